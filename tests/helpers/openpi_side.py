"""The other side of the wire, in an environment of its own with the real openpi-client (it wants numpy below 2).

python openpi_side.py client PORT N     N exchanges with a server of ours
python openpi_side.py server            a server with openpi's framing; prints its port
python openpi_side.py frames FILE       the frames of FILE, packed anew, byte for byte the same
"""

import asyncio
import json
import sys
import time
import traceback
from pathlib import Path

import numpy as np
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy


def client(port, n):
    policy = WebsocketClientPolicy("127.0.0.1", port)
    assert policy.get_server_metadata()["image_resolution"] == [32, 32]
    for i in range(n):
        images = {name: np.full((32, 32, 3), i % 256, np.uint8) for name in ("front", "wrist")}
        answer = policy.infer({"images": images, "state": np.array([i, 2 * i, 0], np.float32), "prompt": "go"})
        assert answer["actions"].dtype == np.float64 and answer["actions"][0].tolist() == [i, 2 * i]
        assert {"policy_timing", "server_timing"} <= answer.keys()
    try:
        policy.infer({"state": np.array([np.nan, 0, 0])})
        raise SystemExit("a state with NaN was taken")
    except RuntimeError as error:
        assert "BAD_OBSERVATION" in str(error)
    images = {name: np.zeros((32, 32, 3), np.uint8) for name in ("front", "wrist")}
    assert policy.infer({"images": images, "state": np.ones(3), "prompt": "go"})["actions"][0].tolist() == [1, 1]
    print(f"{n} exchanges")


async def server():
    """As openpi's websocket_policy_server: metadata, then one answer per frame, a traceback as text."""
    import websockets.asyncio.server

    async def handler(ws):
        await ws.send(msgpack_numpy.packb({"reset_pose": [0.0, 1.0]}))
        last = None
        while True:
            try:
                began = time.monotonic()
                row = msgpack_numpy.unpackb(await ws.recv())
                if row["prompt"] == "fail":
                    raise KeyError("state")
                out = {"actions": np.asarray(row["state"], np.float64)[:2] + np.zeros((5, 1))}
                out["policy_timing"] = {"infer_ms": 1.0}
                out["server_timing"] = {"infer_ms": (time.monotonic() - began) * 1000}
                if last is not None:
                    out["server_timing"]["prev_total_ms"] = last * 1000
                await ws.send(msgpack_numpy.packb(out))
                last = time.monotonic() - began
            except websockets.ConnectionClosed:
                break
            except Exception:
                await ws.send(traceback.format_exc())
                await ws.close(1011, "Internal server error. Traceback included in previous frame.")
                break

    async with websockets.asyncio.server.serve(handler, "127.0.0.1", 0, compression=None, max_size=None) as made:
        print(made.sockets[0].getsockname()[1], flush=True)
        await made.serve_forever()


def frames(path):
    table = json.loads(Path(path).read_text())
    for name, text in table.items():
        if name != "made_with":
            frame = bytes.fromhex(text)
            assert msgpack_numpy.packb(msgpack_numpy.unpackb(frame)) == frame, name
    print(len(table) - 1, "frames")


if __name__ == "__main__":
    mode = sys.argv[1]
    if mode == "client":
        client(int(sys.argv[2]), int(sys.argv[3]))
    elif mode == "server":
        asyncio.run(server())
    else:
        frames(sys.argv[2])
