"""Uniform bins: bounds, ids, bad input, storage."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from vla_tokenizer_binning import PART
from vla_tokenizer_binning.codec import BinningCodec
from vla_tokenizer_binning.config import Binning

from vla.errors import DataError, DecodeError, SettingsError, StoreError

H, D = 6, 3
kinds = st.builds(
    Binning,
    codes=st.integers(2, 400),
    limit=st.sampled_from([0.5, 1.0, 1.5]),
    value=st.sampled_from(["centre", "left"]),
)
unit = st.floats(-1, 1, width=32)
chunks = st.one_of(
    hnp.arrays(np.float32, (H, D), elements=unit),
    unit.map(lambda v: np.full((H, D), v, np.float32)),
    st.integers(0, H).map(lambda i: np.where(np.arange(H)[:, None] < i, -1.0, 1.0) * np.ones((1, D))),
)


@settings(max_examples=600, deadline=None)
@given(kinds, chunks)
def test_round_trip_within_the_bound(kind, chunk):
    codec = BinningCodec(kind)
    chunk = chunk * kind.limit
    (ids,) = codec.encode(chunk[None])
    back = codec.decode(ids, H, D)
    assert np.abs(back - chunk).max() <= codec.error_bound(H, D) + 1e-6
    assert len(ids) == codec.total(H, D) == codec.lengths()[ids].sum()
    if kind.value == "centre":
        assert np.array_equal(codec.encode(back[None])[0], ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-3, 260), max_size=30), st.sampled_from(["strict", "relaxed"]))
def test_random_ids_decode_or_say_why(ids, mode):
    try:
        out = BinningCodec(Binning()).decode(np.asarray(ids, np.int64), H, D, mode)
    except DecodeError:
        return
    assert out.shape == (H, D)
    assert np.isfinite(out).all()


def test_bins_are_uniform_and_clip():
    codec = BinningCodec(Binning())
    (ids,) = codec.encode(np.asarray([[[-9, -1, -1 + 1 / 128, 0, 0.9999, 1, 9]]]))
    assert ids.tolist() == [0, 0, 1, 128, 255, 255, 255]
    assert codec.decode(np.asarray([0, 255]), 1, 2).tolist() == [[-1 + 1 / 256, 1 - 1 / 256]]
    assert BinningCodec(Binning(value="left")).decode(np.asarray([0, 128]), 1, 2).tolist() == [[-1, 0]]


def test_relaxed_repeats_the_last_step_and_cuts():
    codec = BinningCodec(Binning())
    ids = np.asarray([0, 255, 128])
    with pytest.raises(DecodeError, match="not 4"):
        codec.decode(ids, 2, 2)
    out = codec.decode(ids, 2, 2, "relaxed")
    assert np.array_equal(out[0], out[1])
    assert np.array_equal(codec.decode(np.asarray([0, 255, 7]), 1, 2, "relaxed"), out[:1])
    with pytest.raises(DecodeError):
        codec.decode(ids[:1], 2, 2, "relaxed")


def test_bad_input_is_named(tmp_path):
    codec = BinningCodec(Binning())
    with pytest.raises(DataError, match=r"actions\[0, 0, 0\]"):
        codec.encode(np.full((1, H, D), np.nan))
    with pytest.raises(DataError, match="NaN"):
        codec.fit(np.full((1, H, D), np.inf))
    with pytest.raises(DecodeError, match="not an action id"):
        codec.decode(np.asarray([256]), 1, 1)
    for bad in ({"codes": 1}, {"limit": 0.0}):
        with pytest.raises(SettingsError, match="out of bounds"):
            Binning(**bad)
    with pytest.raises(StoreError):
        codec.load(tmp_path)


def test_save_load(tmp_path):
    codec = BinningCodec(Binning(64, 1.5, "left"))
    codec.save(tmp_path)
    again = BinningCodec(Binning(64)).load(tmp_path)
    chunk = np.linspace(-1.5, 1.4, 18).reshape(1, H, D)
    assert np.array_equal(again.decode(again.encode(chunk)[0], H, D), codec.decode(codec.encode(chunk)[0], H, D))
    with pytest.raises(SettingsError, match="codes=64"):
        BinningCodec(Binning()).load(tmp_path)
    facts = json.loads((tmp_path / "codec.json").read_text())
    (tmp_path / "codec.json").write_text(json.dumps(facts | {"value": "right"}))
    with pytest.raises(StoreError, match="damaged"):
        BinningCodec(Binning(64)).load(tmp_path)


def test_part():
    (need,) = PART.needs_of(Binning())
    assert (need.met_by({"vocab_size": 388}), need.met_by({"vocab_size": 387})) == (True, False)
