"""Faults between a robot and its server, and frames of strangers: a few of those that benchmarks/ has in full."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
from chaos import FAULTS, PLAN, Host, drive
from vla_client import FrameError, ServerError, codec

from vla.protocols import VlaEvalSettings
from vla.serving.protocol import Close

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("frozen", "flipped bits", "reorder", "terminated")]


@pytest.mark.parametrize("scenario", ["killed", "half-open", "other model", "wild", *SLOW])
def test_a_robot_survives(scenario):
    """Finite, within limits, no jump, nothing stale, and chunks again (see helpers/chaos.py)."""
    host = Host(bad="wild" if scenario == "wild" else "")
    try:
        seen = drive(scenario, 1, host, 1.2, recover=20.0)  # times are for the benchmark
        assert seen["ticks"] > 50 and seen["chunk"] > 20
        if scenario == "wild":
            assert seen["counts"]["step guarded"] > 0
        if scenario in ("other model", "killed"):
            assert seen["fallback"] > 10
    finally:
        host.stop()


def test_fifty_are_planned():
    assert sum(PLAN.values()) == 50 and set(PLAN) == set(FAULTS)


def test_frames_of_strangers_are_understood_or_refused():
    """8,000 of the 2,100,000 of benchmarks/fuzz_serving.py."""
    import msgpack
    from fuzz_serving import grammar, seeds, take

    from vla.testing.protocols import mutated

    rng, frames = random.Random(7), seeds()
    outcomes = set()
    for n in range(8_000):
        frame = mutated(rng.choice(frames), rng) if n % 4 else msgpack.packb(grammar(rng))
        outcomes.update(take(frame))
    assert outcomes == {f"{name}: {end}" for name in ("openpi", "vla-eval") for end in ("understood", "refused")}


@pytest.mark.parametrize("value", [["raw"], {"a": 1}, np.zeros(2), None, 3, b"raw"])
def test_values_of_any_type_are_refused_not_compared(value):
    """Also found by the fuzz: a list is not hashable, and an array compares into another array."""
    from vla.serving.vla_eval import Conversation

    good = {"__image__": True, "format": "raw", "data": bytes(48), "dtype": "|u1", "shape": [4, 4, 3]}
    told = {"images": {"front": good}, "state": [1, 2, 3]}
    for path in (
        ("type",),
        ("seq",),
        ("payload",),
        *((("image", key)) for key in ("format", "dtype", "shape", "data")),
    ):
        image = {**good, path[1]: value} if path[0] == "image" else good
        message = {"type": "observation", "payload": {**told, "images": {"front": image}}, "seq": 1, "timestamp": 0.0}
        if path[0] != "image":
            message[path[0]] = value
        if path == ("seq",) and isinstance(value, int):
            continue
        with pytest.raises((FrameError, ServerError)):
            Conversation(VlaEvalSettings(), {"cameras": ["front"], "state_dim": 3}).receive(codec.pack(message))
    hello = {"type": "hello", "payload": {"protocol_version": value}, "seq": 1, "timestamp": 0.0}
    talk = Conversation(VlaEvalSettings(), {"cameras": []})
    assert isinstance(talk.receive(codec.pack(hello))[0], Close)


def test_a_state_that_is_no_array_is_refused_by_name():
    """The fuzz found these: numpy said TypeError, which is nobody's refusal."""
    from vla.serving.vla_eval import _numbers

    for state in ({"a": 1}, "3", ["a"], [[1], [1, 2]], None, [None]):
        with pytest.raises(ServerError, match="'state' is no array of numbers"):
            _numbers(state, VlaEvalSettings().state)
    assert _numbers([1, 2.5], "state").dtype == np.float32
