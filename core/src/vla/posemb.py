"""Position embeddings that are not learned."""

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
