"""The random numbers of the two halves."""

from __future__ import annotations

from typing import Any

import numpy as np

from vla.contracts import Spec
from vla.draws import sampling_noise, training_draws


def draws(chosen: Any, spec: Spec, batch: int, rng: np.random.Generator) -> dict[str, Any]:
    """Slot -> what that half draws."""
    return {slot: training_draws(inner, spec, batch, rng) for slot, inner in chosen.inner.items()}


def noise(chosen: Any, spec: Spec, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Sampling uses the action half alone."""
    return sampling_noise(chosen.inner["actions"], spec, batch, rng)
