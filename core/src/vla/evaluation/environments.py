"""The environments of an evaluation, in this process or in worker processes.

Both ways run the same code on the same seeds, so an episode does not depend on how many processes there are.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from attrs import frozen

from vla import errors
from vla.compose import load_object
from vla.embodiment import Embodiment
from vla.errors import DataError, VlaError

PATIENCE = 10  # seconds that a worker gets to close its environments


def default_workers(count: int) -> int:
    """Processes for `count` environments: one per core, for environments and policy take turns; none on one core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(count, cores)
    return workers if workers > 1 else 0


class Environments:
    """Numbered environments of one part, reset and stepped together. A context manager; leaving it closes them.

    Args:
        chosen: the environment part.
        count: how many; they are numbered from 0.
        workers: processes that run them, environment i in process i % workers; 0: all in this process.

    Raises:
        DataError: an environment failed, or its process ended; the message says in which episode.
        VlaError: what an environment itself has to say.
    """

    def __init__(self, chosen: Any, count: int, workers: int = 0):
        # A part holds functions, which cannot travel to another process; these three can.
        plan = (chosen.part.name, chosen.part.numpy, chosen.settings)
        self._name, self._episodes = chosen.part.name, dict.fromkeys(range(count), "making it")
        self._local: _Stage | None = None
        self._workers: list[_Worker] = []
        try:
            if workers < 1:
                self._local = _Stage(*plan)
                about = self._good(0, self._local.make(range(count)))
            else:
                workers = min(workers, count)
                self._workers += [_Worker(plan, range(w, count, workers)) for w in range(workers)]
                about = [self._good(w, self._hear(w)) for w in range(workers)][0]
        except BaseException:
            self.close()
            raise
        self.action_space, self.hz, self.embodiment, self.relative = about

    def __enter__(self) -> Environments:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def reset(self, seeds: Mapping[int, int], instructions: bool = False) -> dict[int, tuple[Any, Any, list[str]]]:
        """Begin the episodes with these seeds: {environment: (observation, info, instructions)}.

        With `instructions`, those that make sense in the scene, [] from an environment that cannot say.
        """
        self._episodes |= {slot: f"seed {seed}" for slot, seed in seeds.items()}
        begun = self._ask("reset", {slot: (seed, instructions) for slot, seed in seeds.items()})
        for slot, (obs, info, _) in begun.items():
            self._episodes[slot] += f", task {str(info.get('task') or obs.get('prompt', ''))!r}"
        return begun

    def step(self, actions: Mapping[int, Any]) -> dict[int, tuple[Any, bool, Any]]:
        """One control step of these environments: {environment: (observation, whether it is over, info)}."""
        return self._ask("step", actions)

    def close(self) -> None:
        """Close all environments and end the processes."""
        if self._local is not None:
            self._local.close()
        for worker in self._workers:
            worker.dismiss()
        for worker in self._workers:
            worker.join()
        self._local, self._workers = None, []

    def _ask(self, command: str, values: Mapping[int, Any]) -> dict[int, Any]:
        if self._local is not None:
            return {slot: self._good(slot, self._local.do(command, slot, value)) for slot, value in values.items()}
        n = len(self._workers)
        shares: dict[int, dict[int, Any]] = {}
        for slot, value in values.items():
            shares.setdefault(slot % n, {})[slot] = value
        for w, share in shares.items():
            self._workers[w].tell((command, share))
        answers: dict[int, Any] = {}
        for w in shares:
            answers |= self._hear(w)
        return {slot: self._good(slot, answers[slot]) for slot in values}

    def _hear(self, w: int) -> Any:
        n = len(self._workers)
        try:
            return self._workers[w].pipe.recv()
        except (EOFError, OSError) as error:
            episodes = "; ".join(
                dict.fromkeys(self._episodes[slot] for slot in sorted(self._episodes) if slot % n == w)
            )
            raise DataError(
                f"a process with environments {self._name!r} ended unexpectedly", field="env", got=episodes,
                fix="evaluate with --num-workers 0 (num_workers=0) to see why; a script that uses worker processes "
                "needs `if __name__ == '__main__':`",
            ) from error  # fmt: skip

    def _good(self, slot: int, answer: Any) -> Any:
        if not isinstance(answer, _Failed):
            return answer
        if isinstance(answer.error, VlaError):
            raise answer.error
        raise DataError(
            f"the environment {self._name!r} failed", field="env", got=f"{answer.text} ({self._episodes[slot]})",
            fix="reset it with this seed to see that again; the cause is in the environment, not in the policy",
        ) from answer.error  # fmt: skip


