"""A model running in JAX for a policy: numpy in, numpy out. Mirror of `torch_kit/runner.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vla.contracts import Observation, Sampling
from vla.errors import SettingsError
from vla.jax_kit.model import VLA, abstract_model, build_model, load_weights, sample, split, weights_of
from vla.params import shapes, table
from vla.store import check_names


class Runner:
    """A model on a device."""

    def __init__(self, model: VLA, variant: Any, device: Any, precision: str = "float32"):
        self.variant, self.device, self.precision = variant, device, precision
        self.graph, params = split(model)
        self.params = jax.device_put(params, device)

    def sample(self, obs: Observation, noise: np.ndarray | None, sampling: Sampling) -> dict[str, np.ndarray]:
        """What `VLA.sample` gives, on the host: {"actions": [B t d]} float32 or {"tokens": [B n]}."""
        obs, noise, sampling = jax.device_put((obs, noise, sampling), self.device)
        dtype = "bfloat16" if self.precision == "bfloat16" else None
        out = sample(self.graph, self.params, obs, noise, sampling, dtype=dtype)
        return {k: np.asarray(v) for k, v in jax.device_get(out).items()}

    def weights(self) -> dict[str, np.ndarray]:
        """Torch name -> float32 array."""
        return weights_of(self.params, self.variant)


def load(
    variant: Any, weights: Mapping[str, np.ndarray] | None, *, device: str | None = None,
    precision: str = "float32", seed: int = 0, source: str = "the weights",
) -> Runner:  # fmt: skip
    """The model of a variant with its weights; fresh ones from `seed` when `weights` is None.

    Names and shapes are compared with the arrays' before anything is built; `source` is for messages.

    Raises:
        StoreError: the weights are not those of this variant.
        SettingsError: no such device.
    """
    where = pick_device(device)
    with jax.default_device(where):
        if weights is None:
            return Runner(build_model(variant, seed), variant, where, precision)
        check_names(shapes(table(variant)), {name: tuple(array.shape) for name, array in weights.items()}, source)
        model = abstract_model(variant)
        load_weights(model, variant, weights)
        return Runner(model, variant, where, precision)


def pick_device(name: str | None) -> Any:
    """The device asked for; by default an accelerator when there is one."""
    if name is None:
        return jax.devices()[0]
    platform, _, index = name.partition(":")
    try:
        return jax.devices("gpu" if platform == "cuda" else platform)[int(index or 0)]
    except (RuntimeError, ValueError, IndexError) as error:
        have = ", ".join(sorted({d.platform for d in jax.devices()}))
        raise SettingsError("JAX finds no such device here", field="device", got=name, expected=have) from error
