"""Frames of openpi's protocol: msgpack with numpy arrays, read strictly. Server and client both use this file.

Written frames are byte for byte those of openpi-client's `msgpack_numpy`. Reading differs: openpi gives what comes to
numpy as it is, where a 53-byte frame with dtype "|O" ends the process and a 43-byte one takes 2 GB. Here a frame is
measured before anything is built from it, and an array needs one of twelve dtypes and exactly as many bytes as its
shape says. A frame that is read costs at most three times its size in memory.
"""

from __future__ import annotations

import struct
from typing import Any

import msgpack
import numpy as np

# What an array may be: little-endian numbers and booleans. Never objects, structures, strings or dates.
DTYPES = {
    "|b1": 1, "|u1": 1, "|i1": 1, "<u2": 2, "<i2": 2, "<u4": 4, "<i4": 4, "<u8": 8, "<i8": 8,
    "<f2": 2, "<f4": 4, "<f8": 8,
}  # fmt: skip
MAX_FRAME = 16 * 2**20  # bytes
MAX_DEPTH = 8  # lists and maps inside each other
MAX_ITEMS = 20_000  # values in a frame; an array is a handful of them, whatever its size
MAX_AXES = 8

_ARRAY, _SCALAR = "__ndarray__", "__npgeneric__"
_SIZES = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_BYTES = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I", 0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
_LISTS, _MAPS = {0xDC: ">H", 0xDD: ">I"}, {0xDE: ">H", 0xDF: ">I"}


class FrameError(ValueError):
    """Bytes that are no frame of this protocol; the message is one short line."""


def pack(value: Any) -> bytes:
    """The frame of a value: dicts, lists, str, bytes, numbers, None, numpy arrays and scalars.

    Raises:
        ValueError: an array of objects, structures or complex numbers.
        TypeError: anything else that has no frame.
    """
    return msgpack.packb(value, default=_pack_array)


def _pack_array(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "VOc":
        raise ValueError(f"an array of dtype {value.dtype} cannot be sent")
    if isinstance(value, np.ndarray):
        return {
            b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape,
        }  # fmt: skip
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"a {type(value).__name__} cannot be sent")


def unpack(data: Any, max_frame: int | None = None) -> Any:
    """The value of a frame; arrays are read-only views of its bytes.

    Raises:
        FrameError: it is no frame of this protocol, or beyond a limit.
    """
    if isinstance(data, str):
        raise FrameError("a text frame; observations are binary")
    limit = MAX_FRAME if max_frame is None else max_frame
    if len(data) > limit:
        raise FrameError(f"{len(data)} bytes, at most {limit} are read")
    data = bytes(data)
    _measure(data)
    try:
        return msgpack.unpackb(data, object_pairs_hook=_map, strict_map_key=False)
    except FrameError:
        raise
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise FrameError(f"no msgpack: {type(error).__name__}") from None


def _measure(data: bytes) -> None:
    """Walk over the frame without building anything: depth, number of values, lengths, nothing left over."""
    at, end, items = 0, len(data), 0
    left = [1]  # values still to come, per open list or map
    while left:
        if not left[-1]:
            left.pop()
            continue
        left[-1] -= 1
        items += 1
        if items > MAX_ITEMS:
            raise FrameError(f"more than {MAX_ITEMS} values")
        if at >= end:
            raise FrameError("it ends too early")
        head = data[at]
        at += 1
        inside = -1
        if head <= 0x7F or head >= 0xE0 or head in (0xC0, 0xC2, 0xC3):
            continue
        if head in _SIZES:
            at += _SIZES[head]
        elif 0xA0 <= head <= 0xBF:
            at += head & 31
        elif head in _BYTES:
            at, length = _length(data, at, _BYTES[head])
            at += length
        elif 0x80 <= head <= 0x8F:
            inside = 2 * (head & 15)
        elif 0x90 <= head <= 0x9F:
            inside = head & 15
        elif head in _MAPS:
            at, length = _length(data, at, _MAPS[head])
            inside = 2 * length
        elif head in _LISTS:
            at, inside = _length(data, at, _LISTS[head])
        else:
            raise FrameError(f"msgpack type 0x{head:02x} is not used here")
        if at > end or inside > end - at:
            raise FrameError("it ends too early")
        if inside >= 0:
            left.append(inside)
            if len(left) > MAX_DEPTH + 1:
                raise FrameError(f"deeper than {MAX_DEPTH} levels")
    if at != end:
        raise FrameError(f"{end - at} bytes too many")


def _length(data: bytes, at: int, code: str) -> tuple:
    size = struct.calcsize(code)
    if at + size > len(data):
        raise FrameError("it ends too early")
    return at + size, struct.unpack_from(code, data, at)[0]


def _map(pairs: list) -> Any:
    if not all(isinstance(key, (str, bytes)) for key, _ in pairs):
        raise FrameError("the keys of a map are text")
    table = dict(pairs)
    if len(table) != len(pairs):
        raise FrameError("a key comes twice")
    for mark, build in ((_ARRAY, _array), (_SCALAR, _scalar)):
        if mark in table or mark.encode() in table:
            plain = {key.decode("ascii", "replace") if isinstance(key, bytes) else key: v for key, v in table.items()}
            return build(plain)
    if any(isinstance(key, bytes) for key in table):
        raise FrameError("the keys of a map are text")
    return table


def _array(table: dict) -> np.ndarray:
    if set(table) != {_ARRAY, "data", "dtype", "shape"}:
        raise FrameError("an array has data, dtype and shape")
    data, shape = table["data"], table["shape"]
    size = _itemsize(table["dtype"])
    if not isinstance(data, bytes) or not isinstance(shape, list):
        raise FrameError("an array has bytes and a list of sizes")
    if len(shape) > MAX_AXES or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise FrameError(f"an array has at most {MAX_AXES} sizes, none negative")
    for n in shape:
        size *= n
    if size != len(data):
        raise FrameError(f"an array of {size} bytes came with {len(data)}")
    if not size:  # frombuffer refuses no bytes, and numpy multiplies the sizes that are not 0
        if np.prod([float(n) for n in shape if n]) >= 2**31:
            raise FrameError("an empty array has absurd sizes")
        return np.zeros(shape, table["dtype"])
    return np.frombuffer(data, table["dtype"]).reshape(shape)


def _scalar(table: dict) -> np.generic:
    if set(table) != {_SCALAR, "data", "dtype"} or not isinstance(table["data"], (bool, int, float)):
        raise FrameError("a scalar has a number and a dtype")
    value, dtype = table["data"], table["dtype"]
    _itemsize(dtype)
    kind = dtype[1]
    if kind in "iu":
        info = np.iinfo(dtype)
        fits = type(value) is int and info.min <= value <= info.max
    else:
        fits = type(value) in ((bool,) if kind == "b" else (int, float))
    if not fits:
        raise FrameError(f"a scalar is no {dtype}")
    with np.errstate(over="ignore"):  # infinite then, and observations have to be finite
        return np.dtype(dtype).type(value)


def _itemsize(dtype: Any) -> int:
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FrameError(f"dtype {str(dtype)[:12]!r}: an array has numbers or booleans")
    return DTYPES[dtype]
