"""A server in a thread of the test, and policies to serve."""

import asyncio
import contextlib
import threading
import time

import numpy as np

CONTRACT = {
    "version": 1, "name": "stand-in", "digest": "d" * 64, "cameras": ["front", "wrist"],
    "image_size": [32, 32], "state_dim": 3, "action_dim": 2, "action_horizon": 5, "hz": 50.0,
    "action_space": None, "parts": {},
    "embodiment": {
        "cameras": ["front", "wrist"], "state_dim": 3, "action_dim": 2, "hz": 50.0, "state_names": ["a", "b", "c"],
        "action_names": ["x", "y"], "action_units": ["m", "m"],
    },
}  # fmt: skip


class Echo:
    """Answers with the first two numbers of the state, plus the step in the chunk; keeps what it was asked."""

    name = "echo"

    def __init__(self, seconds=0.0, horizon=5, fail=None):
        self.seconds, self.horizon, self.fail, self.batches, self.seeds = seconds, horizon, fail, [], []

    def infer_batch(self, rows, *, seeds=None, **more):
        self.batches.append(len(rows))
        self.seeds += list(seeds)
        if self.seconds:
            time.sleep(self.seconds)
        if self.fail:
            return [self.fail(row) for row in rows]
        return [self.answer(row) for row in rows]

    def answer(self, row):
        base = np.asarray(row["state"], np.float64)[:2]
        return {"actions": base + np.arange(self.horizon)[:, None], "policy_timing": {"infer_ms": self.seconds * 1e3}}

    def reset(self):
        pass


def observation(a=0.0, b=0.0, **changes):
    images = {name: np.full((32, 32, 3), 7, np.uint8) for name in ("front", "wrist")}
    return {"images": images, "state": np.array([a, b, 0.0], np.float32), "prompt": "go"} | changes


@contextlib.contextmanager
def serving(
    policy, contract=CONTRACT, protocol="openpi", settings=None, warm=False, live=None, port=0, made=None, **options
):
    """Yields the server; `server.url` is where."""
    from vla.compose import load_object, resolve
    from vla.serving.server import Options, Server, bind

    ours = made
    chosen = resolve("protocol", {"part": protocol, **(settings or {})}, "protocol")
    conversation = load_object(chosen.part.numpy, "protocol")
    ready, done, found = threading.Event(), None, {}

    async def main():
        nonlocal done
        made = ours.options if ours else Options(port=port, **options)
        server = ours or Server(policy, contract, lambda c: conversation(chosen.settings, c), made, live)
        done = asyncio.Event()
        await server.start(bind(made), observation() if warm else None)
        found["server"], found["loop"] = server, asyncio.get_running_loop()
        server.url = f"ws://127.0.0.1:{server.port}"
        server.http = f"http://127.0.0.1:{server.port}"
        ready.set()
        await done.wait()
        await server.stop()

    def run():
        try:
            asyncio.run(main())
        except BaseException as error:
            found["error"] = error
            ready.set()
            raise

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(20)
    if "error" in found:
        raise found["error"]
    try:
        yield found["server"]
    finally:
        found["loop"].call_soon_threadsafe(done.set)
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"
