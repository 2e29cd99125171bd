"""A digest over every pixel of a dataset: whether two datasets show the same, however they are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vla.datasets import Dataset


def pixel_digest(dataset: Dataset, *, threads: int = 2, progress: Callable[[int, int], None] | None = None) -> str:
    """SHA-256 of all decoded images, states, actions and instructions, frame by frame. Decodes everything.

    Datasets that store frames exactly (PNG) agree whatever wrote them; compressed video decodes to the same pixels only
    with the same decoder.

    Args:
        threads: episodes decoded side by side; the digest does not depend on it.
        progress: called with (episodes done, episodes).

    Raises:
        DataError: a frame cannot be decoded; names it.
    """

    def of_episode(span: range) -> bytes:
        found = hashlib.sha256()
        for index in span:
            sample = dataset.sample(index, 1)
            arrays = {**sample["images"], "state": sample["state"], "action": sample["actions"]}
            found.update(sample["prompt"].encode())
            for name in sorted(arrays):
                array = np.ascontiguousarray(arrays[name])
                found.update(f"{name} {array.dtype} {array.shape}".encode())
                found.update(array.data)
        return found.digest()

    total = hashlib.sha256()
    with ThreadPoolExecutor(threads) as pool:
        for done, digest in enumerate(pool.map(of_episode, dataset.episodes), 1):
            total.update(digest)
            if progress is not None:
                progress(done, len(dataset.episodes))
    return total.hexdigest()