@frozen(eq=False)
class _Failed:
    """An answer that is an exception."""

    text: str
    error: BaseException


class _Stage:
    """Environments in the process where this is."""

    def __init__(self, name: str, where: str, settings: Any):
        self.name, self.where, self.settings = name, where, settings
        self.envs: dict[int, Any] = {}

    def make(self, slots: Iterable[int]) -> Any:
        """(action space, rate, the robot as the environment names it) or `_Failed`."""
        try:
            factory = load_object(self.where, f"env {self.name!r}")
            for slot in slots:
                self.envs[slot] = env = factory(self.settings)
            hz, moves = float(env.metadata.get("render_fps") or 10), int(env.metadata.get("relative_dims") or 0)
            return env.action_space, hz, embodiment_of(env), moves
        except Exception as error:
            return _failed(error)

    def do(self, command: str, slot: int, value: Any) -> Any:
        """The answer of one environment, or `_Failed`."""
        env = self.envs[slot]
        try:
            if command == "step":
                obs, _, terminated, truncated, info = env.step(value)
                return obs, bool(terminated or truncated), info
            seed, wanted = value
            obs, info = env.reset(seed=seed)
            known = getattr(env.unwrapped, "instructions", None) if wanted else None
            return obs, info, list(known()) if known else []
        except Exception as error:
            return _failed(error)

    def close(self) -> None:
        """Close them all."""
        while self.envs:
            self.envs.popitem()[1].close()


def embodiment_of(env: Any) -> Embodiment:
    """The robot as an environment names it (`env.metadata`, see `vla.recording`)."""
    about, width = env.metadata, env.action_space.shape
    units = about.get("units") or {}
    return Embodiment.from_table(
        {
            "action_dim": width[0] if len(width) == 1 else 0,
            **{key: about.get(key) for key in ("state_names", "action_names")},
            "action_units": units.get("actions"),
            "state_units": units.get("state"),
            "hz": about.get("render_fps"),
        }
    )


class _Worker:
    """A process with some environments, and the pipe to it."""

    def __init__(self, plan: tuple[str, str, Any], slots: range):
        context = multiprocessing.get_context("spawn")  # a GL library does not survive a fork
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, plan, slots), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    def tell(self, message: Any) -> None:
        """Send; a process that is gone is noticed when its answer is awaited."""
        with contextlib.suppress(OSError):
            self.pipe.send(message)

    def dismiss(self) -> None:
        """Have it end: to a worker, the end of the pipe is the end of its work, even halfway through an answer."""
        self.pipe.close()

    def join(self) -> None:
        """Wait for its end, and make it end when it does not."""
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(pipe: Connection, plan: tuple[str, str, Any], slots: range) -> None:
    """What a worker process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's affair; it sends us home
    stage = _Stage(*plan)
    try:
        pipe.send(_portable(stage.make(slots)))
        while True:
            command, share = pipe.recv()
            pipe.send({slot: _portable(stage.do(command, slot, value)) for slot, value in share.items()})
    except (EOFError, OSError):
        pass  # sent home
    finally:
        stage.close()


def _failed(error: Exception) -> _Failed:
    return _Failed(f"{type(error).__name__}: {error}", error)


def _portable(answer: Any) -> Any:
    """The answer in a form that the main process can read: other people's exceptions become their traceback."""
    if not isinstance(answer, _Failed) or type(answer.error).__module__ == errors.__name__:
        return answer
    return _Failed(
        answer.text, RuntimeError("in a worker process:\n" + "".join(traceback.format_exception(answer.error)))
    )
