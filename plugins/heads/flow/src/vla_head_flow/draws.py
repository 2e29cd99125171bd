"""The random numbers of flow matching, drawn once in numpy for both frameworks."""

from __future__ import annotations

from typing import Any

import numpy as np

from vla.contracts import Spec


def draws(chosen: Any, spec: Spec, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Noise [b k t d] ~ N(0, I) and time [b k] ~ Beta(1.5, 1) * 0.999 + 0.001 (openpi), k = settings.draws."""
    s = chosen.settings
    noise = rng.standard_normal((batch, s.draws, spec.action_horizon, spec.action_dim), dtype=np.float32)
    time = rng.beta(s.time_alpha, s.time_beta, (batch, s.draws)) * s.time_scale + s.time_offset
    return {"noise": noise, "time": time.astype(np.float32)}


def noise(chosen: Any, spec: Spec, batch: int, rng: np.random.Generator) -> np.ndarray:
    """The noise [b t d] that sampling starts from."""
    return rng.standard_normal((batch, spec.action_horizon, spec.action_dim), dtype=np.float32)
