"""Faults between a robot and its server: processes that die or freeze, links that stall, cut, corrupt and lie.

A scenario drives a `ChunkPlayer` at 50 Hz through one fault and looks at every tick. The policy writes into its actions
which observation they follow from, so that age is judged by what arrives, not by the player's own books.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import threading
import time

import numpy as np
from vla_client import ChunkPlayer, Guard, RemotePolicy

HZ, HORIZON, LIMIT, STEP = 50, 50, 1.0, 0.05
MAX_AGE = 1.0  # seconds
CONTRACT = {
    "version": 1, "name": "wave", "digest": "a" * 64, "cameras": [], "image_size": [8, 8], "state_dim": 2,
    "action_dim": 3, "action_horizon": HORIZON, "hz": HZ, "action_space": None, "parts": {}, "embodiment": {},
}  # fmt: skip


class Wave:
    """Actions [wave, number of the observation, step in the chunk]; some of them bad, where asked for."""

    name = "wave"

    def __init__(self, bad=""):
        self.bad, self.asked = bad, 0

    def infer_batch(self, rows, *, seeds=None):
        time.sleep(0.03)
        self.asked += 1
        return [{"actions": self.chunk(float(row["state"][0]), float(row["state"][1]))} for row in rows]

    def chunk(self, wave, number):
        k = np.arange(HORIZON, dtype=np.float64)
        out = np.stack([wave + 0.001 * k, np.full(HORIZON, number), k], 1)
        if self.bad == "nan" and self.asked % 3 == 0:
            out[7, 0] = np.nan
        if self.bad == "wild" and self.asked % 3 == 0:
            out[5:8, 0] = (9.0, -9.0, 1e30)
        return out

    def reset(self):
        pass


def serve(ready, port, digest, bad):
    """A server process of ours."""
    import asyncio

    from vla.serving.openpi import Conversation
    from vla.serving.server import Options, Server, bind

    async def main():
        options = Options(port=port, drain=0.5)
        server = Server(Wave(bad), {**CONTRACT, "digest": digest}, lambda c: Conversation(None, c), options)
        await server.start(bind(options))
        ready.put(server.port)
        await server.run_until_signal()

    asyncio.run(main())


class Host:
    """The server process; it can be killed, frozen and started anew on the same port."""

    def __init__(self, digest="a" * 64, bad="", port=0):
        self.port = port
        self.start(digest, bad)

    def start(self, digest="a" * 64, bad=""):
        spawn = multiprocessing.get_context("spawn")
        ready = spawn.Queue()
        self.process = spawn.Process(target=serve, args=(ready, self.port, digest, bad), daemon=True)
        self.process.start()
        self.port = ready.get(timeout=60)

    def signal(self, number):
        os.kill(self.process.pid, number)

    def stop(self):
        self.process.kill()
        self.process.join(10)


class Link(threading.Thread):
    """A TCP proxy on loopback. `mode` is looked at for every piece of data."""

    def __init__(self, port, seed=0):
        super().__init__(daemon=True)
        self.target, self.random = port, random.Random(seed)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.mode, self.amount, self.over = "", 0.0, False
        self.pairs = []
        self.start()

    def run(self):
        while not self.over:
            try:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target), 5)
            except OSError:
                if self.over:
                    return
                near.close()
                continue
            self.pairs.append((near, far))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self.pump, args=(source, sink), daemon=True).start()

    def pump(self, source, sink):
        try:
            while data := source.recv(65536):
                if self.mode == "delay":
                    time.sleep(self.amount * self.random.uniform(0.5, 1.0))
                while self.mode == "hole" and not self.over:  # half-open: taken, and never delivered
                    time.sleep(0.01)
                while self.mode == "stall" and self.random.random() < self.amount and not self.over:
                    time.sleep(0.2)  # lost packets: TCP sends them again, and everything behind them waits
                if self.mode == "cut" and self.random.random() < self.amount:
                    break
                if self.mode == "flip" and sink is not None and self.random.random() < self.amount:
                    spoilt = bytearray(data)
                    spoilt[self.random.randrange(len(spoilt))] ^= 1 << self.random.randrange(8)
                    data = bytes(spoilt)
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def reset(self):
        """Cut every connection."""
        for pair in self.pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.over = True
        self.listener.close()
        self.reset()


class Shuffled:
    """A policy whose answers come out of order and twice, given to the player behind its back."""

    def __init__(self, policy, seed, twice):
        self.policy, self.random, self.twice, self.kept, self.player = policy, random.Random(seed), twice, [], None

    def infer(self, obs, *, step=None):
        answer = self.policy.infer(obs, step=step)
        self.kept.append((step, time.monotonic(), answer["actions"]))
        self.kept = self.kept[-3:]
        old = self.random.choice(self.kept)
        if self.twice:
            self.player.add(*old)
        if self.random.random() < 0.4 and len(self.kept) > 1:  # this one comes late: an older one instead
            return {"actions": self.kept[-1][2], "late": time.sleep(self.random.uniform(0, 0.3))}
        return answer


def drive(scenario, seed, host, seconds, recover=2.0):
    """Run one scenario; gives what happened, or raises an AssertionError that says at which tick.

    `recover`: seconds after the fault within which the robot plays chunks again.
    """
    rng = random.Random(seed)
    link = Link(host.port, seed)
    remote = RemotePolicy(f"ws://127.0.0.1:{link.port}", timeout=1.0)
    policy = Shuffled(remote, seed, scenario == "duplicate") if scenario in ("reorder", "duplicate") else remote
    inf = np.inf
    guard = Guard([-LIMIT, -inf, -inf], [LIMIT, inf, inf], max_step=[STEP, inf, inf], patience=10**6)
    player = ChunkPlayer(policy, hz=HZ, fallback="hold", every=10, max_age=MAX_AGE, guard=guard)
    if policy is not remote:
        policy.player = player
    fault = threading.Thread(target=FAULTS[scenario], args=(host, link, rng, seconds), daemon=True)
    seen = {"ticks": 0, "chunk": 0, "fallback": 0, "slowest_ms": 0.0, "recovery": None, "refused": False}
    previous, ended = None, None
    expects_refusal = scenario == "other model"
    with player:
        begin = time.monotonic()
        while not player.ahead:  # the robot starts when the first chunk is there
            player.tick(look(player.step + 1))
            time.sleep(0.02)
            assert time.monotonic() - begin < 20, f"no first chunk: {player.error}"
        started = time.monotonic()
        fault.start()
        n = 0
        while True:
            due = started + n / HZ
            time.sleep(max(0.0, due - time.monotonic()))
            n += 1
            before = time.monotonic()
            tick = player.tick(look(player.step + 1))
            seen["slowest_ms"] = max(seen["slowest_ms"], (time.monotonic() - before) * 1e3)
            check(tick, previous, n)
            previous = tick.action
            seen["ticks"] += 1
            seen["chunk" if tick.source == "chunk" else "fallback"] += 1
            if ended is None and not fault.is_alive():
                ended = time.monotonic()
            if ended is not None and tick.source == "chunk" and seen["recovery"] is None:
                seen["recovery"] = time.monotonic() - ended
            if (
                ended is not None
                and (seen["recovery"] is not None or expects_refusal)
                and time.monotonic() - ended > 1.0
            ):
                break
            assert ended is None or time.monotonic() - ended < 4 + recover, f"no recovery: {player.error}"
            assert n < 60 * HZ, "the scenario does not end"
        seen["refused"] = "other weights" in player.error
    remote.close()
    link.close()
    assert seen["refused"] == expects_refusal, player.error
    if not expects_refusal:
        assert seen["recovery"] <= recover, f"recovery took {seen['recovery']:.1f} s"
    guarded = {f"{k} guarded": n for k, n in guard.counts.items() if n}
    seen["counts"] = {k: v for k, v in player.counts.items() if k not in ("ticks", "chunk", "chunks")} | guarded
    return seen


def look(step):
    """What the robot sees: the wave of this step, and the step's number."""
    return {"images": {}, "state": np.array([0.5 * np.sin(step / 40), step], np.float32), "prompt": ""}


