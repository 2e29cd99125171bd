"""The robot adapter of the tabletop: its two cameras in their places. State and actions are taken as they come."""

from __future__ import annotations

from typing import Any

from vla.transforms.build import Context
from vla.transforms.images import camera_steps
from vla_dataset_tabletop.config import PLACES, RobotSettings


def steps(settings: RobotSettings, context: Context) -> list[tuple[str, Any]]:
    """Cameras in their places. Actions are relative already (end-effector motion), so there is no delta step."""
    return camera_steps(
        "tabletop", PLACES, context.variant.spec.cameras, override=settings.cameras, required=("front",)
    )
