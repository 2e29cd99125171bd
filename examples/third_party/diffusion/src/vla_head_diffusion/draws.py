"""The random numbers of diffusion, drawn once in numpy for both frameworks."""

from __future__ import annotations

from typing import Any

import numpy as np

from vla import Spec


def draws(chosen: Any, spec: Spec, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Noise [b t d] ~ N(0, I), and the step [b] of each row."""
    noise_ = rng.standard_normal((batch, spec.action_horizon, spec.action_dim), dtype=np.float32)
    return {"noise": noise_, "step": rng.integers(0, chosen.settings.train_steps, batch, dtype=np.int32)}


def noise(chosen: Any, spec: Spec, batch: int, rng: np.random.Generator) -> np.ndarray:
    """The noise [b t d] that sampling starts from."""
    return rng.standard_normal((batch, spec.action_horizon, spec.action_dim), dtype=np.float32)
