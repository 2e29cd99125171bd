"""LoRA: which linears have adapters, their names and first values, and merging them into the weights.

An adapter of a linear `NAME.weight` is two more weights, the same in both frameworks: `NAME.lora_a` [rank in], normal
numbers of variance 1 / in, and `NAME.lora_b` [out rank], zero, so that training begins at the given weights. The model
computes W x + scale B (A x); W is neither changed nor given a gradient. They are rows of the name table like all other
weights, so optimiser, average, checkpoints and sharding need to know nothing of them.

openpi's own differ: its attention has an A and a B for every head (so more of them at the same rank), its MLP ignores
alpha, its B starts at random. Its checkpoints are merged on import (`vla.interop.openpi_lora`).
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import evolve, frozen

from vla.errors import SettingsError, StoreError
from vla.layout import BACKBONE
from vla.params import Row, cover, shapes, table
from vla.reading import read_json, reading
from vla.training.config import TrainConfig
from vla.training.freezing import under
from vla.training.order import generator

if TYPE_CHECKING:
    from vla.compose import Variant

FOLDER, WEIGHTS, FACTS = "adapter", "adapter.safetensors", "adapter.json"
KIND = "adapter"  # of the folder, in its manifest


# Without `lora.on`: every linear of the LLM core's layers, of every expert; not the modulations, which are small.
LLM_LAYERS = "backbone.llm.layers."


@frozen
class Adapter:
    """The adapter of one linear, or of the same linear in every layer of a stack."""

    linear: Row  # of the weight that it adapts
    rank: int
    scale: float

    @property
    def rows(self) -> tuple[Row, Row]:
        """Rows of A and B."""
        left = self.linear.axes.partition("->")[0]
        out, into = re.findall(r"\([^)]*\)|\S+", left)
        stem, other = self.linear.torch.removesuffix("weight"), self.linear.other.removesuffix("kernel")
        row = evolve(self.linear, sizes={**self.linear.sizes, "rank": self.rank})
        return (
            evolve(row, torch=f"{stem}lora_a", other=f"{other}lora_a", axes=f"rank {into} -> {into} rank"),
            evolve(row, torch=f"{stem}lora_b", other=f"{other}lora_b", axes=f"{out} rank -> rank {out}"),
        )

    def modules(self) -> list[str]:
        """Names of the linears, by layer."""
        return [name.removesuffix(".weight") for name in self.linear.names()]


def adapters_of(variant: Variant | None, config: TrainConfig) -> tuple[Adapter, ...]:
    """The adapters of a run; () without LoRA.

    Raises:
        SettingsError: a pattern matches nothing (what could match is listed), no linear, or some layers of a stack but
            not all; or `freeze` covers a linear that shall have an adapter.
    """
    if config.lora.rank is None:
        return ()
    rows = table(variant)
    linears = [row for row in rows if is_linear(row)]
    chosen = {row.torch for pattern in config.lora.on for row in _matching(pattern, linears, rows, "on")}
    if not config.lora.on:
        chosen = {row.torch for row in linears if row.torch.startswith(LLM_LAYERS) and ".modulation." not in row.torch}
    rank = dict.fromkeys(chosen, config.lora.rank)
    for pattern, other in config.lora.exceptions():
        hit = [row.torch for row in _matching(pattern, linears, rows, "ranks") if row.torch in chosen]
        if not hit:
            raise SettingsError(
                "a rank for linears that have no adapter",
                field="train.lora.ranks",
                got=pattern,
                fix="name them in lora.on too",
            )
        rank |= dict.fromkeys(hit, other)
    found = [
        Adapter(row, rank[row.torch], config.lora.scale(rank[row.torch])) for row in linears if row.torch in chosen
    ]
    _refuse_frozen(found, config)
    return tuple(found)


def is_linear(row: Row) -> bool:
    """Whether a weight is the matrix of a linear."""
    return row.torch.endswith(".weight") and row.other.endswith("/kernel") and len(row.shape(0)) == 2


def frozen_by(adapters: Sequence[Adapter], variant: Variant | None) -> set[str]:
    """Names that are not trained because of the adapters: their linears, in the LLM core also all of their expert."""
    if variant is None or not adapters:
        return set()
    names = shapes(table(variant))
    owners = {BACKBONE, *variant.experts()}

    def expert(name: str) -> str | None:
        if not name.startswith("backbone.llm."):
            return None
        return next((word for word in name.split(".")[2:] if word in owners), BACKBONE)

    linears = {module for adapter in adapters for module in adapter.modules()}
    adapted = {expert(f"{module}.weight") for module in linears} - {None}
    return {name for name in names if name.rpartition(".")[0] in linears or expert(name) in adapted}


def first_values(adapters: Sequence[Adapter], seed: int) -> dict[str, np.ndarray]:
    """A and B at the start, by torch name; each array follows from the seed and its own name."""
    out = {}
    for adapter in adapters:
        for name, shape in shapes(adapter.rows).items():
            rng = generator(seed, "weights", zlib.crc32(name.encode()))
            drawn = name.endswith("lora_a")
            out[name] = rng.standard_normal(shape, np.float32) if drawn else np.zeros(shape, np.float32)
            if drawn:
                out[name] *= np.float32(shape[1] ** -0.5)
    return out


def merged(weights: Mapping[str, np.ndarray], adapters: Sequence[Adapter]) -> dict[str, np.ndarray]:
    """Weights with adapters among them -> those of the plain model: W + scale B A, in float32."""
    out = dict(weights)
    for adapter in adapters:
        for name in adapter.modules():
            a, b = out.pop(f"{name}.lora_a"), out.pop(f"{name}.lora_b")
            base = np.asarray(out[f"{name}.weight"], np.float32)
            out[f"{name}.weight"] = base + np.float32(adapter.scale) * (np.asarray(b) @ np.asarray(a))
    return out


def trained_names(adapters: Sequence[Adapter], variant: Variant, config: TrainConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight that a run trains, from the name tables alone."""
    fixed = frozen_by(adapters, variant)
    free = {n: s for n, s in shapes(table(variant)).items() if n not in fixed and not under(n, config.freeze)}
    return {**free, **shapes(row for adapter in adapters for row in adapter.rows)}


