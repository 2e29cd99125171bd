"""Frames that cannot be used: one clear error, or within a budget reported, counted and replaced.

What stands in for a bad frame is a pure function of seed, step and row, like the order itself (`vla.training.order`):
a resumed run and both frameworks see the same samples. What is counted are frames, not how often they were drawn, in
the order of the steps, and the count goes on when a run is resumed.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from vla.errors import DataError

OPTION = "--skip-bad"
TRIES = 32  # stand-ins for one frame; when they are bad too, it is not this frame


def unusable(error: DataError, index: int, frames: int) -> DataError:
    """The error of a frame that cannot be used, with the way to train on without it."""
    return DataError(
        error.what, field=f"{error.field or 'sample'} (frame {index} of the data)", got=error.got,
        expected=error.expected,
        fix="; ".join(filter(None, [error.fix, f"or let other frames stand in: {OPTION} {budget_for(1, frames)}"])),
    )  # fmt: skip


def over_budget(bad: Collection[int], error: DataError, budget: float, frames: int) -> DataError:
    """The error when more frames are bad than the budget allows; `error` is that of the last."""
    more = ", ..." if len(bad) > 10 else ""
    return DataError(
        f"too many frames of the data cannot be used; the last: {error.what}", field=error.field,
        got=f"{len(bad)} of {frames} frames: {', '.join(map(str, sorted(bad)[:10]))}{more}",
        expected=f"at most {allowed(budget, frames)} ({OPTION} {budget:g})",
        fix=f"repair the data, or leave these episodes out, or {OPTION} {budget_for(len(bad), frames)}",
    )  # fmt: skip


def allowed(budget: float, frames: int) -> int:
    """How many frames may be bad: one at least, unless the budget is 0."""
    return max(math.floor(budget * frames * (1 + 1e-9)), int(budget > 0))


def budget_for(count: int, frames: int) -> str:
    """A share of the frames, with one digit, that allows so many bad ones; 0.001 or more."""
    if count == 1:
        return "0.001"
    for digits in range(3, -1, -1):
        share = math.ceil(count / frames * 10**digits - 1e-9) / 10**digits
        if share <= 10 * 10**-digits or digits == 0:
            return f"{min(max(share, 0.001), 0.99):g}"
    return "0.99"
