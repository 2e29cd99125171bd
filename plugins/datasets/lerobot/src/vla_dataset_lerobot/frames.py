"""The columns of a LeRobotDataset: numbers in memory, images read when asked for."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from attrs import frozen

from vla.errors import DataError
from vla_dataset_lerobot.choice import advice, leave_out, written
from vla_dataset_lerobot.meta import Meta, damaged, open_parquet

SIXTEEN_BIT = ("I", "F")  # beginnings of Pillow's modes of more than 8 bits a channel

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_ROWS_PER_BYTE = 8  # frames: numbers that differ in every row take more than a bit each


@frozen
class Groups:
    """The row groups of all data files, in order: the unit in which parquet is read."""

    starts: np.ndarray  # [G + 1] first row of each, and the end
    file: np.ndarray  # [G] index into `Meta.data_files`
    number: np.ndarray  # [G] its number within the file

    def place(self, files: Sequence[Path], row: int) -> tuple[Path, int]:
        """(file, row within it) of a row of all files."""
        at = int(self.file[np.searchsorted(self.starts, row, side="right") - 1])
        return files[at], int(row - self.starts[np.searchsorted(self.file, at)])


@frozen
class Frames:
    """The numbers of the chosen episodes, row after row as they are stored."""

    episode: np.ndarray  # int64 [n] the number of the episode that each belongs to
    rows: np.ndarray  # int64 [n] where each is in all files laid end to end
    vectors: dict[str, np.ndarray]  # float32 [n d]
    scalars: dict[str, np.ndarray]  # [n]; a column that no file has is not in it
    texts: list[str | None]  # the instructions of the column `text`, which is in `scalars` as indices
    groups: Groups

    def ordered(self, order: np.ndarray) -> Frames:
        """The same frames in another order."""
        return Frames(
            self.episode[order], self.rows[order], {k: v[order] for k, v in self.vectors.items()},
            {k: v[order] for k, v in self.scalars.items()}, self.texts, self.groups,
        )  # fmt: skip


def schema_of(meta: Meta) -> pa.Schema:
    """The columns of the first data file."""
    with open_parquet(meta.data_files[0]) as parquet:
        return parquet.schema_arrow


def is_numeric(kind: pa.DataType) -> bool:
    """Whether a column of this type holds numbers or lists of them."""
    while _is_list(kind):
        kind = kind.value_type
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds texts (or lists of them)."""
    while _is_list(kind):
        kind = kind.value_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def read_frames(
    meta: Meta, vectors: Sequence[str], scalars: Sequence[str], text: str = "", images: Sequence[str] = ()
) -> Frames:
    """The named columns of the chosen episodes, without touching the others.

    Args:
        vectors: columns of lists of numbers (or of one number).
        scalars: columns of one number; those that no file has are left out of the result.
        text: one of `scalars` that may hold texts: these are numbered as they come.
        images: columns that must be there and are not read.

    Raises:
        DataError: a column is missing, or ragged, or not of numbers; or a row belongs to no episode of the dataset.
    """
    wanted = list(dict.fromkeys((*vectors, *scalars, "episode_index")))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
    rows: list[np.ndarray] = []
    texts: dict[str | None, int] = {}
    lacking: dict[str, str] = {}  # column -> the file without it, and its first episode
    spelled: set[bool] = set()  # whether the instructions are texts
    starts, files, numbers = [0], [], []
    for at, file in enumerate(meta.data_files):
        first = starts[-1]
        with open_parquet(file) as parquet:
            have = parquet.schema_arrow.names
            if missing := [name for name in (*vectors, *images) if name not in have]:
                raise DataError("a file of the dataset lacks a column", field=f"{file}: {missing[0]}", expected=have,
                                fix="copy the file again, or choose other columns or cameras")  # fmt: skip
            if double := [name for name in wanted if have.count(name) > 1]:
                raise DataError("a column is in the file twice", field=f"{file}: {double[0]}", fix="write it once")
            _check_rows(parquet.metadata.num_rows, file)
            try:
                table = parquet.read([name for name in wanted if name in have])
            except (OSError, pa.ArrowException) as error:
                raise damaged(file, error) from error
            for g in range(parquet.metadata.num_row_groups):
                starts.append(starts[-1] + parquet.metadata.row_group(g).num_rows)
                files.append(at)
                numbers.append(g)
        table, mine, kept = _chosen(meta, table, file, at)
        if not len(kept):
            continue
        lacking |= {name: f"{file}: {name} (episode {mine[0]})" for name in wanted if name not in have}
        parts["episode_index"].append(mine)
        rows.append(first + kept)
        for name in table.column_names:
            where = f"{file}: {name}"
            if name in vectors:
                parts[name].append(_vectors(table[name], where))
                if parts[name][0].shape[1] != parts[name][-1].shape[1]:
                    raise DataError(
                        "a column is not as wide in one file as in another", field=where,
                        got=f"{parts[name][-1].shape[1]} numbers", expected=f"{parts[name][0].shape[1]}, as before",
                        fix=advice("record these episodes again", leave_out(np.unique(mine), len(meta.numbers))),
                    )  # fmt: skip
            elif name == text and is_text(table.schema.field(name).type):
                spelled.add(True)
                parts[name].append(_numbered(table[name], where, mine, texts))
            elif name != "episode_index":
                if name == text:
                    spelled.add(False)
                parts[name].append(_scalars(table[name], where))
            if len(spelled) > 1:
                raise DataError(
                    "a column holds texts in one file and numbers in another", field=where, got=str(table[name].type),
                    expected="texts in all files, or numbers of tasks", fix=advice("repair it", *_task_advice(True)),
                )  # fmt: skip
    if not rows:
        raise DataError(
            "data/ has no frame of these episodes", field=str(meta.root), got=f"episodes {_some(meta.numbers)}",
            fix="copy the folder data/ completely",
        )  # fmt: skip
    for name, where in lacking.items():
        if parts[name] and name != "episode_index":
            raise DataError(
                "a column is missing in one of the files", field=where, got="no such column",
                expected="the columns of the other files",
                fix=advice("copy the file again", *_task_advice(name == text)),
            )  # fmt: skip
    columns = {name: np.concatenate(chunks) for name, chunks in parts.items() if chunks}
    return Frames(
        columns.pop("episode_index"), np.concatenate(rows), {name: columns[name] for name in vectors},
        {name: columns[name] for name in scalars if name in columns}, list(texts),
        Groups(np.array(starts), np.array(files), np.array(numbers)),
    )  # fmt: skip


