"""From the options of `vla serve` to a running server."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import field, frozen

from vla.compose import load_object, resolve
from vla.errors import DataError, SettingsError, VlaError
from vla.serving.contract import contract_of, example
from vla.serving.live import Frames, Live
from vla.serving.server import Options, Server, bind


@frozen
class Plan:
    """The options of `vla serve`."""

    model: str
    host: str
    port: int
    protocol: str
    settings: Mapping[str, Any]
    api_key: str = field(repr=False)
    insecure: bool
    certificate: str
    private_key: str
    max_sessions: int
    max_batch: int
    max_frame: int
    deadline: float
    idle: float
    drain: float
    framework: str
    device: str
    precision: str
    num_steps: int
    guard: float | None
    prompt: str
    hz: float
    metadata: str
    data: str
    data_settings: Mapping[str, Any]


def options_of(plan: Plan) -> Options:
    """The server's options.

    Raises:
        SettingsError: a value is out of range, or a certificate cannot be read.
    """
    bounds = {"port": (0, 65535), "max_sessions": (1, 4096), "max_batch": (1, 64), "max_frame": (1, 1024),
              "deadline": (0.001, 3600), "idle": (0, 1e9), "drain": (0, 3600), "hz": (0, 10_000)}  # fmt: skip
    for name, (low, high) in bounds.items():
        value = getattr(plan, name)
        if not low <= value <= high:
            option = f"--{name.replace('_', '-')}"
            raise SettingsError("out of range", field=option, got=value, expected=f"{low} to {high}")
    return Options(
        host=plan.host, port=plan.port, api_key=plan.api_key, insecure=plan.insecure, max_sessions=plan.max_sessions,
        max_batch=plan.max_batch, max_frame=plan.max_frame * 2**20, deadline=plan.deadline, idle=plan.idle,
        drain=plan.drain, tls=_tls(plan),
    )  # fmt: skip


def _tls(plan: Plan) -> ssl.SSLContext | None:
    if not plan.certificate and not plan.private_key:
        return None
    if not plan.certificate or not plan.private_key:
        lacking = "--private-key" if plan.certificate else "--certificate"
        raise SettingsError("a certificate and its private key come together", field=lacking, fix=f"add {lacking} FILE")
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        made.load_cert_chain(plan.certificate, plan.private_key)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError("the certificate cannot be used", field="--certificate", got=f"{plan.certificate}: {error}",
                            fix="PEM files of a certificate and of its key") from error  # fmt: skip
    return made


def open_policy(plan: Plan) -> Any:
    """The policy that the plan names."""
    from vla.policy import open

    return open(
        plan.model, plan.framework, device=plan.device or None, precision=plan.precision,
        default_prompt=plan.prompt or None, num_steps=plan.num_steps or None, guard=plan.guard,
    )  # fmt: skip


def server_of(plan: Plan, options: Options) -> Server:
    """The server of a plan, not started. What is quick to check is checked before the model is loaded.

    Raises:
        PartError: there is no such protocol.
        SettingsError: a setting of the protocol or the metadata file will not do.
        StoreError: the model is not there, or damaged.
    """
    chosen = resolve("protocol", {"part": plan.protocol, **plan.settings}, "protocol")
    conversation = load_object(chosen.part.numpy, f"protocol {chosen.part.name!r}")
    metadata = _metadata(plan.metadata)
    policy = open_policy(plan)
    contract = {**contract_of(policy, plan.hz), "metadata": metadata}
    frames = Frames(_open_data(plan, policy), int(contract["action_horizon"]))
    return Server(policy, contract, lambda c: conversation(chosen.settings, c), options, lambda s: Live(s, frames))


def _metadata(path: str) -> dict[str, Any]:
    if not path:
        return {}
    try:
        found = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError("the metadata cannot be read", field="--metadata", got=f"{path}: {error}",
                            fix="a JSON file with one object") from error  # fmt: skip
    if not isinstance(found, dict) or "vla" in found:
        raise SettingsError("the metadata is one JSON object, without the key 'vla'", field="--metadata", got=path)
    return found


def _open_data(plan: Plan, policy: Any) -> Any:
    """What opens the demonstrations whose frames the page may try; those that are named are opened now."""
    from vla.datasets import open_dataset, open_recorded

    if plan.data:
        dataset = open_dataset(plan.data, plan.data_settings)
        return lambda: dataset
    if plan.data_settings:
        raise SettingsError("settings of data that is not named", field="--set", fix="add --data DATA")
    return lambda: open_recorded(policy.model.record)


def run_server(plan: Plan) -> int:
    """Serve until a signal."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s  %(message)s")
    logging.getLogger("vla.serve.websockets").setLevel(logging.CRITICAL)  # tracebacks of strangers' bytes; ours say it
    logging.getLogger("PIL").setLevel(logging.WARNING)
    options = options_of(plan)
    bound = bind(options)
    try:
        server = server_of(plan, options)
        asyncio.run(_serve(plan, server, bound))
    finally:
        bound.close()
    return 0


async def _serve(plan: Plan, server: Server, bound: socket.socket) -> None:
    await start(server, bound)
    secure = "s" if server.options.tls else ""
    host = f"[{plan.host}]" if ":" in plan.host else plan.host
    where = f"{host}:{server.port}"
    costs = ", ".join(f"{n}: {seconds * 1e3:.0f} ms" for n, seconds in server.dispatcher.costs.items())
    print(
        f"serving {server.contract['name']} ({server.contract['digest'][:12]}) to {plan.protocol} clients at "
        f"ws{secure}://{where}\n  page: http{secure}://{where}/   one pass, by robots in it: {costs}",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    await server.run_until_signal()


async def start(server: Server, bound: socket.socket) -> None:
    """Warm up and listen.

    Raises:
        SettingsError: the port is in use.
        DataError: nobody knows an observation that the policy can read.
    """
    await server.start(bound, usable(server))


def usable(server: Server) -> dict[str, Any]:
    """An observation that the policy can read: of its contract, which shows nothing, or else of its data.

    Raises:
        DataError: it reads neither.
    """
    try:
        row = example(server.contract)
        server.policy.group.inputs(row)
        return row
    except VlaError as error:  # a robot adapter with names of its own
        frame = server.live.frames.row(0) if server.live else None
        if frame is not None:
            return frame
        raise DataError(
            "no observation is known to warm the policy up with: it does not read one of its own contract",
            field="model", got=error.what, fix="add --data DATA, demonstrations of this robot: a frame of them will do",
        ) from error  # fmt: skip


def run_check(plan: Plan, seconds: float) -> int:
    """`vla serve --check`."""
    from vla.serving.check import check

    return check(plan, seconds)
