"""The robot adapter of the tabletop: cameras in their places, and as much of the state as the policy is told."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from attrs import frozen

from vla.errors import DataError
from vla.transforms.build import Context
from vla.transforms.images import camera_steps
from vla_dataset_tabletop.config import PLACES, POSITION, STATE_NAMES, RobotSettings


@frozen
class OnlyPosition:
    """State [... 8] -> [... 3]."""

    reads: ClassVar = ("state",)
    writes: ClassVar = ("state",)
    shapes: ClassVar = "state [8] -> [3]"
    batched: ClassVar = True

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        state = np.asarray(data["state"])
        if state.shape[-1:] != (len(STATE_NAMES),):
            raise DataError("the state has the wrong width", field="state", got=state.shape, expected=len(STATE_NAMES))
        return {**data, "state": state[..., :POSITION]}


def steps(settings: RobotSettings, context: Context) -> list[tuple[str, Any]]:
    """Cameras in their places. Actions are relative already (end-effector motion), so there is no delta step."""
    cameras = camera_steps(
        "tabletop", PLACES, context.variant.spec.cameras, override=settings.cameras, required=("front",)
    )
    return [("inputs.robot", OnlyPosition()), *cameras] if settings.state == "position" else cameras
