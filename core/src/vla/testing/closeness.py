"""How tests compare floats: by the largest difference, as a share of the largest magnitude.

Another processor adds in another order, so no computed float is the same everywhere; and what is a small difference is
known only beside the size of the values. Equal bits are asked for where one program runs twice on one machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def relative(got: Any, want: Any, floor: float = 0.0) -> float:
    """Largest difference over the largest magnitude (at least `floor`); infinite when shapes differ."""
    got, want = _array(got), _array(want)
    if got.shape != want.shape:
        return float("inf")
    if not got.size or np.array_equal(got, want):
        return 0.0
    return float(np.abs(got - want).max() / max(np.abs(want).max(), floor, np.finfo(np.float64).tiny))


def close(got: Any, want: Any, bound: float, what: str = "the array", scale: float = 0.0) -> None:
    """Assert that `got` is `want` within `bound`, relative to the largest magnitude in `want`.

    Args:
        got: an array, tensor or number.
        want: the reference, of the same shape (or a number: the same everywhere).
        bound: the largest difference allowed, as a share of the scale; a NaN on one side is never close.
        what: what is compared, for the message.
        scale: the least scale: of what the values were computed from, where they may be zero themselves.
    """
    got, want = _array(got), _array(want)
    if not want.ndim:
        want = np.broadcast_to(want, got.shape)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    error = relative(got, want, scale)
    assert error <= bound, f"{what} differs by {error:.2e} of the largest magnitude, allowed are {bound:.0e}"


def _array(x: Any) -> np.ndarray:
    return np.asarray(x.detach() if hasattr(x, "detach") else x, np.float64)
