"""`vla eval`: a policy in an environment, closed loop, with baselines to compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vla.cli import console
from vla.contracts import GUARD

BASELINES = ("untrained", "shuffled", "swapped", "mean-action", "nearest")
FROM_DATA = ("mean-action", "nearest")
# The policy itself, told or shown something else.
CONTROLS = {"shuffled": {"instruction": "shuffled"}, "swapped": {"pictures": "swapped"}}


def evaluate(
    model: str = "",
    /,
    policy: str = "",
    send: tuple[str, ...] = (),
    api_key: str = "",
    env: str = "tabletop",
    set: tuple[str, ...] = (),
    preset: str = "",
    episodes: int = 50,
    seed: int = 0,
    execute: int = 0,
    num_envs: int = 8,
    num_workers: int = -1,
    against: tuple[str, ...] = (),
    data: str = "",
    framework: str = "torch",
    device: str = "",
    num_steps: int = 0,
    guard: float | None = GUARD,
    latency: str = "",
    rtc: str = "",
    overlap: int = 0,
    clips: int = 4,
    out: str = "",
    overwrite: bool = False,
    json: bool = False,
) -> int:
    """Closed-loop evaluation in an environment: success with its interval, per task, with videos.

    Args:
        model: a model directory; or --policy.
        policy: ws://HOST:PORT, a policy behind openpi's protocol, ours (`vla serve`) or openpi's.
        send: KEY=PATH for --policy: what the server calls it, and where it is in the observation, e.g.
            observation/image=images/front; with any, only these and the instruction are sent; may be repeated.
        api_key: the key of that server; better in the environment variable VLA_API_KEY.
        env: the environment, e.g. tabletop.
        set: path=value, a setting of the environment, e.g. env.families='["touch"]', of the data, e.g.
            data.preset=tiny, of the robot adapter, e.g. robot.cameras='["base_0_rgb=top"]', or of the head's sampler,
            e.g. sampling.temperature=1.0; may be repeated.
        preset: settings of the environment by name, e.g. tiny.
        episodes: how many. The same seed gives the same episodes.
        seed: chooses the episodes.
        execute: steps executed of each chunk before a new one is asked for; 0: the whole chunk.
        num_envs: environments stepped together, so that the model runs on batches.
        num_workers: processes that step the environments; 0: this one; -1: one per core. The episodes are the same.
        against: a baseline on the same episodes: untrained, shuffled (told another instruction), swapped (shown the
            pictures of another scene), mean-action or nearest (the demonstrated moment that looks most alike); may be
            repeated.
        data: demonstrations for mean-action and nearest; default: those that the model was trained on.
        framework: torch or jax.
        device: cpu, cuda, ...; default: an accelerator when there is one.
        num_steps: denoising steps of chunk heads; 0: the model's setting.
        guard: actions further beyond what was recorded than this many times its range are refused, which ends the
            episode; none: none are.
        latency: time from an observation to its chunk that is simulated, e.g. 80ms, 0.4s or 4steps.
        rtc: how chunks are put together then: none (wait), append, aligned, blend, guided, trained, inpaint or forced
            (docs/rtc.md). Default: none.
        overlap: steps of the old chunk that the policy is told in the last four; 0: all that is left of it.
        clips: successes and failures to film, this many of each.
        out: a folder for report.html, results.json and videos.
        overwrite: replace the report that is there.
        json: print the results as JSON.
    """
    import json as text

    from rich.console import Console
    from rich.progress import Progress

    from vla.errors import SettingsError, VlaError
    from vla.evaluation import evaluate as run
    from vla.evaluation.summary import KIND, name_of, save_report
    from vla.files import refuse_taken
    from vla.policy import open as open_policy
    from vla.settings import split_sets

    if out:
        refuse_taken(out, KIND, overwrite)
    if unknown := [name for name in against if name not in BASELINES]:
        raise SettingsError("no such baseline", field="--against", got=unknown[0], expected=list(BASELINES))
    scene, of_data = split_sets(set, "data")
    scene, sampling = split_sets(scene, "sampling")
    scene, of_robot = split_sets(scene, "robot")
    if policy and (of_robot or sampling):
        raise SettingsError("a policy behind an address has its own settings", field="--set",
                            got=next(iter([*of_robot, *sampling])), fix="give them to vla serve")  # fmt: skip
    if of_data and not data:
        raise SettingsError("settings of data that is not named", field="--set", got=f"data.{next(iter(of_data))}",
                            fix="add --data DATA")  # fmt: skip
    table = env_table(env, preset, scene)
    if bool(model) == bool(policy):
        raise SettingsError("one policy is evaluated", field="MODEL, --policy", got=f"{model!r}, {policy!r}",
                            fix="give a model directory, or --policy ws://HOST:PORT")  # fmt: skip
    opened: Any = (
        _remote(policy, send, api_key, against, data)
        if policy
        else open_policy(
            model,
            framework,
            device=device or None,
            num_steps=num_steps or None,
            sampling=sampling,
            guard=guard,
            robot=of_robot,
        )
    )
    dataset = _demonstrations(opened, data, of_data) if any(name in FROM_DATA for name in against) else None
    films: list[Any] = []
    found: list[Any] = []
    with Progress(console=Console(stderr=True), transient=True) as bar:

        def one(acting: Any, label: str, instruction: str = "given", pictures: str = "given") -> None:
            line = bar.add_task(label, total=episodes)
            film = bool(out) and not found
            found.append(
                run(
                    acting, table, episodes=episodes, seed=seed, execute=execute, num_envs=num_envs,
                    num_workers=num_workers, latency=latency or 0, rtc=rtc or "none", overlap=overlap,
                    instruction=instruction, pictures=pictures, clips=clips if film else 0,
                    on_clip=films.append, on_episode=lambda episode: bar.advance(line),
                )
            )  # fmt: skip

        one(opened, opened.name)
        failed: VlaError | None = None  # said last: what was evaluated before it is not lost
        try:
            for name in against:
                acting = _baseline(name, opened, dataset, framework, device)
                one(acting, name, **CONTROLS.get(name, {}))
        except VlaError as error:
            failed = error
    if out:
        console.note(f"report: {save_report(out, found, films, overwrite=overwrite)}")
    if json:
        print(text.dumps({"evaluations": [e.to_dict() for e in found]}, indent=1))
    else:
        rows = [_row(name_of(e), e.successes, len(e.episodes), e.interval) for e in found]
        tasks = [_row(*task) for task in found[0].tasks()]
        title = f"{found[0].env}: seeds {found[0].episodes[0].seed} to {found[0].episodes[-1].seed}"
        console.show(console.table(title, ("policy", "successes", "rate", "95 % interval"), rows))
        if latency or rtc:
            names = ("seam_jump", "step", "seam_jerk", "jerk")
            moved = [(name_of(e), *(f"{m:.3f} ± {half:.3f}" for m, half, _ in map(e.motion, names))) for e in found]
            title = f"actions, in half ranges: {found[0].latency} steps of latency, rtc {found[0].rtc}"
            console.show(console.table(title, ("policy", *(n.replace("_", " ") for n in names)), moved))
        console.show(console.table("per task", ("task", "successes", "rate", "95 % interval"), tasks))
    for line in dict.fromkeys(f"look: {name_of(e)}: {said}" for e in found for said in e.notes()):
        console.note(line)
    if failed:
        raise failed
    return 0


def _row(name: str, successes: int, episodes: int, interval: tuple[float, float]) -> tuple[str, str, str, str]:
    low, high = interval
    return console.escape(name), f"{successes} of {episodes}", f"{successes / episodes:.0%}", f"{low:.0%} to {high:.0%}"


def env_table(env: str, preset: str, sets: Mapping[str, Any] | Iterable[str]) -> dict[str, Any]:
    """The table of an environment part; `env.` before a setting may be left out."""
    from vla.settings import parse_sets

    values = {path.removeprefix("env."): value for path, value in parse_sets(sets).items()}
    return {"part": env, **({"preset": preset} if preset else {}), **values}


def _demonstrations(policy: Any, data: str, settings: Mapping[str, Any]) -> Any:
    """What baselines are made from: the data named, else that of the model's record."""
    from vla.datasets import open_dataset, open_recorded

    record = policy.model.record if hasattr(policy, "model") else {}  # a server gives none
    if not data:
        dataset = open_recorded(record)
        console.note(f"demonstrations: {dataset.info.source} (the model was trained on them)")
        return dataset
    dataset = open_dataset(data, settings)
    if record.get("data") not in (None, dataset.digest()):
        console.note(f"demonstrations: {dataset.info.source}; the model was trained on other data")
    return dataset


