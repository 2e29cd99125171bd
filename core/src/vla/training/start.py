"""What training starts from: a variant alone, a trained model, or a trained model with settings changed.

Weights that exist stay as they are wherever their shape allows it (`vla.refit`); where each comes from is kept in the
record of the run, and those that no run has trained are not frozen unasked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve, field, frozen

from vla.compose import VARIANT_FILE, Variant, load_object, read_variant
from vla.errors import SettingsError, StoreError, VlaError
from vla.params import shapes, table
from vla.refit import Origin, groups, refit, untrained_names
from vla.runs import find_model, is_checkpoint
from vla.store import ASSETS, WEIGHTS, ModelDir, open_model
from vla.tokenizer import Tokenizer, open_tokenizer
from vla.training.config import TrainConfig, TrainingError
from vla.training.freezing import frozen_names
from vla.training.lora import adapters_of, frozen_by


@frozen
class Changed:
    """A trained model that becomes another variant: `reinit` names the weights to make anew (`vla.refit.refit`)."""

    base: str | Path
    variant: Variant
    reinit: tuple[str, ...] = ()


@frozen
class Start:
    """What training starts from."""

    variant: Variant
    weights: Mapping[str, np.ndarray] | None = None  # None: fresh ones, by the engine
    stats: Any = None
    tokenizer: Any = None
    origin: Origin = field(factory=Origin)
    was: Variant | None = None  # the variant that the weights were trained as
    record: Mapping[str, Any] = field(factory=dict)  # of the model


def open_start(model: Any, seed: int = 0) -> Start:
    """Open what training starts from.

    Args:
        model: a `Variant`, the path of a variant file, of a folder with one, of a model directory or of a run; or
            `Changed`.
        seed: of weights that are made anew.

    Raises:
        StoreError: there is no model, or it is damaged.
        SettingsError: weights that a change would need are not to be made anew.
    """
    if isinstance(model, Changed):
        opened = open_model(model.base, tokenizer=False)
        return _changed(opened, model.variant, model.reinit, seed)
    if isinstance(model, Variant):
        return _fresh(model, seed)
    path = find_model(model)
    if is_trained(path):
        opened = open_model(path, tokenizer=False)
        return _changed(opened, opened.variant, (), seed)
    if path.is_dir() and (path / VARIANT_FILE).is_file():
        return _fresh(read_variant(path / VARIANT_FILE), seed)
    if path.is_file():
        return _fresh(read_variant(path), seed)
    fix = "give a variant file or a model directory: vla build ... --out DIR, or --type pi05_ki --preset tiny"
    raise StoreError("there is no model here", field="model", got=str(model), fix=fix)


def start_from(variant: Variant, init: str, reinit: tuple[str, ...] = (), seed: int = 0) -> Start:
    """A variant with weights of another model, or of a known checkpoint; the rest new.

    Args:
        init: a model directory or run, or "paligemma:PATH".
        reinit: weights of the model to make anew.
        seed: of the new weights.

    Raises:
        SettingsError: `init` names no known source, or weights do not fit and are not in `reinit`.
        StoreError: the source is damaged, or does not fit the variant.
    """
    from vla.interop.start import starting_weights

    if not is_trained(find_model(init)):
        if reinit:
            raise SettingsError("only weights of a model can be made anew", field="--reinit", got=",".join(reinit))
        weights, found = starting_weights(variant, init, seed)
        origin = Origin(init, "", seed, len(found.weights), new=found.new, unused=found.unused, untrained=found.new)
        return Start(variant, weights, origin=origin)
    opened = open_model(init, tokenizer=False)
    start = _changed(opened, variant, reinit, seed)
    same = opened.variant.parts["robot"].table() == variant.parts["robot"].table()
    record = {key: opened.record[key] for key in ("embodiment",) if key in opened.record}
    return evolve(start, stats=opened.stats if same else None, record=record)


def base_of(model: Any) -> str:
    """The full path of the model whose weights training starts from; "": there is none."""
    if isinstance(model, Variant):
        return ""
    path = find_model(model.base if isinstance(model, Changed) else model)
    return str(path.absolute()) if is_trained(path) else ""


def is_trained(path: Path) -> bool:
    """Whether a path, as `vla.runs.find_model` gives it, has weights."""
    return is_checkpoint(path) or (path.is_dir() and (path / WEIGHTS).is_file())


def variant_of(model: Any) -> Variant:
    """The variant of what training starts from, without its weights."""
    if isinstance(model, Changed):
        return model.variant
    return model if isinstance(model, Variant) else read_variant(model)


def check_untrained(origin: Origin, config: TrainConfig, variant: Variant, allow: bool = False) -> Origin:
    """The origin of the weights that a run leaves behind: what it trains is no longer untrained.

    Raises:
        TrainingError: weights that no run has trained would stay as they were drawn, and that is not allowed.
    """
    if not origin.untrained or not (config.freeze or config.lora.rank):
        return evolve(origin, untrained=())
    still = frozen_names(shapes(table(variant)), config.freeze) if config.freeze else set()
    still |= frozen_by(adapters_of(variant, config), variant)
    left = sorted(still & origin.untrained)
    if left and not allow:
        names = groups(left)
        raise TrainingError(
            "weights that were never trained would stay as they were drawn",
            field="train.lora" if config.lora.rank else "train.freeze",
            got=", ".join(names[:6]) + (f", ... ({len(names)})" if len(names) > 6 else ""),
            fix="start from a trained model (vla train MODEL ...), train these weights too, or add --yes-random",
        )
    return evolve(origin, untrained=left)


def tokenizer_of(base: ModelDir, variant: Variant) -> Any:
    """The base's tokenizer under the settings of the variant; None: it has none, or one of another kind."""
    assets = base.folder / ASSETS
    if not assets.is_dir():
        return None
    old, new = base.variant.parts["tokenizer"], variant.parts["tokenizer"]
    same = [p.part.name for _, p in old.walk("")] == [p.part.name for _, p in new.walk("")]
    text = (old.inner.get("text", old).table(), new.inner.get("text", new).table())
    if not same or any({**t, "prompt": ""} != {**text[0], "prompt": ""} for t in text):
        return None
    return open_tokenizer(new, variant.spec, assets)


