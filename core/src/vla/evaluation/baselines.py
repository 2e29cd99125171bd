"""Policies that have learned nothing worth the name: what a trained policy has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla.errors import DataError


class MeanAction:
    """Always the mean action of the demonstrations, whatever it sees."""

    name = "mean action"

    def __init__(self, dataset: Any, horizon: int = 1):
        if not len(dataset):
            raise DataError("the dataset is empty", field="data", got=0, expected="demonstrations")
        mean = np.asarray(dataset.actions(), np.float64).mean(0)
        self.chunk = np.tile(mean, (horizon, 1))

    def infer_batch(
        self, rows: Sequence[Mapping[str, Any]], *, seeds: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """The same chunk [horizon a] for every row."""
        return [{"actions": self.chunk.copy()} for _ in rows]

    def reset(self) -> None:
        """Nothing to forget."""