def _task_advice(needed: bool) -> list[str]:
    return ["or give one instruction for all: --set data.prompt='...'"] if needed else []


def _check_rows(rows: int, file: Path) -> None:
    """Equal rows shrink to nothing, so that a file of kilobytes can stand for more than fits into memory."""
    size = file.stat().st_size
    if rows > 1_000_000 and rows > MOST_ROWS_PER_BYTE * size:
        raise DataError(
            "a parquet file claims far more frames than it can hold", field=str(file), got=f"{rows:,} frames",
            expected=f"a recording; the file has {size:,} bytes", fix="copy it again from where it came from",
        )  # fmt: skip


def _chosen(meta: Meta, table: pa.Table, file: Path, at: int) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """The rows of the chosen episodes, their episode numbers, and their places in the file."""
    if "episode_index" in table.column_names:
        mine = whole(_scalars(table["episode_index"], f"{file}: episode_index"), f"{file}: episode_index")
    elif meta.files_of is not None:
        mine = np.full(len(table), meta.files_of[at], np.int64)  # v2: the file is of one episode
    elif len(meta.known) == 1:
        mine = np.full(len(table), meta.known[0], np.int64)
    else:
        raise DataError(
            "the frames do not say which episode they belong to", field=f"{file}: episode_index", got="no such column",
            fix="add the column, or record again",
        )  # fmt: skip
    place = np.minimum(np.searchsorted(meta.known, mine), len(meta.known) - 1)
    if (strange := meta.known[place] != mine).any():
        row = int(np.argmax(strange))
        raise DataError(
            "a frame belongs to an episode that the metadata does not list",
            field=f"{file}: episode_index in row {row}", got=int(mine[row]),
            expected=f"one of {_some(meta.known)}, the episodes in meta/",
            fix="meta/ and data/ are not of one dataset: copy both again",
        )  # fmt: skip
    keep = np.isin(mine, meta.numbers) if len(meta.known) != len(meta.numbers) else np.ones(len(mine), bool)
    if keep.all():
        return table, mine, np.arange(len(mine))
    return table.filter(pa.array(keep)), mine[keep], np.flatnonzero(keep)


