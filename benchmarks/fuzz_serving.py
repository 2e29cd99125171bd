"""Frames that a stranger may send: 2,000,000 mutated and 100,000 made by a grammar in process, 5,000 over a socket.

    python benchmarks/fuzz_serving.py                 benchmarks/results/serving_fuzz.md
    python benchmarks/fuzz_serving.py --share 0.01    a hundredth of it, prints only

In process: every frame goes through both protocols' `receive`; it is understood, or refused by a FrameError or a
ServerError of one short line; nothing else, and nothing may grow. Over a socket: two robots are served meanwhile, and
their latencies are compared with those without the fuzz.
"""

import argparse
import collections
import os
import platform
import random
import resource
import threading
import time
from pathlib import Path

import msgpack
import numpy as np
from bench_serving import CONTRACT, observation, ours
from vla_client import FrameError, RemotePolicy, ServerError, codec
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from vla.protocols import VlaEvalSettings
from vla.serving.openpi import Conversation as OpenPI
from vla.serving.vla_eval import Conversation as VlaEval
from vla.testing.protocols import mutated

RESULTS = Path(__file__).parent / "results" / "serving_fuzz.md"
DTYPES = [
    *codec.DTYPES,
    "|O",
    "|V8",
    "|S0",
    "<U4",
    "<M8[s]",
    "<c16",
    ">f4",
    "f4,f4",
    "(3,)f8",
    "",
    "|b",
    "<f16",
    "object",
]


def seeds():
    """Good frames, small ones, of both protocols."""
    row = {"images": {"front": np.zeros((4, 4, 3), np.uint8)}, "state": np.arange(3, dtype=np.float32), "prompt": "go"}
    extra = {
        "step": 3,
        "sent": 1.5,
        "deadline_ms": 100.0,
        "seed": 5,
        "delay": 2,
        "prefix": np.zeros((2, 2), np.float32),
    }
    hello = {"version": 1, "name": "arm", "embodiment": {"cameras": ["front"], "state_names": ["a", "b"], "hz": 50}}
    frames = [codec.pack(row), codec.pack({**row, "vla": extra}), codec.pack({"vla": {"hello": hello}})]
    frames.append(codec.pack({"a": np.float32(1), "b": [1, 2.5, None, True, "x"], "c": np.zeros((0, 3))}))
    image = {"__image__": True, "format": "raw", "data": bytes(48), "dtype": "|u1", "shape": [4, 4, 3]}
    array = {"__ndarray__": True, "data": bytes(12), "dtype": "<f4", "shape": [3]}
    told = {"images": {"front": image, "wrist": image}, "state": array, "task_description": "go"}
    for kind, payload in (("hello", {"protocol_version": 1}), ("episode_start", {}), ("observation", told)):
        frames.append(msgpack.packb({"type": kind, "payload": payload, "seq": 1, "timestamp": 0.0}))
    return frames


def grammar(rng, depth=0):
    """A msgpack value: anything the format can say, with arrays that may lie."""
    how = rng.randrange(14 if depth < 10 else 8)
    if how == 0:
        return rng.choice([None, True, False])
    if how == 1:
        return rng.choice([0, -1, 127, 128, 2**31, -(2**31), 2**63 - 1, 2**64 - 1, -(2**63)])
    if how == 2:
        return rng.choice([0.0, -1.5, float("nan"), float("inf"), 1e308])
    if how == 3:
        return rng.choice(["", "state", "vla", "__ndarray__", "x" * rng.randrange(300), "\x00", "é"])
    if how == 4:
        return bytes(rng.randrange(64))
    if how == 5:
        return msgpack.ExtType(rng.randrange(128), bytes(rng.randrange(8)))
    if how in (6, 7, 8, 9):
        size = rng.randrange(20)
        shape = rng.choice(
            [[size], [size, 1], [2, 3], [], [0], [-1], [2**40, 2**40], [1] * 9, [1.5], "3", None, [True]]
        )
        mark, text = rng.choice([("__ndarray__", str), ("__ndarray__", str.encode), ("__npgeneric__", str.encode)])
        table = {mark: True, "data": rng.choice([bytes(4 * size), bytes(size), 3, "x"]), "dtype": rng.choice(DTYPES)}
        table |= {"shape": shape} if mark == "__ndarray__" or rng.random() < 0.1 else {}
        if rng.random() < 0.1:
            table.pop(rng.choice(list(table)))
        return {text(key): value for key, value in table.items()}
    if how in (10, 11):
        return [grammar(rng, depth + 1) for _ in range(rng.randrange(5))]
    keys = [
        "state",
        "prompt",
        "images",
        "vla",
        "step",
        "seed",
        "hello",
        "prefix",
        "type",
        "payload",
        "seq",
        "observation",
    ]
    return {rng.choice([*keys, "", b"b", 3]): grammar(rng, depth + 1) for _ in range(rng.randrange(5))}


