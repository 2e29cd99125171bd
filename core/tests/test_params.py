"""The engine of the name tables, on tables made up here."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.errors import PartError, StoreError
from vla.params import Row, bind, cover, other_shapes, shapes, to_other, to_torch

ROWS = (
    Row("table.weight", "table/embedding", "v d"),
    Row("position", "position", "1 p d -> p d"),
    Row("layers.{l}.{e}.q.weight", "layers/{e}/q/kernel", "(n h) d -> d n h"),
    Row("layers.{l}.{e}.q.bias", "layers/{e}/q/bias", "(n h) -> n h"),
    Row("layers.{l}.{e}.k.weight", "layers/{e}/kv[0]", "(n h) d -> n d h"),
    Row("layers.{l}.{e}.v.weight", "layers/{e}/kv[1]", "(n h) d -> n d h"),
    Row("norms.{l}.scale", "norm_{l}.weight", "d"),
    Row("a", "both[1]", "d"),
    Row("b", "both[0]", "d"),
)
SIZES = {"v": 7, "d": 6, "p": 4, "n": 2, "h": 3, "l": 3, "e": "x"}


def weights(rows, dtype=np.float32):
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes(rows).items()}


def test_shapes_of_both_sides_follow_from_the_table():
    rows = tuple(bind(ROWS, SIZES))
    ours, theirs = shapes(rows), other_shapes(rows)
    assert ours["layers.2.x.q.weight"] == (6, 6) and ours["position"] == (1, 4, 6)
    assert theirs["layers/x/q/kernel"] == (3, 6, 2, 3)  # layers first
    assert theirs["layers/x/kv"] == (3, 2, 2, 6, 3)  # layer, then k and v
    assert theirs["both"] == (2, 6) and theirs["position"] == (4, 6) and theirs["norm_2.weight"] == (6,)
    assert len(ours) == 2 + 4 * 3 + 3 + 2 and len(theirs) == 2 + 3 + 3 + 1


def test_axes_move_as_written():
    rows = tuple(bind(ROWS, SIZES))
    w = weights(rows)
    out = to_other(rows, w)
    q = w["layers.1.x.q.weight"].reshape(2, 3, 6)
    np.testing.assert_array_equal(out["layers/x/q/kernel"][1], np.einsum("nhd->dnh", q))
    np.testing.assert_array_equal(
        out["layers/x/kv"][2, 1], w["layers.2.x.v.weight"].reshape(2, 3, 6).transpose(0, 2, 1)
    )
    np.testing.assert_array_equal(out["both"], np.stack([w["b"], w["a"]]))
    np.testing.assert_array_equal(out["norm_0.weight"], w["norms.0.scale"])


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.fixed_dictionaries({k: st.integers(1, 4) for k in ("v", "d", "p", "n", "h", "l")}),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
)
def test_there_and_back_is_bit_equal(sizes, dtype):
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    rows = tuple(bind(ROWS, {**sizes, "e": "x"}))
    w = weights(rows, kind)
    there = to_other(rows, w)
    assert {n: a.shape for n, a in there.items()} == other_shapes(rows)
    back = to_torch(rows, there)
    assert list(back) == list(shapes(rows))
    for name, a in w.items():
        assert back[name].dtype == kind and back[name].flags.c_contiguous
        assert back[name].tobytes() == a.tobytes()


def test_all_faults_are_listed_at_once():
    rows = tuple(bind(ROWS, SIZES))
    found = shapes(rows)
    del found["a"], found["layers.1.x.q.bias"]
    found["stray.weight"] = (3,)
    found["b"] = (5,)
    with pytest.raises(StoreError) as error:
        cover(shapes(rows), found, "the file", fix="get another")
    text = str(error.value)
    assert "2 missing, 1 unknown, 1 of a wrong shape" in text
    for part in (
        "layers.1.x.q.bias (6,)",
        "missing      a (6,)",
        "stray.weight (3,)",
        "b (5,), expected (6,)",
        "get another",
    ):
        assert part in text


def test_nothing_is_converted_from_incomplete_weights():
    rows = tuple(bind(ROWS, SIZES))
    w = weights(rows)
    there = to_other(rows, w)
    with pytest.raises(StoreError, match="missing      position"):
        to_other(rows, {n: a for n, a in w.items() if n != "position"})
    with pytest.raises(StoreError, match="unknown      extra"):
        to_torch(rows, {**there, "extra": np.zeros(2)})
    with pytest.raises(StoreError, match="wrong shape  both"):
        to_torch(rows, {**there, "both": np.zeros((3, 6))})


def test_a_table_with_a_hole_is_the_tables_fault():
    rows = tuple(bind((Row("a", "both[1]", "d"),), {"d": 2}))
    with pytest.raises(PartError, match="holes"):
        to_other(rows, {"a": np.zeros(2)})


def test_letters_must_agree():
    with pytest.raises(PartError, match="same letters"):
        Row("a", "b", "x y -> y z", {"x": 1, "y": 1, "z": 1}).shape(0)
