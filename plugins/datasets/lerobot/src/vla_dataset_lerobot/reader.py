"""A LeRobotDataset with random access to frames and action chunks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla.datasets import DatasetInfo, check_cameras, check_index, chunk
from vla.errors import DataError
from vla_dataset_lerobot.config import LeRobotSettings
from vla_dataset_lerobot.frames import ImageColumns, read_numbers
from vla_dataset_lerobot.meta import IMAGE_PREFIX, find_root, read_meta
from vla_dataset_lerobot.video import Videos

_SCALARS = ["timestamp", "episode_index", "task_index"]


class LeRobotDataset:
    """See `vla.datasets.Dataset`. Opening reads the columns of numbers; images are read when a sample asks for them.

    Can be shared by threads, forked and pickled (open files and decoders are not carried over).
    """

    def __init__(self, settings: LeRobotSettings):
        """Open the dataset.

        Raises:
            DataError: it is missing, empty, damaged, of an unknown version, or has no such camera or column; or a
                state or action is not finite, or timestamps do not follow the rate.
        """
        self.settings = settings
        meta = read_meta(find_root(settings.path))
        for what, key in (("state_key", settings.state_key), ("action_key", settings.action_key)):
            if key not in meta.features:
                raise DataError(
                    "the dataset has no such column", field=f"{meta.root}: {what}", got=key,
                    expected=[k for k, f in meta.features.items() if f["dtype"] not in ("image", "video")],
                )  # fmt: skip
        columns, groups = read_numbers(meta, [settings.state_key, settings.action_key], _SCALARS)
        self._meta = meta
        self._states, self._actions = columns[settings.state_key], columns[settings.action_key]
        ends = np.cumsum(meta.lengths)
        self.episodes = [range(int(end - n), int(end)) for end, n in zip(ends, meta.lengths, strict=True)]
        self._episode_of = np.repeat(np.arange(len(ends)), meta.lengths)
        self._check_order(columns.get("episode_index"))
        self._times = self._check_times(columns.get("timestamp"))
        self._task_of = columns.get("task_index")
        self._check_tasks()
        self._cameras = self._choose_cameras()
        self._images = ImageColumns(meta, groups, settings.cache_mb)
        self._videos = Videos(meta.fps, settings.decoder)
        kinds = meta.cameras()
        self._kinds = {name: kinds[key] for name, key in self._cameras.items()}
        self.info = DatasetInfo(
            cameras={name: meta.size(key) for name, key in self._cameras.items()},
            state_dim=self._states.shape[1],
            action_dim=self._actions.shape[1],
            hz=meta.fps,
            robot=settings.robot or meta.robot_type,
            units={"state": meta.units(settings.state_key), "actions": meta.units(settings.action_key)},
            tasks=self._tasks(),
            action_names=meta.names(settings.action_key),
            state_names=meta.names(settings.state_key),
            source=str(meta.root),
        )

    @staticmethod
    def create(path: str | Path, info: DatasetInfo, video: bool = False, overwrite: bool = False):
        """A `vla.datasets.Writer` of a new LeRobotDataset v3.0 with the cameras, widths and names of `info`."""
        from vla_dataset_lerobot.schema import features_of
        from vla_dataset_lerobot.writer import LeRobotWriter

        return LeRobotWriter.create(path, info.hz, features_of(info, video), info.robot, overwrite)

    def __len__(self) -> int:
        """Frames."""
        return len(self._states)

    def sample(
        self, index: int, horizon: int, cameras: Sequence[str] | None = None, images: bool = True
    ) -> dict[str, Any]:
        """See `vla.datasets`. Only the cameras asked for are read and decoded."""
        index = check_index(index, len(self), self.info.source)
        episode = int(self._episode_of[index])
        span = self.episodes[episode]
        wanted = check_cameras(cameras, self._cameras, self.info.source) if images else []
        actions, is_pad = chunk(self._actions, index, span.stop, horizon)
        return {
            "images": {name: self._image(name, index, episode) for name in wanted},
            "state": self._states[index].copy(),
            "actions": actions,
            "actions_is_pad": is_pad,
            "prompt": self._prompt(index),
            "episode": episode,
            "frame": index - span.start,
        }

    def states(self) -> np.ndarray:
        """float32 [N s]."""
        return self._states

    def actions(self) -> np.ndarray:
        """float32 [N a]."""
        return self._actions

    def prompts(self) -> list[str]:
        """The instruction of each frame."""
        return [self._prompt(i) for i in range(len(self))]

    def digest(self) -> str:
        """SHA-256 of names, rate, tasks, episodes, all states, actions and times, and the sizes of all files."""
        meta = self._meta
        videos = {clip.path for key in self._cameras.values() for clip in meta.clips.get(key, ()) if clip.path.exists()}
        files = sorted((str(f.relative_to(meta.root)), f.stat().st_size) for f in {*meta.data_files, *videos})
        cameras = {name: [key, *meta.size(key)] for name, key in self._cameras.items()}
        head = [meta.fps, cameras, self.settings.prompt, sorted(meta.tasks.items()), meta.lengths.tolist(), files]
        sha = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
        for array in (self._states, self._actions, self._times, self._task_of):
            if array is not None:
                sha.update(str((array.dtype, array.shape)).encode())
                sha.update(np.ascontiguousarray(array).data)
        return sha.hexdigest()

    # --- inside

    def _image(self, name: str, index: int, episode: int) -> np.ndarray:
        key = self._cameras[name]
        if self._kinds[name] == "image":
            return self._images.frame(key, index)
        clip = self._meta.clips[key][episode]
        return self._videos.frame(
            clip.path, clip.start + float(self._times[index]), f"camera {name!r}, episode {episode}"
        )

    def _prompt(self, index: int) -> str:
        if self.settings.prompt or self._task_of is None:
            return self.settings.prompt
        return self._meta.tasks[int(self._task_of[index])]

    def _tasks(self) -> tuple[str, ...]:
        """The instructions that occur, in the order of their numbers."""
        if self.settings.prompt or self._task_of is None:
            return (self.settings.prompt,) if self.settings.prompt else ()
        return tuple(self._meta.tasks[int(i)] for i in np.unique(self._task_of))

    def _choose_cameras(self) -> dict[str, str]:
        """Name offered -> key in the dataset."""
        have = self._meta.cameras()
        short = {key.removeprefix(IMAGE_PREFIX): key for key in have}
        if not self.settings.cameras:
            return short
        chosen = {}
        for item in self.settings.cameras:
            new, equals, old = item.partition("=")
            old = old if equals else new
            key = old if old in have else short.get(old)
            if key is None:
                declared = [k for k in self._meta.features if k.removeprefix(IMAGE_PREFIX) == old or k == old]
                raise DataError(
                    "the dataset declares this camera but lacks its files" if declared else "no such camera",
                    field="cameras", got=item, expected=f"any of {list(short)}", fix="choose one of these",
                )  # fmt: skip
            chosen[new.removeprefix(IMAGE_PREFIX) if not equals else new] = key
        return chosen

    def _check_order(self, episode_index: np.ndarray | None) -> None:
        """Frames must be stored episode after episode."""
        if episode_index is None:
            return
        starts = [span.start for span in self.episodes if len(span)]
        inside = np.diff(episode_index) != 0
        inside[[s - 1 for s in starts if s]] = False
        if inside.any():
            row = int(np.argmax(inside)) + 1
            raise DataError(
                "the frames of an episode do not lie together as the metadata says",
                field=f"{self._meta.root}: episode_index of frame {row}", got=int(episode_index[row]),
                expected=int(self._episode_of[row]), fix="meta/ and data/ are not of one dataset; copy both again",
            )  # fmt: skip

    def _check_times(self, times: np.ndarray | None) -> np.ndarray:
        """Seconds since the start of the episode, [N]; from the frame number where the dataset has none."""
        first = np.array([span.start for span in self.episodes])[self._episode_of]
        ideal = (np.arange(len(self._states)) - first) / self._meta.fps
        if times is None:
            return ideal
        # Published GR00T sets start at 1/fps while their videos start at 0: the time since the first row counts.
        times = times.astype(np.float64)
        times -= times[first]
        off = ~(np.abs(times - ideal) <= 0.5 / self._meta.fps)  # NaN counts as off
        if self.settings.check_fps and off.any():
            row = int(np.argmax(off))
            raise DataError(
                "the timestamps do not follow the declared rate",
                field=f"{self._meta.root}: timestamp of frame {row} (episode {self._episode_of[row]})",
                got=float(times[row]),
                expected=f"{ideal[row]:.4f} at {self._meta.fps:g} fps",
                fix="correct fps in meta/info.json, or set check_fps = false to take the frames as they come",
            )  # fmt: skip
        return times

    def _check_tasks(self) -> None:
        if self.settings.prompt or self._task_of is None:
            return
        unknown = set(np.unique(self._task_of).tolist()) - set(self._meta.tasks)
        if unknown:
            raise DataError(
                "a frame has a task that meta/ does not list",
                field=f"{self._meta.root}: task_index", got=sorted(unknown)[0],
                expected=f"one of {sorted(self._meta.tasks)}", fix="set a prompt for all frames, or repair meta/tasks",
            )  # fmt: skip
