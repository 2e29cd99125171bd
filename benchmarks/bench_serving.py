"""Eight robots at 50 Hz on one server, and openpi's way of serving beside it on the same load.

    python benchmarks/bench_serving.py                  60 s per row, benchmarks/results/serving.md
    python benchmarks/bench_serving.py --seconds 10     quicker, prints only

The policy is a stand-in that sleeps: 60 ms for each robot in a pass ("one by one"), or 60 ms for a pass of up to eight
("batched", what a GPU does with a small batch). Every robot ticks 50 times a second, has chunks of 50 steps, and asks
for the next one every 25 ticks with two pictures of 224 x 224 (301 kB). Robots run in two processes of four threads.

openpi's server is no package, so `openpi_like` below stands for it: the same wire, `infer` called inside the event
loop, as its websocket_policy_server.py does. "blocking" is its client's way too: the chunk is played to its end and the
next one is waited for (ActionChunkBroker).
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
from vla_client import ChunkPlayer, RemoteError, RemotePolicy, ServerError, codec

ROBOTS, HZ, CHUNK, EVERY, COST = 8, 50, 50, 25, 0.06
RESULTS = Path(__file__).parent / "results"
CONTRACT = {
    "version": 1, "name": "stand-in", "digest": "0" * 64, "cameras": ["front", "wrist"], "image_size": [224, 224],
    "state_dim": 8, "action_dim": 8, "action_horizon": CHUNK, "hz": HZ, "action_space": None, "parts": {},
    "embodiment": {},
}  # fmt: skip


class StandIn:
    """Answers with the robot's mark in every action."""

    name = "stand-in"

    def __init__(self, batched, cost=COST):
        self.batched, self.cost = batched, cost

    def infer_batch(self, rows, *, seeds=None):
        if self.cost:
            time.sleep(self.cost * (1 if self.batched else len(rows)))
        return [{"actions": np.tile(np.asarray(row["state"], np.float64), (CHUNK, 1))} for row in rows]

    def reset(self):
        pass


def observation(mark):
    images = {name: np.zeros((224, 224, 3), np.uint8) for name in ("front", "wrist")}
    return {"images": images, "state": np.full(8, mark, np.float32), "prompt": "go"}


# ---- servers, each in a process of its own ----------------------------------------------------------------------


def ours(ready, over, batched, cost):
    from vla.serving.openpi import Conversation
    from vla.serving.server import Options, Server, bind

    async def main():
        options = Options(port=0)
        server = Server(StandIn(batched, cost), CONTRACT, lambda contract: Conversation(None, contract), options)
        await server.start(bind(options), observation(0))
        ready.put(server.port)
        await asyncio.to_thread(over.wait)
        await server.stop()

    asyncio.run(main())


def openpi_like(ready, over, batched, cost):
    from http import HTTPStatus

    from websockets.asyncio.server import serve

    policy = StandIn(batched, cost)

    async def handler(ws):
        await ws.send(codec.pack({}))
        async for frame in ws:
            row = codec.unpack(frame)
            await ws.send(codec.pack(policy.infer_batch([row])[0]))  # inside the loop: whoever else is served waits

    def health(ws, request):
        return ws.respond(HTTPStatus.OK, "OK\n") if request.path == "/healthz" else None

    async def main():
        made = serve(handler, "127.0.0.1", 0, compression=None, max_size=None, process_request=health)
        async with made as server:
            ready.put(server.sockets[0].getsockname()[1])
            await asyncio.to_thread(over.wait)

    asyncio.run(main())


# ---- robots -----------------------------------------------------------------------------------------------------


class Timed:
    """A `RemotePolicy` that notes how long answers take, and whose they are."""

    def __init__(self, url, mark):
        self.policy, self.mark, self.times, self.foreign, self.errors = RemotePolicy(url, timeout=5), mark, [], 0, 0

    def infer(self, obs, *, step=None):
        began = time.perf_counter()
        try:
            answer = self.policy.infer(obs, step=step)
        except (RemoteError, ServerError):
            self.errors += 1
            raise
        self.times.append(time.perf_counter() - began)
        self.foreign += int((answer["actions"] != self.mark).any())
        return answer


