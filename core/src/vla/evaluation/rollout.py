"""Rollouts: several environments stepped together, one forward pass for all that need a new chunk.

An episode is fixed by its seed: the environment is reset with it, and the policy's noise follows from (seed, number of
the call). So the same seeds give the same episodes, in whatever order they run and in whichever process.
"""

from __future__ import annotations

import inspect
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import asdict, define, field, frozen

from vla.embodiment import Embodiment, differences
from vla.errors import ActionError, DataError, DecodeError, SettingsError, VlaError
from vla.evaluation.environments import Environments, default_workers
from vla.evaluation.results import Episode, Evaluation, Motion
from vla.policy import Acts
from vla.rtc import PLAYED, SAMPLED, Timeline, steps_of, trained_delay

INSTRUCTIONS = ("given", "shuffled")
PICTURES = ("given", "swapped")
MOST = 10_000  # episodes of one seed
MAX_STEPS = 10_000  # an environment that never ends is a bug, not an episode


@frozen(eq=False)
class Clip:
    """What an episode looked like: frames uint8 [h w 3], cameras side by side."""

    episode: Episode
    frames: Sequence[np.ndarray]
    hz: float


@define(eq=False)
class _Run:
    """An episode in progress."""

    index: int
    seed: int
    slot: int  # the number of its environment
    obs: Mapping[str, Any]
    info: Mapping[str, Any]
    prompt: str
    told: str
    frames: list[np.ndarray]
    line: Timeline
    asked: int = -1  # step of the newest request
    coming: np.ndarray | None = None  # the chunk of it, on its way
    calls: int = 0
    refused: str = ""
    horizon: int = 0  # steps of a chunk
    executed: list[np.ndarray] = field(factory=list)


