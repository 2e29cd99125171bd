"""The robot's side of a policy server that speaks openpi's protocol: ours, or openpi's.

    from vla_client import ChunkPlayer, Guard, RemotePolicy

    policy = RemotePolicy("ws://gpu-box:8000", api_key="...")
    with ChunkPlayer(policy, hz=50, fallback="hold", guard=Guard(low=LOW, high=HIGH, max_step=0.05)) as player:
        while running:
            robot.command(player.tick(robot.observation()).action)      # never waits

Needs numpy, msgpack and websockets; no torch, no JAX, nothing of the training side.
"""

from __future__ import annotations

from vla_client.codec import FrameError, pack, unpack
from vla_client.guard import Guard
from vla_client.player import ChunkPlayer, Tick
from vla_client.remote import NoAnswer, OtherModel, RemoteError, RemotePolicy, Unreachable
from vla_client.wire import ServerError

__version__ = "0.1.0"
__all__ = [
    "ChunkPlayer", "FrameError", "Guard", "NoAnswer", "OtherModel", "RemoteError", "RemotePolicy", "ServerError",
    "Tick", "Unreachable", "__version__", "pack", "unpack",
]  # fmt: skip
