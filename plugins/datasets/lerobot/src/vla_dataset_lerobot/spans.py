"""Which frames make up which episode, in which order, and at which time: read from the columns that say so.

Every frame belongs to the episode whose number it carries. `frame_index`, `index` and `timestamp` say the same thing in
three ways; where two of them differ nobody knows which is right, and the dataset is refused with both values.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vla.errors import DataError
from vla_dataset_lerobot.choice import advice, leave_out
from vla_dataset_lerobot.frames import Frames, whole
from vla_dataset_lerobot.meta import Meta

INDICES = ("frame_index", "index")


def in_order(frames: Frames, meta: Meta) -> Frames:
    """The frames episode after episode, by rising numbers, and within one by `frame_index`."""
    for name in INDICES:
        if name in frames.scalars:
            frames.scalars[name] = whole(frames.scalars[name], f"{meta.root}: {name}")
    within = frames.scalars.get("frame_index", np.zeros(len(frames.episode), np.int64))
    step, inner = np.diff(frames.episode), np.diff(within)
    if ((step > 0) | ((step == 0) & (inner >= 0))).all():
        return frames
    return frames.ordered(np.lexsort((within, frames.episode)))


def episodes_of(frames: Frames, meta: Meta) -> list[range]:
    """The frames of each episode.

    Raises:
        DataError: an episode has another number of frames than the metadata says.
    """
    ends = np.searchsorted(frames.episode, meta.numbers, side="right")
    starts = np.searchsorted(frames.episode, meta.numbers, side="left")
    bad = ends - starts != meta.lengths
    if bad.any():
        e = int(np.argmax(bad))
        raise DataError(
            "an episode has another number of frames in data/ than meta/ says",
            field=f"{meta.root}: episode {meta.numbers[e]}" + _and_more(bad), got=f"{ends[e] - starts[e]} frames",
            expected=f"{meta.lengths[e]} (its length in meta/)",
            fix=advice(
                "copy the folders data/ and meta/ completely, or record again",
                leave_out(meta.numbers[bad], len(meta.numbers)),
            ),
        )  # fmt: skip
    return [range(int(a), int(b)) for a, b in zip(starts, ends, strict=True)]


def check_once(frames: Frames, meta: Meta) -> None:
    """Refuse a frame that occurs twice.

    Raises:
        DataError: names file, row and episode.
    """
    number = frames.scalars.get("frame_index")
    if number is None:
        return
    same = np.concatenate([[False], (np.diff(number) == 0) & (np.diff(frames.episode) == 0)])
    if same.any():
        what = "a frame occurs twice in an episode"
        raise _contradiction(frames, meta, same, what, "frame_index", number, "rising numbers")


def check_indices(frames: Frames, meta: Meta, first: np.ndarray) -> None:
    """Refuse an `index` that contradicts `frame_index`, or the episode that the frame belongs to.

    Args:
        first: [N] the first frame of the episode of each.

    Raises:
        DataError: names both values.
    """
    number, index = frames.scalars.get("frame_index"), frames.scalars.get("index")
    if index is None:
        return
    expected = index[first] + (np.arange(len(first)) - first if number is None else number - number[first])
    if (bad := index != expected).any():
        says = f"{{}}, as its {'place in the episode' if number is None else 'frame_index'} says"
        raise _contradiction(frames, meta, bad, "two indices contradict each other", "index", index, says, expected)
    if meta.bounds is None:
        return
    e = np.searchsorted(meta.numbers, frames.episode)
    low, high = meta.bounds[e, 0], meta.bounds[e, 1]
    if (bad := (high - low) != meta.lengths[e]).any():
        raise _contradiction(
            frames, meta, bad, "the metadata contradicts itself about the frames of an episode",
            "dataset_to_index - dataset_from_index", high - low, "{}, its length", meta.lengths[e],
        )  # fmt: skip
    if (bad := (index < low) | (index >= high)).any():
        at = int(np.argmax(bad))
        raise _contradiction(
            frames, meta, bad, "an index contradicts the episode that the frame belongs to", "index", index,
            f"{low[at]} to {high[at] - 1}, as meta/episodes says of it",
        )  # fmt: skip


def clock(frames: Frames, meta: Meta, first: np.ndarray, check_fps: bool) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of each frame since the first of its episode [N], and what the clock shows at that first one [N].

    By `timestamp`; with `check_fps` false, or without that column, by `frame_index`; else by the order.

    Raises:
        DataError: with `check_fps`: the timestamps do not follow the rate, or contradict `frame_index`.
    """
    place = (np.arange(len(first)) - first) / meta.fps
    number = frames.scalars.get("frame_index")
    counted = place if number is None else (number - number[first]) / meta.fps
    begin = np.zeros(len(first)) if number is None else number[first] / meta.fps
    times = frames.scalars.get("timestamp") if check_fps else None
    if times is not None:
        times = times.astype(np.float64)
        with np.errstate(invalid="ignore"):
            counted, begin = times - times[first], times[first]
    elif not check_fps:
        return counted, begin
    off = ~(np.abs(counted - place) <= 0.5 / meta.fps)  # NaN counts as off
    if off.any():
        raise _contradiction(
            frames, meta, off, "the timestamps do not follow the declared rate" if times is not None
            else "frames are missing inside an episode", "timestamp" if times is not None else "frame_index",
            counted if times is not None else number, f"{{:.4f}} at {meta.fps:g} fps", place,
            fix="correct fps in meta/info.json, or take the frames by their order: --set data.check_fps=false",
        )  # fmt: skip
    if times is not None and number is not None:
        steps = number - number[first]
        if (bad := steps != np.round(place * meta.fps)).any():
            raise _contradiction(
                frames, meta, bad, "frame_index and timestamp contradict each other", "frame_index", number,
                f"{{:.0f}}, as the timestamps since the first ({number[first][np.argmax(bad)]}) say",
                number[first] + np.round(place * meta.fps),
                fix="repair one of the two columns, or take the frames by their order: --set data.check_fps=false",
            )  # fmt: skip
    return counted, begin


def _contradiction(
    frames: Frames, meta: Meta, bad: np.ndarray, what: str, name: str, got: np.ndarray, expected: str,
    right: np.ndarray | None = None, fix: str = "repair the column",
) -> DataError:  # fmt: skip
    at = int(np.argmax(bad))
    file, row = frames.groups.place(meta.data_files, int(frames.rows[at]))
    value: Any = got[at].item()
    return DataError(
        what, field=f"{file}: {name} in row {row} (frame {at}, episode {frames.episode[at]})",
        got=round(value, 6) if isinstance(value, float) else value,
        expected=expected if right is None else expected.format(right[at].item()),
        fix=advice(fix, leave_out(np.unique(frames.episode[bad]), len(meta.numbers))),
    )  # fmt: skip


def _and_more(bad: np.ndarray) -> str:
    return f" (and {int(bad.sum()) - 1} more)" if bad.sum() > 1 else ""
