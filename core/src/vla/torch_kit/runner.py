"""A model running in PyTorch for a policy: numpy in, numpy out. `jax_kit/runner.py` mirrors this file."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from vla.contracts import Observation, Sampling
from vla.errors import SettingsError
from vla.params import shapes, table
from vla.store import check_names
from vla.torch_kit.model import VLA, build_model, load_weights, observation_to, sampling_to, weights_of


class Runner:
    """A model on a device."""

    def __init__(self, model: VLA, variant: Any, device: torch.device, precision: str = "float32"):
        self.model, self.variant = model.to(device).eval(), variant
        self.device, self.precision = device, precision

    def sample(self, obs: Observation, noise: np.ndarray | None, sampling: Sampling) -> dict[str, np.ndarray]:
        """What `VLA.sample` gives, on the host: {"actions": [B t d]} float32 or {"tokens": [B n]}."""
        start = None if noise is None else torch.as_tensor(noise, device=self.device)
        low = self.precision == "bfloat16"
        guided = sampling.prefix is not None and sampling.prefix.mode == "guided"  # needs a gradient
        quiet = torch.no_grad() if guided else torch.inference_mode()
        with quiet, torch.autocast(self.device.type, torch.bfloat16) if low else nullcontext():
            out = self.model.sample(observation_to(obs, self.device), start, sampling_to(sampling, self.device))
        return {k: (v.float() if v.is_floating_point() else v).cpu().numpy() for k, v in out.items()}

    def weights(self) -> dict[str, np.ndarray]:
        """Torch name -> float32 array."""
        return weights_of(self.model, self.variant)


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
    if weights is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Runner(build_model(variant).float(), variant, where, precision)
    check_names(shapes(table(variant)), {name: tuple(array.shape) for name, array in weights.items()}, source)
    with _Undrawn():
        model = build_model(variant).float()
    load_weights(model, variant, weights)
    return Runner(model, variant, where, precision)


class _Undrawn(TorchFunctionMode):
    """Random initialisation does nothing in this block: the weights are overwritten, and drawing takes long."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0]
        return function(*args, **(kwargs or {}))


def pick_device(name: str | None) -> torch.device:
    """The device asked for; by default an accelerator when there is one."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError("unknown device", field="device", got=name, expected="cpu, cuda, cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError("PyTorch finds no CUDA device here", field="device", got=name, fix="use device cpu")
    return device
