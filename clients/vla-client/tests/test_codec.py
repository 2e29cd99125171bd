"""Frames: byte for byte openpi's, and nothing else gets in."""

import contextlib
import json
import math
import pickle
import resource
import struct
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from vla_client import codec, wire
from vla_client.codec import FrameError, pack, unpack

FRAMES = json.loads((Path(__file__).parent / "openpi_frames.json").read_text())
VALUES = {
    "float32": {"a": np.arange(3, dtype=np.float32)},
    "scalars": {
        "f": np.float32(1.5), "d": np.float64(2.0), "i": np.int64(-3), "b": np.bool_(True), "n": None,
        "t": (1, 2.5, "x"),
    },
    "shapes": {
        "zero": np.zeros((0, 3), np.float64), "single": np.array(7, np.uint16),
        "order": np.asfortranarray(np.arange(6, dtype=np.int8).reshape(2, 3)),
    },
    "answer": {
        "actions": np.arange(6, dtype=np.float64).reshape(3, 2) / 4, "policy_timing": {"infer_ms": 12.5},
        "server_timing": {"infer_ms": 13.0, "prev_total_ms": 14.0},
    },
    "droid": {
        "observation/exterior_image_1_left": np.full((2, 2, 3), 9, np.uint8),
        "observation/joint_position": np.linspace(0, 1, 7), "observation/gripper_position": np.array([0.5]),
        "prompt": "pick up the fork",
    },
}  # fmt: skip


def same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            same(x, y)
    else:
        assert type(a) is type(b) or isinstance(a, float)
        assert a == b or (math.isnan(a) and math.isnan(b))


@pytest.mark.parametrize("name", VALUES)
def test_frames_are_those_of_openpi_client(name):
    golden = bytes.fromhex(FRAMES[name])
    assert pack(VALUES[name]) == golden
    same(VALUES[name], unpack(golden))


ARRAYS = st.sampled_from(sorted(codec.DTYPES)).flatmap(
    lambda dtype: hnp.arrays(np.dtype(dtype), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
)
LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary() | ARRAYS
KEYS = st.text().filter(lambda key: key not in ("__ndarray__", "__npgeneric__"))
TREES = st.recursive(LEAVES, lambda t: st.lists(t, max_size=4) | st.dictionaries(KEYS, t, max_size=4), max_leaves=12)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(KEYS, TREES, max_size=4))
def test_what_is_packed_is_unpacked(value):
    def depth(v):
        inner = v.values() if isinstance(v, dict) else v if isinstance(v, list) else ()
        return 1 + max(map(depth, inner), default=0) if isinstance(v, (dict, list, np.ndarray)) else 0

    frame = pack(value)
    if depth(value) >= codec.MAX_DEPTH - 1:  # an array is a map with a list
        return
    same(value, unpack(frame))


def array(dtype="<f4", data=b"\0\0\0\0", shape=(1,), **changes):
    return msgpack.packb({b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape, **changes})


