"""When the pictures of a video file are shown, read from its tables and not from its pictures.

An mp4 file lists all its pictures at one place (ISO 14496-12: `moov`, with `stts` for the decoding times, `ctts` for
what is shown later than decoded, `elst` for where the clock starts). Reading that takes a tenth of a millisecond, where
opening a file with FFmpeg decodes some pictures: thousands of files are checked when a dataset is opened. Whatever is
not plain in a file (fragments, several edits, another container) is left to PyAV.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from attrs import frozen

from vla.errors import DataError
from vla.reading import MB, open_file

MOST_MOOV, MOST_BOXES, MOST_PICTURES = 256 * MB, 4096, 50_000_000


@frozen
class Film:
    """What a video file says of itself, in seconds of its own clock."""

    start: float  # its first picture
    last: float  # its last picture
    end: float  # the end of the last picture
    frames: int  # 0: it does not say
    rate: float  # pictures a second, on average
    times: np.ndarray | None = None  # of each picture, rising; None: only decoding would tell


class CutOff(ValueError):
    """The file ends before its last picture does."""


def films_of(paths: Iterable[Path]) -> dict[Path, Film | str]:
    """What the files of a camera say of themselves, or why they cannot be read ("missing" or another reason).

    Decodes nothing, but the first file is opened with PyAV to see whether it holds pictures.

    Raises:
        DataError: it holds measurements of more than 8 bits instead.
    """
    paths = list(paths)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 2)) as pool:
        found = dict(zip(paths, pool.map(_film, paths), strict=True))
    first = next((path for path in paths if isinstance(found[path], Film)), None)
    if first is not None and isinstance(opened := opened_film(first), str):
        found[first] = opened
    return found


def _film(path: Path) -> Film | str:
    try:
        film = listed_film(path)
    except CutOff as error:
        return str(error)
    except FileNotFoundError:
        return "missing"
    except (DataError, OSError) as error:
        return str(error).splitlines()[0]
    return film or opened_film(path)


# ---- by the tables of an mp4 file -----------------------------------------------------------------------------------


def listed_film(path: Path) -> Film | None:
    """What the tables of an mp4 file say; None: it is no such file, or not a plain one.

    Raises:
        FileNotFoundError: it is not there.
        DataError: it is a folder, a pipe or a device.
        CutOff: it ends before its last picture.
    """
    size = os.stat(path).st_size
    with open_file(path, DataError) as file:
        moov = _moov(file, size)
    try:
        return None if moov is None else _read(moov, size)
    except CutOff:
        raise
    except (struct.error, ValueError, LookupError, OverflowError):  # a table that is not as the standard says
        return None


def _moov(file: BinaryIO, size: int) -> bytes | None:
    at = 0
    for _ in range(MOST_BOXES):
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            return None
        length, kind, body = int.from_bytes(head[:4], "big"), head[4:8], 8
        if length == 1:
            length, body = int.from_bytes(head[8:16], "big"), 16
        length = length or size - at
        if length < body:
            return None
        if kind == b"moov":
            if length > MOST_MOOV or at + length > size:
                return None
            file.seek(at + body)
            return file.read(length - body)
        at += length
    return None


def _boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """(kind, content) of the boxes within a box."""
    at = 0
    for _ in range(MOST_BOXES):
        if at + 8 > len(data):
            return
        length, kind = int.from_bytes(data[at : at + 4], "big"), bytes(data[at + 4 : at + 8])
        if length < 8 or at + length > len(data):
            raise ValueError("a box that is longer than what it is in")
        yield kind, data[at + 8 : at + length]
        at += length


def _inside(data: memoryview, *kinds: bytes) -> memoryview:
    """The first box of each kind within the one before."""
    for kind in kinds:
        data = next((content for k, content in _boxes(data) if k == kind), memoryview(b""))
        if not len(data):
            raise ValueError(f"no {kind!r}")
    return data


def _numbers(table: memoryview, columns: int, kind: str = ">u4") -> np.ndarray:
    """A table of version, flags, count and rows of numbers: int64 [n columns]."""
    count = int.from_bytes(table[4:8], "big")
    row = columns * np.dtype(kind).itemsize
    if 8 + count * row > len(table):
        raise ValueError("a table that is longer than its box")
    return np.frombuffer(table[8 : 8 + count * row], kind).reshape(count, columns).astype(np.int64)


def _read(moov: bytes, size: int) -> Film | None:
    whole = memoryview(moov)
    boxes = list(_boxes(whole))
    if any(kind == b"mvex" for kind, _ in boxes):
        return None  # fragments: the tables are all over the file
    trak = next((t for k, t in boxes if k == b"trak" and _inside(t, b"mdia", b"hdlr")[8:12] == b"vide"), None)
    if trak is None:
        return None
    seconds, movie = _clock(_inside(trak, b"mdia", b"mdhd")), _clock(_inside(whole, b"mvhd"))
    table = {kind: content for kind, content in _boxes(_inside(trak, b"mdia", b"minf", b"stbl"))}
    sizes = table[b"stsz"] if b"stsz" in table else memoryview(b"")
    count = int.from_bytes(sizes[8:12], "big")
    steps = _numbers(table.get(b"stts", memoryview(b"")), 2)
    if not 0 < count <= MOST_PICTURES or steps[:, 0].sum() != count or seconds <= 0 or movie <= 0:
        return None
    _check_whole(table, sizes, count, size)
    delta = np.repeat(steps[:, 1], steps[:, 0])
    shown = np.cumsum(delta) - delta
    if b"ctts" in table:
        later = _numbers(table[b"ctts"], 2)
        if later[:, 0].sum() != count:
            return None
        shown = shown + np.repeat(later[:, 1].astype(np.int32), later[:, 0])  # as FFmpeg reads both versions
    shown = np.sort(shown)
    shift, until = _edit(trak, movie, seconds)
    times = shown / seconds + shift
    step = float(delta[-1]) / seconds or (float(np.median(np.diff(times))) if count > 1 else 0.0)
    end = float(times[-1]) + step
    if times[0] < -1e-6 or (until is not None and until < end - step / 2) or end <= times[0]:
        return None  # pictures that are there but not shown
    return Film(float(times[0]), float(times[-1]), end, count, count / (end - float(times[0])), times)


def _clock(header: memoryview) -> int:
    """The ticks a second of mvhd or mdhd."""
    at = 20 if header[0] == 1 else 12
    return int.from_bytes(header[at : at + 4], "big")


def _edit(trak: memoryview, movie: int, ticks: int) -> tuple[float, float | None]:
    """(seconds by which pictures are shown later, when that ends) of one edit, perhaps after an empty one."""
    edts = next((content for kind, content in _boxes(trak) if kind == b"edts"), None)
    if edts is None:
        return 0.0, None
    elst = _inside(edts, b"elst")
    form = ">QqI" if elst[0] == 1 else ">IiI"
    width, count = struct.calcsize(form), int.from_bytes(elst[4:8], "big")
    edits = [struct.unpack_from(form, elst, 8 + i * width) for i in range(min(count, 3))]
    wait = 0.0
    if len(edits) == 2 and edits[0][1] == -1:
        wait = edits[0][0] / movie
        edits = edits[1:]
    if len(edits) != 1 or count > 2 or edits[0][1] < 0 or edits[0][2] != 1 << 16:
        raise ValueError("several edits")
    length, begin, _ = edits[0]
    return wait - begin / ticks, wait + length / movie if length else None


def _check_whole(table: dict[bytes, memoryview], sizes: memoryview, count: int, size: int) -> None:
    """Refuse a file that ends before its last chunk of pictures."""
    places = _numbers(table[b"co64"], 1, ">u8") if b"co64" in table else _numbers(table[b"stco"], 1)
    each = int.from_bytes(sizes[4:8], "big")
    last = int(_numbers(table[b"stsc"], 3)[-1, 1])
    length = each * last if each else int(np.frombuffer(sizes[12 : 12 + 4 * count], ">u4")[-last:].sum())
    if int(places[-1, 0]) + length > size:
        raise CutOff(f"it is cut off: {size} bytes, its last picture ends at {int(places[-1, 0]) + length}")


# ---- by PyAV --------------------------------------------------------------------------------------------------------


def opened_film(path: Path) -> Film | str:
    """What PyAV says of a file, or why it cannot be opened.

    Raises:
        DataError: it does not hold pictures but measurements.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                return "it has no video stream"
            stream = container.streams.video[0]
            kind = stream.codec_context.format
            if is_measurement(kind):
                raise DataError(
                    "a video has more than 8 bits in its only channel: no pictures, but depth or another measurement",
                    field=str(path), got=kind.name, expected="pictures in colour, or 8 bits of grey",
                    fix="leave this camera out: --set 'data.cameras=[...]' with the others",
                )  # fmt: skip
            base = float(stream.time_base)
            if stream.duration is not None:
                start, length = (stream.start_time or 0) * base, stream.duration * base
            elif container.duration is not None:
                start, length = (container.start_time or 0) / av.time_base, container.duration / av.time_base
            else:
                return "it does not say how long it is"
            rate = float(stream.average_rate or 0) or (stream.frames / length if length else 0)
            if rate <= 0 or length <= 0:
                return "it does not say how many pictures it has"
            # In some files the last picture has no length: the end is where it begins.
            return Film(start, start + length, start + length, stream.frames, rate)
    except FileNotFoundError:
        return "missing"
    except (av.FFmpegError, OSError, ValueError) as error:
        if is_pointer(path):
            return "a git-lfs pointer: run `git lfs pull`"
        return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def is_measurement(kind: av.VideoFormat | None) -> bool:
    """Whether a pixel format has one channel of more than 8 bits, as depth has."""
    return kind is not None and len(kind.components) == 1 and kind.components[0].bits > 8


def is_pointer(path: Path) -> bool:
    """Whether a file stands for one that git-lfs has not brought."""
    with open(path, "rb") as stream:
        return stream.read(40).startswith(b"version https://git-lfs")