def with_codec_for(tokenizer: Any, variant: Variant, dims: int, note: Callable[[str], None]) -> Any:
    """The tokenizer, with a new codec where the learned one serves no chunks of this horizon and these dims."""
    if tokenizer.codec is None or not tokenizer.fitted:
        return tokenizer
    horizon = variant.spec.action_horizon
    try:
        tokenizer.codec.total(horizon, min(dims, variant.spec.action_dim))
        return tokenizer
    except VlaError as error:
        chosen = variant.parts["tokenizer"]
        note(f"the {chosen.part.name} tokenizer of the model is of other chunks than [{horizon} {dims}]: {error.what}")
        codec = load_object(chosen.part.numpy, f"tokenizer {chosen.part.name!r}")(chosen.settings)
        return Tokenizer(tokenizer.text, codec, tokenizer.prompt.name, tokenizer.id_map, tokenizer.max_len)


def _fresh(variant: Variant, seed: int) -> Start:
    return Start(variant, origin=Origin(seed=seed, untrained=shapes(table(variant))))


def _changed(opened: ModelDir, variant: Variant, reinit: tuple[str, ...], seed: int) -> Start:
    from vla.interop.start import fresh_weights

    weights = opened.read()
    untrained = untrained_names(opened.record, weights)
    origin = Origin(str(opened.folder.absolute()), opened.digest, seed, len(weights), untrained=untrained)
    if variant is opened.variant and not reinit:
        origin = evolve(origin, seed=None)
    else:
        weights, origin = refit(opened.variant, variant, weights, lambda: fresh_weights(variant, seed), origin, reinit)
    tokenizer = tokenizer_of(opened, variant)
    return Start(variant, weights, opened.stats, tokenizer, origin, opened.variant, opened.record)
