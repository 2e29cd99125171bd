"""The robot adapter `plain`: data is already in the model's own names; nothing is renamed or converted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from vla.parts import Part


@frozen
class PlainSettings:
    """Widths of the robot's own state and actions; 0 means as in the spec. No cameras means those of the spec."""

    state_dim: int = 0
    action_dim: int = 0
    cameras: tuple[str, ...] = ()


def offers(settings: PlainSettings, inner: Mapping[str, Any]) -> Mapping[str, Any]:
    """Facets of a robot."""
    return {"state_dim": settings.state_dim, "action_dim": settings.action_dim, "cameras": settings.cameras, "hz": None}


PART = Part(
    kind="robot",
    name="plain",
    summary="identity adapter: images, state and actions as they come",
    settings=PlainSettings,
    offers=offers,
)
