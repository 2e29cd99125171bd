"""Files that anybody may have written: read within limits, or refused with one error.

Model directories, datasets and checkpoints come from strangers. Everything of theirs that is parsed goes through here:
a pipe or a device is not opened, a file larger than its kind ever is is not read, nesting is bounded, text is UTF-8
whatever the locale, and whatever is wrong becomes one `VlaError` that names the file.

Parsed text takes up to about 30 times its bytes in memory, which is where the limits of JSON and TOML come from.
Importing this module imports no array library.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from vla.errors import StoreError, VlaError

if TYPE_CHECKING:
    import numpy as np

MB = 2**20
MOST_JSON, MOST_TOML, MOST_HEADER, MOST_ARRAYS = 8 * MB, MB // 4, 16 * MB, 256 * MB
MOST_ROWS, MOST_LINE = 1_000_000, MB  # of a file with one JSON object a line
MOST_DEPTH = 64  # tables within tables
MOST_NAMES = 100_000  # arrays of one file
COPY = "copy it again from its source"
# What parsers and the code that reads their results raise when a file is not what it says it is.
FAULTS = (
    *(OSError, EOFError, ValueError, TypeError, LookupError, AttributeError),
    *(ArithmeticError, RuntimeError, MemoryError),
)
# A TOML key of many parts: the time that tomllib takes grows with their square.
_PART = r"(?:(?<![\w-])[\w-]++|\"[^\"\n]*+\"|'[^'\n]*+')"
_LONG_KEY = re.compile(rf"(?:{_PART}[ \t]*+\.[ \t]*+){{{MOST_DEPTH}}}")


def reason(fault: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(fault, RecursionError):
        return f"nested deeper than {MOST_DEPTH}"
    if isinstance(fault, OSError) and fault.strerror:
        return fault.strerror
    text = " ".join(str(fault).split())[:160]
    plain = isinstance(fault, ValueError) and text
    return text if plain else f"{type(fault).__name__}: {text}" if text else type(fault).__name__


@contextmanager
def reading(what: str, where: str | Path, error: type[VlaError] = StoreError, fix: str = COPY) -> Iterator[None]:
    """Whatever a file that is not what it says it is makes the block raise becomes one error; a `VlaError` passes.

    Args:
        what: what cannot be read ("the id map cannot be read").
        where: the file, for the message.
        error: the kind of error.
        fix: the way out.
    """
    try:
        yield
    except VlaError:
        raise
    except FAULTS as fault:
        raise error(what, field=str(where), got=reason(fault), fix=fix) from fault


def open_file(path: str | Path, error: type[VlaError] = StoreError) -> BinaryIO:
    """A regular file, open for reading. The caller closes it.

    Raises:
        `error`: it is not there, is a folder, a pipe or a device, or may not be read.
    """
    with _opening(path, error):
        _refuse_special(os.stat(path), path, error)  # to open a device or a pipe can already do something
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        try:
            _refuse_special(os.fstat(handle), path, error)  # what stood there a moment ago may have been replaced
        except VlaError:
            os.close(handle)
            raise
        return os.fdopen(handle, "rb")


def check_file(path: str | Path, error: type[VlaError] = StoreError) -> int:
    """Refuse what is no regular file, before a library opens it by name; gives its size. Raises as `open_file`."""
    with open_file(path, error) as file:
        return os.fstat(file.fileno()).st_size


@contextmanager
def _opening(path: str | Path, error: type[VlaError]) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as fault:
        fix = "copy the whole folder again from its source"
        raise error("a file is missing", field=str(path), fix=fix) from fault
    except (OSError, ValueError) as fault:  # ValueError: a zero byte in the path
        raise error("a file cannot be read", field=str(path), got=reason(fault)) from fault


def _refuse_special(status: os.stat_result, path: str | Path, error: type[VlaError]) -> None:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    if not stat.S_ISREG(status.st_mode):
        got = kinds.get(stat.S_IFMT(status.st_mode), "a special file")
        raise error("this is not a regular file", field=str(path), got=got, expected="a file")


def read_bytes(path: str | Path, most: int, error: type[VlaError] = StoreError) -> bytes:
    """All bytes of a file, at most `most`. Raises as `open_file`, and `error` for a larger one."""
    with open_file(path, error) as file, _opening(path, error):
        size = os.fstat(file.fileno()).st_size
        data = file.read(most + 1) if size <= most else b""
    if size > most or len(data) > most:
        got = f"{size:,} bytes" if size > most else f"more than {most:,} bytes"
        raise error("a file is far larger than its kind is", field=str(path), got=got, expected=f"<= {most:,} bytes")
    return data


def read_text(path: str | Path, most: int = MOST_JSON, error: type[VlaError] = StoreError) -> str:
    """The text of a UTF-8 file. Raises as `read_bytes`."""
    data = read_bytes(path, most, error)
    with reading("a file is not UTF-8 text", path, error):
        return data.decode("utf-8")


def read_json(
    path: str | Path, what: str = "a file is not valid JSON", *, most: int = MOST_JSON,
    error: type[VlaError] = StoreError, of: type = dict,
) -> Any:  # fmt: skip
    """The value in a JSON file, which must be of the type `of`; `what` is for messages. Raises as `read_bytes`."""
    return parse_json(read_text(path, most, error), path, what, error=error, of=of)


def parse_json(
    text: str | bytes, where: str | Path, what: str = "a file is not valid JSON", *,
    error: type[VlaError] = StoreError, of: type = dict,
) -> Any:  # fmt: skip
    """The value of a JSON text; `where` and `what` are for messages."""
    with reading(what, where, error):
        return checked(json.loads(text), where, what, error=error, of=of)


def read_jsonl(path: str | Path, most: int = MOST_ROWS, error: type[VlaError] = StoreError) -> Iterator[dict[str, Any]]:
    """The objects of a file with one JSON object a line, one after the other. Raises as `read_bytes`."""
    with open_file(path, error) as file:
        for number in range(1, most + 2):
            with _opening(path, error):
                line = file.readline(MOST_LINE + 1)
            if not line:
                return
            if number > most or len(line) > MOST_LINE:
                expected = f"at most {most:,} lines of {MOST_LINE:,} bytes"
                raise error("a file is far larger than its kind is", field=f"{path}:{number}", expected=expected)
            if line.strip():
                yield parse_json(line, f"{path}:{number}", error=error)


def parse_toml(
    text: str, where: str | Path, what: str = "a file is not valid TOML", *, error: type[VlaError] = StoreError
) -> dict[str, Any]:
    """The table of a TOML text; `where` and `what` are for messages."""
    import tomllib

    with reading(what, where, error, "correct it"):
        if len(text) > MOST_TOML:
            raise ValueError(f"{len(text):,} characters, at most {MOST_TOML:,} are read")
        if _LONG_KEY.search(text):
            raise RecursionError
        return checked(tomllib.loads(text), where, what, error=error)


def checked(value: Any, where: str | Path, what: str, *, error: type[VlaError] = StoreError, of: type = dict) -> Any:
    """A parsed value of the right type that is not nested beyond `MOST_DEPTH`."""
    if not isinstance(value, of):
        names = {dict: "a table", list: "a list"}
        expected = names.get(of, of.__name__)
        raise error(what, field=str(where), got=_kind(value), expected=expected)
    level = [value]
    for _ in range(MOST_DEPTH):
        inner = (child for table in level for child in (table.values() if isinstance(table, dict) else table))
        level = [child for child in inner if isinstance(child, (dict, list))]
        if not level:
            return value
    raise error(what, field=str(where), got=f"nested deeper than {MOST_DEPTH}", fix=COPY)


def _kind(value: Any) -> str:
    return {dict: "a table", list: "a list", str: "a text", type(None): "null"}.get(type(value), type(value).__name__)


# ---- arrays ---------------------------------------------------------------------------------------------------------


def read_npz(
    path: str | Path, most: int = MOST_ARRAYS, error: type[VlaError] = StoreError, only: str | None = None
) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, `most` bytes of them together, or the one named `only`; nothing is unpickled.

    Raises:
        `error`: it is not there, is no such file, or is damaged or larger.
    """
    import numpy as np

    out: dict[str, np.ndarray] = {}
    left = most
    with _npz(path, error) as archive:
        for entry in archive.infolist():
            if only not in (None, entry.filename.removesuffix(".npy")):
                continue
            with archive.open(entry) as stream:
                shape, fortran, dtype = npy_header(stream)
                size = math.prod(shape) * dtype.itemsize
                if size > left:
                    raise ValueError(f"its arrays take more than {most:,} bytes")
                left -= size
                data = stream.read(size)
            if len(data) != size:
                raise ValueError(f"{entry.filename} is cut short")
            array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
            out[entry.filename.removesuffix(".npy")] = array.copy()
    return out