def _some(numbers: np.ndarray) -> str:
    text = written(numbers)
    return text if len(text) < 200 else f"{numbers[0]} to {numbers[-1]}"


def whole(values: np.ndarray, where: str) -> np.ndarray:
    """Whole numbers, which some writers store as floats, as int64.

    Raises:
        DataError: one is not whole.
    """
    if values.dtype.kind in "iu":
        return values.astype(np.int64)
    first, real = values[:1].tolist(), values.dtype.kind == "f"
    values = values.astype(np.float64)  # a half would overflow below
    with np.errstate(invalid="ignore"):
        odd = ~(np.floor(values) == values) | ~(np.abs(values) < 2**53) if real else None
    if odd is None or odd.any():
        row = 0 if odd is None else int(np.argmax(odd))
        raise DataError(
            "an index is not a whole number", field=f"{where} in row {row}",
            got=first[0] if odd is None and first else float(values[row]),
            fix="repair the column, or drop this episode",
        )  # fmt: skip
    return values.astype(np.int64)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    return array.storage if isinstance(array, pa.ExtensionArray) else array


def _numbers(array: pa.Array, where: str) -> tuple[np.ndarray, bool]:
    """All numbers of an array of lists (of lists ...) in a row, and whether each row holds as many as the others."""
    even, kind = True, array.type
    while _is_list(array.type):
        if array.null_count:
            even = False
        elif not pa.types.is_fixed_size_list(array.type) and len(array):
            widths = np.diff(array.offsets.to_numpy())
            even = even and bool((widths == widths[0]).all())
        array = array.flatten()
    if not (is_numeric(array.type) or pa.types.is_decimal(array.type) or not len(array)):
        raise DataError("a column does not hold numbers", field=where, got=str(kind), fix="choose another column")
    return array.to_numpy(zero_copy_only=False), even


