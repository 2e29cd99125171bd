"""The metadata of a LeRobotDataset, v2.0, v2.1 and v3.0 brought to one form.

Layouts (LeRobot `datasets/utils.py`; dumped from files that LeRobot wrote):
v2.x: meta/{info.json, tasks.jsonl, episodes.jsonl}, one parquet and one mp4 per camera for every episode.
v3.0: meta/info.json, meta/tasks.parquet, meta/episodes/*/*.parquet; many episodes per parquet and mp4 file.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from attrs import frozen

from vla.errors import DataError
from vla.reading import MB, MOST_ROWS, check_file, read_json, read_jsonl, reading
from vla_dataset_lerobot.choice import advice, chosen, leave_out
from vla_dataset_lerobot.config import LeRobotSettings

VERSIONS = ("v2.0", "v2.1", "v3.0")
IMAGE_PREFIX = "observation.images."
MOST_PIXELS = 1 << 26  # of a picture
MOST_FOOTER = 64 * MB  # of a parquet file: its metadata, about 150 bytes for each column of each row group
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w{0,40})(?::0?([1-9]\d?)d)?\}")


@frozen
class Clip:
    """Where the frames of one episode are in a video file.

    As the metadata says: from `start` to `stop`; None: the file holds nothing else. As `pictures.place` found out: the
    frame `t` seconds after the episode's first is `start + t` seconds into the file, or at its own of the `moments`.
    """

    path: Path
    start: float
    stop: float | None
    moments: np.ndarray | None = None  # [frames] seconds, where frames count by their order


@frozen
class Meta:
    """What is known before a parquet file of frames is read; of the episodes that the settings choose."""

    root: Path
    version: str
    fps: float
    robot_type: str
    features: dict[str, dict[str, Any]]
    tasks: dict[int, Any]
    numbers: np.ndarray  # [E] the episodes' numbers, rising
    lengths: np.ndarray  # [E] frames of each
    bounds: np.ndarray | None  # [E 2] where `index` starts and ends, where the metadata says it
    known: np.ndarray  # numbers of all episodes of the dataset, rising
    data_files: list[Path]
    files_of: np.ndarray | None  # v2: [E] the number of the episode that each data file is for
    clips: dict[str, list[Clip]]  # video camera key -> one clip per episode

    def cameras(self) -> dict[str, str]:
        """Camera key -> "image" or "video", depth maps left out."""
        found = {}
        for key, feature in self.features.items():
            kind = feature.get("dtype")
            details = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
            if kind in ("image", "video") and not (details.get("is_depth_map") or details.get("video.is_depth_map")):
                found[key] = kind
        return found

    def has_files(self, key: str) -> bool:
        """Whether a camera that is stored as video has any."""
        return any(os.path.exists(path) for path in {clip.path for clip in self.clips.get(key, ())})

    def size(self, key: str) -> tuple[int, int]:
        """(height, width) of a camera."""
        shape, names = list(self.features[key].get("shape") or ()), self.names(key)
        if len(shape) != 3:
            raise DataError(
                "a camera has no size", field=f"{self.root}/meta/info.json: {key}.shape", got=shape,
                expected="[height, width, channels]", fix="write it into info.json, or choose other cameras",
            )  # fmt: skip
        channels_first = (names[0] in ("channel", "channels") if names else False) or (
            shape[0] in (1, 3) and shape[2] > 4
        )
        return (int(shape[1]), int(shape[2])) if channels_first else (int(shape[0]), int(shape[1]))

    def names(self, key: str) -> tuple[str, ...]:
        """Names of the dimensions of a feature; () when it has none."""
        names = self.features.get(key, {}).get("names") or ()
        if isinstance(names, dict):  # {"motors": [...]}
            names = [n for group in names.values() for n in (group if isinstance(group, list) else [group])]
        return tuple(str(n) for n in names)

    def units(self, key: str) -> tuple[str, ...]:
        """Units of the dimensions, where the writer noted them (ours does)."""
        return tuple(str(u) for u in (self.features.get(key, {}).get("info") or {}).get("units", ()))

    def width(self, key: str) -> int | None:
        """How many numbers a row of this column has, where info.json says it."""
        shape = self.features.get(key, {}).get("shape")
        return int(np.prod(shape)) if isinstance(shape, list | tuple) else None


def read_meta(root: Path, settings: LeRobotSettings) -> Meta:
    """Read meta/.

    Raises:
        DataError: a file is missing or damaged, the version or the storage is not one that is read, or the episodes
            that the settings name are not there.
    """
    file = root / "meta" / "info.json"
    info = read_json(file, "a metadata file cannot be read", error=DataError)
    _check_info(info, file)
    version = _version(info, file)
    read = _read_v3 if version == "v3.0" else _read_v2
    fix = "copy the folder meta/ again from where the dataset came from"
    with reading("the dataset's metadata is damaged", root / "meta", DataError, fix):
        found = read(root, info, settings)
    lengths = found["lengths"]
    if not len(lengths) or not lengths.any():
        raise DataError("the dataset is empty: it has no frame", field=str(root), fix="record at least one episode")
    if (lengths < 1).any():
        empty = found["numbers"][lengths < 1]
        raise DataError(
            "an episode has no frame", field=f"{root}/meta: length of episode {empty[0]}",
            got=int(lengths[lengths < 1][0]), fix=advice("record it again", leave_out(empty, len(lengths))),
        )  # fmt: skip
    for data_file in found["data_files"]:
        if not os.path.isfile(data_file):
            raise DataError(
                "a parquet file of the dataset is missing", field=str(data_file),
                expected=f"{len(found['data_files'])} files",
                fix=advice("copy the folder data/ completely", _without(data_file, found)),
            )  # fmt: skip
    return Meta(
        root=root, version=version, fps=float(info["fps"]), robot_type=str(info.get("robot_type") or ""),
        features=info["features"], **found,
    )  # fmt: skip


def _without(data_file: Path, found: dict[str, Any]) -> str:
    """The advice to leave out the episode of a missing file, where a file holds one episode."""
    if found["files_of"] is None:
        return ""
    missing = [
        n
        for n, file in zip(found["files_of"], found["data_files"], strict=True)
        if file == data_file or not file.is_file()
    ]
    return leave_out(missing, len(found["numbers"]))


def _check_info(info: dict[str, Any], file: Path) -> None:
    storage = info.get("storage_format") or "parquet"
    if storage != "parquet":
        raise DataError(
            "the frames are not stored in a format that is read here", field=f"{file}: storage_format", got=storage,
            expected="parquet", fix="convert the dataset to parquet with the tool that wrote it",
        )  # fmt: skip
    for key in ("fps", "features", "data_path"):
        if not info.get(key):
            raise DataError(
                "the dataset's metadata is incomplete", field=f"{file}: {key}", got=info.get(key),
                fix="copy meta/info.json again, or write the value into it",
            )  # fmt: skip
    fps, features = info["fps"], info["features"]
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < 1e6:
        raise DataError(
            "frames per second is a positive number", field=f"{file}: fps", got=fps, fix="correct it in info.json"
        )
    if not isinstance(features, dict) or not all(map(_is_feature, features.values())):
        bad = features if not isinstance(features, dict) else [k for k, f in features.items() if not _is_feature(f)][0]
        raise DataError(
            "the features of a dataset are a table: name -> dtype, shape, names", field=f"{file}: features",
            got=str(bad)[:160], fix="copy meta/info.json again from where the dataset came from",
        )  # fmt: skip
    for name, feature in features.items():
        shape, names = feature.get("shape"), feature.get("names")
        sized = shape is None or (isinstance(shape, list) and all(isinstance(n, int) and 0 < n < 2**31 for n in shape))
        tables = all(isinstance(feature.get(key) or {}, dict) for key in ("info", "video_info"))
        if not sized or not isinstance(names or [], list | dict) or not tables:
            raise DataError(
                "a feature of info.json is not described as it should be", field=f"{file}: {name}",
                got=str(feature)[:160],
                expected="shape: a list of numbers; names: a list, a table or null; info: a table",
                fix="correct it, or copy meta/info.json again",
            )  # fmt: skip
    _check_pictures(features, file)
    for key in ("data_path", "video_path"):
        if not isinstance(info.get(key, ""), str | None) or len(info.get(key) or "") > 1000:
            raise DataError("a path is a text", field=f"{file}: {key}", got=str(info[key])[:80], expected="text")
    if _video_keys(info) and not isinstance(info.get("video_path"), str):
        raise DataError(
            "a camera is declared as video, but info.json does not say where the videos are",
            field=f"{file}: video_path", got=info.get("video_path"),
            expected=f"a path, as features[{_video_keys(info)[0]!r}].dtype is video",
            fix="add video_path, or write dtype image where the pictures are in the parquet files",
        )  # fmt: skip


def _check_pictures(features: dict[str, dict[str, Any]], file: Path) -> None:
    """No picture is larger than a camera makes: its declared size is what is decoded."""
    for name, feature in features.items():
        units, shape = (feature.get("info") or {}).get("units") or [], feature.get("shape") or [1]
        large = feature["dtype"] in ("image", "video") and math.prod(shape) > 3 * MOST_PIXELS
        if large or not isinstance(units, list):
            raise DataError(
                "a feature of info.json is not described as it should be",
                field=f"{file}: {name}.{'shape' if large else 'info.units'}", got=str(shape if large else units)[:160],
                expected=f"at most {MOST_PIXELS:,} pixels" if large else "a list", fix="correct it",
            )  # fmt: skip


def _is_feature(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("dtype"), str)


def _version(info: dict[str, Any], file: Path) -> str:
    version = str(info.get("codebase_version", ""))
    version = version if version.startswith("v") else f"v{version}"
    if version not in VERSIONS:
        raise DataError(
            "this version of the LeRobotDataset format is not supported",
            field=f"{file}: codebase_version",
            got=info.get("codebase_version"),
            expected=", ".join(VERSIONS),
            fix="convert it with LeRobot's own scripts",
        )
    return version


def _read_v2(root: Path, info: dict[str, Any], settings: LeRobotSettings) -> dict[str, Any]:
    file = root / "meta" / "tasks.jsonl"
    needed = not settings.prompt or file.is_file()
    tasks = _tasks(
        [(row["task_index"], row["task"]) for row in read_jsonl(file, error=DataError)] if needed else [], file
    )
    table: dict[int, int] = {}
    for row in read_jsonl(root / "meta" / "episodes.jsonl", error=DataError):
        _once(table, _int(row["episode_index"]), _int(row["length"]), root / "meta" / "episodes.jsonl", "length")
    known = np.array(sorted(table), np.int64)
    numbers = known[chosen(known, settings, str(root))]
    size = int(info.get("chunks_size") or 1000)
    places = [{"episode_chunk": n // size, "episode_index": n} for n in numbers.tolist()]
    return {
        "tasks": tasks, "numbers": numbers, "lengths": np.array([table[n] for n in numbers.tolist()], np.int64),
        "bounds": None, "known": known, "files_of": numbers,
        "data_files": [_inside(root, info["data_path"], **place) for place in places],
        "clips": {
            key: [Clip(_inside(root, info["video_path"], video_key=key, **place), 0.0, None) for place in places]
            for key in _video_keys(info)
        },
    }  # fmt: skip


def _read_v3(root: Path, info: dict[str, Any], settings: LeRobotSettings) -> dict[str, Any]:
    file = root / "meta" / "tasks.parquet"
    tasks: dict[int, Any] = {}
    if not settings.prompt or file.is_file():
        table = read_parquet(file)
        column = "task" if "task" in table.column_names else "__index_level_0__"
        pairs = zip(table["task_index"].to_pylist(), table[column].to_pylist(), strict=True)
        tasks = _tasks(list(pairs), file)

    episodes = root / "meta" / "episodes"
    files = sorted(episodes.glob("*/*.parquet"))
    if not files:
        raise DataError("the table of episodes is missing", field=str(episodes), fix="copy the folder meta/ completely")
    must = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    may = ["dataset_from_index", "dataset_to_index"]
    places = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    may += [f"videos/{key}/{what}" for key in _video_keys(info) for what in places]
    rows: dict[int, dict[str, Any]] = {}
    for file in files:
        for row in read_parquet(file, must, may).to_pylist():
            _once(rows, _int(row["episode_index"]), row, file, "its row")
    known = np.array(sorted(rows), np.int64)
    numbers = known[chosen(known, settings, str(root))]
    at = [rows[n] for n in numbers.tolist()]
    data = sorted({(_int(row["data/chunk_index"]), _int(row["data/file_index"])) for row in at})
    clips = {}
    for key in _video_keys(info):
        chunk, number, start, stop = (f"videos/{key}/{what}" for what in places)
        if all(row.get(name) is not None for row in at for name in (chunk, number, start)):
            clips[key] = [
                Clip(
                    _inside(
                        root, info["video_path"], video_key=key, chunk_index=_int(row[chunk]),
                        file_index=_int(row[number]),
                    ),
                    float(row[start]), None if row.get(stop) is None else float(row[stop]),
                )
                for row in at
            ]  # fmt: skip
    bounds = [[row.get(name) for name in may[:2]] for row in at]
    return {
        "tasks": tasks, "numbers": numbers, "known": known, "files_of": None, "clips": clips,
        "lengths": np.array([_int(row["length"]) for row in at], np.int64),
        "bounds": None if any(None in pair for pair in bounds) else np.array(bounds, np.int64).reshape(-1, 2),
        "data_files": [_inside(root, info["data_path"], chunk_index=c, file_index=f) for c, f in data],
    }  # fmt: skip


def _int(value: Any) -> int:
    """A whole number, which some writers store as 3.0 or [3]."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or int(value) != value:
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def _once(table: dict[int, Any], number: int, value: Any, file: Path, what: str) -> None:
    """Note what a table says of an episode; said twice, it must be the same."""
    if table.setdefault(number, value) != value:
        raise DataError(
            f"the metadata lists an episode twice, with another {what}", field=f"{file}: episode {number}",
            got=str(value)[:300], expected=str(table[number])[:300], fix="remove one of the two rows",
        )  # fmt: skip


