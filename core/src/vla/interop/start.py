"""Weights to start training from: fresh ones of a variant, with those of a known checkpoint in their place.

`vla build --init paligemma:PATH` uses this; a source is a name and a function (path, variant) -> `Start`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla.errors import SettingsError, VlaError

if TYPE_CHECKING:
    import numpy as np

    from vla.interop.paligemma import Start

SOURCES = {
    "paligemma": "vla.interop.paligemma:read_paligemma",
    "transformers": "vla.interop.transformers:read_transformers",
}


def starting_weights(variant: Any, init: str, seed: int = 0) -> tuple[dict[str, np.ndarray], Start]:
    """All weights of a variant, {our name: array}, and what came from where.

    Args:
        variant: a `vla.compose.Variant`.
        init: "paligemma:PATH" or "transformers:PATH".
        seed: of the fresh weights.

    Raises:
        SettingsError: `init` names no known source.
        StoreError: the source does not fit the variant.
    """
    from vla.compose import load_object

    source, colon, path = init.partition(":")
    if not colon or not path or source not in SOURCES:
        raise SettingsError(
            "unknown starting weights",
            field="--init",
            got=init,
            expected=" or ".join(["a model directory", *(f"{name}:PATH" for name in SOURCES)]),
            fix="e.g. --init paligemma:path/to/paligemma-3b-pt-224 (a folder of transformers, or big_vision's .npz)",
        )
    start = load_object(SOURCES[source])(Path(path).expanduser(), variant)  # before the fresh weights: it may refuse
    return start.fill(fresh_weights(variant, seed)), start


def fresh_weights(variant: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Newly initialised float32 weights under our names; by PyTorch if it is installed, else by JAX.

    Raises:
        VlaError: no framework in which every part of the variant runs is installed.
    """
    from importlib.util import find_spec

    needs = {"jax": ("jax", "flax")}
    runs = [f for f in variant.frameworks() if all(find_spec(module) is not None for module in needs.get(f, (f,)))]
    if not runs:
        raise VlaError(
            "making new weights needs a framework in which every part runs",
            got=f"the parts run in {', '.join(variant.frameworks()) or 'none in common'}; none of these is installed",
            fix="pip install torch, or pip install 'vla-core[jax]'",
        )
    if runs[0] == "torch":
        import torch

        from vla.torch_kit.model import build_model

        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
            torch.manual_seed(seed)
            model = build_model(variant)
        return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    return _fresh_in_jax(variant, seed)


def _fresh_in_jax(variant: Any, seed: int) -> dict[str, np.ndarray]:
    from vla.jax_kit.model import build_model, split, weights_of

    return weights_of(split(build_model(variant, seed))[1], variant)
