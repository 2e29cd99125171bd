"""Write a LeRobotDataset v3.0 that LeRobot itself opens (checked against files written by LeRobot 0.6.1).

Everything is written into a folder beside the target, which takes its place when `finalize` is called: after an
exception, a full disk or Ctrl-C nothing is left. Cameras are stored as PNG in parquet (dtype `image`, exact) or as
H.264 video (dtype `video`). Pages of parquet files carry checksums, and a manifest lists every file for
`vla data check`; whoever changes a dataset on purpose may, and removes it then.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla.errors import DataError
from vla.files import atomic_folder
from vla_dataset_lerobot import stats
from vla_dataset_lerobot.meta import IMAGE_PREFIX
from vla_dataset_lerobot.mp4 import VideoWriter
from vla_dataset_lerobot.schema import AUTO, IMAGE, TYPES, episode_type, frames_schema, tasks_table

DATA_MB, VIDEO_MB, CHUNK_FILES = 100, 200, 1000
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


class LeRobotWriter:
    """`add_frame` takes frames, `save_episode` closes an episode, `finalize` (or leaving `with`) the dataset."""

    def __init__(
        self, path: str | Path, fps: float, features: Mapping[str, Mapping[str, Any]], robot: str, overwrite: bool
    ):
        self.path, self.fps, self.robot = Path(path), fps, robot
        self.features = {**{key: dict(feature) for key, feature in features.items()}, **AUTO}
        for key, feature in self.features.items():
            if not key.strip() or key != key.strip() or any(c in "/\\{}" or not c.isprintable() for c in key):
                raise DataError(
                    "a name cannot be that of a column and a folder", field="features", got=repr(key),
                    expected="a name without slash, backslash, braces and control characters", fix="use another name",
                )  # fmt: skip
            if feature["dtype"] not in ("image", "video", *TYPES):
                raise DataError(
                    "this dtype cannot be written",
                    field=key,
                    got=feature["dtype"],
                    expected=["image", "video", *TYPES],
                )
        self._cameras = {k: f["dtype"] for k, f in self.features.items() if f["dtype"] in ("image", "video")}
        self._vectors = [k for k in features if k not in self._cameras]
        self._stack = ExitStack()
        self._folder = self._stack.enter_context(atomic_folder(path, "dataset", overwrite=overwrite))
        self._data = _DataFiles(self._folder, frames_schema(self.features))
        self._videos: dict[str, VideoWriter] = {}
        self._frames: list[dict[str, Any]] = []
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._numbers: dict[str, list[np.ndarray]] = {key: [] for key in self.features if key not in self._cameras}
        self._histograms = {key: np.zeros((3, 256), np.int64) for key in self._cameras}
        self._total = 0
        self._done = False

    @classmethod
    def create(
        cls,
        path: str | Path,
        fps: float,
        features: Mapping[str, Mapping[str, Any]],
        robot: str = "",
        overwrite: bool = False,
    ) -> LeRobotWriter:
        """Start a dataset.

        Args:
            path: where it will be; must not exist, or be empty.
            fps: frames per second.
            features: key -> {"dtype", "shape", "names"} as in info.json, without the automatic columns; cameras
                have dtype "image" or "video" and shape [h w 3].
            robot: `robot_type` of info.json.
            overwrite: replace a LeRobotDataset that is there, when this one is finalized.

        Raises:
            StoreError: the path is taken or cannot be written.
        """
        return cls(path, fps, features, robot, overwrite)

    def __enter__(self) -> LeRobotWriter:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool | None:
        if kind is None and not self._done:
            self.finalize()
        return None if self._done else self._abort(kind, error, trace)

    def add(self, sample: Mapping[str, Any]) -> None:
        """One frame in the form of `vla.datasets.Writer`."""
        images = {IMAGE_PREFIX + name: image for name, image in sample["images"].items()}
        self.add_frame(
            {**images, "observation.state": sample["state"], "action": sample["action"], "task": sample["prompt"]}
        )

    def add_frame(self, frame: Mapping[str, Any]) -> None:
        """One frame: a value for every feature, and "task", the instruction.

        Raises:
            DataError: a value is missing, unknown, of the wrong shape or not finite.
        """
        expected = {*self._cameras, *self._vectors, "task"}
        if set(frame) != expected:
            raise DataError(
                "a frame must hold exactly the declared features",
                field="frame",
                got=sorted(frame),
                expected=sorted(expected),
            )
        for key in (*self._cameras, *self._vectors):
            value, shape = np.asarray(frame[key]), tuple(self.features[key]["shape"])
            if tuple(value.shape or (1,)) != shape or (key in self._cameras and value.dtype != np.uint8):
                raise DataError(
                    "a value has the wrong shape or type", field=key, got=f"{value.dtype} {value.shape}", expected=shape
                )
            if key not in self._cameras and not np.isfinite(value).all():
                raise DataError("a value is not finite", field=key, got=value, fix="do not record this frame")
        if not isinstance(frame["task"], str) or not frame["task"]:
            raise DataError("a frame needs its instruction", field="task", got=frame["task"])
        # The caller may reuse its buffers.
        self._frames.append({key: np.array(value) if key != "task" else value for key, value in frame.items()})

    def end_episode(self) -> None:
        """`save_episode` under the name of `vla.datasets.Writer`."""
        self.save_episode()

    def save_episode(self) -> None:
        """Write the frames added since the last call as one episode."""
        frames, self._frames = self._frames, []
        if not frames:
            raise DataError("an episode has no frame", field="episode", got=len(self._episodes))
        n, number = len(frames), len(self._episodes)
        tasks = [self._tasks.setdefault(frame["task"], len(self._tasks)) for frame in frames]
        columns: dict[str, Any] = {key: np.stack([np.atleast_1d(f[key]) for f in frames]) for key in self._vectors}
        columns |= {
            "timestamp": (np.arange(n) / self.fps).astype(np.float32)[:, None],
            "frame_index": np.arange(n)[:, None],
            "episode_index": np.full((n, 1), number),
            "index": np.arange(self._total, self._total + n)[:, None],
            "task_index": np.array(tasks)[:, None],
        }
        row: dict[str, Any] = {
            "episode_index": number,
            "tasks": list(dict.fromkeys(frame["task"] for frame in frames)),
            "length": n,
        }
        histograms, videos, images = {}, {}, {}
        for key, kind in self._cameras.items():
            pixels = [frame[key] for frame in frames]
            histograms[key] = sum(stats.histogram(image) for image in pixels)
            if kind == "video":
                videos |= self._write_video(key, pixels)
            else:
                images[key] = [{"bytes": _png(image), "path": f"frame-{i:06d}.png"} for i, image in enumerate(pixels)]
        chunk, file = self._data.write(self._table({**columns, **images}))
        row |= {"data/chunk_index": chunk, "data/file_index": file, "dataset_from_index": self._total}
        row |= {"dataset_to_index": self._total + n, **videos}
        for key in self.features:
            found = stats.of_histogram(histograms[key], n) if key in histograms else stats.of_numbers(columns[key])
            row |= {f"stats/{key}/{name}": found[name] for name in stats.STATS}
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        self._episodes.append(row)
        for key, values in columns.items():
            self._numbers[key].append(values)
        for key, counts in histograms.items():
            self._histograms[key] += counts
        self._total += n

    def finalize(self) -> Path:
        """Write the metadata and put the dataset in place. Frames of an unfinished episode are an error.

        Raises:
            DataError: there is no episode, or the last one was not saved.
            StoreError: the disk is full or the path was taken meanwhile.
        """
        try:
            if self._frames or not self._episodes:
                what = "the last episode was not saved" if self._frames else "nothing was recorded"
                raise DataError(what, field=str(self.path), fix="call save_episode() after the frames of an episode")
            self._data.close()
            for video in self._videos.values():
                video.close()
            self._write_meta()
        except BaseException as error:
            self._abort(type(error), error, error.__traceback__)
            raise
        self._done = True
        self._stack.close()
        return self.path

    def abort(self) -> None:
        """Leave nothing behind."""
        if not self._done:
            self._abort(_Abandoned, _Abandoned(), None)

    # --- inside

    def _abort(self, kind: Any, error: Any, trace: Any) -> bool | None:
        self._done = True
        for file in (self._data, *self._videos.values()):
            file.discard()
        return self._stack.__exit__(kind, error, trace)  # a failed write becomes a StoreError here

    def _table(self, columns: Mapping[str, Any]) -> pa.Table:
        schema, arrays = self._data.schema, []
        for field in schema:
            values = columns[field.name]
            if pa.types.is_fixed_size_list(field.type):
                flat = pa.array(np.ascontiguousarray(values).ravel(), field.type.value_type)
                arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type))
            else:
                arrays.append(pa.array(values if field.type == IMAGE else values.ravel(), field.type))
        return pa.Table.from_arrays(arrays, schema=schema)

    def _write_video(self, key: str, pixels: list[np.ndarray]) -> dict[str, Any]:
        """Append an episode to the camera's current file; gives its columns of the table of episodes."""
        video = self._videos.get(key)
        if video is None or video.size() > VIDEO_MB * 2**20:
            place = _next(video)
            if video is not None:
                video.close()
            path = self._folder / VIDEO_PATH.format(video_key=key, chunk_index=place[0], file_index=place[1])
            height, width = self.features[key]["shape"][:2]
            video = self._videos[key] = VideoWriter(path, self.fps, height, width, place)
        start = video.frames / self.fps
        video.write(pixels)
        places = {"chunk_index": video.place[0], "file_index": video.place[1]}
        times = {"from_timestamp": start, "to_timestamp": video.frames / self.fps}
        return {f"videos/{key}/{name}": value for name, value in {**places, **times}.items()}

    def _write_meta(self) -> None:
        meta = self._folder / "meta"
        (meta / "episodes" / "chunk-000").mkdir(parents=True)
        features = {key: dict(feature) for key, feature in self.features.items()}
        for key, video in self._videos.items():
            features[key]["info"] = video.describe()
        info = {
            "codebase_version": "v3.0",
            "fps": int(self.fps) if float(self.fps).is_integer() else self.fps,
            "features": features,
            "total_episodes": len(self._episodes),
            "total_frames": self._total,
            "total_tasks": len(self._tasks),
            "chunks_size": CHUNK_FILES,
            "data_files_size_in_mb": DATA_MB,
            "video_files_size_in_mb": VIDEO_MB,
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self._videos else None,
            "robot_type": self.robot or None,
            "splits": {"train": f"0:{len(self._episodes)}"},
        }
        (meta / "info.json").write_text(json.dumps(info, indent=4))
        overall = {key: stats.of_histogram(counts, self._total) for key, counts in self._histograms.items()}
        overall |= {key: stats.of_numbers(np.concatenate(values)) for key, values in self._numbers.items()}
        (meta / "stats.json").write_text(json.dumps(overall, indent=4))
        pq.write_table(tasks_table(self._tasks), meta / "tasks.parquet", write_page_checksum=True)
        names = list(self._episodes[0])
        table = pa.table(
            [pa.array([row[name] for row in self._episodes], episode_type(name, self._cameras)) for name in names],
            names,
        )
        pq.write_table(table, meta / "episodes" / "chunk-000" / "file-000.parquet", write_page_checksum=True)


