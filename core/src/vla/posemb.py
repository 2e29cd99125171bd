"""Position embeddings: fixed ones, and learned ones on another grid."""

from __future__ import annotations

import numpy as np


def sincos_2d(rows: int, cols: int, width: int) -> np.ndarray:
    """Fixed 2-d sine-cosine position embedding [1 P D] (MoCo v3, as in big_vision): sin x, cos x, sin y, cos y.

    P = rows * cols, row-major; width is a multiple of 4 from 8; float32.
    """
    y, x = np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij")
    omega = 1 / 10_000 ** (np.arange(width // 4) / (width // 4 - 1))
    y, x = (side.flatten()[:, None] * omega for side in (y, x))
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], 1)[None].astype(np.float32)


def resample_2d(grid: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """A grid [h w D] as [rows columns D]: linear in both directions, corners kept (as big_vision resamples its own)."""
    for axis, size in ((0, rows), (1, columns)):
        at = np.linspace(0, grid.shape[axis] - 1, size)
        low = np.floor(at).astype(np.int64)
        high = np.minimum(low + 1, grid.shape[axis] - 1)
        share = (at - low).reshape([-1 if i == axis else 1 for i in range(3)])
        grid = np.take(grid, low, axis) * (1 - share) + np.take(grid, high, axis) * share
    return grid
