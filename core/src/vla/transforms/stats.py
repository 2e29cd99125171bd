"""Normalisation statistics: what they are, `norm_stats.json` (openpi's format), and computing them from a dataset.

Statistics are taken over what the model will see: states of all frames, and all actions of all chunks, after the robot
and delta stages, without the steps that only repeat the last action past the end of an episode. No image is decoded.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import field, frozen

from vla.errors import DataError, StoreError
from vla.files import write_text
from vla.reading import read_json
from vla.transforms.quantiles import Batch, Summary, summarise_batches

FILE = "norm_stats.json"
FIELDS = ("mean", "std", "q01", "q99")
EXTREMES = ("min", "max")
_CHUNK_VALUES = 1 << 21  # values of one batch of chunks: bounds memory
FAR = 10.0  # |z| that no value of the data passes
RESTS = 50  # a dim rests when its extremes are so many times as far apart as its percentiles
_CONSTANT = 1e-6  # a range (or deviation) below this is what the formulas' epsilon would divide by


def _vector(value: Any) -> np.ndarray | None:
    return None if value is None else np.asarray(value, np.float64)


@frozen(eq=False)
class Stats:
    """float64 [d] each: mean, standard deviation (of the population), 1st and 99th percentile (None: not known).

    `data` is the digest of the data they were taken from, "" when unknown; `min` and `max` are its extremes, if known.
    """

    mean: np.ndarray = field(converter=_vector)
    std: np.ndarray = field(converter=_vector)
    q01: np.ndarray | None = field(default=None, converter=_vector)
    q99: np.ndarray | None = field(default=None, converter=_vector)
    data: str = ""
    min: np.ndarray | None = field(default=None, converter=_vector)
    max: np.ndarray | None = field(default=None, converter=_vector)

    @property
    def recorded(self) -> tuple[np.ndarray, np.ndarray]:
        """The range [d], [d] of the data: its extremes, else its percentiles, else where 98 % of a bell curve lie."""
        low = (self.min, self.q01, self.mean - 2.33 * self.std)
        high = (self.max, self.q99, self.mean + 2.33 * self.std)
        return tuple(next(x for x in side if x is not None) for side in (low, high))  # type: ignore[return-value]

    def __attrs_post_init__(self) -> None:
        for name in (*FIELDS, *EXTREMES):
            x = getattr(self, name)
            if x is None:
                continue
            if x.ndim != 1 or len(x) != len(self.mean):
                raise DataError(
                    "statistics are vectors of one length", field=name, got=x.shape, expected=self.mean.shape
                )
            if not np.isfinite(x).all():
                raise DataError("statistics must be finite", field=name, got=x[~np.isfinite(x)][0])
        if (self.std < 0).any():
            raise DataError("a standard deviation is negative", field="std", got=float(self.std.min()))
        if self.q01 is not None and self.q99 is not None and (self.q99 < self.q01).any():
            at = int(np.argmax(self.q99 < self.q01))
            raise DataError(
                "a 99th percentile lies below the 1st", field=f"q99[{at}]", got=self.q99[at], expected=self.q01[at]
            )


def identity_stats(state_dim: int, action_dim: int) -> dict[str, Stats]:
    """Statistics that leave data (almost) as it is: for tests, and for data that is normalised already."""

    def one(d: int) -> Stats:
        return Stats(np.zeros(d), np.ones(d), -np.ones(d), np.ones(d))

    return {"state": one(state_dim), "actions": one(action_dim)}


# ---- norm_stats.json -----------------------------------------------------------------------------------------------


def save_stats(stats: Mapping[str, Stats], path: str | Path, about: Mapping[str, Any] | None = None) -> Path:
    """Write `norm_stats.json`; openpi reads it too (it ignores the key `vla`). Whole or not at all; gives the path.

    Args:
        path: the file, or a folder for it.
        about: plain values to keep beside the statistics (a report).
    """
    path = Path(path).expanduser()
    path = path / FILE if path.is_dir() else path
    extra = dict(about or {})
    digests = {key: s.data for key, s in stats.items() if s.data}
    if digests:
        extra["data"] = digests
    for name in EXTREMES:
        known = {key: getattr(s, name).tolist() for key, s in stats.items() if getattr(s, name) is not None}
        if known:
            extra.setdefault(name, known)
    table: dict[str, Any] = {"norm_stats": {key: _plain(s) for key, s in stats.items()}}
    if extra:
        table["vla"] = extra
    text = json.dumps(table, indent=2, allow_nan=False) + "\n"
    write_text(path, text, "the statistics", b'"norm_stats"')
    return path


def _plain(stats: Stats) -> dict[str, Any]:
    return {name: None if getattr(stats, name) is None else getattr(stats, name).tolist() for name in FIELDS}


def load_stats(path: str | Path) -> dict[str, Stats]:
    """Read `norm_stats.json` (the file, or a folder that holds it), ours or openpi's. q01 and q99 may be null.

    Raises:
        StoreError: there is none, or it is damaged; the message names the field.
    """
    path = Path(path).expanduser()
    path = path / FILE if path.is_dir() else path
    table = _read(path)
    entries = table.get("norm_stats")
    if not isinstance(entries, dict) or not entries:
        raise StoreError(
            "not a norm_stats.json", field=str(path), got=sorted(table)[:8], expected='{"norm_stats": {...}}'
        )
    about = table["vla"] if isinstance(table.get("vla"), dict) else {}
    beside = {name: t if isinstance(t := about.get(name), dict) else {} for name in ("data", *EXTREMES)}
    out = {}
    for key, entry in entries.items():
        where = f"{path}: {key}"
        if not isinstance(entry, dict):
            raise StoreError("statistics of one key must be a table", field=where, got=type(entry).__name__)
        if lacking := [name for name in ("mean", "std") if entry.get(name) is None]:
            raise StoreError("statistics are incomplete", field=f"{where}.{lacking[0]}", got=sorted(entry))
        extremes = {name: beside[name].get(key) for name in EXTREMES}
        try:
            out[key] = Stats(*(entry.get(name) for name in FIELDS), data=str(beside["data"].get(key, "")), **extremes)
        except (TypeError, ValueError, OverflowError) as error:
            raise StoreError("statistics must be lists of numbers", field=where, got=str(error)) from error
        except DataError as error:
            raise StoreError(
                error.what, field=f"{where}.{error.field}", got=error.got, expected=error.expected,
                fix=f"compute them again: vla stats DATA --out {shlex.quote(str(path))}",
            ) from error  # fmt: skip
    return out


def about_stats(path: str | Path) -> dict[str, Any]:
    """What was kept beside the statistics; {} for openpi's files."""
    path = Path(path)
    about = _read(path / FILE if path.is_dir() else path).get("vla", {})
    return about if isinstance(about, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    if not os.path.exists(path):
        raise StoreError(
            "there are no normalisation statistics",
            field=str(path),
            fix=f"compute them: vla stats DATA --out {shlex.quote(str(path))}",
        )
    return read_json(path, "the statistics cannot be read")


# ---- computing -----------------------------------------------------------------------------------------------------


def compute_stats(dataset: Any, variant: Any, horizon: int | None = None) -> dict[str, Stats]:
    """Exact statistics of a dataset as a variant sees it; see `summarise`."""
    return stats_of(summarise(dataset, variant, horizon), dataset)


def stats_of(summaries: Mapping[str, Summary], dataset: Any = None) -> dict[str, Stats]:
    """What normalises the data, by one rule everywhere; with a dataset its digest is kept.

    openpi's formula takes the 1st and the 99th percentile (or the deviation), and divides by its epsilon of 1e-6 what
    lies outside a range of nothing: a gripper that rests in 99 of 100 frames becomes 10^6 in the others. Here no value
    of the data leaves |z| <= 10 (`FAR`):

    - A dim that rests (its percentiles are less than 1/50 of its extremes apart, or it is constant in all but a few
      frames) is normalised by its minimum and maximum.
    - Any other range, and any deviation, is widened around its middle until the farthest value lies at 10.

    Dims that nothing happens to keep openpi's numbers. What a constant dim answers at run time: `normalize`.
    """
    digest = dataset.digest() if hasattr(dataset, "digest") else ""

    def one(s: Summary) -> Stats:
        low, high = np.where(_rests(s), s.min, s.q01), np.where(_rests(s), s.max, s.q99)
        middle, half = (low + high) / 2, (high - low) / 2
        far = np.maximum(s.max - middle, middle - s.min)
        wide = far > FAR * half
        wide &= s.max > s.min
        low, high = np.where(wide, middle - far / FAR, low), np.where(wide, middle + far / FAR, high)
        far = np.maximum(s.max - s.mean, s.mean - s.min)
        return Stats(s.mean, np.maximum(s.std, far / FAR), low, high, data=digest, min=s.min, max=s.max)

    return {key: one(s) for key, s in summaries.items()}


def _rests(s: Summary) -> np.ndarray:
    """Which dims [d] rest, with rare excursions."""
    return (s.max > s.min) & (s.q99 - s.q01 <= np.maximum((s.max - s.min) / RESTS, _CONSTANT))


def summarise(dataset: Any, variant: Any, horizon: int | None = None) -> dict[str, Summary]:
    """Mean, deviation, quantiles and extremes of state and actions, in bounded memory.

    Args:
        dataset: `states()` [N s], `actions()` [N a], `episodes` (ranges of frames); a mixture works too.
        variant: a `vla.compose.Variant`, or the steps to run first (`vla.transforms.stats_steps`), e.g. ().
        horizon: actions per chunk; default: the variant's.

    Raises:
        DataError: no frames, or values that are not finite (the message says where).
    """
    from vla.transforms.build import stats_steps

    widths: Mapping[str, Any] = {}
    if isinstance(variant, (list, tuple)):
        steps = [getattr(s, "step", s) for s in variant]
    else:
        steps = [p.step for p in stats_steps(variant)]
        horizon = variant.spec.action_horizon if horizon is None else horizon
        widths = variant.parts["robot"].offers
    if horizon is None or horizon < 1:
        raise DataError("statistics of chunks need their length", field="horizon", got=horizon, expected=">= 1")
    states, actions = np.asarray(dataset.states()), np.asarray(dataset.actions())
    episodes = [e for e in dataset.episodes if len(e)]
    if not episodes:
        raise DataError("the dataset has no frames", field="data", got=f"{len(states)} frames, 0 episodes")
    rows = _frames(states, actions, steps, episodes)
    out = {"state": summarise_batches(lambda: ((s, None) for s, _, _ in rows()), "state")}
    if all(getattr(step, "pointwise", False) for step in steps):
        out["actions"] = summarise_batches(lambda: _weighted(rows, episodes, horizon), "actions")
    else:
        out["actions"] = summarise_batches(_chunks(states, actions, steps, episodes, horizon), "actions")
    for key, facet in (("state", "state_dim"), ("actions", "action_dim")):
        want, got = widths.get(facet) or 0, len(out[key].mean)
        if want and got != want:
            raise DataError(
                f"the data has another number of values in {key} than the robot",
                field=key,
                got=got,
                expected=want,
                fix="choose the adapter of the robot that recorded this data: --robot NAME",
            )
    return out


Rows = Callable[[], Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]]


