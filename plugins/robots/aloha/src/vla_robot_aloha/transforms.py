"""ALOHA's joint and gripper conventions against those of pi's pre-training data (openpi `aloha_policy.py`).

Pi's conventions: some joints turn the other way, and a gripper is the angle of its motor, scaled so that pi's own
gripper spans [0, 1], while ALOHA gives the linear opening scaled to [0, 1].
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from attrs import frozen

from vla.errors import DataError
from vla.transforms import Context, camera_steps, delta_steps
from vla_robot_aloha.config import CAMERAS, DIM, AlohaSettings

FLIP = np.array([1, -1, -1, 1, 1, 1, 1] * 2, np.float64)
GRIPPERS = [6, 13]
LINEAR_CLOSED, LINEAR_OPEN = 0.01844, 0.05800  # metres, of the puppet's fingers
HORN, ROD = 0.022, 0.036  # metres: the crank that moves the fingers
PI_CLOSED, PI_OPEN = 0.5476, 1.6296  # radians, of pi's gripper
JOINT_CLOSED, JOINT_OPEN = -0.6213, 1.4910  # radians, of ALOHA's gripper motor
DELTA = (6, -1, 6, -1)


def gripper_to_pi(opening: np.ndarray) -> np.ndarray:
    """ALOHA's gripper observation in [0, 1] (linear) as pi's: the motor angle, where pi's gripper spans [0, 1]."""
    linear = opening * (LINEAR_OPEN - LINEAR_CLOSED) + LINEAR_CLOSED
    with np.errstate(divide="ignore", invalid="ignore"):
        sine = (HORN**2 + linear**2 - ROD**2) / (2 * HORN * linear)
    angle = np.arcsin(np.clip(sine, -1.0, 1.0))
    return (angle - PI_CLOSED) / (PI_OPEN - PI_CLOSED)


def gripper_from_pi(action: np.ndarray) -> np.ndarray:
    """pi's gripper action as ALOHA's gripper command.

    pi's value counts as an angle already (openpi unscales nothing here), so this is not the reverse of `gripper_to_pi`.
    """
    return (action + PI_CLOSED - JOINT_CLOSED) / (JOINT_OPEN - JOINT_CLOSED)


def gripper_from_pi_reversed(action: np.ndarray) -> np.ndarray:
    """ALOHA's gripper command as pi's action: the reverse of `gripper_from_pi`, for training data."""
    return action * (JOINT_OPEN - JOINT_CLOSED) + JOINT_CLOSED - PI_CLOSED


def decode_state(state: np.ndarray) -> np.ndarray:
    """ALOHA's state [... 14] in pi's conventions, float64."""
    return _with_grippers(FLIP * state, gripper_to_pi)


def encode_actions(actions: np.ndarray) -> np.ndarray:
    """pi's actions [... 14] as ALOHA commands, float64."""
    return _with_grippers(FLIP * actions, gripper_from_pi)


def encode_actions_reversed(actions: np.ndarray) -> np.ndarray:
    """ALOHA commands [... 14] as pi's actions, float64."""
    return _with_grippers(FLIP * actions, gripper_from_pi_reversed)


def _with_grippers(x: np.ndarray, function: Any) -> np.ndarray:
    x[..., GRIPPERS] = function(x[..., GRIPPERS])
    return x


def _wide(x: Any, name: str) -> np.ndarray:
    x = np.asarray(x)
    if not x.ndim or x.shape[-1] != DIM:
        fix = "choose the adapter of the robot that recorded this data: --robot NAME"
        raise DataError(f"ALOHA's {name} has 14 values", field=name, got=x.shape, expected=f"[... {DIM}]", fix=fix)
    return x


@frozen
class ToPi:
    """State and, in training, actions into pi's conventions."""

    reads: ClassVar = ("state", "actions?")
    writes: ClassVar = ("state", "actions?")
    shapes: ClassVar = "state [14], actions [t 14]"
    batched: ClassVar = True
    pointwise: ClassVar = True

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        out = {**data, "state": decode_state(_wide(data["state"], "state"))}
        if "actions" in data:
            out["actions"] = encode_actions_reversed(_wide(data["actions"], "actions"))
        return out


@frozen
class FromPi:
    """Actions as ALOHA commands."""

    reads: ClassVar = ("actions",)
    writes: ClassVar = ("actions",)
    shapes: ClassVar = "actions [t 14]"

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        return {**data, "actions": encode_actions(_wide(data["actions"], "actions"))}


def steps(settings: AlohaSettings, context: Context) -> list[tuple[str, Any]]:
    """What the adapter contributes."""
    out = camera_steps(
        "aloha", CAMERAS, context.variant.spec.cameras, override=settings.cameras, required=("cam_high",)
    )
    if settings.adapt_to_pi:
        out += [("inputs.robot", ToPi()), ("outputs.robot", FromPi())]
    if settings.delta:
        out += delta_steps(*DELTA)
    return out
