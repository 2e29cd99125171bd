"""Settings of the ALOHA adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

DIM = 14  # left joints 0-5, left gripper 6, right joints 7-12, right gripper 13
HZ = 50
# camera of the robot -> names it may take in a model, best first. cam_low is accepted and not used, as in openpi.
CAMERAS: dict[str, tuple[str, ...]] = {
    "cam_high": ("base_0_rgb",),
    "cam_left_wrist": ("left_wrist_0_rgb", "wrist_0_rgb"),
    "cam_right_wrist": ("right_wrist_0_rgb",),
    "cam_low": (),
}


@frozen
class AlohaSettings:
    """Conventions of the data.

    Attributes:
        adapt_to_pi: turn joints and grippers into the conventions of pi's pre-training data, and back. Keep it on to
            fine-tune a pi checkpoint on a standard ALOHA.
        delta: joint actions relative to the state at the start of the chunk (grippers stay absolute).
        cameras: "model=robot" pairs instead of the usual places, e.g. "base_0_rgb=cam_low".
    """

    adapt_to_pi: bool = True
    delta: bool = True
    cameras: tuple[str, ...] = ()


def offers(settings: AlohaSettings, inner: Mapping[str, Any]) -> Mapping[str, Any]:
    """Facets of a robot; `cameras` are the names in a model that it can fill."""
    usual = dict.fromkeys(name for names in CAMERAS.values() for name in names)
    cameras = tuple(pair.partition("=")[0].strip() for pair in settings.cameras) or tuple(usual)
    return {"state_dim": DIM, "action_dim": DIM, "cameras": cameras, "hz": HZ}