def robot(url, mark, seconds, blocking, out):
    timed, obs = Timed(url, mark), observation(mark)
    late, took, without = [], [], 0
    player = ChunkPlayer(timed, hz=HZ, fallback="hold", every=EVERY)
    left = 0
    with player:
        player.tick(obs)  # not counted: nothing can be there yet
        while not blocking and not player.ahead:
            time.sleep(0.01)
        start = time.perf_counter() + 0.02 * (mark % 5)
        for n in range(int(seconds * HZ)):
            due = start + n / HZ
            if (pause := due - time.perf_counter()) > 0:
                time.sleep(pause)
            began = time.perf_counter()
            late.append(began - due)
            if blocking:
                if not left:
                    timed.infer(obs)
                    left = CHUNK
                left -= 1
                without += int(time.perf_counter() - due > 1 / HZ)  # the tick is over before there is a decision
                if time.perf_counter() - due > 1 / HZ:
                    start += time.perf_counter() - due  # the arm stood still: its clock did too
            else:
                without += int(player.tick(obs).source != "chunk")
            took.append(time.perf_counter() - began)
    timed.policy.close()
    out.append({"mark": mark, "late": late, "took": took, "without": without, "times": timed.times,
                "foreign": timed.foreign, "errors": timed.errors})  # fmt: skip


def fleet(url, marks, seconds, blocking, queue):
    out = []
    threads = [threading.Thread(target=robot, args=(url, mark, seconds, blocking, out)) for mark in marks]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    queue.put(out)


def measure(server, seconds, *, batched=False, blocking=False):
    """One row of the table."""
    spawn = multiprocessing.get_context("spawn")
    ready, over, queue = spawn.Queue(), spawn.Event(), spawn.Queue()
    serving = spawn.Process(target=server, args=(ready, over, batched, COST), daemon=True)
    serving.start()
    port = ready.get(timeout=60)
    url = f"ws://127.0.0.1:{port}"
    halves = [spawn.Process(target=fleet, args=(url, m, seconds, blocking, queue)) for m in (range(1, 5), range(5, 9))]
    load = os.getloadavg()[0]
    [half.start() for half in halves]
    health, robots = [], []
    while len(robots) < ROBOTS:
        began = time.perf_counter()
        urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=30).read()
        health.append(time.perf_counter() - began)
        time.sleep(0.1)
        while not queue.empty():
            robots += queue.get()
    [half.join() for half in halves]
    lag = None
    if server is ours:
        lag = quantile_of(urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode(), 0.99)
    over.set()
    serving.join(20)
    shares = np.array([len(r["times"]) for r in robots], float)

    def p(values, q):
        return float(np.percentile(np.concatenate([np.asarray(v) for v in values]) * 1e3, q))

    return {
        "ticks": sum(len(r["late"]) for r in robots), "without": sum(r["without"] for r in robots),
        "tick_p99_ms": p([r["took"] for r in robots], 99), "late_p99_ms": p([r["late"] for r in robots], 99),
        "request_p50_ms": p([r["times"] for r in robots], 50), "request_p99_ms": p([r["times"] for r in robots], 99),
        "requests": int(shares.sum()), "jain": float(shares.sum() ** 2 / (len(shares) * (shares**2).sum())),
        "health_p50_ms": p([health], 50), "health_p99_ms": p([health], 99), "lag_p99_ms": lag,
        "foreign": sum(r["foreign"] for r in robots), "errors": sum(r["errors"] for r in robots), "load": load,
    }  # fmt: skip


def quantile_of(metrics, q):
    """Upper edge, in ms, of the bucket of the loop's lag in which the quantile lies."""
    rows = [line for line in metrics.splitlines() if line.startswith("vla_loop_lag_seconds_bucket")]
    pairs = [(float(row.split('le="')[1].split('"')[0]), float(row.split()[-1])) for row in rows]
    return next(edge * 1e3 for edge, count in pairs if count >= q * pairs[-1][1])


def crosstalk(requests=10_000):
    """Eight robots that ask as fast as they can, each with its own mark: answers that are somebody else's."""
    spawn = multiprocessing.get_context("spawn")
    ready, over = spawn.Queue(), spawn.Event()
    serving = spawn.Process(target=ours, args=(ready, over, True, 0.0), daemon=True)
    serving.start()
    url = f"ws://127.0.0.1:{ready.get(timeout=60)}"
    found = []

    def one(number):
        with RemotePolicy(url, timeout=30) as policy:
            obs = {"images": {}, "prompt": "", "state": np.zeros(8, np.float32)}
            for n in range(requests // ROBOTS):
                mark = number * 100_000 + n
                answer = policy.infer({**obs, "state": np.full(8, mark, np.float32)})
                found.append(bool((answer["actions"] != mark).any()))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(ROBOTS)]
    began = time.perf_counter()
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    over.set()
    serving.join(20)
    return {"requests": len(found), "foreign": sum(found), "seconds": time.perf_counter() - began}


