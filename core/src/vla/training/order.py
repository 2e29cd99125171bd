"""Which samples make up step k, and which random numbers: pure functions of (seed, step).

Nothing here has state, so nothing has to be saved: a resumed run, one with other workers, micro-batches or devices
sees the same samples in the same order. Epochs follow each other without a gap in the stream; every epoch is a fresh
permutation, computed element by element (a Feistel network with cycle walking: Black & Rogaway 2002), so that memory
does not grow with the data and any step can be asked for directly. The arithmetic is on 64-bit integers only: the same
on every machine and with every numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

ROUNDS = 7
# What a stream of numbers is for; streams of one seed are independent.
PURPOSES = {
    "order": 0,
    "draws": 1,
    "augment": 2,
    "validation": 3,
    "weights": 4,
    "mixture": 5,
    "sample": 6,
    "replace": 7,
    "rtc": 8,
}
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def generator(seed: int, purpose: str, *counter: int) -> np.random.Generator:
    """A numpy generator for one purpose at one place in the run, e.g. `generator(seed, "draws", step)`."""
    words = [seed, PURPOSES[purpose], *counter]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([w % 2**64 for w in words])))


def permuted(index: np.ndarray, size: int, key: np.ndarray | int) -> np.ndarray:
    """Where a pseudo-random permutation of range(size), chosen by `key` (one for all, or one each), sends `index`."""
    index = np.asarray(index, np.uint64)
    if size <= 1:
        return np.zeros(index.shape, np.int64)
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    key = np.broadcast_to(np.asarray(key, np.uint64), index.shape)
    out = index.copy()
    todo = np.ones(index.shape, bool)
    while todo.any():  # an image outside the range is sent on until it falls inside: at most 4 tries on average
        x, k = out[todo], key[todo]
        left, right = x >> half, x & low
        for r in range(ROUNDS):
            left, right = right, left ^ (_mix(right + _mix(k + np.uint64(r))) & low)
        out[todo] = (left << half) | right
        todo[todo] = out[todo] >= size
    return out.astype(np.int64)


def sample_ids(seed: int, step: int, batch_size: int, size: int) -> np.ndarray:
    """The samples of step `step`, [batch_size] int64 in range(size), in row order."""
    places = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.uint64)
    epoch, within = places // np.uint64(size), places % np.uint64(size)
    return permuted(within, size, _mix(_mix(np.uint64(seed % 2**64)) + epoch * _GOLDEN))


def stand_ins(seed: int, step: int, row: int, size: int, count: int) -> np.ndarray:
    """The samples that stand in, one after the other, for one of row `row` of step `step` that cannot be read."""
    key = _mix(np.uint64(seed % 2**64) ^ np.uint64(PURPOSES["replace"]))
    key = _mix(_mix(key + np.uint64(step % 2**64)) + np.uint64(row))
    return permuted(np.arange(min(count, size)), size, int(key))


def split_episodes(seed: int, episodes: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Episode numbers for training and for validation, both sorted; chosen by the seed alone."""
    shuffled = permuted(
        np.arange(episodes), episodes, int(_mix(np.uint64(seed % 2**64) ^ np.uint64(PURPOSES["validation"])))
    )
    return np.sort(shuffled[held_out:]), np.sort(shuffled[:held_out])


def mixture(
    seed: int, step: int, batch_size: int, sizes: Sequence[int], weights: Sequence[float], block: int = 1024
) -> np.ndarray:
    """The samples of step `step` from several datasets, numbered as if they were laid end to end, [batch_size].

    Each run of `block` samples holds the datasets in proportion to their weights (exactly, up to one sample), in random
    order; each dataset is gone through in epochs of its own.
    """
    shares = np.asarray(weights, float) / np.sum(weights)
    bounds = np.round(np.cumsum(np.concatenate([[0.0], shares])) * block).astype(int)
    counts = np.diff(bounds)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    owner = np.repeat(np.arange(len(sizes)), counts)
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    out = np.empty(batch_size, np.int64)
    for number in np.unique(places // block):
        rows = places // block == number
        slot = permuted(places[rows] % block, block, int(_mix(np.uint64((seed + 1) % 2**64)) ^ _mix(np.uint64(number))))
        for d, (first, last) in enumerate(pairwise(bounds)):
            mine = owner[slot] == d
            if mine.any():
                nth = int(number) * int(counts[d]) + (slot[mine] - first)  # the how-manieth sample of this dataset
                epoch, within = nth // sizes[d], nth % sizes[d]
                key = _mix(_mix(np.uint64((seed + d) % 2**64)) + epoch.astype(np.uint64) * _GOLDEN)
                out[np.flatnonzero(rows)[mine]] = starts[d] + permuted(within, sizes[d], key)
            assert last >= first
    return out


def _mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """splitmix64's finaliser: every output bit depends on every input bit."""
    with np.errstate(over="ignore"):
        x = np.asarray(x, np.uint64) + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
