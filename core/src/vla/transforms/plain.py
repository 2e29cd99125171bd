"""What the `plain` robot adapter contributes: renamed cameras and, if asked for, delta actions."""

from __future__ import annotations

from typing import Any

from vla.plain_robot import PlainSettings
from vla.transforms.build import Context
from vla.transforms.images import camera_steps
from vla.transforms.numbers import delta_steps


def steps(settings: PlainSettings, context: Context) -> list[tuple[str, Any]]:
    """Cameras in their places; delta actions."""
    cameras = context.variant.spec.cameras
    out = camera_steps("plain", {name: (name,) for name in cameras}, cameras, override=settings.cameras)
    return out + (delta_steps(*settings.delta) if settings.delta else [])
