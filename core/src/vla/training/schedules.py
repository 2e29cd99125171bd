"""Learning rate and averaging as pure functions of the step: openpi's schedules (optax formulas), in Python floats.

`step` counts updates from 0. Both engines ask here, so that they take the same step sizes.
"""

from __future__ import annotations

import math

from vla.training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of update number `step`. `config` must be planned (`config.planned()`)."""
    warmup = config.lr_warmup
    assert warmup is not None and config.lr_decay_steps is not None and config.lr_final is not None
    if step < warmup:  # openpi: linear from peak / (warmup + 1)
        start = config.lr / (warmup + 1)
        return start + (config.lr - start) * step / warmup
    if config.lr_schedule == "constant":
        return config.lr
    if config.lr_schedule == "rsqrt":
        return config.lr / math.sqrt((config.lr_timescale + step - warmup) / config.lr_timescale)
    span = max(1, config.lr_decay_steps - warmup)
    along = min(step - warmup, span) / span
    return config.lr_final + (config.lr - config.lr_final) * 0.5 * (1 + math.cos(math.pi * along))


def ema_decay(config: TrainConfig, step: int) -> float:
    """How much of the average is kept at update number `step`."""
    return min(config.ema_decay, (1 + step) / (10 + step)) if config.ema_warmup else config.ema_decay
