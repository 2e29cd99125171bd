"""The own fit: bounds, bad input, storage."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from vla_tokenizer_fast import PART
from vla_tokenizer_fast.codec import FastCodec, dct_matrix
from vla_tokenizer_fast.config import Fast

from vla.errors import DataError, DecodeError, SettingsError, StoreError
from vla.testing.closeness import close

H, D = 12, 3


def smooth(n, h=H, d=D, seed=0):
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, h)[None, :, None]
    return np.clip(
        sum(rng.normal(0, 0.6 / k, (n, 1, d)) * np.sin(np.pi * k * t + rng.random((n, 1, d)) * 6) for k in (1, 2, 3)),
        -1,
        1,
    )


CODEC = FastCodec(Fast(codes=256)).fit(smooth(400))
unit = st.floats(-1, 1, width=32)
chunks = st.one_of(
    hnp.arrays(np.float32, (H, D), elements=unit),  # extreme and noisy
    unit.map(lambda v: np.full((H, D), v, np.float32)),  # constant
    st.tuples(unit, unit, st.integers(0, H)).map(
        lambda a: np.where(np.arange(H)[:, None] < a[2], a[0], a[1]) * np.ones((1, D))
    ),  # step
    st.integers(0, 2**31).map(lambda s: smooth(1, seed=s)[0]),
    st.integers(0, 2**31).map(lambda s: np.random.default_rng(s).choice([-1.0, 1.0], (H, D))),
)


@settings(max_examples=600, deadline=None)
@given(chunks)
def test_in_range_chunks_round_trip_within_the_bound(chunk):
    (ids,) = CODEC.encode(chunk[None])
    assert CODEC.out_of_range(chunk[None]).tolist() == [0]
    back = CODEC.decode(ids, H, D)
    assert np.abs(back - chunk).max() <= CODEC.error_bound(H, D) + 1e-6
    assert np.sqrt(((back - chunk) ** 2).mean(0)).max() <= 1 / (2 * CODEC.scale) + 1e-6
    assert np.array_equal(CODEC.encode(back[None])[0], ids)  # what decodes is a fixed point
    assert CODEC.lengths()[ids].sum() == CODEC.total(H, D)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(-10, 300), max_size=60), st.sampled_from(["strict", "relaxed", "openpi"]))
def test_random_ids_decode_or_say_why(ids, mode):
    try:
        out = CODEC.decode(np.asarray(ids, np.int64), H, D, mode)
    except DecodeError as e:
        assert str(e)
    else:
        assert out.shape == (H, D)
        assert np.isfinite(out).all()


def test_dct_matches_its_definition():
    m = dct_matrix(7)
    close(m @ m.T, np.eye(7), 1e-6)
    x = np.random.default_rng(0).normal(size=7)
    k = np.arange(7)
    want = [np.sqrt((1 if i == 0 else 2) / 7) * (x * np.cos(np.pi * (2 * k + 1) * i / 14)).sum() for i in k]
    close(m @ x, want, 1e-6)


def test_fit_is_deterministic_and_compresses():
    again = FastCodec(Fast(codes=256)).fit(smooth(400))
    held = smooth(50, seed=9)
    assert all(np.array_equal(a, b) for a, b in zip(CODEC.encode(held), again.encode(held), strict=True))
    assert np.mean([len(i) for i in CODEC.encode(held)]) < H * D / 2
    assert np.array_equal(CODEC.encode(held)[7], CODEC.encode(held[7:8])[0])  # a row does not depend on its batch


def test_relaxed_fills_and_cuts():
    (ids,) = CODEC.encode(smooth(1, seed=5))
    whole = CODEC.decode(ids, H, D)
    for broken in (ids[:-1], np.append(ids, ids)):
        with pytest.raises(DecodeError, match=f"not {H * D}"):
            CODEC.decode(broken, H, D)
    assert np.array_equal(CODEC.decode(np.append(ids, ids), H, D, "relaxed"), whole)
    assert np.abs(CODEC.decode(ids[:-1], H, D, "relaxed") - whole).max() < 1
    with pytest.raises(DecodeError):
        CODEC.decode(ids[:0], H, D, "relaxed")  # nothing is there: zeros would be a lie


def test_out_of_range_is_clipped_and_said_once_or_refused(caplog):
    far = np.full((1, H, D), 40.0)
    codec = FastCodec(Fast(codes=256)).fit(smooth(50))
    ids = codec.encode(far)
    codec.encode(far)
    assert codec.out_of_range(far).tolist() == [D]
    assert len(caplog.records) == 1
    assert "moved to the nearest" in caplog.text
    assert np.isfinite(codec.decode(ids[0], H, D)).all()
    with pytest.raises(DataError, match="beyond the range") as e:
        FastCodec(Fast(codes=256, overflow="error")).fit(smooth(50)).encode(far)
    assert "overflow" in str(e.value)
    huge = codec.encode(np.full((1, H, D), 1e300))
    assert np.isfinite(codec.decode(huge[0], H, D)).all()


def test_range_covers_the_fitted_data_when_there_is_room(caplog):
    wide = smooth(50) * 2.5
    assert not FastCodec(Fast(codes=512)).fit(wide).out_of_range(wide).any()
    assert not caplog.records
    assert FastCodec(Fast(codes=128)).fit(smooth(50) * 100).out_of_range(smooth(50) * 100).any()
    assert "normalised" in caplog.text


def test_bad_input_is_named():
    with pytest.raises(SettingsError, match="not fitted") as e:
        FastCodec(Fast()).encode(smooth(1))
    assert "vla tokenizer fit" in str(e.value)
    for call in (
        lambda: CODEC.encode(smooth(1, h=H + 1)),
        lambda: CODEC.decode(np.zeros(1, int), H, D + 1),
        lambda: CODEC.total(1, 1),
    ):
        with pytest.raises(DataError, match="other dims") as e:
            call()
        assert str((H, D)) in str(e.value)
    with pytest.raises(DataError, match="NaN"):
        CODEC.encode(np.full((1, H, D), np.nan))
    with pytest.raises(DataError, match="NaN"):
        FastCodec(Fast()).fit(np.full((1, H, D), np.inf))
    with pytest.raises(DataError, match="three axes"):
        CODEC.encode(np.zeros((H, D)))
    with pytest.raises(DataError, match="no chunks"):
        FastCodec(Fast()).fit(np.zeros((0, H, D)))
    with pytest.raises(SettingsError, match="too few") as e:
        FastCodec(Fast(codes=64)).fit(smooth(10))
    assert "71" in str(e.value)
    with pytest.raises(SettingsError, match="scale is out of bounds"):
        Fast(scale=0.0)
    assert CODEC.encode(np.zeros((0, H, D))) == []


def test_save_load(tmp_path):
    CODEC.save(tmp_path)
    held = smooth(20, seed=3)
    for again in (FastCodec(Fast(codes=256)).load(tmp_path), FastCodec(Fast(codes=256, source=str(tmp_path)))):
        assert again.fitted
        assert all(np.array_equal(a, b) for a, b in zip(CODEC.encode(held), again.encode(held), strict=True))
        with pytest.raises(DataError, match="other dims"):
            again.encode(smooth(1, d=D + 1))
    with pytest.raises(SettingsError, match="codes=256"):
        FastCodec(Fast(codes=1024)).load(tmp_path)
    facts = json.loads((tmp_path / "codec.json").read_text())
    for damage in ({"low": 5, "high": 1}, {"scale": 0}, {"shapes": 3}, {"low": None}):
        (tmp_path / "codec.json").write_text(json.dumps(facts | damage))
        with pytest.raises(StoreError, match="damaged"):
            FastCodec(Fast(codes=256)).load(tmp_path)
    with pytest.raises(SettingsError, match="not fitted"):
        FastCodec(Fast()).save(tmp_path)


def test_part_refuses_a_small_vocabulary_before_anything_is_loaded():
    (need,) = PART.needs_of(Fast(codes=1024, skip=128))
    assert not need.met_by({"vocab_size": 1155})
    assert need.met_by({"vocab_size": 1156})
    offers = PART.offers(Fast(), {"text": {"vocab_size": 4096}})
    assert offers == {"emits": {"text", "state", "actions"}, "vocab_size": 4096, "prompt": "fast"}
