"""The protocols that core brings: how a robot or a benchmark talks to a served policy (`vla serve --protocol NAME`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from vla.parts import NoSettings, Part
from vla.settings import size


@frozen
class VlaEvalSettings:
    """How a benchmark of `vla-eval` names what it observes, and what it is asked to send.

    Attributes:
        execute: steps of each chunk that are handed out, one per observation, before the policy looks again; 0: all.
        cameras: "robot=benchmark" pairs, e.g. "image=agentview"; none: the robot's cameras in the order of the
            benchmark's.
        state: the key of the robot's state in an observation.
        prompt: the key of the instruction.
        params: "key=value" pairs that the benchmark is asked for (`observation_params`), e.g. "send_state=true".
    """

    execute: int = size(0, most=4096, least=0)
    cameras: tuple[str, ...] = ()
    state: str = "state"
    prompt: str = "task_description"
    params: tuple[str, ...] = ("send_state=true", "send_wrist_image=true")


def _offers(speaks: str) -> Any:
    def offers(settings: Any, inner: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"speaks": speaks}

    return offers


OPENPI = Part(
    kind="protocol",
    name="openpi",
    summary="openpi's websocket protocol: its clients work unchanged",
    settings=NoSettings,
    offers=_offers("openpi-client 0.1"),
    numpy="vla.serving.openpi:Conversation",
)
VLA_EVAL = Part(
    kind="protocol",
    name="vla-eval",
    summary="the model-server protocol of vla-eval: its benchmark containers evaluate our policies",
    settings=VlaEvalSettings,
    offers=_offers("vla-eval protocol 1"),
    numpy="vla.serving.vla_eval:Conversation",
)
