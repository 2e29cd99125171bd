"""Which normalisation statistics a run uses, and whether they fit its data.

Those of the data are the default, also when a model is fine-tuned: the statistics of another robot put most values
outside the range that the model knows, and nothing else would say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen

from vla.errors import DataError, SettingsError
from vla.transforms.build import stats_steps
from vla.transforms.stats import RESTS, Stats, _apply, findings, load_stats, stats_of, summarise

DATA, BASE = "data", "base"
FRAMES = 4096  # frames, evenly spaced, that are looked at
# (said, refused): beyond these a dim is named before the first step; beyond those the run does not start.
SHARE = (0.1, 0.9)  # of the values outside the range (3 deviations for zscore)
LARGEST = (10.0, 100.0)  # |z|
WIDTH = (0.1, 0.001)  # of the data, as a share of the range: under it nearly all values are one
_SHOWN = 6


@frozen
class Fit:
    """How one dim of the data lies in the statistics."""

    name: str
    outside: float  # share of the values
    largest: float  # |z|
    width: float  # of the data from the 1st to the 99th percentile, as a share of the range; 1 for a constant dim

    def beyond(self, limit: int) -> bool:
        """Whether it is past the limit: 0 to be said, 1 to be refused."""
        return self.outside > SHARE[limit] or self.largest > LARGEST[limit] or self.width < WIDTH[limit]

    def __str__(self) -> str:
        return f"{self.name}: {self.outside:.0%} outside the range, largest {self.largest:.3g}, width {self.width:.2g}"


def choose(
    given: Any, base: Mapping[str, Stats] | None, variant: Any, dataset: Any, note: Callable[[str], None]
) -> tuple[Mapping[str, Stats], str]:
    """The statistics of a run, and where they are from: "data", "base" or a path.

    Args:
        given: "data" (also None), "base", a path, or statistics.
        base: those of the model that is fine-tuned.

    Raises:
        SettingsError: "base", and there are none.
        DataError: they do not fit the data; the message has the numbers.
    """
    if isinstance(given, str | Path) and str(given) not in (DATA, BASE):
        found, source = load_stats(Path(given).expanduser()), str(given)
    elif isinstance(given, Mapping):
        found, source = given, "statistics given"
    elif given == BASE:
        if base is None:
            fix = "--stats data, or --stats FILE"
            raise SettingsError("there are no statistics of a base model to use", field="--stats", got=BASE, fix=fix)
        found, source = base, BASE
    else:
        note(f"statistics: of the data, all {len(dataset)} frames (norm_stats.json)")
        summaries = summarise(dataset, variant)
        _say(findings(summaries, variant.spec.norm), note)
        return stats_of(summaries, dataset), DATA
    note(f"statistics: {'of the base model' if source == BASE else source}, not of this data")
    bad = [fit for fit in fits(found, variant, dataset) if fit.beyond(0)]
    _say(list(map(str, bad)), note)
    if worst := [fit for fit in bad if fit.beyond(1)]:
        lines = [f"    {fit}" for fit in worst[:_SHOWN]] + ([f"    ... ({len(worst)} dims)"] if worst[_SHOWN:] else [])
        raise DataError(
            "\n".join(["the statistics do not fit the data", *lines]),
            field="--stats",
            got=source,
            expected=f"at most {SHARE[1]:.0%} outside, |z| up to {LARGEST[1]:g}, a width of at least {WIDTH[1]:g}",
            fix="--stats data",
        )
    return found, source


def _say(lines: list[str], note: Callable[[str], None]) -> None:
    for line in lines[:_SHOWN]:
        note(f"  look: {line}")
    if len(lines) > _SHOWN:
        note(f"  look: {len(lines) - _SHOWN} more; all of them: vla stats DATA")


def words_of(given: Any) -> str:
    """What `choose` was given, as text for the run's record; "": numbers."""
    if isinstance(given, str | Path) and str(given) not in (DATA, BASE):
        return str(Path(given).expanduser().absolute())
    return DATA if given is None else given if isinstance(given, str) else ""


def fits(stats: Mapping[str, Stats], variant: Any, dataset: Any) -> list[Fit]:
    """How the data, as the model sees it before normalisation, lies in statistics; one entry per dim.

    Raises:
        DataError: they are of another number of values.
    """
    frames = np.unique(np.linspace(0, len(dataset) - 1, FRAMES).astype(np.int64))
    states, actions, real = _values(variant, dataset, frames)
    found = []
    for key, values in (("state", states), ("actions", actions[real])):
        if key not in stats:
            raise DataError("statistics are incomplete", field="--stats", got=sorted(stats), expected=key)
        one = stats[key]
        if len(one.mean) < values.shape[-1]:
            raise DataError(
                f"the statistics are of fewer values in {key} than the data has",
                field="--stats", got=len(one.mean), expected=values.shape[-1], fix="--stats data",
            )  # fmt: skip
        found += _fits_of(key, one, np.asarray(values, np.float64), variant.spec.norm)
    return found


def _fits_of(key: str, one: Stats, values: np.ndarray, norm: str) -> list[Fit]:
    if norm == "zscore" or one.q01 is None or one.q99 is None:
        centre, half, edge = one.mean, one.std, 3.0
    else:
        centre, half, edge = (one.q01 + one.q99) / 2, (one.q99 - one.q01) / 2, 1.0
    d = values.shape[-1]  # longer statistics are cut, as in normalising
    centre, half = centre[:d], np.maximum(half[:d], 1e-6)
    z = np.abs(values - centre) / half
    low, high = np.percentile(values, [1, 99], axis=0)
    width = np.where(values.max(0) > values.min(0), (high - low) / (2 * half * edge), 1.0)
    # A dim that rests in the data within rare excursions has no width of its own; its largest value tells.
    width = np.where(RESTS * (high - low) > values.max(0) - values.min(0), width, 1.0)
    return [Fit(f"{key}[{d}]", float((z[:, d] > edge).mean()), float(z[:, d].max()), float(width[d])) for d in range(d)]


def _values(variant: Any, dataset: Any, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(states [n s], actions [n t a], real [n t]) after the robot and delta stages; no image is decoded."""
    ends = np.zeros(len(dataset), np.int64)
    for episode in dataset.episodes:
        ends[episode.start : episode.stop] = episode.stop
    index = frames[:, None] + np.arange(variant.spec.action_horizon)
    end = ends[frames][:, None]
    states, actions = np.asarray(dataset.states()), np.asarray(dataset.actions())
    done = _apply([p.step for p in stats_steps(variant)], states[frames], actions[np.minimum(index, end - 1)])
    return *done, index < end
