"""Which episodes are read: the settings `episodes` and `exclude`, and the advice that names them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from vla.errors import DataError
from vla_dataset_lerobot.config import LeRobotSettings, Numbers, ranges


def chosen(numbers: np.ndarray, settings: LeRobotSettings, where: str) -> np.ndarray:
    """bool [E]: which of the dataset's episode numbers [E] (sorted) are read.

    Raises:
        DataError: a number that the dataset lacks, or none is left.
    """
    keep = np.ones(len(numbers), bool)
    if settings.episodes not in ((), "", []):
        keep = _named(numbers, settings.episodes, "episodes", where)
    if settings.exclude not in ((), "", []):
        keep &= ~_named(numbers, settings.exclude, "exclude", where)
    if len(numbers) and not keep.any():
        raise DataError(
            "no episode is left to read", field=f"{where}: episodes, exclude",
            got=f"episodes = {settings.episodes!r}, exclude = {settings.exclude!r}",
            expected=f"some of {written(numbers)}", fix="choose others",
        )  # fmt: skip
    return keep


def _named(numbers: np.ndarray, value: Numbers, field: str, where: str) -> np.ndarray:
    found = np.zeros(len(numbers), bool)
    lacking = []
    for first, last in ranges(value):
        inside = (numbers >= first) & (numbers <= last)
        found |= inside
        # A range may step over numbers that the dataset does not use, but not lead out of it.
        if not inside.any() or first < numbers[0] or last > numbers[-1]:
            lacking.append(str(first) if first == last else f"{first}-{last}")
    if lacking:
        raise DataError(
            "the dataset has no such episodes", field=f"{where}: {field}", got=", ".join(lacking),
            expected=f"some of {written(numbers)}", fix="name episodes that are there, the last of a range included",
        )  # fmt: skip
    return found


def written(numbers: Iterable[int]) -> str:
    """Numbers as the settings take them: `0-9,12`."""
    runs: list[list[int]] = []
    for number in sorted({int(n) for n in numbers}):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def leave_out(bad: Iterable[int], total: int) -> str:
    """The advice to read the dataset without these episodes; "" where nothing would be left."""
    numbers = {int(n) for n in bad}
    return f"or read the others: --set data.exclude='{written(numbers)}'" if len(numbers) < total else ""


def advice(*parts: str) -> str:
    """The parts of a fix that there are, as one sentence."""
    return ", ".join(part for part in parts if part)
