"""The robot adapter of Meta-World: cameras in their places."""

from __future__ import annotations

from typing import Any

from vla.transforms.build import Context
from vla.transforms.images import camera_steps
from vla_dataset_metaworld.config import PLACES, RobotSettings


def steps(settings: RobotSettings, context: Context) -> list[tuple[str, Any]]:
    """Cameras in their places. Actions are relative already (motion of the hand), so there is no delta step."""
    cameras = context.variant.spec.cameras
    return camera_steps("metaworld", PLACES, cameras, override=settings.cameras, required=("front",))