def _frames(states: np.ndarray, actions: np.ndarray, steps: Sequence[Any], episodes: Sequence[range]) -> Rows:
    """Passes over (states [n s], actions [n a], frame numbers [n]) of single frames, after the steps."""

    def rows() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for frames in _blocks(episodes, 1 << 16):
            s, a = _apply(steps, states[frames], actions[frames][:, None])
            yield s, a[:, 0], frames

    return rows


def _weighted(rows: Rows, episodes: Sequence[range], horizon: int) -> Iterator[Batch]:
    """Actions of single frames, each with the number of chunks it stands in (that start less than horizon before)."""
    starts = np.array(sorted(e.start for e in episodes))
    for _, a, frames in rows():
        place = frames - starts[np.searchsorted(starts, frames, side="right") - 1]
        yield a, np.minimum(place + 1, horizon)


def _chunks(
    states: np.ndarray, actions: np.ndarray, steps: Sequence[Any], episodes: Sequence[range], horizon: int
) -> Callable[[], Iterable[Batch]]:
    """Passes over the real actions of all chunks."""
    ends = np.zeros(len(actions), np.int64)
    for e in episodes:
        ends[e.start : e.stop] = e.stop
    size = max(1, _CHUNK_VALUES // max(1, horizon * actions.shape[1]))

    def batches() -> Iterator[Batch]:
        for frames in _blocks(episodes, size):
            index = frames[:, None] + np.arange(horizon)
            end = ends[frames][:, None]
            _, a = _apply(steps, states[frames], actions[np.minimum(index, end - 1)])
            yield a[index < end], None

    return batches


def _blocks(episodes: Sequence[range], size: int) -> Iterator[np.ndarray]:
    """Frame numbers of all episodes, at most `size` at a time."""
    held: list[np.ndarray] = []
    count = 0
    for e in episodes:
        frames = np.arange(e.start, e.stop)
        while len(frames):
            part, frames = frames[: size - count], frames[size - count :]
            held.append(part)
            count += len(part)
            if count == size:
                yield np.concatenate(held)
                held, count = [], 0
    if held:
        yield np.concatenate(held)


def _apply(steps: Sequence[Any], states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """states [n s], actions [n t a] after the steps; row by row as soon as one step promises nothing about batches."""
    if not steps:
        return states, actions
    if all(getattr(s, "batched", False) or getattr(s, "pointwise", False) for s in steps):
        return _through(steps, states, actions)
    rows = [_through(steps, s, a) for s, a in zip(states, actions)]
    return np.stack([s for s, _ in rows]), np.stack([a for _, a in rows])


def _through(steps: Sequence[Any], states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from vla.transforms.group import Placed, _run

    data = _run({"state": states, "actions": actions}, [Placed("robot, delta", step) for step in steps])
    return np.asarray(data["state"]), np.asarray(data["actions"])


# ---- report --------------------------------------------------------------------------------------------------------


def findings(summaries: Mapping[str, Summary], norm: str) -> list[str]:
    """What a person should look at: constant dims, dims that rest, and values far outside the usual range."""
    out = []
    made = stats_of(summaries)
    for key, s in summaries.items():
        fixed = [d for d in range(len(s.mean)) if s.max[d] == s.min[d]]
        if fixed:
            dims = ", ".join(f"{d} ({s.min[d]:g})" for d in fixed)
            out.append(f"{key}: constant dims {dims}: the model learns nothing about other values")
        spread = s.std if norm == "zscore" else (s.q99 - s.q01) / 2
        middle = s.mean if norm == "zscore" else (s.q01 + s.q99) / 2
        for d in range(len(s.mean)):
            if d in fixed:
                continue
            at = s.max[d] if s.max[d] - middle[d] >= middle[d] - s.min[d] else s.min[d]
            name, reach = f"{key}[{d}]", abs(at - middle[d]) / max(spread[d], 1e-300)
            if norm != "zscore" and _rests(s)[d]:
                share = 1 - s.below[d] - s.above[d]
                out.append(
                    f"{name} rests: {share:.1%} of its values lie in [{s.q01[d]:.4g}, {s.q99[d]:.4g}], others reach "
                    f"{at:.4g}: normalised by its extremes (repair or drop the frames if they are faults)"
                )
            elif reach > FAR:
                low, high = (x[d] for x in (made[key].q01, made[key].q99)) if norm != "zscore" else (None, None)
                new = f"std {made[key].std[d]:.4g}" if low is None else f"[{low:.4g}, {high:.4g}]"
                out.append(
                    f"{name} reaches {at:.4g}, {reach:.1f} times its usual range: an outlier, or a long tail; its "
                    f"range is widened to {new}"
                )
    return out


def report(summaries: Mapping[str, Summary], names: Mapping[str, Sequence[str]] | None = None) -> list[tuple[str, ...]]:
    """Rows of text for a table: dim, name, min, q01, mean, std, q99, max, share outside the quantiles."""
    rows = []
    for key, s in summaries.items():
        labels = (names or {}).get(key, ())
        for d in range(len(s.mean)):
            values = (s.min[d], s.q01[d], s.mean[d], s.std[d], s.q99[d], s.max[d])
            share = f"{100 * s.below[d]:.2f} + {100 * s.above[d]:.2f} %"
            if s.min[d] == s.max[d]:
                share = "constant"
            name = labels[d] if d < len(labels) else ""
            rows.append((f"{key}[{d}]", name, *(f"{v:.4g}" for v in values), share))
    return rows
