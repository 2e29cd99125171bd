"""The kit on core's own protocols, and the real clients of vla-eval."""

import msgpack
import numpy as np
from vla_client import codec

from vla.testing import ProtocolConformance


class TestOpenpi(ProtocolConformance):
    name = "openpi"

    def say(self, row):
        return [codec.pack(row)]

    def hear(self, frame):
        return codec.unpack(frame)["actions"]


def plain(value):
    return {"__ndarray__": True, "data": value.tobytes(), "dtype": value.dtype.str, "shape": list(value.shape)}


class TestVlaEval(ProtocolConformance):
    name = "vla-eval"
    image_format = "raw"

    def say(self, row):
        payload = {**row, "task_description": row["prompt"]}
        messages = [
            ("hello", {"harness_version": "0.8.0", "protocol_version": 1, "benchmark": "x:Y"}),
            ("episode_start", {"task": {"name": "touch"}}), ("observation", payload),
        ]  # fmt: skip
        return [
            msgpack.packb({"type": kind, "payload": payload, "seq": i, "timestamp": 0.0}, default=plain)
            for i, (kind, payload) in enumerate(messages)
        ]

    def hear(self, frame):
        return np.asarray(codec.unpack(frame)["payload"]["actions"])
