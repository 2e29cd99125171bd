"""The robot adapter `plain`: data is already in the model's own terms; cameras may be renamed, nothing is converted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from vla.contracts import MOST_DIMS
from vla.parts import Part
from vla.settings import size


@frozen
class PlainSettings:
    """What the data looks like.

    Attributes:
        state_dim, action_dim: widths of the robot's own state and actions; 0: those of the statistics.
        cameras: "model=robot" pairs, e.g. "base_0_rgb=front"; none: cameras are named as in the spec.
        delta: which actions become relative to the state at the start of the chunk: +n for n that do, -n for n that do
            not, e.g. (6, -1); none: all stay as they are.
    """

    state_dim: int = size(0, most=MOST_DIMS, least=0)
    action_dim: int = size(0, most=MOST_DIMS, least=0)
    cameras: tuple[str, ...] = ()
    delta: tuple[int, ...] = size((), most=MOST_DIMS, least=-MOST_DIMS)


def offers(settings: PlainSettings, inner: Mapping[str, Any]) -> Mapping[str, Any]:
    """Facets of a robot; `cameras` are the names in a model that it can fill (none: whatever the spec has)."""
    cameras = tuple(pair.partition("=")[0].strip() for pair in settings.cameras)
    return {"state_dim": settings.state_dim, "action_dim": settings.action_dim, "cameras": cameras, "hz": None}


PART = Part(
    kind="robot",
    name="plain",
    summary="identity adapter: images, state and actions as they come; cameras may be renamed",
    settings=PlainSettings,
    offers=offers,
    transforms="vla.transforms.plain:steps",
)
