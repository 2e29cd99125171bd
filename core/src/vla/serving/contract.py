"""The contract of a served policy: what it wants to see, what it gives, and which weights it is. `/spec` shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from attrs import evolve
from vla_client.wire import VERSION

from vla.embodiment import Embodiment

# What RoboArena's policy servers say in the metadata frame; their clients read these keys.
ROBOARENA = (
    "image_resolution", "needs_wrist_camera", "n_external_cameras", "needs_stereo_camera", "needs_session_id",
    "action_space",
)  # fmt: skip


def contract_of(policy: Any, hz: float = 0.0) -> dict[str, Any]:
    """Plain facts of a `vla.policy.Policy`, as JSON can hold them.

    Args:
        policy: the policy.
        hz: control steps per second, where neither robot nor record say it (0: unknown).
    """
    variant = policy.variant
    robot = embodiment_of(policy, hz)
    return {
        "version": VERSION,
        "name": policy.name,
        "digest": policy.model.digest,
        "cameras": list(robot_cameras(policy)),
        "image_size": list(variant.spec.image_size),
        "state_dim": robot.state_dim,
        "action_dim": robot.action_dim,
        "action_horizon": variant.spec.action_horizon,
        "hz": robot.hz or None,
        "rtc": list(policy.chunking),
        "action_space": variant.parts["robot"].offers.get("action_space"),
        "embodiment": robot.to_table(),
        "parts": {path: chosen.part.name for path, chosen in variant.walk()},
    }


def embodiment_of(policy: Any, hz: float = 0.0) -> Embodiment:
    """The robot as the policy's data named it; what the record does not say, as the variant knows it."""
    recorded, robot = policy.embodiment, policy.variant.parts["robot"]
    return evolve(
        recorded,
        robot=recorded.robot or (robot.part.name if robot.part.name != "plain" else ""),
        cameras=recorded.cameras or robot_cameras(policy),
        state_dim=recorded.state_dim or state_dim(policy),
        action_dim=policy.group.codec_dim or policy.variant.spec.action_dim,
        hz=float(hz or recorded.hz or robot.offers.get("hz") or 0.0),
    )


def metadata_of(contract: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata frame of openpi's protocol: RoboArena's keys, the contract under "vla", and what the user adds."""
    ours = {key: value for key, value in contract.items() if key != "metadata"}
    cameras = contract.get("cameras") or []
    wrists = [name for name in cameras if "wrist" in name]
    values = (contract.get("image_size"), bool(wrists), len(cameras) - len(wrists), False, False,
              contract.get("action_space"))  # fmt: skip
    return {**dict(zip(ROBOARENA, values, strict=True)), "vla": ours, **contract.get("metadata", {})}


def robot_cameras(policy: Any) -> tuple[str, ...]:
    """The cameras that an observation has to bring, by the robot's names."""
    pairs = [pair for placed in policy.group.input_steps for pair in getattr(placed.step, "pairs", ())]
    seen = policy.model.record.get("cameras")
    names = [theirs for mine, theirs in pairs if not seen or mine in seen]
    return tuple(dict.fromkeys(names)) or tuple(policy.variant.spec.cameras)


def state_dim(policy: Any) -> int:
    """Values of the robot's own state."""
    stats = policy.model.stats
    own = policy.variant.parts["robot"].offers.get("state_dim")
    return int(own or (len(stats["state"].mean) if stats else policy.variant.spec.state_dim))


def example(contract: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """An observation of the right shape that shows nothing: what warms the model up and tests the link."""
    rng = np.random.default_rng(seed)
    size = (*contract["image_size"], 3)
    images = {name: rng.integers(0, 255, size, dtype=np.uint8) for name in contract["cameras"]}
    return {"images": images, "state": np.zeros(contract["state_dim"], np.float32), "prompt": "do something"}
