"""Decoded and resized frames of a dataset in one memory-mapped file, so that a training never decodes twice.

The file is named by the digest of the data, the cameras and the size, and appears only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve

from vla.datasets import Dataset, check_cameras
from vla.errors import StoreError
from vla.files import atomic_file
from vla.reading import check_file, reading
from vla.transforms.images import resize_with_pad

REVISION = 1  # raised when the same inputs would give other pixels


def cache_frames(
    dataset: Dataset,
    cameras: Sequence[str],
    size: tuple[int, int],
    folder: str | Path,
    *,
    threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> np.memmap:
    """All frames of these cameras, resized as the transforms do: uint8 [N cameras h w 3], read-only.

    Built on the first call and mapped on later ones; the bytes do not depend on the number of threads.

    Args:
        cameras: the dataset's names, in the order of the second axis.
        size: (height, width).
        folder: where the file is kept; made if absent.
        threads: episodes decoded side by side.
        progress: called with (episodes done, episodes).

    Raises:
        DataError: no such camera, or a frame that cannot be decoded. No file is left then.
        StoreError: the folder cannot be written, or the disk is full.
    """
    names = check_cameras(cameras, dataset.info.cameras, dataset.info.source)
    shape = (len(dataset), len(names), *size, 3)
    key = json.dumps([REVISION, dataset.digest(), names, list(size)])
    file = Path(folder).expanduser() / f"frames-{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy"
    if not file.exists():
        _build(dataset, names, shape, file, threads, progress)
    check_file(file)
    with reading("a frame cache is damaged", file, fix="delete this file"):
        frames = np.load(file, mmap_mode="r", allow_pickle=False)
    if frames.shape != shape or frames.dtype != np.uint8:
        raise StoreError(
            "a frame cache is damaged", field=str(file), got=frames.shape, expected=shape, fix="delete this file"
        )
    return frames


def _build(
    dataset: Dataset, names: list[str], shape: tuple[int, ...], file: Path, threads: int,
    progress: Callable[[int, int], None] | None,
) -> None:  # fmt: skip
    def fill(episode: range) -> None:
        for index in episode:
            images = dataset.sample(index, 1, cameras=names)["images"]
            for c, name in enumerate(names):
                frames[index, c] = resize_with_pad(images[name], *shape[2:4])

    with atomic_file(file, "the frame cache") as temp:
        frames = np.lib.format.open_memmap(temp, "w+", np.uint8, shape)
        if hasattr(os, "posix_fallocate"):
            # A disk that fills up under a memory map kills the process; here it is an error.
            with open(temp, "r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, temp.stat().st_size)
        with ThreadPoolExecutor(threads) as pool:
            for done, _ in enumerate(pool.map(fill, dataset.episodes), 1):
                if progress is not None:
                    progress(done, len(dataset.episodes))
        frames.flush()


class CachedFrames:
    """A dataset whose images come from a frame cache: the same samples, with images of `size`."""

    def __init__(
        self, dataset: Dataset, cameras: Sequence[str], size: tuple[int, int], folder: str | Path, threads: int = 2
    ):
        self._dataset, self._names = dataset, list(cameras)
        self._frames = cache_frames(dataset, cameras, size, folder, threads=threads)
        self.episodes = dataset.episodes
        self.info = evolve(dataset.info, cameras={name: size for name in self._names})

    def __len__(self) -> int:
        """Frames."""
        return len(self._dataset)

    def sample(
        self, index: int, horizon: int, cameras: Sequence[str] | None = None, images: bool = True
    ) -> dict[str, Any]:
        """As `Dataset.sample`; nothing is decoded."""
        wanted = check_cameras(cameras, self._names, self.info.source) if images else []
        sample = self._dataset.sample(index, horizon, images=False)
        row = self._frames[index]
        return {**sample, "images": {name: np.array(row[self._names.index(name)]) for name in wanted}}

    def states(self) -> np.ndarray:
        """float32 [N s]."""
        return self._dataset.states()

    def actions(self) -> np.ndarray:
        """float32 [N a]."""
        return self._dataset.actions()

    def prompts(self) -> Sequence[str]:
        """The instruction of each frame."""
        return self._dataset.prompts()

    def digest(self) -> str:
        """The digest of the data itself."""
        return self._dataset.digest()