def rss():
    """Peak memory of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_process(mutations, made):
    """(how frames ended, slowest frame in ms, growth in MiB, seconds)."""
    rng, frames = random.Random(0), seeds()
    ended, worst = collections.Counter(), 0.0
    for frame in frames * 200:  # what is used at all is loaded
        take(frame)
    before, began = rss(), time.perf_counter()
    for n in range(mutations + made):
        if n < mutations:
            frame = mutated(rng.choice(frames), rng)
        else:
            frame = msgpack.packb(grammar(rng), strict_types=False)
        start = time.perf_counter()
        for outcome in take(frame):
            ended[outcome] += 1
        worst = max(worst, time.perf_counter() - start)
    return ended, worst * 1e3, rss() - before, time.perf_counter() - began


def take(frame):
    """What both protocols make of a frame; anything but a value or a typed refusal raises."""
    for name, talk in (("openpi", OpenPI(None, CONTRACT)), ("vla-eval", VlaEval(VlaEvalSettings(), CONTRACT))):
        try:
            talk.receive(frame)
            yield f"{name}: understood"
        except (FrameError, ServerError) as error:
            assert len(str(error)) <= 1000 and "Traceback" not in str(error), str(error)
            yield f"{name}: refused"


def over_a_socket(count):
    """(answers by kind, robots' latencies without and with the fuzz, growth of the server in MiB)."""
    import multiprocessing

    spawn = multiprocessing.get_context("spawn")
    ready, over = spawn.Queue(), spawn.Event()
    server = spawn.Process(target=ours, args=(ready, over, True, 0.01), daemon=True)
    server.start()
    url = f"ws://127.0.0.1:{ready.get(timeout=60)}"
    times, phase, wrong = {"without": [], "with": []}, ["without"], []

    def robot(mark):
        with RemotePolicy(url, timeout=20) as policy:
            obs = observation(mark)
            while phase[0]:
                now, began = phase[0], time.perf_counter()
                answer = policy.infer(obs)
                times[now].append(time.perf_counter() - began)
                wrong.append(bool((answer["actions"] != mark).any()))
                time.sleep(0.02)

    robots = [threading.Thread(target=robot, args=(mark,)) for mark in (1, 2)]
    [thread.start() for thread in robots]
    time.sleep(5)
    before = memory_of(server.pid)
    phase[0] = "with"
    rng, frames, said = random.Random(1), seeds(), collections.Counter()
    ws = None
    for _ in range(count):
        frame = mutated(rng.choice(frames), rng) if rng.random() < 0.8 else msgpack.packb(grammar(rng))
        try:
            if ws is None:
                ws = connect(url, compression=None, max_size=None).__enter__()
                ws.recv(timeout=10)
            ws.send(frame)
            answer = ws.recv(timeout=10)
            kind = answer.partition(":")[0].partition(" ")[0] if isinstance(answer, str) else "a chunk"
            assert not isinstance(answer, str) or (len(answer) < 1200 and ".py" not in answer and "/" not in answer), (
                answer
            )
        except ConnectionClosed:
            kind = "closed"
        said[kind] += 1
        if kind in ("closed", "BAD_REQUEST", "VERSION", "EMBODIMENT"):
            ws = None
    phase[0] = ""
    [thread.join() for thread in robots]
    growth = memory_of(server.pid) - before
    alive = server.is_alive()
    over.set()
    server.join(20)
    assert alive and not any(wrong)
    return said, times, growth


def memory_of(pid):
    """Memory of a process, MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0)
    share = parser.parse_args().share
    load = os.getloadavg()[0]
    mutations, made, live = (int(n * share) for n in (2_000_000, 100_000, 5_000))
    ended, worst, growth, seconds = in_process(mutations, made)
    said, times, grown = over_a_socket(live)
    p99 = {k: np.percentile(np.array(v) * 1e3, 99) for k, v in times.items()}
    rate, answers = (mutations + made) / seconds, ", ".join(f"{n:,} {k}" for k, n in said.most_common())
    text = f"""# Serving: frames that a stranger may send

Made by `python benchmarks/fuzz_serving.py`. {platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python
{platform.python_version()}; load average {load:.1f} at the start.

In process: {mutations:,} mutated and {made:,} grammar-made frames through both protocols in {seconds:.0f} s
({rate:,.0f} frames a second). Each was understood, or refused by a typed error; nothing else was raised.
Memory grew by {growth:.1f} MiB (peak); the slowest frame took {worst:.1f} ms (other work on the machine included).

| protocol | understood | refused |
|---|---|---|
| openpi | {ended["openpi: understood"]:,} | {ended["openpi: refused"]:,} |
| vla-eval | {ended["vla-eval: understood"]:,} | {ended["vla-eval: refused"]:,} |

Over a socket: {live:,} frames while two robots were served. Answers: {answers}.
The robots got {len(times["without"]):,} chunks before and {len(times["with"]):,} meanwhile, all their own; p99
{p99["without"]:.1f} ms before, {p99["with"]:.1f} ms meanwhile. No answer named a file. The server grew by
{grown:.1f} MiB.
"""
    print(text)
    if share >= 1:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
