"""`vla serve`: a policy for robots, over the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vla.cli import console
from vla.contracts import GUARD


def serve(
    model: str,
    /,
    host: str = "127.0.0.1",
    port: int = 8000,
    protocol: str = "openpi",
    set: tuple[str, ...] = (),
    api_key: str = "",
    insecure: bool = False,
    certificate: str = "",
    private_key: str = "",
    max_sessions: int = 64,
    max_batch: int = 8,
    max_frame: int = 16,
    deadline: float = 5.0,
    idle: float = 300.0,
    drain: float = 10.0,
    framework: str = "torch",
    device: str = "",
    precision: str = "float32",
    num_steps: int = 0,
    guard: float | None = GUARD,
    prompt: str = "",
    hz: float = 0.0,
    metadata: str = "",
    data: str = "",
    check: bool = False,
    seconds: float = 10.0,
) -> int:
    """Serve a model directory to robots: openpi's websocket protocol, several robots at once, a page to watch at /.

    Args:
        model: a model directory.
        host: the address to serve at; 0.0.0.0 is every address of this machine, and wants a key or --insecure.
        port: the port; 0: any free one.
        protocol: what clients speak: openpi, vla-eval, or a plugin's (`vla list protocol`).
        set: path=value, a setting of the protocol, e.g. protocol.execute=8, or of the data; may be repeated.
        api_key: what clients have to send; better in the environment variable VLA_API_KEY, which `ps` does not show.
        insecure: serve other machines without a key.
        certificate: a PEM file; clients then connect to wss://.
        private_key: the PEM file of its key.
        max_sessions: robots at once.
        max_batch: robots in one forward pass, where that is faster; 1: each by itself.
        max_frame: MiB of one observation.
        deadline: seconds that an observation waits for its turn at most; then it is refused (STALE), or at once when
            that is foreseeable (BUSY).
        idle: seconds without a request after which a robot gives its place to another, when all are taken.
        drain: seconds that requests get to end on SIGTERM.
        framework: torch or jax.
        device: cpu, cuda, ...; default: an accelerator when there is one.
        precision: float32 or bfloat16.
        num_steps: Euler steps of flow heads; 0: the model's setting.
        guard: actions further beyond what was recorded than this many times its range are refused; none: none are.
        prompt: the instruction for observations that have none.
        hz: control steps per second, where neither robot nor model say it.
        metadata: a JSON file with more keys for the metadata frame (openpi's policy_metadata, e.g. reset_pose).
        data: demonstrations whose frames the page can try; default: those that the model was trained on,
            if they are here.
        check: drive the server with a synthetic robot for some seconds and say whether it keeps up. Exit status 1: not.
        seconds: how long --check takes.
    """
    import os

    try:
        from vla.serving.run import Plan, run_check, run_server
    except ModuleNotFoundError as error:
        from vla.errors import SettingsError

        if (error.name or "").partition(".")[0] not in ("websockets", "msgpack", "prometheus_client", "vla_client"):
            raise
        fix = "pip install 'vla-core[serve]'"
        raise SettingsError("what serving needs is not installed", field="serve", got=error.name, fix=fix) from error
    ours, of_data = _settings(set)
    plan = Plan(
        model=model, host=host, port=port, protocol=protocol, settings=ours,
        api_key=api_key or os.environ.get("VLA_API_KEY", ""), insecure=insecure, certificate=certificate,
        private_key=private_key, max_sessions=max_sessions, max_batch=max_batch, max_frame=max_frame,
        deadline=deadline, idle=idle, drain=drain, framework=framework, device=device, precision=precision,
        num_steps=num_steps, guard=guard, prompt=prompt, hz=hz, metadata=metadata, data=data, data_settings=of_data,
    )  # fmt: skip
    return run_check(plan, seconds) if check else run_server(plan)


def _settings(sets: tuple[str, ...]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    from vla.settings import parse_sets, split_sets

    mine, of_data = split_sets(sets, "data")
    return {path.removeprefix("protocol."): value for path, value in parse_sets(mine).items()}, of_data


def main(argv: list[str]) -> int:
    """The verb."""
    return console.call(serve, "serve", argv)