class _Abandoned(Exception):
    """The writer is given up on purpose."""


class _DataFiles:
    """The parquet files of frames: one row group per episode, a new file when one is full."""

    def __init__(self, folder: Path, schema: pa.Schema):
        self.folder, self.schema = folder, schema
        self.place = (0, -1)
        self._writer: pq.ParquetWriter | None = None
        self._path = folder

    def write(self, table: pa.Table) -> tuple[int, int]:
        """Append an episode; gives the (chunk, file) it is in."""
        if self._writer is None or self._path.stat().st_size > DATA_MB * 2**20:
            self.close()
            self.place = _following(self.place)
            self._path = self.folder / DATA_PATH.format(chunk_index=self.place[0], file_index=self.place[1])
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # PNG is compressed already; dictionaries of images and floats only cost time.
            self._writer = pq.ParquetWriter(
                self._path, self.schema, compression="snappy", use_dictionary=False, write_page_checksum=True
            )
        self._writer.write_table(table, row_group_size=max(1, len(table)))
        return self.place

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def discard(self) -> None:
        """Close after a failure, when writing the footer may fail again."""
        try:
            self.close()
        except (OSError, pa.ArrowException):
            self._writer = None  # the folder is removed anyway


def _next(video: VideoWriter | None) -> tuple[int, int]:
    return (0, 0) if video is None else _following(video.place)


def _following(place: tuple[int, int]) -> tuple[int, int]:
    chunk, file = place
    return (chunk, file + 1) if file + 1 < CHUNK_FILES else (chunk + 1, 0)


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG", compress_level=1)
    return out.getvalue()
