"""Statistics as LeRobot stores them: min, max, mean, std, count, q01, q10, q50, q90, q99 per feature.

Quantiles are exact: over all frames, and for images over the counts of all 256 values (LeRobot itself samples frames
and merges episode quantiles approximately). Images are in [0, 1], per channel, shaped [3][1][1].
"""

from __future__ import annotations

from typing import Any

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
STATS = ("min", "max", "mean", "std", "count", *QUANTILES)


def of_numbers(values: np.ndarray) -> dict[str, Any]:
    """Statistics over the rows of [n d]."""
    values = np.asarray(values, np.float64)
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
    return {
        "min": values.min(0).tolist(),
        "max": values.max(0).tolist(),
        "mean": values.mean(0).tolist(),
        "std": values.std(0).tolist(),
        "count": [len(values)],
        **{name: q.tolist() for name, q in zip(QUANTILES, quantiles, strict=True)},
    }


def histogram(image: np.ndarray) -> np.ndarray:
    """How often each value occurs in each channel of uint8 [h w 3]: int64 [3 256]."""
    return np.stack([np.bincount(image[..., c].ravel(), minlength=256) for c in range(3)])


def of_histogram(counts: np.ndarray, frames: int) -> dict[str, Any]:
    """Statistics of images from the counts of their values, [3 256]."""
    levels = np.arange(256) / 255
    total = counts.sum(1)
    mean = counts @ levels / total
    spread = np.sqrt(np.maximum((counts * (levels - mean[:, None]) ** 2).sum(1) / total, 0))
    cumulative = np.cumsum(counts, 1)

    def value(rank: np.ndarray) -> np.ndarray:  # of the pixel with this rank, per channel
        return np.array([levels[np.searchsorted(c, r, side="right")] for c, r in zip(cumulative, rank, strict=True)])

    def level(q: float) -> np.ndarray:  # between the two pixels that numpy.quantile takes
        place = q * (total - 1)
        low, part = np.floor(place), place - np.floor(place)
        return value(low) * (1 - part) + value(np.minimum(low + 1, total - 1)) * part

    def shaped(values: np.ndarray) -> list[list[list[float]]]:
        return [[[float(v)]] for v in values]

    return {
        "min": shaped(level(0.0)),
        "max": shaped(level(1.0)),
        "mean": shaped(mean),
        "std": shaped(spread),
        "count": [frames],
        **{name: shaped(level(q)) for name, q in QUANTILES.items()},
    }
