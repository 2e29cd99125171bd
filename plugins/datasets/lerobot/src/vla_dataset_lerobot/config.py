"""Settings of the LeRobot reader."""

from __future__ import annotations

from attrs import field, frozen, validators

from vla.errors import SettingsError


def _is_rename(settings: object, attribute: object, value: tuple[str, ...]) -> None:
    for item in value:
        new, equals, old = item.partition("=")
        if equals and not (new and old):
            raise SettingsError(f"cameras: {item!r} is not written new=old")


@frozen
class LeRobotSettings:
    """Where the data is and how to read it.

    Attributes:
        path: a folder with meta/info.json, a hub cache folder (`datasets--org--name`), or a hub name `org/name` that
            is looked up in the local caches (never downloaded).
        cameras: which cameras to offer, and under which name: `["front"]` or `["base=observation.images.front"]`.
            The prefix `observation.images.` may be left out. Empty: all that have data.
        state_key, action_key: the columns.
        prompt: used for every frame instead of the dataset's tasks.
        robot: robot part the data fits; "": what the dataset's `robot_type` says.
        check_fps: refuse a dataset whose timestamps do not follow its declared rate.
        cache_mb: memory for encoded images (PNG) that were read from parquet files.
        decoder: of videos: "pyav"; "torchcodec", an extra that imports PyTorch and needs FFmpeg's shared libraries; or
            "auto": PyAV. Their frames are equal, and so are their times, except that torchcodec takes about a seventh
            less for random frames of videos with keyframes far apart (benchmarks/results/reader.md).
    """

    path: str = ""
    cameras: tuple[str, ...] = field(default=(), converter=tuple, validator=_is_rename)
    state_key: str = "observation.state"
    action_key: str = "action"
    prompt: str = ""
    robot: str = ""
    check_fps: bool = True
    cache_mb: int = 512
    decoder: str = field(default="auto", validator=validators.in_(("auto", "pyav", "torchcodec")))