def summary(adapters: Sequence[Adapter], variant: Variant, config: TrainConfig) -> str:
    """One line on what LoRA trains."""

    def size(found: Mapping[str, tuple[int, ...]]) -> int:
        return sum(int(np.prod(shape)) for shape in found.values())

    own = size(shapes(row for adapter in adapters for row in adapter.rows))
    all_ = size(trained_names(adapters, variant, config))
    count = sum(len(adapter.modules()) for adapter in adapters)
    base = size(shapes(table(variant)))
    return f"LoRA on {count} linears: {own:,} parameters in adapters; {all_:,} trained in all, of a model of {base:,}"


# ---- what training changed, kept apart from the merged model ---------------------------------------------------------


def write_adapter(
    folder: Path,
    variant: Variant,
    adapters: Sequence[Adapter],
    weights: Mapping[str, np.ndarray],
    config: TrainConfig,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Write everything that a run trained into a folder that the caller makes whole: adapters and other weights.

    adapter.safetensors   A, B, and every other weight that was trained
    adapter.json          settings of LoRA, digest of the weights that were not trained, which must be the base's; the
                          record of the run, which is that of the merged model
    variant.toml          the model that it belongs to
    """
    from vla.store import VARIANT, check_finite, write_weights

    names = trained_names(adapters, variant, config)
    check_finite(weights, folder / WEIGHTS)
    write_weights(folder / WEIGHTS, {name: weights[name] for name in names})
    fixed = {name: array for name, array in weights.items() if name not in names}
    facts = {"vla_adapter": 1, "lora": config.to_dict()["lora"], "freeze": list(config.freeze), "base": digest(fixed)}
    facts["record"] = dict(record or {})
    (folder / FACTS).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
    (folder / VARIANT).write_text(variant.to_toml())


def merge_adapter(base: str | Path, adapter: str | Path, out: str | Path, *, overwrite: bool = False) -> Path:
    """A model directory from the one that LoRA started from and what training kept: the same weights as `model/`.

    Args:
        base: the model directory that training started from.
        adapter: the folder `adapter/` of the run, or the run.
        out: the model directory to write.
        overwrite: replace a model directory that is there.

    Raises:
        StoreError: a file is damaged, or `base` is not the model that the adapter was trained on.
    """
    from vla.compose import read_variant
    from vla.manifest import verify_folder
    from vla.store import ASSETS, STATS, VARIANT, open_model, read_weights, save_model
    from vla.tokenizer import open_tokenizer
    from vla.training.config import config_from
    from vla.transforms.stats import load_stats

    folder = Path(adapter).expanduser()
    folder = folder / FOLDER if (folder / FOLDER / FACTS).is_file() else folder
    if not (folder / FACTS).is_file():
        fix = "give the folder `adapter` of a training run with LoRA"
        raise StoreError("there is no adapter here", field=str(folder / FACTS), fix=fix)
    verify_folder(folder, (FACTS, VARIANT, WEIGHTS, STATS, ASSETS))
    facts = read_json(folder / FACTS, "the facts of an adapter are damaged")
    with reading("the facts of an adapter are damaged", folder / FACTS):
        config, trained_on = config_from({"lora": facts["lora"], "freeze": facts["freeze"]}), str(facts["base"])
    variant = read_variant(folder / VARIANT)
    adapters = adapters_of(variant, config)
    trained = read_weights(folder / WEIGHTS)
    cover(trained_names(adapters, variant, config), trained, f"{folder / WEIGHTS} does not fit its variant")
    model = open_model(base)
    weights = model.read()
    cover(shapes(table(variant)), weights, f"{base} is not the model that the adapter was trained on")
    fixed = {name: array for name, array in weights.items() if name not in trained}
    if digest(fixed) != trained_on:
        raise StoreError(
            "the adapter was trained on other weights than these",
            field=str(base),
            got=f"digest {digest(fixed)[:16]}...",
            expected=f"{trained_on[:16]}...",
            fix="give the model directory that training started from",
        )
    stats = load_stats(folder / STATS) if (folder / STATS).is_file() else None
    tokenizer = open_tokenizer(variant.parts["tokenizer"], variant.spec, folder / ASSETS)
    run = facts.get("record", {})  # which robot it was trained for: who fine-tunes or serves it compares that
    record = {**(run if isinstance(run, Mapping) else {}), "merged": {"base": model.digest, "lora": facts["lora"]}}
    whole = {n: np.asarray(a, np.float32) for n, a in merged({**fixed, **trained}, adapters).items()}
    return save_model(out, variant, whole, stats, tokenizer, record=record, overwrite=overwrite)


def digest(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names and float32 values: equal for equal weights, whatever dtype they are stored in."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode())
        found.update(np.ascontiguousarray(weights[name], np.float32).data)
    return found.hexdigest()


# ---- inside ----------------------------------------------------------------------------------------------------------


def _hit(pattern: str, name: str) -> bool:
    return under(name, [pattern]) or fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern.rstrip('.')}.*")


def _matching(pattern: str, linears: Sequence[Row], rows: Sequence[Row], field: str) -> list[Row]:
    """The linears that a pattern names."""
    found = []
    for row in linears:
        mine = [_hit(pattern, name) or _hit(pattern, name.removesuffix(".weight")) for name in row.names()]
        if any(mine) and not all(mine):
            raise SettingsError(
                "adapters are on all layers of a stack or on none",
                field=f"train.lora.{field}",
                got=pattern,
                fix=f"write * for the number of the layer: {row.torch.replace('{l}', '*').removesuffix('.weight')}",
            )
        if all(mine):
            found.append(row)
    if found:
        return found
    possible = ", ".join(row.torch.replace("{l}", "*").removesuffix(".weight") for row in linears)
    others = [row.torch for row in rows if any(_hit(pattern, name) for name in row.names())]
    what = f"{others[0].replace('{l}', '*')} is not a linear" if others else "no linear has this name"
    raise SettingsError(f"LoRA adapts linears: {what}", field=f"train.lora.{field}", got=pattern, expected=possible)


def _refuse_frozen(adapters: Sequence[Adapter], config: TrainConfig) -> None:
    for prefix in config.freeze:
        for adapter in adapters:
            names = [*adapter.linear.names(), *(name for row in adapter.rows for name in row.names())]
            if any(under(name, [prefix]) for name in names):
                raise SettingsError(
                    "these weights shall be frozen and have adapters that train",
                    field="train.freeze",
                    got=f"{prefix} covers {adapter.linear.torch.replace('{l}', '*')}",
                    fix="take it out of --freeze (LoRA freezes what it adapts), or out of --lora.on",
                )