def connections(count=10_000):
    """That many robots come, half of them leave without a word; what the server keeps of them."""
    from websockets.sync.client import connect

    spawn = multiprocessing.get_context("spawn")
    ready, over = spawn.Queue(), spawn.Event()
    serving = spawn.Process(target=ours, args=(ready, over, True, 0.0), daemon=True)
    serving.start()
    url = f"ws://127.0.0.1:{ready.get(timeout=60)}"

    def come(number):
        for n in range(number):
            ws = connect(url, compression=None, max_size=None).__enter__()
            ws.recv(timeout=30)
            if n % 2:
                ws.socket.close()
            else:
                ws.close()

    def kept():
        time.sleep(1)
        status = Path(f"/proc/{serving.pid}/status").read_text()
        memory = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024
        return memory, len(os.listdir(f"/proc/{serving.pid}/fd")), len(os.listdir(f"/proc/{serving.pid}/task"))

    come(count // 10)  # what is used at all is loaded, and allocators have their pools
    before = kept()
    threads = [threading.Thread(target=come, args=(count // 4,)) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    after = kept()
    over.set()
    serving.join(20)
    return {"count": count, "before": before, "after": after}


ROWS = [
    ("vla serve, one by one", "ours", {}), ("openpi's way, one by one", "openpi_like", {}),
    ("openpi's way, and its blocking client", "openpi_like", {"blocking": True}),
    ("vla serve, batched", "ours", {"batched": True}),
]  # fmt: skip


def report(rows, cross, came, seconds):
    """The page."""
    head = (
        "", "ticks without a decision", "tick p99", "late p99", "request p50 / p99", "health p50 / p99", "Jain",
        "chunks", "foreign", "load before",
    )  # fmt: skip
    lines = [
        "# Serving: eight robots at 50 Hz", "",
        "Made by `python benchmarks/bench_serving.py`, which says what is measured and what stands for openpi's",
        f"server. {ROBOTS} robots, {HZ} Hz, chunks of {CHUNK} steps, a request every {EVERY} ticks, a stand-in policy",
        f"of {COST * 1e3:.0f} ms, {seconds:g} s per row. {platform.machine()}, {len(os.sched_getaffinity(0))} cores, "
        f"Python {platform.python_version()}. Times in ms.", "",
        "| " + " | ".join(head) + " |", "|---" * len(head) + "|",
    ]  # fmt: skip
    for name, r in rows:
        cells = (
            name, f"{r['without']} of {r['ticks']}", f"{r['tick_p99_ms']:.1f}", f"{r['late_p99_ms']:.1f}",
            f"{r['request_p50_ms']:.0f} / {r['request_p99_ms']:.0f}",
            f"{r['health_p50_ms']:.1f} / {r['health_p99_ms']:.1f}", f"{r['jain']:.4f}", str(r["requests"]),
            str(r["foreign"]), f"{r['load']:.1f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lag = next(r["lag_p99_ms"] for name, r in rows if r["lag_p99_ms"] is not None)
    lines += [
        "", "A tick is a call of `ChunkPlayer.tick`; late is how long after its time it began. Loop lag of vla serve, "
        f"p99: at most {lag:g} ms", f"(the bucket's upper edge). Cross-talk: {cross['foreign']} of {cross['requests']} "
        "answers to eight robots that ask without pause were another's",
        f"({cross['seconds']:.0f} s). The load before is "
        "the machine's one-minute load average when a row began: other work on the cores is in these figures.",
        "", f"{came['count']:,} connections, half of them cut without a word: memory of the server "
        f"{came['before'][0]:.1f} MiB before, {came['after'][0]:.1f} after; files {came['before'][1]} and "
        f"{came['after'][1]}, threads {came['before'][2]} and {came['after'][2]}.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--write", action="store_true", help="write the table although --seconds is not 60")
    parser.add_argument("--rows", type=int, default=len(ROWS))
    given = parser.parse_args()
    rows = []
    for name, server, more in ROWS[: given.rows]:
        row = measure(globals()[server], given.seconds, **more)
        print(name, json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
        rows.append((name, row))
    text = report(rows, crosstalk(), connections(), given.seconds)
    print(text)
    if given.write or (given.seconds >= 60 and given.rows == len(ROWS)):
        (RESULTS / "serving.md").write_text(text)
        (RESULTS / "serving.json").write_text(json.dumps(dict(rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
