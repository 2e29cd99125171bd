"""A LeRobotDataset with random access to frames and action chunks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vla.datasets import DatasetInfo, check_cameras, check_index, chunk
from vla.errors import DataError
from vla_dataset_lerobot.choice import advice, leave_out
from vla_dataset_lerobot.columns import DEFAULTS, Modality, described, joined, pieces_of
from vla_dataset_lerobot.config import LeRobotSettings
from vla_dataset_lerobot.frames import (
    Frames,
    ImageColumns,
    check_finite,
    is_numeric,
    is_text,
    read_frames,
    schema_of,
    whole,
)
from vla_dataset_lerobot.meta import IMAGE_PREFIX, read_meta
from vla_dataset_lerobot.pictures import place, rows_of
from vla_dataset_lerobot.roots import find_root
from vla_dataset_lerobot.schema import AUTO
from vla_dataset_lerobot.spans import INDICES, check_indices, check_once, clock, episodes_of, in_order
from vla_dataset_lerobot.video import Videos


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
        self._meta = meta = read_meta(find_root(settings.path), settings)
        schema, modality = schema_of(meta), Modality(meta)
        numeric = [field.name for field in schema if is_numeric(field.type) and field.name not in AUTO]
        have = [name for name in schema.names if name not in AUTO]
        state, action = (
            pieces_of(setting, getattr(settings, setting), have, numeric, modality) for setting in DEFAULTS
        )
        self._cameras = self._choose_cameras(have, modality)
        self._kinds = {name: meta.cameras()[key] for name, key in self._cameras.items()}
        vectors = list(dict.fromkeys(piece.column for piece in (*state, *action)))
        task = self._task_column(schema, vectors)
        scalars = [*INDICES, *(["timestamp"] if settings.check_fps else []), *([task] if task else [])]
        images = [key for name, key in self._cameras.items() if self._kinds[name] == "image"]
        frames = read_frames(meta, vectors, scalars, task, images)
        frames = in_order(frames, meta)
        self.episodes = episodes_of(frames, meta)
        check_finite(frames, meta)
        first = np.repeat([span.start for span in self.episodes], meta.lengths)
        check_once(frames, meta)
        self._times, begin = clock(frames, meta, first, settings.check_fps)
        check_indices(frames, meta, first)
        self._rows = frames.rows
        self._states, self._actions = (joined(pieces, frames.vectors, meta) for pieces in (state, action))
        self._episode_of = np.repeat(np.arange(len(self.episodes)), meta.lengths)
        self._task_of, self._texts = self._instructions(frames, task)
        rows = rows_of(meta, self.episodes, begin, self._times, frames.scalars)
        self._clips = {
            name: place(meta, key, rows, not settings.check_fps)
            for name, key in self._cameras.items()
            if self._kinds[name] == "video"
        }
        self._images = ImageColumns(meta, frames.groups, settings.cache_mb)
        self._videos = Videos(meta.fps, settings.decoder)
        self.info = DatasetInfo(
            cameras={name: meta.size(key) for name, key in self._cameras.items()},
            state_dim=self._states.shape[1],
            action_dim=self._actions.shape[1],
            hz=meta.fps,
            robot=settings.robot or meta.robot_type,
            units={
                "state": described(state, frames.vectors, meta.units),
                "actions": described(action, frames.vectors, meta.units),
            },
            tasks=self._tasks(),
            action_names=described(action, frames.vectors, meta.names),
            state_names=described(state, frames.vectors, meta.names),
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
        videos = {clip.path for clips in self._clips.values() for clip in clips}
        files = sorted((str(f.relative_to(meta.root)), f.stat().st_size) for f in {*meta.data_files, *videos})
        cameras = {name: [key, *meta.size(key)] for name, key in self._cameras.items()}
        head = [meta.fps, cameras, self.settings.prompt, sorted(self._texts.items()), meta.lengths.tolist(), files]
        sha = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
        for array in (self._states, self._actions, self._times, self._task_of):
            if array is not None:
                sha.update(str((array.dtype, array.shape)).encode())
                sha.update(np.ascontiguousarray(array).data)
        return sha.hexdigest()

    # --- inside

    def _image(self, name: str, index: int, episode: int) -> np.ndarray:
        key, number = self._cameras[name], self._meta.numbers[episode]
        way_out = leave_out([number], len(self.episodes))
        where = f"frame {index - self.episodes[episode].start} of episode {number}"
        if self._kinds[name] == "image":
            return self._images.frame(key, int(self._rows[index]), where, way_out)
        clip = self._clips[name][episode]
        if clip.moments is not None:
            seconds = float(clip.moments[index - self.episodes[episode].start])
        else:
            seconds = clip.start + float(self._times[index])
        return self._videos.frame(clip.path, seconds, f"camera {name!r}, {where}", way_out)

    def _prompt(self, index: int) -> str:
        return self.settings.prompt if self._task_of is None else self._texts[int(self._task_of[index])]

    def _tasks(self) -> tuple[str, ...]:
        """The instructions that occur, in the order of their numbers."""
        if self._task_of is None:
            return (self.settings.prompt,)
        return tuple(dict.fromkeys(self._texts[int(i)] for i in np.unique(self._task_of)))

    def _task_column(self, schema: pa.Schema, vectors: Sequence[str]) -> str:
        """The column with the instructions (none of `vectors`); "" where one instruction is given for all."""
        if self.settings.prompt:
            return ""
        name = self.settings.prompt_key or "task_index"
        texts = self._text_columns = [field.name for field in schema if is_text(field.type)]
        if name not in schema.names:
            raise DataError(
                "the frames have no instruction: there is no such column",
                field=self._first(name), got="no such column", expected=schema.names,
                fix=_give_instruction(texts),
            )  # fmt: skip
        kind = schema.field(name).type
        other = name in {*AUTO, *vectors} - {"task_index"}
        if other or not (is_text(kind) or is_numeric(kind)):
            raise DataError(
                "a column holds no instructions", field=self._first(name), got=str(kind)[:160],
                expected="texts, or numbers of tasks", fix=_give_instruction(texts),
            )  # fmt: skip
        return name

    def _instructions(self, frames: Frames, task: str) -> tuple[np.ndarray | None, dict[int, Any]]:
        """The number of each frame's instruction [N], and the instructions by number.

        Raises:
            DataError: a frame has none, an empty one, or something else than a text.
        """
        meta = self._meta
        if not task:
            return None, meta.tasks
        texts: dict[int, Any] = dict(enumerate(frames.texts)) if frames.texts else meta.tasks
        values = frames.scalars[task]
        if values.dtype.kind == "f" and (lost := np.isnan(values)).any():  # null in the file
            raise self._no_instruction(
                frames, task, lost, "an instruction is missing", "null", f"one of {sorted(texts)}"
            )
        numbers = values if values.dtype.kind in "iu" else whole(values, f"{meta.root}: {task}")
        wrong = [n for n in np.unique(numbers).tolist() if not isinstance(texts.get(n), str) or not texts[n].strip()]
        if wrong:
            number = int(numbers[np.argmax(np.isin(numbers, wrong))])  # of the first such frame
            text = texts.get(number)
            what = (
                "a frame has a task that meta/ does not list" if number not in texts
                else "an instruction is missing" if text is None
                else "an instruction is empty" if isinstance(text, str)
                else "an instruction is no text"
            )  # fmt: skip
            got = number if number not in texts else repr(text) if frames.texts else f"{number}: {text!r} in meta/"
            expected = "an instruction in words" if number in texts else f"one of {sorted(texts)}"
            raise self._no_instruction(frames, task, np.isin(numbers, wrong), what, got, expected)
        return numbers, texts

    def _no_instruction(
        self, frames: Frames, task: str, bad: np.ndarray, what: str, got: Any, expected: str
    ) -> DataError:
        """The error of frames `bad` [N] without an instruction, at the first of them."""
        at = int(np.argmax(bad))
        file, row = frames.groups.place(self._meta.data_files, int(frames.rows[at]))
        return DataError(
            what, field=f"{file}: {task} in row {row} (episode {frames.episode[at]})", got=got, expected=expected,
            fix=advice(
                _give_instruction([c for c in self._text_columns if c != task]),
                leave_out(np.unique(frames.episode[bad]), len(self._meta.numbers)),
            ),
        )  # fmt: skip

    def _choose_cameras(self, columns: Sequence[str], modality: Modality) -> dict[str, str]:
        """Name offered -> key in the dataset."""
        kinds, there = self._meta.cameras(), {}
        for key, kind in kinds.items():
            there[key] = key in columns if kind == "image" else self._meta.has_files(key)
        short = {key.removeprefix(IMAGE_PREFIX): key for key in kinds}
        have = [name for name, key in short.items() if there[key]]
        if not self.settings.cameras:
            lacking = [name for name, key in short.items() if not there[key]]
            if lacking and not self._known_to_lack(lacking, modality):
                raise DataError(
                    "the dataset declares a camera but lacks its files",
                    field=f"{self._meta.root}: {short[lacking[0]]}",
                    got="no video of it, nor a column with pictures", expected=f"files of {list(short)}",
                    fix="copy the dataset completely, or go without it: "
                    f"--set 'data.cameras={json.dumps(have)}'" if have else "copy the dataset completely",
                )  # fmt: skip
            return {name: short[name] for name in have}
        chosen = {}
        parts = modality.group("video") if (self._meta.root / "meta" / "modality.json").is_file() else {}
        for item in self.settings.cameras:
            new, equals, old = item.partition("=")
            old = old if equals else new
            key = old if old in kinds else short.get(old) or str(parts.get(old, {}).get("original_key", ""))
            if not there.get(key):
                raise DataError(
                    "the dataset declares this camera but lacks its files" if key in kinds else "no such camera",
                    field="cameras", got=item, expected=f"any of {have}", fix="choose one of these",
                )  # fmt: skip
            name = new if equals else new.removeprefix(IMAGE_PREFIX)
            if name in chosen:
                raise DataError(
                    "two cameras would have one name", field="cameras", got=f"{item}, beside {name}={chosen[name]}",
                    expected="a name for each", fix="write new=old with another new name",
                )  # fmt: skip
            chosen[name] = key
        return chosen

    def _known_to_lack(self, names: list[str], modality: Modality) -> bool:
        """Whether modality.json says which cameras there are, and names none of these: published GR00T sets do."""
        listed = {
            str(value.get("original_key") or IMAGE_PREFIX + name).removeprefix(IMAGE_PREFIX)
            for name, value in modality.group("video").items()
        }
        return bool(listed) and not listed & set(names)

    def _first(self, column: str) -> str:
        return f"{self._meta.data_files[0]}: {column} (episode {self._meta.numbers[0]})"


def _give_instruction(columns: Sequence[str]) -> str:
    """The ways out where an instruction is missing."""
    other = f", or name the column that has them: --set data.prompt_key={columns[0]}" if columns else ""
    return f"give one for all frames: --set data.prompt='pick up the cube'{other}"
