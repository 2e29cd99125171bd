"""The corpus of hostile inputs: one clear error or an honest use, never code, a hang, a blow-up or a touch outside."""

from collections import Counter

import pytest
from hostile import BAD, build_lab, run, warm
from hostile_corpus import corpus

pytest.importorskip("torch")
CASES = corpus()
SHARE = 11  # one in so many is run in the fast lane, some of every kind


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = build_lab(tmp_path_factory.mktemp("lab"))
    warm(folder)
    return folder


def outcomes(cases, lab, room):
    results = [run(case, lab, room) for case in cases]
    assert not (bad := [str(r) for r in results if r.outcome in BAD]), "\n".join(
        [f"{len(bad)} of {len(results)}:", *bad]
    )
    return Counter(r.outcome for r in results)


def test_the_corpus_is_large_and_names_are_used_once():
    assert len(CASES) >= 800
    assert not [n for n, times in Counter((c.kind, c.name) for c in CASES).items() if times > 1]


def test_some_of_every_kind(lab, tmp_path):
    found = outcomes(CASES[::SHARE], lab, tmp_path)
    assert found["refused"] > found["accepted"] > 0


@pytest.mark.slow
def test_all(lab, tmp_path):
    outcomes(CASES, lab, tmp_path)