def evaluate(
    policy: Acts,
    env: Any = "tabletop",
    *,
    episodes: int = 50,
    seed: int = 0,
    execute: int = 0,
    num_envs: int = 8,
    num_workers: int = 0,
    instruction: str = "given",
    pictures: str = "given",
    latency: int | str = 0,
    rtc: str = "none",
    overlap: int = 0,
    clips: int = 0,
    on_clip: Callable[[Clip], None] | None = None,
    on_episode: Callable[[Episode], None] | None = None,
) -> Evaluation:
    """Run a policy in an environment and count successes.

    Args:
        policy: a `vla.open(...)` policy or anything else that `Acts`.
        env: an environment part: its name, a table {"part": ..., settings...}, or a `Chosen`.
        episodes: how many.
        seed: episode i is reset with `first_seed(seed) + i`.
        execute: steps executed of each chunk before a new one is asked for; 0: the whole chunk.
        num_envs: environments stepped together; their chunks come from one batch.
        num_workers: processes that step the environments; 0: this one; -1: one per core, at most one per environment
            (none on one core). Episodes are the same bit for bit. Processes are spawned: a script that uses them needs
            `if __name__ == "__main__":`.
        instruction: "given", or "shuffled": the policy is told another instruction that makes sense in the same scene,
            while success is judged by the true one. A policy that listens to language fails then.
        pictures: "given", or "swapped": with its own state and instruction the policy is shown what the cameras of the
            next environment see at that moment. A policy that looks fails then. Which scene it sees follows from
            `num_envs`: keep that the same when two such runs are to be the same.
        latency: control steps between an observation and its chunk, or a time such as "80ms", as on a robot; the first
            chunk is waited for.
        rtc: what happens meanwhile (`vla.rtc`, docs/rtc.md). "none": the robot holds still until the chunk is there.
            Else the next chunk is asked for while the last one is executed, `execute` steps after the request before
            it. "append" puts it behind the old one, "aligned" in place of the old one's rest, step by step, "blend"
            fades from one to the other; "guided", "trained", "inpaint" and "forced" tell the policy what it has to go
            on from.
        overlap: steps of the old chunk that a policy is told; 0: all that is left of it.
        clips: successes and failures of which frames are kept, this many of each.
        on_clip, on_episode: called as episodes end.

    Raises:
        PartError: the environment is not installed.
        SettingsError: a setting is unknown or wrong, the environment has no other instruction to give, or there is no
            other environment to take pictures from.
        DataError: the policy cannot read the observation, its actions have another width than the environment's or are
            not finite, or the environment failed; the message says with which seed and task.
    """
    chosen = _chosen(env)
    bounds = {"episodes": (1, MOST), "num_envs": (1, 256), "execute": (0, 10_000), "seed": (0, 1600)}
    bounds |= {"num_workers": (-1, 256), "clips": (0, MOST)}
    values = {"episodes": episodes, "num_envs": num_envs, "execute": execute, "seed": seed}
    bounds |= {"overlap": (0, 1000)}
    values |= {"num_workers": num_workers, "clips": clips, "overlap": overlap}
    for name, (low, high) in bounds.items():
        if not low <= values[name] <= high:
            raise SettingsError("out of range", field=name, got=values[name], expected=f"{low} to {high}")
    if instruction not in INSTRUCTIONS:
        raise SettingsError("unknown way to instruct", field="instruction", got=instruction, expected=INSTRUCTIONS)
    if pictures not in PICTURES:
        raise SettingsError("unknown way to show pictures", field="pictures", got=pictures, expected=PICTURES)
    slots = min(num_envs, episodes)
    if pictures == "swapped" and slots < 2:
        raise SettingsError(
            "there is no other scene to take pictures from", field="pictures", got=f"{num_envs} environments, "
            f"{episodes} episodes", expected="at least 2 of each", fix="raise num_envs and episodes, e.g. to 8 and 50",
        )  # fmt: skip
    mine = getattr(policy, "embodiment", None)
    mine = mine if isinstance(mine, Embodiment) else Embodiment()
    if rtc in SAMPLED and "prefixes" not in inspect.signature(policy.infer_batch).parameters:
        raise SettingsError(
            "this policy cannot be told what its chunks go on from", field="rtc", got=rtc, expected=list(PLAYED),
            fix="use rtc=blend",
        )  # fmt: skip
    began = time.perf_counter()
    policy.reset()
    todo = list(range(episodes))[::-1]
    running: dict[int, _Run] = {}  # by the number of the environment
    views: list[Any] = [None] * slots  # what the cameras of each environment saw last
    done: dict[int, Episode] = {}
    kept, late = {True: 0, False: 0}, 0
    with Environments(chosen, slots, default_workers(slots) if num_workers < 0 else num_workers) as envs:
        delay = steps_of(latency, envs.hz)
        if not 0 <= delay <= 1000:
            raise SettingsError("out of range", field="latency", got=latency, expected="0 to 1000 steps")
        plan = _Plan(
            rtc, delay, execute, overlap, trained_delay(getattr(getattr(policy, "model", None), "record", None))
        )
        while todo or running:
            starting = {slot: todo.pop() for slot in range(slots) if todo and slot not in running}
            running |= _begin(envs, starting, seed, instruction, clips > 0, plan)
            for slot in starting:
                views[slot] = running[slot].obs.get("images")
            here = [running[slot] for slot in sorted(running)]
            _ask(policy, here, envs, views if pictures == "swapped" else None, plan)
            refused = [(run, True) for run in running.values() if run.refused]
            going = {slot: run for slot, run in running.items() if not run.refused}
            for run, over in [*refused, *_step(envs, going, clips > 0)]:
                views[run.slot] = run.obs.get("images")
                if not over:
                    continue
                del running[run.slot]
                done[run.index] = episode = _episode(run, envs.action_space)
                late += run.line.late
                if on_episode:
                    on_episode(episode)
                if on_clip and kept[episode.success] < clips:
                    kept[episode.success] += 1
                    on_clip(Clip(episode, run.frames, envs.hz))
    return Evaluation(
        policy=getattr(policy, "name", type(policy).__name__),
        env=chosen.part.name,
        settings={k: list(v) if isinstance(v, tuple) else v for k, v in asdict(chosen.settings).items()},
        execute=execute,
        instruction=instruction,
        episodes=tuple(done[i] for i in range(episodes)),
        seconds=time.perf_counter() - began,
        pictures=pictures,
        differences=tuple(map(str, differences(mine, envs.embodiment))),
        latency=delay,
        rtc=rtc,
        late=late,
        digest=getattr(getattr(policy, "model", policy), "digest", ""),
    )