def _vectors(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """A column of lists of numbers as float32 [n d]."""
    rows = len(column)
    flat, even = _numbers(_one_array(column), where)
    with np.errstate(over="ignore"):
        values = np.asarray(flat, np.float32)
    if rows and (not even or values.size % rows or not values.size):
        raise DataError(
            "the rows of a column differ in width, or some are empty",
            field=where,
            got=f"{values.size} values in {rows} rows",
            fix="repair or drop these rows",
        )
    return values.reshape(rows, values.size // rows if rows else 1)


def _scalars(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """A column of one number a row, which some writers wrap into lists of one."""
    values, even = _numbers(_one_array(column), where)
    if len(values) != len(column) or not even:
        raise DataError(
            "a column holds lists where one number a frame is meant", field=where,
            got=f"{len(values)} values in {len(column)} rows", fix="repair the column",
        )  # fmt: skip
    return values


def _numbered(column: pa.ChunkedArray, where: str, episode: np.ndarray, texts: dict[str | None, int]) -> np.ndarray:
    """A column of texts (or lists of one) as indices into `texts`, to which new ones are added."""
    array = _one_array(column)
    while _is_list(array.type):
        count = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        if (count != 1).any():
            row = int(np.argmax(count != 1))
            raise DataError(
                "an instruction is a list of several, or of none",
                field=f"{where} in row {row} (episode {episode[row]})",
                got=str(array[row].as_py())[:160], expected="one text a frame",
                fix=advice("choose another column", *_task_advice(True)),
            )  # fmt: skip
        array = array.flatten()
    coded = array if pa.types.is_dictionary(array.type) else pc.dictionary_encode(array, null_encoding="encode")
    if coded.indices.null_count:
        return np.array([texts.setdefault(word, len(texts)) for word in array.to_pylist()], np.int64)
    numbers = np.array([texts.setdefault(word, len(texts)) for word in coded.dictionary.to_pylist()], np.int64)
    return numbers[coded.indices.to_numpy()]


def check_finite(frames: Frames, meta: Meta) -> None:
    """Refuse states and actions with a value that is not finite.

    Raises:
        DataError: names column, file, row and episode.
    """
    for name, values in frames.vectors.items():
        good = np.isfinite(values).all(1)
        if good.all():
            continue
        at = int(np.argmin(good))
        dim = int(np.argmin(np.isfinite(values[at])))
        file, row = frames.groups.place(meta.data_files, int(frames.rows[at]))
        bad = np.unique(frames.episode[~good])
        raise DataError(
            "the dataset holds a value that is not finite",
            field=f"{file}: {name}[{dim}] in row {row} (episode {frames.episode[at]})", got=float(values[at, dim]),
            fix=advice("drop or repair this frame", leave_out(bad, len(meta.numbers))),
        )  # fmt: skip


class ImageColumns:
    """Images stored as PNG or JPEG bytes in parquet columns.

    Reads one row group of one camera at a time and keeps the encoded bytes of those used last, up to a limit, so that
    walking through episodes or staying within a small dataset reads each file once. Shared by threads.
    """

    def __init__(self, meta: Meta, groups: Groups, cache_mb: int):
        self._meta, self._groups, self._limit = meta, groups, cache_mb * 2**20
        self._kept: OrderedDict[tuple[int, str], pa.Array] = OrderedDict()
        self._footers: dict[Path, pq.FileMetaData] = {}
        self._size = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> tuple[Meta, Groups, int]:
        return self._meta, self._groups, self._limit // 2**20

    def __setstate__(self, state: tuple[Meta, Groups, int]) -> None:
        self.__init__(*state)

    def frame(self, key: str, row: int, what: str, way_out: str) -> np.ndarray:
        """uint8 [h w 3] of a row of all files; `what` and `way_out` are for messages.

        Raises:
            DataError: it cannot be decoded, or has more than 8 bits a channel.
        """
        from PIL import Image, UnidentifiedImageError

        group = int(np.searchsorted(self._groups.starts, row, side="right")) - 1
        data = self._column(group, key)[row - int(self._groups.starts[group])]
        file = self._meta.data_files[self._groups.file[group]]
        try:
            if not data.is_valid:
                raise ValueError("it has no bytes")
            # Others start programs (EPS) or are what no camera writes.
            with Image.open(io.BytesIO(data.as_buffer()), formats=FORMATS) as image:
                declared = self._meta.size(key)
                if (image.height, image.width) != declared:  # before a pixel is decoded
                    raise DataError(
                        "an image is not of the size that the dataset declares", field=f"{file}: {key} of {what}",
                        got=f"{image.height} x {image.width}", expected=f"{declared[0]} x {declared[1]}",
                        fix=advice("correct the shape in meta/info.json, if all pictures are so", way_out),
                    )  # fmt: skip
                if image.mode.startswith(SIXTEEN_BIT):
                    raise DataError(
                        "an image has more than 8 bits a channel: it is no picture, but depth or another measurement",
                        field=f"{file}: {key} of {what}", got=f"mode {image.mode}", expected="8 bits a channel",
                        fix="leave this camera out: --set 'data.cameras=[...]' with the others",
                    )  # fmt: skip
                return np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            got = "no image of a known format" if isinstance(error, UnidentifiedImageError) else str(error)[:160]
            raise DataError("an image cannot be decoded", field=f"{file}: {key} of {what}", got=got,
                            fix=advice("repair this episode", way_out)) from error  # fmt: skip

    def _column(self, group: int, key: str) -> pa.Array:
        with self._lock:
            if (group, key) in self._kept:
                self._kept.move_to_end((group, key))
                return self._kept[group, key]
        file = self._meta.data_files[self._groups.file[group]]
        with open_parquet(file, self._footers.get(file)) as parquet:
            self._footers[file] = parquet.metadata
            if key not in parquet.schema_arrow.names:
                raise DataError(
                    "a camera's column is missing",
                    field=f"{file}: {key}",
                    expected=f"any of {parquet.schema_arrow.names}",
                )
            nested = pa.types.is_struct(parquet.schema_arrow.field(key).type)
            try:
                table = parquet.read_row_group(
                    int(self._groups.number[group]), columns=[f"{key}.bytes" if nested else key], use_threads=False
                )
            except (OSError, pa.ArrowException) as error:
                raise damaged(file, error) from error
        column: Any = _one_array(table[key])
        if nested:
            column = column.field("bytes")
        with self._lock:
            if (group, key) not in self._kept:
                self._kept[group, key] = column
                self._size += column.nbytes
            while self._size > self._limit and len(self._kept) > 1:
                self._size -= self._kept.popitem(last=False)[1].nbytes
        return column
