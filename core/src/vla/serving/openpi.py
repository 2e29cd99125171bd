"""openpi's websocket protocol, as its `openpi-client` speaks it, with one optional key, "vla" (`vla_client.wire`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from vla_client import codec
from vla_client.wire import VERSION, ServerError

from vla.embodiment import Embodiment, differences
from vla.serving.contract import metadata_of
from vla.serving.protocol import Ask, Close, Frame, Reset, Say

NUMBERS = {"step": int, "seed": int, "delay": int, "deadline_ms": float, "sent": float}


class Conversation:
    """One connection."""

    def __init__(self, settings: Any, contract: Mapping[str, Any]):
        self.contract = contract
        self.name = ""
        self._last_total: float | None = None

    def begin(self) -> list[Frame]:
        """The metadata frame."""
        return [codec.pack(metadata_of(self.contract))]

    def receive(self, frame: Frame) -> list[Any]:
        """An observation, or the "vla" key's hello and reset."""
        row = codec.unpack(frame)
        if not isinstance(row, dict):
            raise codec.FrameError(f"an observation is a map, this is a {type(row).__name__}")
        ours = row.pop("vla", None)
        if ours is None:
            return [Ask(row)]
        if not isinstance(ours, dict):
            raise codec.FrameError('"vla" is a map')
        if "hello" in ours:
            return [self._meet(ours["hello"])]
        if "reset" in ours:
            return [Reset(), Say(codec.pack({"vla": {"reset": True}}))]
        return [Ask(row, _options(ours), ours)]

    def answer(self, ask: Ask, answer: Mapping[str, Any]) -> Frame:
        """The result with `server_timing`; with "vla" where the request had it."""
        out = {k: v for k, v in answer.items() if k not in ("age_ms", "server_timing")}
        timing = dict(answer["server_timing"])
        if self._last_total is not None:
            timing["prev_total_ms"] = self._last_total
        self._last_total = answer["age_ms"]
        out["server_timing"] = timing
        if ask.token is not None:
            echo = {key: ask.token[key] for key in ("step", "sent") if key in ask.token}
            out["vla"] = {**echo, "age_ms": answer["age_ms"], "digest": self.contract.get("digest", "")}
        return codec.pack(out)

    def refuse(self, ask: Ask | None, error: ServerError) -> Frame:
        """A text frame, as openpi's clients expect errors."""
        return error.line()

    def _meet(self, hello: Any) -> Any:
        if not isinstance(hello, dict) or type(hello.get("version")) is not int:
            raise codec.FrameError("a hello has a version")
        self.name = str(hello.get("name", ""))[:80]
        if hello["version"] != VERSION:
            old = hello["version"] < VERSION
            way = "older: upgrade vla-client" if old else "newer: upgrade vla-core"
            text = f"the client speaks version {hello['version']}, this server {VERSION}; the client is {way}"
            return Close(ServerError("VERSION", text).line(), text)
        robot, ours = (Embodiment.from_table(t.get("embodiment")) for t in (hello, self.contract))
        found = differences(ours, robot)
        if found:  # ten lines at most: one per field of an embodiment, and the first
            what = f"the policy {self.contract.get('name', '')!r} is for another robot"
            lines = [f"{d.field}: {d.mine} in the policy, {d.theirs} in the robot" for d in found]
            return Close(ServerError("EMBODIMENT", "\n  ".join([what, *lines])).line(), what)
        return Say(codec.pack({"vla": {"welcome": {"version": VERSION}}}))


def _options(ours: Mapping[str, Any]) -> dict[str, Any]:
    options = {}
    for key, kind in NUMBERS.items():
        value = ours.get(key)
        if value is None:
            continue
        whole = type(value) is int
        if not whole and (kind is int or type(value) is not float or not math.isfinite(value)):
            raise codec.FrameError(f'"vla": {key} is a number')
        options[key] = kind(value)
    if options.get("deadline_ms", 1.0) <= 0 or options.get("seed", 0) < 0 or options.get("delay", 0) < 0:
        raise codec.FrameError('"vla": a number is out of range')
    prefix = ours.get("prefix")
    if prefix is not None:
        if not isinstance(prefix, np.ndarray) or prefix.ndim != 2 or prefix.dtype.kind != "f":
            raise codec.FrameError('"vla": prefix is an array [n a]')
        if not np.isfinite(prefix).all():
            raise codec.FrameError('"vla": prefix is not finite')
        options["prefix"] = prefix
    if (mode := ours.get("rtc")) is not None:
        if not isinstance(mode, str) or len(mode) > 20:
            raise codec.FrameError('"vla": rtc is a short word')
        options["rtc"] = mode
    return options