BAD = {
    "empty": b"",
    "text frame": "hello",
    "pickle": pickle.dumps({"a": 1}),
    "objects": array("|O", b"\0" * 8),
    "structure": array("|V8", b"\0" * 8),
    "empty strings": array("|S0", b"", (2**40,)),
    "unicode": array("<U1"),
    "dates": array("<M8[s]", b"\0" * 8),
    "complex": array("<c8", b"\0" * 8),
    "big-endian": array(">f4"),
    "an expression": array("(2,)f4, (3)f8"),
    "dtype is a list": array([["a", "<f4"]]),
    "negative size": array(shape=(-1,)),
    "too few bytes": array(shape=(2,)),
    "too many bytes": array(data=b"\0" * 8),
    "overflow": array(shape=(2**32, 2**32)),
    "an empty array of absurd sizes": array(data=b"", shape=(0, 2**39, 2**39)),
    "nine axes": array(shape=(1,) * 9),
    "size is a float": array(shape=(1.0,)),
    "size is true": array(shape=(True,)),
    "data is text": array(data="abcd"),
    "one key more": array(**{"more": 1}),
    "memory bomb": msgpack.packb({b"__npgeneric__": True, b"data": 2**31 - 1, b"dtype": "|V1"}),
    "scalar of objects": msgpack.packb({b"__npgeneric__": True, b"data": 1, b"dtype": "|O"}),
    "scalar does not fit": msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}),
    "scalar is cut": msgpack.packb({b"__npgeneric__": True, b"data": 1.5, b"dtype": "<i4"}),
    "keys are numbers": msgpack.packb({1: 2}),
    "keys are bytes": msgpack.packb({b"a": 2}),
    "a key twice": b"\x82\xa1a\x01\xa1a\x02",
    "deep": b"\x91" * 100_000 + b"\x01",
    "a list of 4 billion": b"\xdd\xff\xff\xff\xff\x01",
    "a map of 4 billion": b"\xdf\xff\xff\xff\xff\x01",
    "4 GB of bytes": b"\xc6\xff\xff\xff\xff\x01",
    "bytes left over": pack({"a": 1}) + b"\x01",
    "cut": pack({"a": np.zeros(10)})[:-3],
    "extension": msgpack.packb(msgpack.ExtType(5, b"abc")),
    "timestamp": b"\xd6\xff\x00\x00\x00\x00",
    "reserved": b"\xc1",
    "no utf-8": b"\x81\xa1\xff\x01",
    "many values": msgpack.packb([0] * (codec.MAX_ITEMS + 1)),
}


@pytest.mark.parametrize("name", BAD)
def test_anything_else_is_refused_in_a_line(name):
    with pytest.raises(FrameError) as caught:
        unpack(BAD[name])
    assert len(str(caught.value)) < 120 and "\n" not in str(caught.value)


def test_frames_that_are_too_long_are_refused():
    with pytest.raises(FrameError, match="at most"):
        unpack(pack({"a": np.zeros(100)}), max_frame=100)


def test_nested_lengths_that_lie_cost_no_memory():
    """Every level claims a list as long as the frame: a reader that allocates what it is told needs gigabytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for filler in (b"\xc0", b"\x90"):
        with pytest.raises(FrameError):
            unpack((b"\xdd" + struct.pack(">I", 10_000_000)) * 7 + filler * 10_000_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # KiB


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(VALUES)), st.integers(0, 10**6), st.integers(0, 255), st.integers(0, 3))
def test_mutated_frames_give_a_value_or_a_frame_error(name, at, byte, how):
    frame = bytearray.fromhex(FRAMES[name])
    at %= len(frame)
    if how == 0:
        frame[at] = byte
    elif how == 1:
        del frame[at:]
    elif how == 2:
        frame[at:at] = bytes([byte])
    else:
        del frame[at]
    with contextlib.suppress(FrameError):
        unpack(bytes(frame))


@pytest.mark.parametrize("value", [np.array([object()]), np.zeros(2, "c8"), np.zeros(2, [("a", "f4")])])
def test_what_cannot_be_read_is_not_sent(value):
    with pytest.raises(ValueError):
        pack({"a": value})
    with pytest.raises(TypeError):
        pack({"a": object()})


@pytest.mark.parametrize("kind", wire.KINDS)
def test_errors_survive_the_wire(kind):
    error = wire.ServerError(kind, "why: [really]\n  two lines", retry_after_ms=12, step=7, error="ab12")
    read = wire.ServerError.read(error.line())
    assert vars(read) == vars(error)


def test_other_servers_errors_are_their_last_line():
    error = wire.ServerError.read("Traceback (most recent call last):\n  File x\nKeyError: 'state'\n")
    assert (error.kind, error.text) == ("OTHER", "KeyError: 'state'")
    assert wire.ServerError.read("").text == "an empty error"
    assert wire.ServerError.read("BUSY [retry_after_ms=x]: a").retry_after_ms is None
