"""Settings of the DROID adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

DIM = 8  # 7 joints, then the gripper (0 open, 1 closed)
HZ = 15
# camera of the robot -> names it may take in a model, best first
CAMERAS: dict[str, tuple[str, ...]] = {
    "exterior_image_1_left": ("base_0_rgb",),
    "wrist_image_left": ("left_wrist_0_rgb", "wrist_0_rgb"),
    "exterior_image_2_left": (),  # recorded, and not used
}


@frozen
class DroidSettings:
    """Conventions of the data.

    Attributes:
        delta: joint positions as actions, relative to the state at the start of the chunk (openpi's full DROID
            fine-tuning). Off: joint velocities, or whatever the data holds.
        mask_absent: False: a camera of the model that the robot lacks counts as seen, and is black, as openpi does for
            pi0_fast.
        cameras: "model=robot" pairs instead of the usual places.
    """

    delta: bool = False
    mask_absent: bool = True
    cameras: tuple[str, ...] = ()


def offers(settings: DroidSettings, inner: Mapping[str, Any]) -> Mapping[str, Any]:
    """Facets of a robot; `cameras` are the names in a model that it can fill."""
    usual = dict.fromkeys(name for names in CAMERAS.values() for name in names)
    cameras = tuple(pair.partition("=")[0].strip() for pair in settings.cameras) or tuple(usual)
    space = {"action_space": "joint_position"} if settings.delta else {}  # off: the data decides, and nobody asks it
    return {"state_dim": DIM, "action_dim": DIM, "cameras": cameras, "hz": HZ, **space}
