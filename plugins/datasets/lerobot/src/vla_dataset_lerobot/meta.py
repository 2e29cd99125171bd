"""The metadata of a LeRobotDataset, v2.0, v2.1 and v3.0 brought to one form.

Layouts (LeRobot `datasets/utils.py`; dumped from files that LeRobot wrote):
v2.x: meta/{info.json, tasks.jsonl, episodes.jsonl}, one parquet and one mp4 per camera for every episode.
v3.0: meta/info.json, meta/tasks.parquet, meta/episodes/*/*.parquet; many episodes per parquet and mp4 file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from attrs import frozen

from vla.errors import DataError
from vla.reading import MB, MOST_ROWS, check_file, read_json, read_jsonl, read_text, reading

VERSIONS = ("v2.0", "v2.1", "v3.0")
IMAGE_PREFIX = "observation.images."
MOST_FOOTER = 64 * MB  # of a parquet file: its metadata, about 150 bytes for each column of each row group
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w{0,40})(?::0?([1-9]\d?)d)?\}")


@frozen
class Clip:
    """Where the frames of one episode are in a video file: they start `start` seconds into it."""

    path: Path
    start: float


@frozen
class Meta:
    """What is known before a parquet file of frames is read."""

    root: Path
    version: str
    fps: float
    robot_type: str
    features: dict[str, dict[str, Any]]
    tasks: dict[int, str]
    lengths: np.ndarray  # [E] frames of each episode
    data_files: list[Path]  # in the order of the frames
    clips: dict[str, list[Clip]]  # video camera key -> one clip per episode

    def cameras(self) -> dict[str, str]:
        """Camera key -> "image" or "video", for the cameras whose files are there; depth maps are left out."""
        found = {}
        for key, feature in self.features.items():
            kind = feature.get("dtype")
            details = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
            if details.get("is_depth_map") or details.get("video.is_depth_map"):
                continue
            # Some published datasets declare a camera that they do not contain.
            if kind == "image" or (kind == "video" and any(clip.path.exists() for clip in self.clips[key])):
                found[key] = kind
        return found

    def size(self, key: str) -> tuple[int, int]:
        """(height, width) of a camera."""
        shape, names = list(self.features[key]["shape"]), self.names(key)
        channels_first = (names[0] in ("channel", "channels") if names else False) or (
            shape[0] in (1, 3) and shape[2] > 4
        )
        return (shape[1], shape[2]) if channels_first else (shape[0], shape[1])

    def names(self, key: str) -> tuple[str, ...]:
        """Names of the dimensions of a feature; () when it has none."""
        names = self.features[key].get("names") or ()
        if isinstance(names, dict):  # {"motors": [...]}
            names = [n for group in names.values() for n in (group if isinstance(group, list) else [group])]
        return tuple(str(n) for n in names)

    def units(self, key: str) -> tuple[str, ...]:
        """Units of the dimensions, where the writer noted them (ours does)."""
        return tuple(str(u) for u in (self.features[key].get("info") or {}).get("units", ()))


def find_root(path: str) -> Path:
    """The folder with meta/info.json: the path itself, a hub cache folder, or a hub name in the local caches.

    Raises:
        DataError: nothing is there.
    """
    if not path:
        raise DataError(
            "which dataset?", field="path", got="''", fix="name a folder with meta/info.json, or a hub name org/name"
        )
    given = Path(path).expanduser()
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    tried = [given]
    if not given.is_absolute() and len(given.parts) == 2 and not given.is_dir():
        cached = "datasets--" + path.replace("/", "--")
        lerobot = Path(os.environ.get("HF_LEROBOT_HOME", hub / "lerobot")).expanduser()
        hub_cache = Path(os.environ.get("HF_HUB_CACHE", hub / "hub")).expanduser()
        tried += [lerobot / path, lerobot / "hub" / cached, hub_cache / cached]
    for folder in tried:
        if (folder / "meta" / "info.json").is_file():
            return folder
        if (snapshot := _snapshot(folder)) is not None:
            return snapshot
    if not given.is_dir():
        raise DataError(
            "no such dataset folder",
            field="path",
            got=path,
            expected="a folder with meta/info.json, or a hub name in one of " + ", ".join(map(str, tried[1:]))
            if tried[1:]
            else "a folder with meta/info.json",
            fix="check the path; a hub dataset must be downloaded first (nothing is downloaded here)",
        )
    raise DataError(
        "not a LeRobotDataset: it has no meta/info.json",
        field="path",
        got=path,
        fix="point at the folder that holds `meta` and `data`",
    )


def _snapshot(folder: Path) -> Path | None:
    """The current snapshot of a hub cache folder."""
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return None
    main = folder / "refs" / "main"
    current = [read_text(main, 1024, DataError).strip()] if main.is_file() else []
    names = current or sorted(p.name for p in snapshots.iterdir())
    for name in reversed(names):
        if (snapshots / name / "meta" / "info.json").is_file():
            return snapshots / name
    return None


def read_meta(root: Path) -> Meta:
    """Read meta/.

    Raises:
        DataError: a file is missing or damaged, or the version is not one of `VERSIONS`.
    """
    file = root / "meta" / "info.json"
    info = read_json(file, "a metadata file cannot be read", error=DataError)
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
    for key in ("fps", "features", "data_path"):
        if not info.get(key):
            raise DataError("the dataset's metadata is incomplete", field=f"{file}: {key}", got=info.get(key))
    read = _read_v3 if version == "v3.0" else _read_v2
    fix = "copy the folder meta/ again from where the dataset came from"
    with reading("the dataset's metadata is damaged", root / "meta", DataError, fix):
        tasks, lengths, data_files, clips = read(root, info)
    if not len(lengths) or not lengths.sum():
        raise DataError("the dataset is empty: it has no frame", field=str(root), fix="record at least one episode")
    for data_file in data_files:
        if not data_file.is_file():
            raise DataError(
                "a parquet file of the dataset is missing", field=str(data_file), expected=f"{len(data_files)} files",
                fix="copy the folder data/ completely",
            )  # fmt: skip
    return Meta(
        root=root,
        version=version,
        fps=float(info["fps"]),
        robot_type=str(info.get("robot_type") or ""),
        features=info["features"],
        tasks=tasks,
        lengths=lengths,
        data_files=data_files,
        clips=clips,
    )


_Found = tuple[dict[int, str], np.ndarray, list[Path], dict[str, list[Clip]]]


def _read_v2(root: Path, info: dict[str, Any]) -> _Found:
    rows = {name: read_jsonl(root / "meta" / f"{name}.jsonl", error=DataError) for name in ("tasks", "episodes")}
    tasks = {int(row["task_index"]): str(row["task"]) for row in rows["tasks"]}
    episodes = sorted(rows["episodes"], key=lambda row: row["episode_index"])
    size = int(info.get("chunks_size") or 1000)
    places = [
        {"episode_chunk": row["episode_index"] // size, "episode_index": row["episode_index"]} for row in episodes
    ]
    data_files = [_inside(root, info["data_path"], **place) for place in places]
    clips = {
        key: [Clip(_inside(root, info["video_path"], video_key=key, **place), 0.0) for place in places]
        for key in _video_keys(info)
    }
    return tasks, np.array([row["length"] for row in episodes], np.int64), data_files, clips


def _read_v3(root: Path, info: dict[str, Any]) -> _Found:
    table = read_parquet(root / "meta" / "tasks.parquet")
    column = "task" if "task" in table.column_names else "__index_level_0__"
    tasks = dict(zip(table["task_index"].to_pylist(), table[column].to_pylist(), strict=True))

    videos = _video_keys(info)
    columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    columns += [f"videos/{key}/{what}" for key in videos for what in ("chunk_index", "file_index", "from_timestamp")]
    files = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise DataError("the table of episodes is missing", field=str(root / "meta" / "episodes"))
    rows = pa.concat_tables(read_parquet(file, columns) for file in files).sort_by("episode_index")
    at = {name: rows[name].to_pylist() for name in rows.column_names}
    data = dict.fromkeys(zip(at["data/chunk_index"], at["data/file_index"], strict=True))
    data_files = [_inside(root, info["data_path"], chunk_index=c, file_index=f) for c, f in sorted(data)]
    clips = {
        key: [
            Clip(_inside(root, info["video_path"], video_key=key, chunk_index=c, file_index=f), float(t))
            for c, f, t in zip(
                *(at[f"videos/{key}/{w}"] for w in ("chunk_index", "file_index", "from_timestamp")), strict=True
            )
        ]
        for key in videos
    }
    return tasks, np.array(at["length"], np.int64), data_files, clips


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


def read_parquet(file: Path, columns: list[str] | None = None) -> pa.Table:
    """A whole parquet file, or some columns.

    Raises:
        DataError: it is missing or damaged, or lacks a column.
    """
    with open_parquet(file) as parquet:
        if missing := set(columns or ()) - set(parquet.schema_arrow.names):
            raise DataError("a parquet file lacks a column", field=f"{file}: {sorted(missing)[0]}", expected=columns)
        try:
            return parquet.read(columns)
        except (OSError, pa.ArrowException) as error:
            raise damaged(file, error) from error


def open_parquet(file: Path, footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """An open parquet file, memory-mapped. With many row groups, reading its footer again takes most of the time."""
    check_file(file, DataError)
    try:
        return pq.ParquetFile(
            file, memory_map=True, metadata=footer, thrift_string_size_limit=MOST_FOOTER,
            thrift_container_size_limit=MOST_ROWS,
        )  # fmt: skip
    except (OSError, pa.ArrowException) as error:
        raise damaged(file, error) from error


def damaged(file: Path, error: Exception) -> DataError:
    """The error for a parquet file that cannot be read."""
    with open(file, "rb") as stream:
        pointer = stream.read(40).startswith(b"version https://git-lfs")
    fix = "it is a git-lfs pointer: run `git lfs pull`" if pointer else "copy or record it again"
    return DataError("a parquet file is damaged", field=str(file), got=str(error).splitlines()[0][:160], fix=fix)
