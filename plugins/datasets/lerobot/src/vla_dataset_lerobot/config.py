"""Settings of the LeRobot reader."""

from __future__ import annotations

import re
from collections.abc import Sequence

from attrs import field, frozen, validators

from vla.errors import SettingsError
from vla.settings import size

Numbers = tuple[int | str, ...] | int | str


def _is_rename(settings: object, attribute: object, value: tuple[str, ...]) -> None:
    for item in value:
        new, equals, old = item.partition("=")
        if equals and not (new and old):
            raise SettingsError(f"cameras: {item!r} is not written new=old")


def _are_numbers(settings: object, attribute: object, value: Numbers) -> None:
    ranges(value)


def _is_text(settings: object, attribute: object, value: str) -> None:
    if value and not value.strip():
        raise ValueError("write the instruction, or leave prompt out")


def ranges(value: Numbers) -> list[tuple[int, int]]:
    """(first, last) of each range of episode numbers: `"0-9,12"` and `["0-9", 12]` are [(0, 9), (12, 12)].

    Raises:
        ValueError: it is not written so.
    """
    items: Sequence[int | str] = value if isinstance(value, list | tuple) else [value]
    out = []
    for text in (word.strip() for item in items for word in str(item).split(",") if str(item).strip()):
        match = re.fullmatch(r"(\d{1,18})(?:\s*-\s*(\d{1,18}))?", text)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(f'{text!r} names no episodes; they are written "0-9,12" or [0, 3, 7], the last included')
        out.append((first, last))
    return out


@frozen
class LeRobotSettings:
    """Where the data is and how to read it.

    Attributes:
        path: a folder with meta/info.json, a hub cache folder (`datasets--org--name`), or a hub name `org/name` that
            is looked up in the local caches (never downloaded).
        cameras: which cameras to offer, and under which name: `["front"]` or `["base=observation.images.front"]`.
            The prefix `observation.images.` may be left out. Empty: all that have data.
        state_key, action_key: the columns: one, or several laid side by side, each with an optional slice:
            `["observation.arm", "observation.hand[0:6]"]`. A part that meta/modality.json names counts as a column.
        prompt: used for every frame instead of the dataset's tasks.
        prompt_key: the column with the instructions, texts or numbers of tasks. Empty: `task_index`.
        episodes: the numbers of the episodes to read, `"0-9,12"` or `[0, 3]`. Empty: all.
        exclude: the numbers of those to leave out, written the same way.
        robot: robot part the data fits; "": what the dataset's `robot_type` says.
        check_fps: refuse a dataset whose timestamps do not follow its declared rate. False: frames count by their
            order (`frame_index`) and timestamps are not looked at.
        cache_mb: memory for encoded images (PNG) that were read from parquet files.
        decoder: of videos: "pyav"; "torchcodec", an extra that imports PyTorch and needs FFmpeg's shared libraries; or
            "auto": PyAV. Their frames are equal, and so are their times, except that torchcodec takes about a seventh
            less for random frames of videos with keyframes far apart (benchmarks/results/reader.md).
    """

    path: str = ""
    cameras: tuple[str, ...] = field(default=(), converter=tuple, validator=_is_rename)
    state_key: tuple[str, ...] | str = "observation.state"
    action_key: tuple[str, ...] | str = "action"
    prompt: str = field(default="", validator=_is_text)
    prompt_key: str = ""
    episodes: Numbers = field(default=(), validator=_are_numbers)
    exclude: Numbers = field(default=(), validator=_are_numbers)
    robot: str = ""
    check_fps: bool = True
    cache_mb: int = size(512, most=1_048_576, least=0)
    decoder: str = field(default="auto", validator=validators.in_(("auto", "pyav", "torchcodec")))
