"""`vla serve --check`: a synthetic robot for some seconds; does the policy keep up with the robot's rate?"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from attrs import evolve
from vla_client import RemotePolicy, ServerError

from vla.errors import SettingsError
from vla.serving.run import Plan, options_of, server_of, start, usable
from vla.serving.server import Server, bind


def check(plan: Plan, seconds: float) -> int:
    """Serve on a free port of this machine, be its robot, print what came out. 0: it keeps up, 1: not.

    Raises:
        SettingsError: nobody says at which rate the robot moves.
    """
    if not 0.1 <= seconds <= 3600:
        raise SettingsError("out of range", field="--seconds", got=seconds, expected="0.1 to 3600")
    if plan.protocol != "openpi":
        raise SettingsError("the synthetic robot speaks openpi's protocol", field="--protocol", got=plan.protocol,
                            fix="leave --protocol out: latency does not depend on it")  # fmt: skip
    plan = evolve(plan, host="127.0.0.1", port=0, api_key="", certificate="", private_key="")
    options = options_of(plan)
    bound = bind(options)
    server = server_of(plan, options)
    hz = server.contract["hz"]
    if not hz:
        bound.close()
        raise SettingsError("nobody says at which rate the robot moves", field="--hz", fix="add --hz, e.g. --hz 50")
    times, health = asyncio.run(_drive(server, bound, seconds))
    return report(server.contract, hz, times, health, server.dispatcher.costs, options.max_sessions)


async def _drive(server: Server, bound: Any, seconds: float) -> tuple[list[float], list[float]]:
    """(latencies, latencies of /healthz) in seconds."""
    await start(server, bound)
    times: list[float] = []
    health: list[float] = []
    failed: list[BaseException] = []
    refused: list[ServerError] = []

    def robot() -> None:
        try:
            with RemotePolicy(f"ws://127.0.0.1:{server.port}", timeout=server.options.deadline + 60) as policy:
                row = usable(server)
                end = time.monotonic() + seconds
                while time.monotonic() < end or not times:
                    began = time.monotonic()
                    try:
                        policy.infer(row)
                    except ServerError as error:
                        if error.kind not in ("BAD_ACTION", "NONFINITE_ACTION"):  # it took as long to find out
                            raise
                        refused.append(error)
                    times.append(time.monotonic() - began)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=robot, daemon=True)
    thread.start()
    while thread.is_alive():
        began = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        await reader.read()
        writer.close()
        health.append(time.monotonic() - began)
        await asyncio.sleep(0.1)
    await server.stop()
    if refused:
        what = f"{len(refused)} of {len(times)} chunks were refused ({refused[0].text})"
        print(f"{what}: the synthetic robot shows noise", file=sys.stderr)
    if failed:
        raise failed[0]
    return times, health


def report(
    contract: Mapping[str, Any], hz: float, times: list[float], health: list[float], costs: Mapping[int, float],
    places: int,
) -> int:  # fmt: skip
    """Print the figures and the verdict."""
    p50, p90, p99 = (float(np.percentile(times, p)) * 1e3 for p in (50, 90, 99))
    chunk = contract["action_horizon"] / hz * 1e3
    keeps_up = p99 <= chunk
    most = max(1, *(int(n * chunk / 1e3 / cost) for n, cost in costs.items() if cost * 1e3 <= chunk), 0)
    worst = max(times) * 1e3
    print(f"{len(times)} chunks: {p50:.1f} ms (p50), {p90:.1f} ms (p90), {p99:.1f} ms (p99), {worst:.1f} ms (worst)")
    print(f"health meanwhile: {np.percentile(health, 99) * 1e3:.1f} ms (p99)")
    print(f"a chunk has {contract['action_horizon']} steps at {hz:g} Hz and lasts {chunk:.0f} ms")
    if keeps_up:
        robots = f", for about {min(most, places)} robots" if most > 1 else ""
        steps = int(np.ceil(p99 / 1e3 * hz))
        print(f"it keeps up{robots}: ask for the next chunk {steps} step{'s' * (steps > 1)} before the last one ends")
        return 0
    print(f"it does not keep up: an answer takes {p99:.0f} ms, a chunk lasts {chunk:.0f} ms", file=sys.stderr)
    fix = "fewer --num-steps, --precision bfloat16, --device cuda, or a model with a longer horizon"
    print(f"  fix: {fix}", file=sys.stderr)
    return 1
