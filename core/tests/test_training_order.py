"""Data order and random numbers are pure functions of (seed, step)."""

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.training.order import PURPOSES, generator, mixture, permuted, sample_ids, split_episodes


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 700), seed=st.integers(0, 2**63), batch=st.integers(1, 40))
def test_every_epoch_shows_every_sample_once(size, seed, batch):
    steps = -(-3 * size // batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream = np.concatenate([sample_ids(seed, k, batch, size) for k in range(steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


@settings(deadline=None, max_examples=30)
@given(size=st.integers(2, 10_000), seed=st.integers(0, 2**32), step=st.integers(0, 10**9))
def test_the_stream_does_not_depend_on_the_batch_size(size, seed, step):
    whole = sample_ids(seed, step, 12, size)
    for batch in (1, 3, 4, 6):
        parts = [sample_ids(seed, step * 12 // batch + i, batch, size) for i in range(12 // batch)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_order_is_the_same_on_every_machine():
    """Written down once: a change here silently reorders every resumed run."""
    assert sample_ids(42, 0, 8, 1000).tolist() == [748, 451, 900, 726, 722, 548, 137, 237]
    assert sample_ids(42, 10**6, 8, 1000).tolist() == [548, 117, 124, 567, 426, 723, 965, 812]


def test_permutations_are_uniform_on_small_sets():
    """Chi-square over all 24 orders of 4 samples, and over every (place, sample) pair of 10."""
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    for seed in range(4800):
        counts[tuple(sample_ids(seed, 0, 4, 4).tolist())] += 1
    chi = sum((n - 200) ** 2 / 200 for n in counts.values())
    assert chi < 60, chi  # 23 degrees of freedom: p < 4e-5
    table = np.zeros((10, 10))
    for seed in range(3000):
        table[np.arange(10), sample_ids(seed, 0, 10, 10)] += 1
    chi = ((table - 300) ** 2 / 300).sum()
    assert chi < 150, chi  # 81 degrees of freedom


def test_epochs_and_seeds_differ():
    orders = {sample_ids(seed, epoch, 100, 100).tobytes() for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_keys_may_differ_per_element():
    index = np.array([3, 3, 3])
    keys = np.array([1, 2, 1], np.uint64)
    out = permuted(index, 1000, keys)
    assert out[0] == out[2] == permuted(np.array([3]), 1000, 1)[0]
    assert out[1] == permuted(np.array([3]), 1000, 2)[0]


def test_purposes_do_not_share_numbers():
    streams = [generator(7, purpose, 3).random(4).tobytes() for purpose in PURPOSES]
    assert len(set(streams)) == len(PURPOSES)
    assert np.array_equal(generator(7, "draws", 3).random(4), generator(7, "draws", 3).random(4))


@pytest.mark.parametrize("held_out", [0, 1, 3])
def test_held_out_episodes_are_fixed_by_the_seed(held_out):
    train, val = split_episodes(5, 10, held_out)
    assert len(val) == held_out and sorted([*train, *val]) == list(range(10))
    again = split_episodes(5, 10, held_out)
    assert np.array_equal(val, again[1])


def test_a_mixture_keeps_its_proportions_and_covers_every_dataset():
    sizes, weights = [50, 7, 200], [0.5, 0.2, 0.3]
    drawn = np.concatenate([mixture(3, k, 16, sizes, weights) for k in range(640)])  # ten blocks of 1024
    starts = np.cumsum([0, *sizes])
    owner = np.searchsorted(starts, drawn, side="right") - 1
    for d, weight in enumerate(weights):
        for block in range(10):
            share = (owner[block * 1024 : (block + 1) * 1024] == d).mean()
            assert abs(share - weight) <= 1 / 1024
        mine = drawn[owner == d] - starts[d]
        counts = np.bincount(mine, minlength=sizes[d])
        assert counts.max() - counts.min() <= 1  # epochs of its own
    assert np.array_equal(mixture(3, 5, 16, sizes, weights), drawn[80:96])