@frozen
class _Plan:
    """When chunks are asked for, and how they are put together."""

    rtc: str
    latency: int
    execute: int
    overlap: int
    max_delay: int

    def timeline(self) -> Timeline:
        """That of a new episode."""
        return Timeline(self.rtc, max_delay=self.max_delay)

    def steps(self, horizon: int) -> int:
        """Steps from one request to the next (`none`, `append`: executed steps of a chunk).

        Raises:
            SettingsError: the old chunk would be over before the next one comes, or before it is asked for.
        """
        if self.rtc in ("none", "append"):
            steps = min(self.execute or horizon, horizon)
            fits, want = self.rtc == "none" or steps >= self.latency, f"at least {self.latency} steps of each chunk"
        else:
            steps = self.execute or max(1, horizon - self.latency)
            fits = max(steps, self.latency) + self.latency <= horizon
            want = f"execute + latency at most the chunk's {horizon} steps, and latency at most half of it"
        if not fits:
            raise SettingsError(
                "a chunk is over before the next one comes", field="execute, latency",
                got=f"{self.execute}, {self.latency} steps", expected=want, fix="use rtc=none, or train longer chunks",
            )  # fmt: skip
        if self.rtc in SAMPLED and steps == horizon:
            raise SettingsError(
                "nothing is left of a chunk that the next one could go on from", field="execute, latency",
                got=f"{self.execute}, {self.latency} steps", expected=f"fewer steps than the chunk's {horizon}",
                fix=f"say --latency, or --execute {max(1, horizon // 2)}",
            )  # fmt: skip
        return steps

    def due(self, run: _Run) -> bool:
        """Whether a run asks now."""
        left = 0 if run.line.plan is None else len(run.line.plan)
        if run.coming is not None:
            return False
        if run.asked < 0 or self.rtc == "none" or not left:
            return not left
        if self.rtc == "append":
            return left <= self.latency
        return run.line.step - run.asked >= self.steps(run.horizon)


def first_seed(seed: int) -> int:
    """The environment seed of episode 0. Recorders count from 2^24 on, so no demonstration is evaluated on."""
    return seed * MOST


def _chosen(env: Any) -> Any:
    from vla.compose import Chosen, resolve

    return env if isinstance(env, Chosen) else resolve("env", env, "env")


def _begin(
    envs: Environments, starting: Mapping[int, int], seed: int, instruction: str, film: bool, plan: _Plan
) -> dict[int, _Run]:
    """Begin these episodes, {environment: number of the episode}."""
    seeds = {slot: first_seed(seed) + index for slot, index in starting.items()}
    runs = {}
    for slot, (obs, info, instructions) in envs.reset(seeds, instruction == "shuffled").items():
        prompt = str(obs.get("prompt", ""))
        told = prompt if instruction == "given" else _another(instructions, prompt, seeds[slot])
        frames = [_frame(obs)] if film else []
        runs[slot] = _Run(starting[slot], seeds[slot], slot, obs, info, prompt, told, frames, plan.timeline())
    return runs


def _another(instructions: Sequence[str], prompt: str, seed: int) -> str:
    """Another instruction for the same scene, chosen by the seed."""
    others = sorted(set(instructions) - {prompt})
    if not others:
        raise SettingsError(
            "this environment has no other instruction to give in the same scene", field="instruction", got="shuffled",
            fix="evaluate with the given instructions, or put more things into the scene (env.n_blocks)",
        )  # fmt: skip
    return others[zlib.crc32(f"{seed} {prompt}".encode()) % len(others)]


def _ask(policy: Acts, running: list[_Run], envs: Environments, views: Sequence[Any] | None, plan: _Plan) -> None:
    """New chunks, in one batch, for the runs that ask; with `views`, each sees the next environment's.

    A chunk joins those before it when its latency is over.
    """
    if needy := [run for run in running if plan.due(run)]:
        rows = [{**run.obs, "prompt": run.told} for run in needy]
        if views is not None:
            rows = [{**row, "images": views[(run.slot + 1) % len(views)]} for row, run in zip(rows, needy, strict=True)]
        seeds = [run.seed * 1000 + run.calls for run in needy]
        rests = [None if run.line.plan is None else run.line.plan[: plan.overlap or None] for run in needy]
        for run, answer in zip(needy, _answers(policy, rows, seeds, rests, plan), strict=True):
            if isinstance(answer, VlaError):
                run.refused, run.calls = answer.what, run.calls + 1
                continue
            run.coming = _checked(answer["actions"], run, envs)
            run.horizon = len(run.coming)
            plan.steps(run.horizon)
            run.asked, run.calls = run.line.step, run.calls + 1
    for run in running:
        first = run.calls == 1 and not run.line.step
        if run.coming is not None and (first or run.line.step - run.asked >= plan.latency):
            run.line.add(run.coming, run.asked, plan.steps(run.horizon), plan.latency)
            run.coming = None


