"""Merges found by one pass over positions equal merges applied one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vla_tokenizer_fast import bpe
from vla_tokenizer_fast.bpe import Merger, learn


def merged_one_by_one(symbols, merges, base):
    """The definition: the pair of lowest rank, leftmost first, until there is none."""
    ranks = {tuple(m): r for r, m in enumerate(merges.tolist())}
    s = list(symbols)
    while True:
        rank, at = min(
            ((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(zip(s, s[1:], strict=False))),
            default=(len(ranks), 0),
        )
        if rank == len(ranks):
            return s
        s[at : at + 2] = [base + rank]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**31), st.integers(0, 80))
def test_encode_is_byte_pair_encoding(base, seed, extra):
    rng = np.random.default_rng(seed)
    grid = np.minimum(rng.geometric(0.4, (40, 30)) - 1, base - 1)
    merges = learn(grid, base, base + extra)
    merger = Merger(base, merges)
    lengths = rng.integers(0, 31, 40)
    starts = rng.random(grid.shape) < 0.1
    starts[:, 0] = True
    plain, words = merger.encode(grid, lengths), merger.encode(grid, lengths, starts)
    for few, many in (
        (plain, merger._encode_many(grid, lengths, None)),
        (words, merger._encode_many(grid, lengths, starts)),
    ):
        assert all(np.array_equal(a, b) for a, b in zip(few, many, strict=True))
    for row, n, cut, a, b in zip(grid, lengths, starts, plain, words, strict=True):
        assert a.tolist() == merged_one_by_one(row[:n], merges, base)
        edges = [*np.flatnonzero(cut[:n]), n]
        assert b.tolist() == [
            t for i, j in zip(edges, edges[1:], strict=False) for t in merged_one_by_one(row[i:j], merges, base)
        ]
        assert [s for t in a for s in merger.texts[t]] == row[:n].tolist()


def test_learn_takes_the_most_frequent_pair():
    data = np.asarray([[0, 1, 0, 1, 2, 2, 2, 2]])
    assert learn(data, 3, 6).tolist() == [[2, 2], [0, 1]]  # then no pair occurs twice
    assert learn(data, 3, 3).shape == (0, 2)


def test_learn_counts_as_a_recount_would():
    rng = np.random.default_rng(1)
    data = np.minimum(rng.geometric(0.5, (50, 40)) - 1, 3)
    merges = learn(data, 4, 60)
    assert np.array_equal(merges, learn(data, 4, 60))
    rows, texts = [list(r) for r in data], [(i,) for i in range(4)]
    for new, (a, b) in enumerate(merges.tolist(), 4):
        count = {}
        for row in rows:
            for pair in zip(row, row[1:], strict=False):
                if texts[pair[0]] + texts[pair[1]] not in texts:
                    count[pair] = count.get(pair, 0) + 1
        assert count[a, b] == max(count.values())
        texts.append(texts[a] + texts[b])
        for row in rows:
            i = 0
            while i < len(row) - 1:
                if (row[i], row[i + 1]) == (a, b):
                    row[i : i + 2] = [new]
                i += 1


def test_memory_of_the_automaton_is_bounded(monkeypatch):
    monkeypatch.setattr(bpe, "TEXT_BUDGET", 300)
    data = np.random.default_rng(0).integers(0, 3, (3, 400)).repeat(5, 0)
    merger = Merger(3, learn(data, 3, 60))
    assert merger.lengths[3:].sum() <= 300
    assert merger.size == 60


@pytest.mark.parametrize("base", [1, 3])
def test_no_merges(base):
    merger = Merger(base, np.zeros((0, 2), np.int32))
    grid = np.zeros((2, 5), int)
    assert [r.tolist() for r in merger.encode(grid, np.asarray([5, 0]))] == [[0] * 5, []]
    assert merger.encode(grid[:0], np.zeros(0, int)) == []
