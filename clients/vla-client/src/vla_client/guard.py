"""The last look at an action before a motor gets it: finite, within limits, no jump. Every intervention is counted."""

from __future__ import annotations

from typing import Any

import numpy as np


class Guard:
    """Checks in this order: finite, absolute limits, change per tick, change of that change per tick.

    What is out of limits is moved to the limit; what is not finite is not executed at all. After `patience` ticks in a
    row with an intervention the guard is `stalled`, and stays so until `reset`: the robot should not be moved by it.

    Args:
        low, high: limits of the actions [a], or numbers; None: none.
        max_step: greatest change of each value from one tick to the next, [a] or a number (a velocity limit, for
            positions: v / hz); None: any.
        max_bend: greatest change of that change (an acceleration limit: a / hz^2); None: any.
        patience: ticks in a row.
    """

    def __init__(
        self,
        low: Any = None,
        high: Any = None,
        max_step: Any = None,
        max_bend: Any = None,
        patience: int = 3,
    ):
        self.low, self.high = _limit(low, "low"), _limit(high, "high")
        self.max_step, self.max_bend = _limit(max_step, "max_step"), _limit(max_bend, "max_bend")
        if self.low is not None and self.high is not None and not np.all(self.low <= self.high):
            raise ValueError("Guard: low is above high")
        for name in ("max_step", "max_bend"):
            value = getattr(self, name)
            if value is not None and not np.all(value > 0):
                raise ValueError(f"Guard: {name} is not positive")
        if patience < 1:
            raise ValueError("Guard: patience is at least 1")
        self.patience = patience
        self.reset()

    def reset(self) -> None:
        """Forget what was executed, and go on after a stall."""
        self.counts: dict[str, int] = {"non_finite": 0, "limit": 0, "step": 0, "bend": 0}
        self.in_a_row = 0
        self.stalled = False
        self._last: np.ndarray | None = None
        self._before: np.ndarray | None = None

    def check(self, action: Any) -> np.ndarray | None:
        """What may be executed instead of `action` [a]; None: nothing of it."""
        wanted = np.asarray(action, np.float64)
        if self._last is not None and wanted.shape != self._last.shape:
            raise ValueError(f"Guard: an action of shape {wanted.shape} after one of {self._last.shape}")
        if not np.isfinite(wanted).all():
            self._violated("non_finite")
            self.in_a_row += 1
            self.stalled = self.stalled or self.in_a_row >= self.patience
            return None
        allowed, bad = wanted, False
        if self.max_step is not None and self._last is not None:
            allowed = self._clip("step", allowed, self._last - self.max_step, self._last + self.max_step)
        if self.max_bend is not None and self._last is not None and self._before is not None:
            straight = 2 * self._last - self._before
            allowed = self._clip("bend", allowed, straight - self.max_bend, straight + self.max_bend)
        low = -np.inf if self.low is None else self.low
        high = np.inf if self.high is None else self.high
        allowed = self._clip("limit", allowed, low, high)  # last: nothing that came before may lead out of the limits
        bad = not np.array_equal(allowed, wanted)
        self.in_a_row = self.in_a_row + 1 if bad else 0
        self.stalled = self.stalled or self.in_a_row >= self.patience
        return allowed

    def executed(self, action: Any) -> None:
        """Tell what the robot was sent, whoever chose it: the next step is measured from there."""
        self._before, self._last = self._last, np.array(action, np.float64)

    def _clip(self, name: str, action: np.ndarray, low: Any, high: Any) -> np.ndarray:
        moved = np.clip(action, low, high)
        if not np.array_equal(moved, action):
            self._violated(name)
        return moved

    def _violated(self, name: str) -> None:
        self.counts[name] += 1


def _limit(value: Any, name: str) -> np.ndarray | None:
    if value is None:
        return None
    limit = np.asarray(value, np.float64)
    if np.isnan(limit).any():
        raise ValueError(f"Guard: {name} has NaN")
    return limit