def npz_shapes(path: str | Path, error: type[VlaError] = StoreError) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every array of an .npz file; no array is read. Raises as `read_npz`."""
    out = {}
    with _npz(path, error) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as stream:
                out[entry.filename.removesuffix(".npy")] = npy_header(stream)[0]
    return out


@contextmanager
def _npz(path: str | Path, error: type[VlaError]) -> Iterator[Any]:
    import zipfile
    import zlib

    with open_file(path, error) as file, reading("a file of arrays cannot be read", path, error):
        try:
            with zipfile.ZipFile(file) as archive:
                if len(archive.namelist()) > MOST_NAMES:
                    raise ValueError(f"it has more than {MOST_NAMES:,} arrays")
                yield archive
        except (zipfile.BadZipFile, zlib.error, EOFError) as fault:
            raise ValueError(f"{type(fault).__name__}: {fault}") from fault


def npy_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran order, dtype) of an array that begins here; the stream then stands at its data.

    Raises:
        ValueError: it is no array of plain numbers (or of raw pairs of bytes, as numpy stores bfloat16).
    """
    from numpy.lib import format as npy

    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(stream)
    if version not in read:
        raise ValueError(f"version {version} of the npy format")
    shape, fortran, dtype = read[version](stream)
    if dtype.kind not in "biufc" and dtype.str != "|V2":
        raise ValueError(f"an array of {dtype}, not of plain numbers")
    if len(shape) > 32 or any(n < 0 for n in shape):
        raise ValueError(f"an array of shape {shape}")
    return shape, fortran, dtype


def safetensors_header(
    path: str | Path, error: type[VlaError] = StoreError
) -> tuple[dict[str, tuple[str, tuple[int, ...], tuple[int, int]]], int]:
    """({name: (dtype as the file writes it, shape, (begin, end))}, offset of the first byte of data).

    The library checks sizes, overlaps and gaps; here the header is bounded before it is parsed.
    """
    from safetensors import SafetensorError, safe_open

    what = "the weight file is damaged or is not safetensors"
    with open_file(path, error) as file, reading(what, path, error):
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= MOST_HEADER:
            raise ValueError(f"a header of {length:,} bytes, at most {MOST_HEADER:,} are read")
        table = parse_json(file.read(length), path, what, error=error)
        try:
            with safe_open(path, framework="numpy"):
                pass
        except SafetensorError as fault:
            raise ValueError(str(fault)) from fault
        table.pop("__metadata__", None)
        rows = {name: (t["dtype"], tuple(t["shape"]), tuple(t["data_offsets"])) for name, t in table.items()}
    return rows, 8 + length
