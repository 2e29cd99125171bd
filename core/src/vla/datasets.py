"""The contract of a dataset, opening one by name or path, action chunks, and mixtures.

A raw sample is what a robot saw and did at one frame, in the robot's own units and camera names:

    {"images": {camera: uint8 [h w 3]}, "state": float32 [s], "actions": float32 [t a], "actions_is_pad": bool [t],
     "prompt": str, "episode": int, "frame": int}

`actions` is the chunk that starts at this frame. Past the end of the episode it repeats the last action, and
`actions_is_pad` is True there (LeRobot's convention).
"""

from __future__ import annotations

import difflib
import json
import os
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextvars import ContextVar
from itertools import combinations, permutations
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from attrs import evolve, field, frozen

from vla.embodiment import Embodiment, check_same, differences, same_rate
from vla.errors import DataError, PartError, SettingsError, VlaError
from vla.reading import reading

DEFAULT_FORMAT = "lerobot"


@frozen
class DatasetInfo:
    """What a dataset declares. Names and units may be empty: many recordings do not say.

    Attributes:
        cameras: camera -> (height, width).
        hz: frames per second.
        robot: name of the robot part that its samples fit, "" when unknown.
        units: "state" and "actions" -> one unit per dimension.
        tasks: every instruction that occurs.
        source: where it was read from, for messages.
    """

    cameras: Mapping[str, tuple[int, int]]
    state_dim: int
    action_dim: int
    hz: float
    robot: str = ""
    units: Mapping[str, tuple[str, ...]] = field(factory=dict)
    tasks: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()
    state_names: tuple[str, ...] = ()
    source: str = ""


@runtime_checkable
class Dataset(Protocol):
    """Random access to frames; safe to use from several threads, and after fork or in a spawned process."""

    info: DatasetInfo
    episodes: Sequence[range]  # frame indices of each episode

    def __len__(self) -> int:
        """Frames."""
        ...

    def sample(
        self, index: int, horizon: int, cameras: Sequence[str] | None = None, images: bool = True
    ) -> dict[str, Any]:
        """The raw sample of one frame, `horizon` actions; decodes only the cameras asked for (None: all)."""
        ...

    def states(self) -> np.ndarray:
        """float32 [N s], without decoding an image."""
        ...

    def actions(self) -> np.ndarray:
        """float32 [N a], without decoding an image."""
        ...

    def prompts(self) -> Sequence[str]:
        """The instruction of each frame [N]."""
        ...

    def digest(self) -> str:
        """SHA-256 of everything but pixels: the identity of the data."""
        ...


class Writer(Protocol):
    """What a recorder writes to: `Part.numpy` of a dataset may offer `create(path, info, video, overwrite) -> Writer`.

    Used as a context manager: leaving the block puts the dataset in place, an exception leaves nothing behind.
    """

    def add(self, sample: Mapping[str, Any]) -> None:
        """One frame: {"images": {camera: uint8 [h w 3]}, "state": [s], "action": [a], "prompt": str}."""
        ...

    def end_episode(self) -> None:
        """Close the episode that the frames added since the last call make up."""
        ...


