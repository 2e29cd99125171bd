"""openpi's checkpoints as they are on disk: an orbax tree and normalisation statistics.

    <checkpoint>/params/         the weights (training writes <dir>/<step>/params/)
    <checkpoint>/assets/<id>/norm_stats.json

The type of the model and every size that a shape shows come from the tree; what no shape shows (the horizon, the
length of the prompt) comes from the type or from `set`. Names and axes are in the parts' own tables (`openpi` in
their params.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen

from vla.errors import StoreError
from vla.interop.openpi_lora import merge_leaves
from vla.interop.orbax import is_item, read_item
from vla.params import cover, other_shapes, shapes, table, to_torch

IMG, LLM = "PaliGemma/img/", "PaliGemma/llm/"
BLOCK = IMG + "Transformer/encoderblock/"
# A leaf that tells the type; asked in this order.
MARKS = (("state_proj/kernel", "pi0"), ("time_mlp_in/kernel", "pi05"), (LLM + "final_norm/scale", "pi0_fast"))


@frozen
class Checkpoint:
    """An openpi checkpoint, found and opened; no array is read yet."""

    params: Path
    leaves: Mapping[str, Any]  # path below `params` -> lazy array, LoRA merged
    ranks: tuple[int, ...] = ()  # of the LoRA weights that were merged; (): it has none

    @property
    def type(self) -> str:
        """The openpi model these weights are of: pi0, pi05 or pi0_fast."""
        for leaf, name in MARKS:
            if leaf in self.leaves:
                return name
        raise StoreError(
            "these are not the weights of an openpi policy",
            field=str(self.params),
            got=f"{len(self.leaves)} arrays: {', '.join(sorted(self.leaves)[:4])}, ...",
            expected=" or ".join(f"{leaf} ({name})" for leaf, name in MARKS),
        )


def import_openpi(
    path: str | Path,
    type: str | None = None,
    spec: Mapping[str, Any] | None = None,
    set: Iterable[str] = (),
    lora_alpha: float | None = None,
    lora_rslora: bool = False,
) -> tuple[Any, dict[str, np.ndarray]]:
    """An openpi checkpoint as (variant, {our weight name: array}); dtypes as stored, with LoRA merged float32.

    Args:
        path: the checkpoint, a training run's folder (its last step is taken), a step, or `params/` itself.
        type: model type to build; default: openpi's own, told from the tree.
        spec: shapes that no weight shows: `action_horizon`, `max_token_len`, `cameras`, for pi0_fast `action_dim`, ...
        set: further settings, as `vla build --set`; they win.
        lora_alpha, lora_rslora: as `open_checkpoint`.

    Raises:
        StoreError: not an openpi checkpoint, or tensors that are missing, unknown or of a wrong shape (all are listed).
    """
    checkpoint = open_checkpoint(path, lora_alpha, lora_rslora)
    variant = variant_of(checkpoint, type, spec or {}, set)
    return variant, convert(checkpoint, variant)


def open_checkpoint(path: str | Path, lora_alpha: float | None = None, lora_rslora: bool = False) -> Checkpoint:
    """Find the weights of a checkpoint and open them. LoRA weights are merged into those they belong to.

    Args:
        path: as `import_openpi`.
        lora_alpha: alpha of LoRA, which no weight shows; None: the rank, as in all of openpi's variants.
        lora_rslora: whether LoRA was scaled by alpha / sqrt(rank) (no variant of openpi is).

    Raises:
        StoreError: no orbax tree there, a damaged one, or one whose LoRA weights do not fit.
    """
    folder = _params_folder(Path(path).expanduser())
    found = read_item(folder)
    leaves = {p.removeprefix("params/"): leaf for p, leaf in found.items() if p.startswith("params/")}
    if not leaves or len(leaves) < len(found):
        raise StoreError(
            "this is an orbax tree, but not openpi's `params`",
            field=str(folder),
            got=sorted({p.split("/")[0] for p in found}),
            expected=["params"],
            fix="give the folder that holds `params/` (not `train_state/`)",
        )
    if all(p.endswith("/value") for p in leaves):  # written by openpi's training loop: nnx.State
        leaves = {p.removesuffix("/value"): leaf for p, leaf in leaves.items()}
    leaves, ranks = merge_leaves(leaves, str(folder), lora_alpha, lora_rslora)
    return Checkpoint(folder, leaves, ranks)


def variant_of(checkpoint: Checkpoint, type: str | None, spec: Mapping[str, Any], set: Iterable[str]) -> Any:
    """The variant these weights are of: parts by type, sizes by shapes; `spec` and `set` win."""
    from vla.compose import build
    from vla.settings import parse_sets

    name = type or checkpoint.type
    head = next((path for path, chosen in build(type=name).walk() if chosen.part.name == "flow"), None)
    seen = {**sizes(checkpoint, head), **{f"spec.{key}": value for key, value in spec.items()}}
    return build(type=name, set={**seen, **parse_sets(set)})


def sizes(checkpoint: Checkpoint, head: str | None) -> dict[str, Any]:
    """Settings that the shapes show: {"backbone.vision.width": 1152, ...}; `head` is the slot of the flow head."""
    shape = {path: leaf.shape for path, leaf in checkpoint.leaves.items()}

    def of(path: str, rank: int) -> tuple[int, ...]:
        if len(shape.get(path, ())) != rank:
            raise StoreError(
                "a weight that tells the model's size is missing or has the wrong rank",
                field=path,
                got=shape.get(path, "missing"),
                expected=f"{rank} axes",
                fix="the checkpoint is incomplete, or not openpi's",
            )
        return shape[path]

    patch, _, _, vision_width = of(IMG + "embedding/kernel", 4)
    depth, _, heads, _ = of(BLOCK + "MultiHeadDotProductAttention_0/query/kernel", 4)
    side = math.isqrt(of(IMG + "pos_embedding", 3)[1]) * patch
    llm_depth, llm_heads, llm_width, head_dim = of(LLM + "layers/attn/q_einsum/w", 4)
    packed = LLM + "layers/attn/qkv_einsum/w" in shape
    out: dict[str, Any] = {
        "spec.image_size": (side, side),
        "backbone.vision.width": vision_width,
        "backbone.vision.depth": depth,
        "backbone.vision.mlp_dim": of(BLOCK + "MlpBlock_0/Dense_0/kernel", 3)[2],
        "backbone.vision.num_heads": heads,
        "backbone.vision.patch_size": patch,
        "backbone.llm.width": llm_width,
        "backbone.llm.depth": llm_depth,
        "backbone.llm.mlp_dim": of(LLM + "layers/mlp/linear", 3)[1],
        "backbone.llm.num_heads": llm_heads,
        "backbone.llm.num_kv_heads": llm_heads if packed else of(LLM + "layers/attn/kv_einsum/w", 5)[2],
        "backbone.llm.head_dim": head_dim,
        "backbone.llm.vocab_size": of(LLM + "embedder/input_embedding", 2)[0],
    }
    if "action_in_proj/kernel" in shape:
        action_dim, width = of("action_in_proj/kernel", 2)
        out["spec.action_dim"] = action_dim
        # pi05 has no weight for the state; openpi pads it to the width of the actions
        out["spec.state_dim"] = of("state_proj/kernel", 2)[0] if "state_proj/kernel" in shape else action_dim
        if head is not None:
            out[f"{head}.width"] = width
            out[f"{head}.mlp_dim"] = of(LLM + "layers/mlp_1/linear", 3)[1]
    return out


def convert(checkpoint: Checkpoint, variant: Any) -> dict[str, np.ndarray]:
    """Read every array under our names. All names and shapes are checked before the first is read."""
    rows = table(variant, "openpi")
    fix = f"the tree looks like {checkpoint.type}; check --type and --set, or the checkpoint is incomplete"
    cover(other_shapes(rows), checkpoint.leaves, f"{checkpoint.params} does not fit {variant.name}", fix)
    cover(shapes(table(variant)), shapes(rows), "openpi has no weights for some parts of this variant", fix)
    return to_torch(rows, checkpoint.leaves)


def find_stats(path: str | Path, asset_id: str | None = None) -> Path | None:
    """The `norm_stats.json` beside the weights, or None.

    Raises:
        StoreError: several and no `asset_id`, or none of that name.
    """
    assets = _params_folder(Path(path).expanduser()).parent / "assets"
    found = {f.parent.relative_to(assets).as_posix(): f for f in sorted(assets.rglob("norm_stats.json"))}
    if asset_id is not None and asset_id not in found:
        raise StoreError("no such normalisation statistics", field=str(assets), got=asset_id, expected=sorted(found))
    if asset_id is None and len(found) > 1:
        raise StoreError(
            "the checkpoint has statistics of several robots",
            field=str(assets),
            got=sorted(found),
            fix="choose with --asset-id",
        )
    return found[asset_id] if asset_id is not None else next(iter(found.values()), None)


def _params_folder(path: Path) -> Path:
    if not path.is_dir():
        raise StoreError("no such folder", field=str(path), fix="give the folder of an openpi checkpoint")
    steps = sorted((p for p in path.iterdir() if p.name.isdigit()), key=lambda p: int(p.name), reverse=True)
    for folder in (path, path / "params", *(step / "params" for step in steps)):
        if is_item(folder):
            return folder
    raise StoreError(
        "no openpi checkpoint here",
        field=str(path),
        got=sorted(p.name for p in path.iterdir())[:8],
        expected="params/_METADATA, or <step>/params/_METADATA",
        fix="give the folder that holds `params/`; a compressed or half-copied checkpoint cannot be read",
    )
