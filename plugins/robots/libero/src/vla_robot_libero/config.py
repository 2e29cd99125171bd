"""Settings of the LIBERO adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

STATE_DIM = 8  # position 3, rotation vector 3, gripper joints 2
ACTION_DIM = 7  # position 3, rotation 3, gripper 1
HZ = 20  # the simulator's control rate
# camera of the robot -> names it may take in a model, best first
CAMERAS: dict[str, tuple[str, ...]] = {
    "image": ("base_0_rgb",),
    "wrist_image": ("left_wrist_0_rgb", "wrist_0_rgb"),
}


@frozen
class LiberoSettings:
    """Conventions of the data.

    Attributes:
        delta: actions minus state, on top of LIBERO's own relative actions: only for openpi's early pi0 checkpoints,
            which were trained that way.
        mask_absent: False: a camera of the model that the robot lacks counts as seen, and is black, as openpi does for
            pi0_fast.
        cameras: "model=robot" pairs instead of the usual places.
    """

    delta: bool = False
    mask_absent: bool = True
    cameras: tuple[str, ...] = ()


def offers(settings: LiberoSettings, inner: Mapping[str, Any]) -> Mapping[str, Any]:
    """Facets of a robot; `cameras` are the names in a model that it can fill."""
    usual = dict.fromkeys(name for names in CAMERAS.values() for name in names)
    cameras = tuple(pair.partition("=")[0].strip() for pair in settings.cameras) or tuple(usual)
    return {"state_dim": STATE_DIM, "action_dim": ACTION_DIM, "cameras": cameras, "hz": HZ}