def _tasks(pairs: list[tuple[Any, Any]], file: Path) -> dict[int, Any]:
    tasks: dict[int, Any] = {}
    for index, task in pairs:
        number = _int(index)
        if tasks.setdefault(number, task) != task:
            raise DataError(
                "the metadata lists a task twice, with other words", field=f"{file}: task_index {number}", got=task,
                expected=tasks[number], fix="remove one of the two, or set a prompt for all: --set data.prompt=TEXT",
            )  # fmt: skip
    return tasks


def _video_keys(info: dict[str, Any]) -> list[str]:
    return [key for key, feature in info["features"].items() if feature["dtype"] == "video"]


def _inside(root: Path, template: str, **values: Any) -> Path:
    """A path made from a template of info.json, which must stay inside the dataset.

    The template is parsed, not formatted: `{0:10000000000}` would fill the memory, `{a.b}` looks into objects.
    """

    def fill(match: re.Match[str]) -> str:
        name, width = match[1], int(match[2] or 0)
        if name not in values:
            raise DataError(
                "a path of info.json has an unknown placeholder", field=f"{root}/meta/info.json", got=match[0],
                expected=", ".join(f"{{{known}}}" for known in values),
            )  # fmt: skip
        return f"{values[name]:0{width}d}" if width else str(values[name])

    text = _PLACEHOLDER.sub(fill, template)
    if "{" in text.replace("{{", "") or "\0" in text:
        raise DataError("a path of info.json cannot be read", field=f"{root}/meta/info.json", got=template)
    relative = PurePosixPath(text)
    if relative.is_absolute() or ".." in relative.parts:
        raise DataError("a path of info.json leads out of the dataset", field=f"{root}/meta/info.json", got=template)
    return root / relative


