"""The columns of a LeRobotDataset: numbers in memory, images read when asked for."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from attrs import frozen

from vla.errors import DataError
from vla_dataset_lerobot.meta import Meta, damaged, open_parquet


@frozen
class Groups:
    """The row groups of all data files, in order: the unit in which parquet is read."""

    starts: np.ndarray  # [G + 1] first frame of each, and the end
    file: np.ndarray  # [G] index into `Meta.data_files`
    number: np.ndarray  # [G] its number within the file


def read_numbers(meta: Meta, vectors: list[str], scalars: list[str]) -> tuple[dict[str, np.ndarray], Groups]:
    """The named columns over all frames, without touching the others; vectors as float32 [N d], scalars [N].

    Scalars that a file lacks are left out of the result.

    Raises:
        DataError: a vector column is missing, ragged or not finite, or the files disagree with the metadata.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*vectors, *scalars)}
    starts, files, numbers, total = [0], [], [], 0
    for at, file in enumerate(meta.data_files):
        with open_parquet(file) as parquet:
            have = parquet.schema_arrow.names
            if missing := [name for name in vectors if name not in have]:
                raise DataError("the dataset has no such column", field=f"{file}: {missing[0]}", expected=have,
                                fix="set state_key or action_key")  # fmt: skip
            try:
                table = parquet.read([name for name in parts if name in have])
            except (OSError, pa.ArrowException) as error:
                raise damaged(file, error) from error
            for g in range(parquet.metadata.num_row_groups):
                starts.append(starts[-1] + parquet.metadata.row_group(g).num_rows)
                files.append(at)
                numbers.append(g)
        for name in table.column_names:
            parts[name].append(_vectors(table[name], file, name, total) if name in vectors else table[name].to_numpy())
        total = starts[-1]
    if total != int(meta.lengths.sum()):
        raise DataError(
            "the parquet files do not hold the frames that the metadata lists",
            field=str(meta.root / "data"), got=f"{total} frames",
            expected=f"{int(meta.lengths.sum())} frames in {len(meta.lengths)} episodes",
            fix="copy the folders data/ and meta/ completely, or record again",
        )  # fmt: skip
    columns = {name: np.concatenate(chunks) for name, chunks in parts.items() if len(chunks) == len(meta.data_files)}
    return columns, Groups(np.array(starts), np.array(files), np.array(numbers))


def _vectors(column: pa.ChunkedArray, file: Path, name: str, first: int) -> np.ndarray:
    """A column of lists of numbers as float32 [n d]."""
    rows = len(column)
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    try:
        flat = array.flatten() if pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type) else array
        values = np.asarray(flat.to_numpy(zero_copy_only=False), np.float32)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise DataError("a column does not hold numbers", field=f"{file}: {name}", got=str(array.type)) from error
    if rows and (values.size % rows or _ragged(array, values.size // rows)):
        raise DataError(
            "the rows of a column differ in width, or some are empty",
            field=f"{file}: {name}",
            got=f"{values.size} values in {rows} rows",
        )
    values = values.reshape(rows, -1)
    if not np.isfinite(values).all():
        row, dim = np.argwhere(~np.isfinite(values))[0]
        raise DataError(
            "the dataset holds a value that is not finite",
            field=f"{file}: {name}[{dim}] in row {row} (frame {first + row})", got=float(values[row, dim]),
            fix="drop or repair this frame",
        )  # fmt: skip
    return values


def _ragged(array: pa.Array, width: int) -> bool:
    if array.null_count:
        return True
    return pa.types.is_list(array.type) and bool((np.diff(array.offsets.to_numpy()) != width).any())


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

    def frame(self, key: str, index: int) -> np.ndarray:
        """uint8 [h w 3]."""
        from PIL import Image

        group = int(np.searchsorted(self._groups.starts, index, side="right")) - 1
        row = index - int(self._groups.starts[group])
        column = self._column(group, key)
        data = column[row]
        file = self._meta.data_files[self._groups.file[group]]
        try:
            if not data.is_valid:
                raise ValueError("it has no bytes")
            with Image.open(io.BytesIO(data.as_buffer())) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError("an image cannot be decoded", field=f"{file}: {key} of frame {index}", got=str(error)[:160],
                            fix="drop or repair this episode") from error  # fmt: skip

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
        column = table[key].combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks)
        if nested:
            column = column.field("bytes")
        with self._lock:
            if (group, key) not in self._kept:
                self._kept[group, key] = column
                self._size += column.nbytes
            while self._size > self._limit and len(self._kept) > 1:
                self._size -= self._kept.popitem(last=False)[1].nbytes
        return column