def _baseline(name: str, policy: Any, dataset: Any, framework: str, device: str) -> Any:
    if name in CONTROLS:
        return policy
    if name == "untrained":
        from vla.policy import untrained

        m = policy.model
        return untrained(m.variant, m.stats, m.tokenizer, framework, device=device or None)
    from vla.evaluation import MeanAction, NearestNeighbour

    made_from_data = {"mean-action": MeanAction, "nearest": NearestNeighbour}[name]
    horizon = getattr(policy, "horizon", 0) or policy.variant.spec.action_horizon
    return made_from_data(dataset, horizon)


def _remote(url: str, send: tuple[str, ...], api_key: str, against: tuple[str, ...], data: str) -> Any:
    """A policy behind an address, and what cannot be compared with it."""
    import os

    from vla.errors import SettingsError
    from vla.evaluation.remote import Remote

    if "untrained" in against or (not data and any(name in FROM_DATA for name in against)):
        what = "untrained" if "untrained" in against else "mean-action and nearest"
        fix = "add --data DATA" if "untrained" not in against else "evaluate the model directory itself"
        raise SettingsError("a server gives neither weights nor demonstrations", field="--against", got=what, fix=fix)
    found = Remote(url, api_key=api_key or os.environ.get("VLA_API_KEY", ""), send=send)
    if not found.horizon and any(name in FROM_DATA for name in against):
        raise SettingsError("the server does not say how long its chunks are", field="--against",
                            fix="leave out mean-action and nearest")  # fmt: skip
    return found


def main(argv: list[str]) -> int:
    """The verb."""
    return console.call(evaluate, "eval", argv)
