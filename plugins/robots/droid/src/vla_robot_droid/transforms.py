"""DROID's wire names (openpi `droid_policy.py`) and, for joint-position data, delta actions."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from attrs import frozen

from vla.errors import DataError
from vla.transforms import Context, camera_steps, delta_steps
from vla_robot_droid.config import CAMERAS, DIM, DroidSettings

JOINTS, GRIPPER = "observation/joint_position", "observation/gripper_position"
DELTA = (7, -1)


@frozen
class ReadState:
    """The state [8] of joints [7] and gripper [1] or []; a sample that has its state already passes."""

    reads: ClassVar = ("state?", f"{JOINTS}?", f"{GRIPPER}?")
    writes: ClassVar = ("state",)
    shapes: ClassVar = "state [8]"
    batched: ClassVar = True
    pointwise: ClassVar = True

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        if "state" in data:
            return data
        for key in (JOINTS, GRIPPER):
            if key not in data:
                raise DataError(
                    "the observation is incomplete", field=key, got=sorted(data), expected=f"{JOINTS}, {GRIPPER}"
                )
        joints, gripper = np.asarray(data[JOINTS]), np.asarray(data[GRIPPER])
        if gripper.ndim == joints.ndim - 1:
            gripper = gripper[..., None]
        if joints.shape[-1:] != (DIM - 1,) or gripper.shape != (*joints.shape[:-1], 1):
            raise DataError(
                "DROID has 7 joints and one gripper value",
                field=f"{JOINTS}, {GRIPPER}",
                got=f"{joints.shape}, {gripper.shape}",
            )
        out = {k: v for k, v in data.items() if k not in (JOINTS, GRIPPER)}
        return {**out, "state": np.concatenate([joints, gripper], -1)}


@frozen
class ReadCameras:
    """Images sent as "observation/NAME" under "images/NAME"."""

    reads: ClassVar = ("observation/*?",)
    writes: ClassVar = ("images/*?",)

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        names = {f"observation/{name}": f"images/{name}" for name in CAMERAS}
        return {names.get(key, key): value for key, value in data.items()}


def steps(settings: DroidSettings, context: Context) -> list[tuple[str, Any]]:
    """What the adapter contributes."""
    cameras = camera_steps(
        "droid",
        CAMERAS,
        context.variant.spec.cameras,
        override=settings.cameras,
        required=("exterior_image_1_left", "wrist_image_left"),
        mask_absent=settings.mask_absent,
    )
    out = [("inputs.robot", ReadState()), ("inputs.robot", ReadCameras()), *cameras]
    return out + (delta_steps(*DELTA) if settings.delta else [])