def _answers(
    policy: Acts, rows: list[dict[str, Any]], seeds: list[int], rests: list[np.ndarray | None], plan: _Plan
) -> list[Mapping[str, Any] | ActionError | DecodeError]:
    """An answer for each row, or why there is none: one that is refused costs the others nothing but time."""
    told: dict[str, Any] = {}
    if plan.rtc in SAMPLED and any(rest is not None for rest in rests):
        told = {"prefixes": rests, "delays": [plan.latency] * len(rows), "rtc": plan.rtc}
    try:
        return [*policy.infer_batch(rows, seeds=seeds, **told)]
    except (ActionError, DecodeError) as error:
        if len(rows) == 1:
            return [error]
        one = zip(rows, seeds, rests, strict=True)
        return [_answers(policy, [row], [seed], [rest], plan)[0] for row, seed, rest in one]


def _checked(actions: Any, run: _Run, envs: Environments) -> np.ndarray:
    """The chunk [t a] of an answer.

    Raises:
        DataError: it does not fit the environment, or is not finite.
    """
    chunk = np.asarray(actions, np.float64)
    width = envs.action_space.shape
    if chunk.ndim != 2 or chunk.shape[1:] != width or not len(chunk):
        raise DataError(
            "the policy's actions do not fit the environment", field="actions", got=chunk.shape,
            expected=("t", *width), fix="train on data of this environment's robot (robot adapter, dims)",
        )  # fmt: skip
    if not np.isfinite(chunk).all():
        raise DataError(
            "the policy's actions have NaN or infinite values", field="actions", got=chunk[~np.isfinite(chunk)][0],
            expected="finite numbers", fix=f"look at what it answers in the episode of seed {run.seed}, "
            f"call {run.calls}",
        )  # fmt: skip
    return chunk


def _step(envs: Environments, running: Mapping[int, _Run], film: bool) -> list[tuple[_Run, bool]]:
    """One control step of all; each with whether it is over."""
    space = envs.action_space
    actions = {}
    for slot, run in sorted(running.items()):
        action = run.line.next()
        if action is None:  # nothing to execute: hold
            action = np.array(run.executed[-1], np.float64)
            action[: envs.relative] = 0
        actions[slot] = np.clip(action, space.low, space.high).astype(space.dtype)
        run.executed.append(actions[slot])
    stepped = []
    for slot, (obs, over, info) in envs.step(actions).items():
        run = running[slot]
        run.obs, run.info = obs, info
        if film:
            run.frames.append(_frame(obs))
        if run.line.step >= MAX_STEPS:
            got = f"{run.line.step} steps"
            raise DataError("an episode did not end", field="env", got=got, fix="set env.max_steps")
        stepped.append((run, over))
    return stepped


def _episode(run: _Run, space: Any) -> Episode:
    task = str(run.info.get("task") or run.prompt or "all")
    success = bool(run.info.get("success", False)) and not run.refused
    moved = motion(run.executed, run.line.seams, space) if len(run.executed) > 1 else None
    steps, calls = run.line.step, run.calls
    return Episode(run.index, run.seed, task, run.prompt, run.told, success, steps, calls, run.refused, moved)


def motion(actions: Sequence[np.ndarray], seams: Sequence[int], space: Any) -> Motion:
    """How smooth executed actions [n a] are, where other chunks took over at the steps `seams`."""
    half = (np.asarray(space.high, np.float64) - space.low) / 2
    scaled = np.asarray(actions, np.float64) / np.where(np.isfinite(half) & (half > 0), half, 1)
    first, second = np.diff(scaled, axis=0), np.diff(scaled, 2, axis=0)  # first[k]: from k to k + 1
    jump = np.sqrt((first**2).mean(1))
    at = [s for s in seams if 0 < s < len(scaled)]
    near = sorted({k for s in at for k in (s - 2, s - 1) if 0 <= k < len(second)})

    def rms(x: np.ndarray) -> float:
        return float(np.sqrt((x**2).mean())) if x.size else 0.0

    return Motion(
        float(np.mean([jump[s - 1] for s in at])) if at else None,
        float(jump.mean()) if len(jump) else 0.0,
        rms(second[near]) if near else None,
        rms(second),
    )


def _frame(obs: Mapping[str, Any]) -> np.ndarray:
    """All cameras side by side, padded to the tallest."""
    images = [np.asarray(image) for image in obs["images"].values()]
    tallest = max(image.shape[0] for image in images)
    padded = [np.pad(i, ((0, tallest - i.shape[0]), (0, 0), (0, 0))) for i in images]
    return np.concatenate(padded, axis=1)