def check(tick, previous, n):
    """The invariants of every tick."""
    action = tick.action
    assert action is not None and np.isfinite(action).all(), f"tick {n}: {action}"
    assert abs(action[0]) <= LIMIT, f"tick {n}: {action[0]} is out of limits"
    if previous is not None:
        assert abs(action[0] - previous[0]) <= STEP + 1e-9, f"tick {n}: jumped from {previous[0]} to {action[0]}"
    if tick.source == "chunk":
        assert tick.age <= MAX_AGE
        if action[1] == np.round(action[1]) and abs(action[1]) < 1e6:  # (a flipped bit may have hit the mark itself)
            assert tick.step - action[1] <= MAX_AGE * HZ + 12, f"tick {n}: of observation {action[1]}, {tick.step} now"


# ---- faults: each returns when it is over ------------------------------------------------------------------------------


def killed(host, link, rng, seconds):
    host.signal(signal.SIGKILL)
    host.process.join(10)
    time.sleep(seconds)
    host.start()


def terminated(host, link, rng, seconds):
    host.signal(signal.SIGTERM)
    host.process.join(10)
    time.sleep(seconds)
    host.start()


def frozen(host, link, rng, seconds):
    host.signal(signal.SIGSTOP)
    time.sleep(seconds)
    host.signal(signal.SIGCONT)


def other_model(host, link, rng, seconds):
    host.signal(signal.SIGTERM)
    host.process.join(10)
    host.start(digest="b" * 64)
    time.sleep(seconds)


def mode(name, low, high):
    def fault(host, link, rng, seconds):
        link.mode, link.amount = name, rng.uniform(low, high)
        time.sleep(seconds)
        link.mode = ""
        if name in ("hole", "flip"):
            link.reset()

    return fault


def cuts(host, link, rng, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        link.reset()
        time.sleep(rng.uniform(0.05, 0.6))


def nothing(host, link, rng, seconds):
    time.sleep(seconds)


FAULTS = {
    "killed": killed, "terminated": terminated, "frozen": frozen, "other model": other_model,
    "delay": mode("delay", 0.05, 0.5), "stall": mode("stall", 0.2, 0.6), "half-open": mode("hole", 0, 0),
    "cut": mode("cut", 0.02, 0.1), "resets": cuts, "flipped bits": mode("flip", 0.2, 0.8), "reorder": nothing,
    "duplicate": nothing, "nan": nothing, "wild": nothing,
}  # fmt: skip
# name -> how many of the fifty
PLAN = {
    "killed": 5, "terminated": 4, "frozen": 5, "other model": 4, "delay": 5, "stall": 4, "half-open": 5, "cut": 4,
    "resets": 4, "flipped bits": 2, "reorder": 3, "duplicate": 2, "nan": 1, "wild": 2,
}  # fmt: skip
__all__ = ["FAULTS", "PLAN", "Host", "Link", "drive"]
