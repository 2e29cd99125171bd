"""LIBERO's wire names (openpi `libero_policy.py`) and the extra delta of its early checkpoints."""

from __future__ import annotations

from typing import Any, ClassVar

from attrs import frozen

from vla.transforms import Context, camera_steps, delta_steps
from vla_robot_libero.config import CAMERAS, LiberoSettings

DELTA = (6, -1)


@frozen
class ReadState:
    """The state [8], sent as "observation/state"."""

    reads: ClassVar = ("state?", "observation/state?")
    writes: ClassVar = ("state?",)
    batched: ClassVar = True
    pointwise: ClassVar = True

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        return {"state" if key == "observation/state" else key: value for key, value in data.items()}


@frozen
class ReadCameras:
    """Images sent as "observation/NAME" under "images/NAME"."""

    reads: ClassVar = ("observation/*?",)
    writes: ClassVar = ("images/*?",)

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        names = {f"observation/{name}": f"images/{name}" for name in CAMERAS}
        return {names.get(key, key): value for key, value in data.items()}


def steps(settings: LiberoSettings, context: Context) -> list[tuple[str, Any]]:
    """What the adapter contributes."""
    cameras = camera_steps(
        "libero",
        CAMERAS,
        context.variant.spec.cameras,
        override=settings.cameras,
        required=("image",),
        mask_absent=settings.mask_absent,
    )
    out = [("inputs.robot", ReadState()), ("inputs.robot", ReadCameras()), *cameras]
    return out + (delta_steps(*DELTA) if settings.delta else [])
