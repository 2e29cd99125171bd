"""The random numbers of token decoding, drawn once in numpy for both frameworks."""

from __future__ import annotations

from typing import Any

import numpy as np

from vla.contracts import Spec


def draws(chosen: Any, spec: Spec, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Nothing is random in next-token training."""
    return {}


def noise(chosen: Any, spec: Spec, batch: int, rng: np.random.Generator) -> np.ndarray:
    """One uniform number per row and decoded token [b max_decode]; used only at a temperature above zero."""
    return rng.random((batch, chosen.settings.max_decode), dtype=np.float32)