def read_parquet(file: Path, columns: list[str] | None = None, optional: Sequence[str] = ()) -> pa.Table:
    """A whole parquet file, or some columns, of which those optional may be missing.

    Raises:
        DataError: it is missing or damaged, or lacks a column.
    """
    with open_parquet(file) as parquet:
        if missing := set(columns or ()) - set(parquet.schema_arrow.names):
            raise DataError("a parquet file lacks a column", field=f"{file}: {sorted(missing)[0]}", expected=columns)
        try:
            return parquet.read(columns and [*columns, *(n for n in optional if n in parquet.schema_arrow.names)])
        except (OSError, pa.ArrowException) as error:
            raise damaged(file, error) from error


def open_parquet(file: Path, footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """An open parquet file, memory-mapped. With many row groups, reading its footer again takes most of the time."""
    check_file(file, DataError)
    try:
        return pq.ParquetFile(
            file, memory_map=True, metadata=footer, page_checksum_verification=True,
            thrift_string_size_limit=MOST_FOOTER, thrift_container_size_limit=MOST_ROWS,
        )  # fmt: skip
    except (OSError, pa.ArrowException) as error:
        raise damaged(file, error) from error


def damaged(file: Path, error: Exception) -> DataError:
    """The error for a parquet file that cannot be read."""
    with open(file, "rb") as stream:
        pointer = stream.read(40).startswith(b"version https://git-lfs")
    fix = "it is a git-lfs pointer: run `git lfs pull`" if pointer else "copy or record it again"
    return DataError("a parquet file is damaged", field=str(file), got=str(error).splitlines()[0][:160], fix=fix)