def open_dataset(source: str | Path | Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> Dataset:
    """Open a dataset.

    Args:
        source: a folder or a hub name (`org/name`, read from the local hub cache) in LeRobot's format; the name of a
            dataset part (`tabletop`); `part:path` for another format; a table {"part": ..., settings...}; or
            {"mixture": [tables with a "weight" each]} (`mixture_table`).
        settings: settings of the part, as in a file; and those that every dataset has: `stride` (see `EveryNth`),
            `state_names` and `action_names`, which win over the names that the data brings.

    Raises:
        PartError: the reader is not installed.
        SettingsError: a setting is unknown or wrong.
        DataError: the data is missing or damaged.
    """
    from vla.compose import load_object, resolve

    table = source_table(source, settings)
    if "mixture" in table:
        opened = [
            (open_dataset({k: v for k, v in t.items() if k != "weight"}), t.get("weight")) for t in table["mixture"]
        ]
        return Mixture([(dataset, len(dataset) if weight is None else weight) for dataset, weight in opened])
    stride, names = table.pop("stride", 1), {k: table.pop(k) for k in ("state_names", "action_names") if k in table}
    chosen = resolve("dataset", table, "data")
    dataset = load_object(chosen.part.numpy, f"dataset {chosen.part.name!r}")(chosen.settings)
    if names:
        dataset.info = evolve(dataset.info, **{k: _names(k, v, dataset.info) for k, v in names.items()})
    return dataset if stride == 1 else EveryNth(dataset, stride)


def _names(setting: str, value: Any, info: DatasetInfo) -> tuple[str, ...]:
    """The names of a setting, one for each dim that the data has."""
    want = getattr(info, setting.replace("_names", "_dim"))
    if not isinstance(value, list | tuple) or len(value) != want or not all(isinstance(name, str) for name in value):
        raise SettingsError(
            "one name for each dim", field=f"data.{setting}", got=value, expected=f"{want} words in {info.source}"
        )
    return tuple(value)


def source_table(source: str | Path | Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What `open_dataset` understands, as a table {"part": ..., settings...}; a folder here by its full path."""
    from vla import registry

    if isinstance(source, Mapping) and "mixture" in source:
        return {"mixture": [source_table(one, settings) for one in source["mixture"]]}
    if isinstance(source, Mapping):
        table = {**source, **(settings or {})}
    else:
        names = {item.name for item in registry.listed("dataset")}
        text = str(source)
        part, colon, path = text.partition(":")
        if isinstance(source, str) and text in names:
            _refuse_ambiguous(text)
            table = {"part": text, **(settings or {})}
        elif isinstance(source, str) and colon and part in names:
            table = {"part": part, **({"path": path} if path else {}), **(settings or {})}
        else:
            _refuse_misspelt(text, part if colon else text, names)
            table = {"part": DEFAULT_FORMAT, "path": text, **(settings or {})}
    path = table.get("path")
    if isinstance(path, str) and path and (folder := Path(os.path.expanduser(path))).exists():
        table["path"] = str(folder.absolute())
    return table


def mixture_table(sources: Sequence[str], settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What `open_dataset` understands, of one source or of several to be mixed: `A`, `B:0.3`, `tabletop:PATH:0.7`.

    Without weights every frame counts alike. A number behind the last colon is a weight unless there is such a folder.
    Settings go to every dataset, `1.stride` only to the second.

    Raises:
        SettingsError: some have a weight and some none, a weight on a single one, one is named twice, or a setting is
            for a dataset that there is not.
    """
    parted = [_weighted(source) for source in sources]
    weights = [weight for _, weight in parted]
    common = {k: v for k, v in (settings or {}).items() if not k.partition(".")[0].isdigit()}
    single: dict[int, dict[str, Any]] = {}
    for path, value in (settings or {}).items():
        head, _, rest = path.partition(".")
        if head.isdigit():
            if not rest or int(head) >= len(sources):
                have = f"data.0 to data.{len(sources) - 1}"
                raise SettingsError("a setting of a dataset that there is not", field=f"data.{path}", expected=have)
            single.setdefault(int(head), {})[rest] = value
    tables = [source_table(text, {**common, **single.get(i, {})}) for i, (text, _) in enumerate(parted)]
    if len(tables) == 1:
        if weights[0] is not None:
            fix = "name another dataset to mix it with, or leave the weight out"
            raise SettingsError("a weight of a single dataset", field="--data", got=sources[0], fix=fix)
        return tables[0]
    if any(w is None for w in weights) and any(w is not None for w in weights):
        fix = "give every --data a weight (A:0.3), or none: then every frame counts alike"
        raise SettingsError(
            "some datasets of a mixture have a weight, and some none", field="--data", got=sources, fix=fix
        )
    for i, table in enumerate(tables):
        if table in tables[:i]:
            fix = "to draw it more often give weights: A:0.7"
            raise SettingsError("a dataset is named twice", field="--data", got=sources[i], fix=fix)
    return {"mixture": [{**t, "weight": w} for t, w in zip(tables, weights, strict=True)]}


def _weighted(source: str) -> tuple[str, float | None]:
    """A source and the weight behind its last colon."""
    text, colon, number = source.rpartition(":")
    try:
        weight = float(number) if colon and text else None
    except ValueError:
        weight = None
    if weight is None or os.path.exists(os.path.expanduser(source)) or Path(number).is_dir():
        return source, None
    return text, weight


def _refuse_ambiguous(name: str) -> None:
    """The name of a dataset part that is also a dataset here: nobody knows which of the two is meant."""
    if (Path(name) / "meta" / "info.json").is_file():
        raise PartError(
            "this is the name of a dataset part, and of a folder here that holds a dataset", field="data", got=name,
            expected=f"./{name} for the folder, {name}: for the part", fix=f"write ./{name}, or {name}:",
        )  # fmt: skip


def _refuse_misspelt(text: str, part: str, names: Collection[str]) -> None:
    """A word that is nearly the name of a dataset part, and no folder or hub name, was meant as one."""
    close = [] if "/" in part or os.sep in part else difflib.get_close_matches(part, names, 1, 0.7)
    if close and not os.path.exists(os.path.expanduser(text)):
        raise PartError(
            "no dataset of this name, and no such folder", field="data", got=text,
            expected=f"a folder, or {', '.join(sorted(names))}", fix=f"did you mean {close[0]}?",
        )  # fmt: skip


_on_demand: ContextVar[bool] = ContextVar("on_demand", default=True)


def check_on_demand(what: str) -> None:
    """Called by datasets that make their data when it is not there, before they do.

    Raises:
        DataError: a model's record asked for it, not the user.
    """
    if not _on_demand.get():
        raise DataError(
            f"{what} are not recorded here, and the record of a model starts no recording", field="--data",
            fix="add --data, which records them",
        )  # fmt: skip


def open_recorded(record: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> Dataset:
    """The data that a model was trained on, as its record names it (`source`, and `data`, its digest).

    With settings it is opened with these, and need not be the same data any more.

    A record may come from a stranger: it opens what is here, and never starts a recording.

    Raises:
        DataError: the record does not name it, it is not here any more, or it is other data now.
    """
    source = record.get("source")
    if not source:
        raise DataError(
            "the model does not say where the data is that it was trained on", field="--data", fix="add --data DATA"
        )
    recording = _on_demand.set(False)
    try:
        with reading("the record of a model is damaged", "source", DataError):
            table = source_table(source, settings)
            for one in table.get("mixture", [table]):
                if one["part"] != DEFAULT_FORMAT and one.get("path") and not os.path.exists(one["path"]):
                    raise DataError("no such folder", field="path", got=one["path"])
        dataset = open_dataset(table)
    except (VlaError, OSError) as error:
        if settings and isinstance(error, SettingsError):
            raise  # what was asked for is wrong, not where the data is
        raise DataError(
            "the data that the model was trained on cannot be opened",
            field="--data",
            got=f"{source}: {str(error).splitlines()[0]}",
            fix="add --data DATA, where it is now",
        ) from error
    finally:
        _on_demand.reset(recording)
    if not settings and dataset.digest() != record.get("data"):
        raise DataError(
            "this is other data now than the model was trained on", field="--data", got=source,
            fix="add --data DATA to use it all the same, or other data",
        )  # fmt: skip
    return dataset


def create_dataset(
    path: str | Path, info: DatasetInfo, *, video: bool = False, overwrite: bool = False, part: str = DEFAULT_FORMAT
) -> Writer:
    """A writer of a new dataset at `path`; see `Writer`.

    Args:
        info: cameras, widths, rate and names of what will be written.
        video: cameras as compressed video; else every frame exactly (PNG).
        overwrite: replace a dataset that is there, when the new one is complete.

    Raises:
        StoreError: the path is taken or cannot be written.
    """
    from vla.compose import load_object, resolve

    chosen = resolve("dataset", {"part": part}, "dataset")
    reader = load_object(chosen.part.numpy, f"dataset {part!r}")
    if not hasattr(reader, "create"):
        raise PartError(f"dataset {part!r} cannot be written", field="part", got=part, fix=f"use {DEFAULT_FORMAT!r}")
    return reader.create(path, info, video=video, overwrite=overwrite)


def chunk(actions: np.ndarray, index: int, end: int, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """The chunk that starts at `index` in an episode that ends before `end`.

    Args:
        actions: [N a] of the whole dataset.

    Returns:
        float32 [horizon a], the last action repeated past the end, and bool [horizon], True where repeated.
    """
    steps = np.arange(index, index + horizon)
    is_pad = steps >= end
    return np.ascontiguousarray(actions[np.minimum(steps, end - 1)], np.float32), is_pad


def check_index(index: int, length: int, where: str) -> int:
    """The index as an int in range(length); negative ones count from the end."""
    i = int(index)
    if not -length <= i < length:
        raise DataError("no such frame", field="index", got=index, expected=f"0 to {length - 1} in {where}")
    return i % length


def check_cameras(wanted: Sequence[str] | None, have: Iterable[str], where: str) -> list[str]:
    """The cameras to decode; None means all."""
    have = list(have)
    if wanted is None:
        return have
    if missing := [name for name in wanted if name not in have]:
        raise DataError(
            "the dataset has no such camera",
            field=f"cameras: {missing[0]!r}",
            got=list(wanted),
            expected=f"any of {have} in {where}",
            fix='choose one of these, or rename with the setting cameras = ["new=old", ...]',
        )
    return list(wanted)


def ways_out(mine: Embodiment, theirs: Embodiment, they: str = "data", me: str = "") -> str:
    """What to type so that data says what another side says, if it means the same; "": nothing would do.

    Args:
        they: what settings of the data begin with.
        me: what those of the other side begin with, if it is data too.
    """
    words = []
    for name in (d.field for d in differences(mine, theirs)):
        if name in ("state_names", "action_names") and len(getattr(mine, name)) == len(getattr(theirs, name)):
            words.append(f"{they}.{name}={json.dumps(getattr(mine, name))}")
        if name == "cameras":
            new, old = ([c for c in a if c not in b] for a, b in permutations((mine.cameras, theirs.cameras)))
            if len(new) == len(old) == 1:
                named = [f"{new[0]}={c}" if c in old else c for c in theirs.cameras]
                words.append(f"{they}.cameras={json.dumps(named)}")
        if name == "hz":
            meet = ((n, m) for n in range(1, 21 if me else 2) for m in range(1, 21))
            n, m = next(((n, m) for n, m in meet if same_rate(mine.hz / n, theirs.hz / m)), (1, 1))
            words += [f"{side}.stride={k}" for side, k in ((me, n), (they, m)) if k > 1]
    return " ".join(f"--set {shlex.quote(word)}" for word in words)


class EveryNth:
    """Every n-th frame of a dataset, and every n-th action of a chunk: the same robot at a lower rate.

    Right for actions that say where to be (joint positions, poses). Actions that say how far to go from one frame to
    the next would have to be added up.
    """

    def __init__(self, dataset: Dataset, stride: int):
        if isinstance(stride, bool) or not isinstance(stride, int) or stride < 1:
            raise SettingsError("a stride is a number of frames", field="data.stride", got=stride, expected=">= 1")
        self.dataset, self.stride = dataset, stride
        self._rows = np.concatenate([np.arange(e.start, e.stop, stride) for e in dataset.episodes])
        ends = np.cumsum([len(range(e.start, e.stop, stride)) for e in dataset.episodes]).tolist()
        self.episodes = [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        self.info = evolve(dataset.info, hz=dataset.info.hz / stride)

    def __len__(self) -> int:
        """Frames that are left."""
        return len(self._rows)

    def sample(
        self, index: int, horizon: int, cameras: Sequence[str] | None = None, images: bool = True
    ) -> dict[str, Any]:
        """As `Dataset.sample`; "frame" counts the frames that are left."""
        index = check_index(index, len(self), self.info.source)
        n = self.stride
        sample = self.dataset.sample(int(self._rows[index]), n * horizon, cameras, images)
        chunk = {name: sample[name][::n] for name in ("actions", "actions_is_pad") if name in sample}
        return {**sample, **chunk, "frame": sample["frame"] // n}

    def states(self) -> np.ndarray:
        """float32 [N s]."""
        return self.dataset.states()[self._rows]

    def actions(self) -> np.ndarray:
        """float32 [N a]."""
        return self.dataset.actions()[self._rows]

    def prompts(self) -> list[str]:
        """The instruction of each frame."""
        prompts = self.dataset.prompts()
        return [prompts[i] for i in self._rows.tolist()]

    def digest(self) -> str:
        """SHA-256 over that of the dataset and the stride."""
        import hashlib

        return hashlib.sha256(f"{self.dataset.digest()} every {self.stride}".encode()).hexdigest()


class Mixture:
    """Several datasets laid end to end, with sampling weights.

    The frame numbers run through the datasets in order; `locate` says which dataset a number belongs to. How often
    each dataset is drawn is the trainer's business: it reads `sizes` and `weights`.
    """

    def __init__(self, parts: Sequence[tuple[Dataset, float]]):
        if not parts:
            raise DataError("a mixture of no datasets", field="mixture", fix="name at least one dataset")
        for dataset, weight in parts:
            if not (np.isfinite(weight) and weight > 0):
                raise DataError("a weight must be positive", field=f"weight of {dataset.info.source}", got=weight)
        self.datasets = [dataset for dataset, _ in parts]
        self.sizes = [len(dataset) for dataset in self.datasets]
        total = sum(weight for _, weight in parts)
        self.weights = [weight / total for _, weight in parts]
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        first = self.datasets[0].info
        for other in (dataset.info for dataset in self.datasets[1:]):
            for name in ("state_dim", "action_dim", "robot"):
                if getattr(other, name) != getattr(first, name):
                    raise DataError(
                        f"the datasets of a mixture differ in {name}",
                        field=name,
                        got=f"{getattr(other, name)!r} in {other.source}",
                        expected=f"{getattr(first, name)!r} as in {first.source}",
                        fix="mix datasets of one robot",
                    )
        infos = [dataset.info for dataset in self.datasets]
        for (i, one), (j, other) in combinations(enumerate(infos), 2):
            a, b = Embodiment.of(one), Embodiment.of(other)
            way = ways_out(a, b, f"data.{j}", f"data.{i}")
            check_same(
                a, b, one.source, other.source, f"mix data of one robot{way and f'; if they mean the same: {way}'}"
            )
        self.info = evolve(
            first,
            cameras={name: size for info in reversed(infos) for name, size in info.cameras.items()},
            tasks=tuple(dict.fromkeys(task for info in infos for task in info.tasks)),
            source=" + ".join(info.source for info in infos),
        )
        self.episodes = [
            range(start + episode.start, start + episode.stop)
            for start, dataset in zip(self._starts.tolist(), self.datasets, strict=False)
            for episode in dataset.episodes
        ]

    def __len__(self) -> int:
        """Frames in all datasets."""
        return int(self._starts[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """(which dataset, frame within it) of a frame number."""
        index = check_index(index, len(self), self.info.source)
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        return which, index - int(self._starts[which])

    def sample(
        self, index: int, horizon: int, cameras: Sequence[str] | None = None, images: bool = True
    ) -> dict[str, Any]:
        """As `Dataset.sample`; a camera that this frame's dataset lacks is left out. Adds "dataset", its number."""
        which, inner = self.locate(index)
        dataset = self.datasets[which]
        if cameras is not None:
            check_cameras(cameras, self.info.cameras, self.info.source)
            cameras = [name for name in cameras if name in dataset.info.cameras]
        sample = dataset.sample(inner, horizon, cameras, images)
        before = sum(len(d.episodes) for d in self.datasets[:which])
        return {**sample, "episode": before + sample["episode"], "dataset": which}

    def states(self) -> np.ndarray:
        """float32 [N s]."""
        return np.concatenate([dataset.states() for dataset in self.datasets])

    def actions(self) -> np.ndarray:
        """float32 [N a]."""
        return np.concatenate([dataset.actions() for dataset in self.datasets])

    def prompts(self) -> list[str]:
        """The instruction of each frame."""
        return [prompt for dataset in self.datasets for prompt in dataset.prompts()]

    def digest(self) -> str:
        """SHA-256 over the digests and weights of the datasets."""
        import hashlib

        text = "\n".join(f"{d.digest()} {w!r}" for d, w in zip(self.datasets, self.weights, strict=True))
        return hashlib.sha256(text.encode()).hexdigest()
