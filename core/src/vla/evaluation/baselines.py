"""Policies that have learned nothing worth the name: what a trained policy has to beat."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla.errors import DataError
from vla.frame_cache import cache_frames
from vla.transforms.images import resize_with_pad, to_uint8

SIZE = (8, 8)  # of the pictures that are compared
BLOCK = 4096  # frames compared at a time: what bounds the memory


class MeanAction:
    """Always the mean action of the demonstrations, whatever it sees."""

    name = "mean action"

    def __init__(self, dataset: Any, horizon: int = 1):
        _not_empty(dataset)
        mean = _finite(dataset.actions(), "actions", np.float64).mean(0)
        self.chunk = np.tile(mean, (horizon, 1))

    def infer_batch(
        self, rows: Sequence[Mapping[str, Any]], *, seeds: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """The same chunk [horizon a] for every row."""
        return [{"actions": self.chunk.copy()} for _ in rows]

    def reset(self) -> None:
        """Nothing to forget."""


class NearestNeighbour:
    """Does what was done in the demonstration that looks most like this moment; nothing is learned.

    Of the frames with the same instruction (of all frames when the instruction is new), the one with the least
    distance: the mean squared difference of the state, each number in units of its standard deviation, plus for each
    camera the mean squared difference of the pictures at 8 x 8 pixels, in units of their variance. So the state and
    every camera count alike, whatever their units and sizes. The answer is the chunk that was recorded there, cut at
    the end of its episode: between 1 and `horizon` actions.

    Args:
        dataset: the demonstrations, in the names and units of the observations.
        horizon: actions per answer, at most.
        folder: where the small pictures are kept, once for each dataset (`vla.frame_cache`); default: "frames" below
            `$VLA_CACHE` (~/.cache/vla).
        threads: episodes decoded side by side.
        progress: called with (episodes decoded, episodes) when they are not in the folder yet.

    Raises:
        DataError: the dataset is empty, cannot be decoded, or has states or actions that are not finite.
        StoreError: the folder cannot be written.
    """

    name = "nearest neighbour"

    def __init__(
        self,
        dataset: Any,
        horizon: int = 1,
        *,
        folder: str | Path | None = None,
        threads: int = 2,
        progress: Callable[[int, int], None] | None = None,
    ):
        _not_empty(dataset)
        self.dataset, self.horizon, self.cameras = dataset, horizon, list(dataset.info.cameras)
        self._states = _finite(dataset.states(), "state", np.float32)
        _finite(dataset.actions(), "actions", np.float32)
        cache = Path(os.environ.get("VLA_CACHE", "~/.cache/vla")).expanduser() / "frames"
        self._pictures = np.zeros((len(dataset), 0, *SIZE, 3), np.uint8)
        if self.cameras:
            where = folder or cache
            self._pictures = cache_frames(dataset, self.cameras, SIZE, where, threads=threads, progress=progress)
        spread = self._states.std(0, dtype=np.float64)
        self._spread = np.where(spread > 1e-6, spread, 1.0).astype(np.float32)
        self._variances = self._picture_variances()
        prompts = np.asarray(dataset.prompts(), dtype=object)
        self._frames_of = {str(prompt): np.flatnonzero(prompts == prompt) for prompt in set(prompts)}

    def infer_batch(
        self, rows: Sequence[Mapping[str, Any]], *, seeds: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """The recorded chunk [1..horizon a] of the nearest frame, and which "frame" that is, for every row.

        Raises:
            DataError: an observation lacks a camera, or its state has another width or values that are not finite.
        """
        return [self._answer(row) for row in rows]

    def reset(self) -> None:
        """Nothing to forget."""

    def nearest(self, row: Mapping[str, Any]) -> int:
        """Index of the nearest frame; the first of equals."""
        state, pictures = self._state(row), self._small(row)
        best, least = -1, np.inf
        for some in _blocks(self._candidates(row)):
            distance = np.square((self._states[some] - state) / self._spread).mean(1)
            for camera, variance in enumerate(self._variances):
                apart = self._pictures[some, camera].astype(np.float32) - pictures[camera]
                distance += np.square(apart).mean((1, 2, 3)) / variance
            at = int(distance.argmin())
            if distance[at] < least:
                best, least = int(some[at]), float(distance[at])
        return best

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _answer(self, row: Mapping[str, Any]) -> dict[str, Any]:
        frame = self.nearest(row)
        sample = self.dataset.sample(frame, self.horizon, images=False)
        real = np.asarray(sample["actions"], np.float64)[~np.asarray(sample["actions_is_pad"], bool)]
        return {"actions": real, "frame": frame}

    def _candidates(self, row: Mapping[str, Any]) -> np.ndarray:
        found = self._frames_of.get(str(row.get("prompt", "")))
        return np.arange(len(self._states)) if found is None else found

    def _state(self, row: Mapping[str, Any]) -> np.ndarray:
        state = np.asarray(row["state"], np.float32)
        if state.shape != self._states.shape[1:] or not np.isfinite(state).all():
            raise DataError(
                "the state is not one of these demonstrations' robot", field="state", got=state,
                expected=f"{self._states.shape[1]} finite numbers", fix="give demonstrations from this environment",
            )  # fmt: skip
        return state

    def _small(self, row: Mapping[str, Any]) -> list[np.ndarray]:
        images = row.get("images", {})
        if lacking := [name for name in self.cameras if name not in images]:
            raise DataError(
                "the observation lacks a camera of the demonstrations", field="images", got=sorted(images),
                expected=lacking, fix="give demonstrations from this environment",
            )  # fmt: skip
        return [resize_with_pad(to_uint8(images[name], name), *SIZE).astype(np.float32) for name in self.cameras]

    def _picture_variances(self) -> list[float]:
        """How much a pixel varies over the frames, averaged over the pixels of each camera."""
        total = np.zeros(self._pictures.shape[1:])
        squares = np.zeros_like(total)
        for some in _blocks(np.arange(len(self._pictures))):
            block = self._pictures[some].astype(np.float64)
            total += block.sum(0)
            squares += np.square(block).sum(0)
        n = len(self._pictures)
        variance = (squares / n - np.square(total / n)).mean((1, 2, 3))
        return [float(v) if v > 1e-6 else 1.0 for v in variance]


def _blocks(frames: np.ndarray) -> Iterator[np.ndarray]:
    return (frames[at : at + BLOCK] for at in range(0, len(frames), BLOCK))


def _not_empty(dataset: Any) -> None:
    if not len(dataset):
        raise DataError("the dataset is empty", field="data", got=0, expected="demonstrations")


def _finite(values: Any, name: str, dtype: Any) -> np.ndarray:
    """The states or actions of all frames; NaN would be nearest to everything, and the mean of anything."""
    found = np.asarray(values, dtype)
    if not np.isfinite(found).all():
        frame = int(np.argwhere(~np.isfinite(found))[0][0])
        raise DataError(
            "the demonstrations have NaN or infinite values", field=name, got=f"frame {frame}: {found[frame]}",
            fix="leave out that episode, or repair the data",
        )  # fmt: skip
    return found
