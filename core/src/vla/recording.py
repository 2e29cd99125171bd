"""Record demonstrations: an environment's own expert acts, a dataset is written.

An environment can be recorded when, besides Gymnasium's methods, `env.unwrapped` has `expert() -> (() -> action)`: a
callable that gives the next action of the present episode, from whatever it likes to look at. `metadata` may hold
"state_names", "action_names", "units" and "noise_dims" (how many leading action dims are disturbed by noise).

Which episodes are recorded depends on the settings and the seed alone, not on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from attrs import asdict, frozen

from vla.datasets import Dataset, DatasetInfo, check_on_demand, create_dataset, open_dataset
from vla.errors import DataError, PartError, StoreError

# Episodes for training are reset with seeds from here on, so that evaluation with small seeds never repeats one.
FIRST_SEED = 1 << 24
PATIENCE = 30  # tries after which an expert that fails more often than not is refused


@frozen
class Episode:
    """One demonstration; arrays have one row per step, images as the camera saw the step begin."""

    images: dict[str, np.ndarray]
    states: np.ndarray
    actions: np.ndarray
    prompt: str
    task: str


@frozen
class Recorded:
    """What was recorded. `tries` counts the failures of the expert too, which are not kept."""

    path: Path
    episodes: int
    frames: int
    tries: int
    tasks: Mapping[str, int]


def record(
    env: str | Mapping[str, Any],
    path: str | Path,
    episodes: int,
    *,
    seed: int = 0,
    noise: float = 0.0,
    workers: int = 2,
    video: bool = False,
    overwrite: bool = False,
    part: str = "lerobot",
    progress: Callable[[int, int], None] | None = None,
) -> Recorded:
    """Record successful episodes of an environment's expert as a new dataset.

    Args:
        env: name of an environment part, or a table {"part": name, settings...}.
        path: where the dataset will be; nothing may be there.
        episodes: how many to keep.
        seed: chooses the episodes.
        noise: sd of Gaussian noise on the executed action, in half of the episodes; the action that is stored is the
            expert's own (DART, Laskey et al. 2017), so the data shows how to recover.
        workers: processes that act and render; 1 means this one.
        video: store cameras as compressed video instead of exactly.
        overwrite: replace a dataset that is there, when the new one is complete.
        progress: called with (episodes kept, episodes).

    Raises:
        PartError: no such environment, or it has no expert.
        DataError: the expert fails more often than not.
        StoreError: the path is taken or cannot be written. After any error nothing is left at `path`.
    """
    if episodes < 1:
        raise DataError("nothing to record", field="episodes", got=episodes, expected="at least 1")
    table = {"part": env} if isinstance(env, str) else dict(env)
    info = _describe(table)
    kept = frames = tries = 0
    tasks: Counter[str] = Counter()
    with create_dataset(path, info, video=video, overwrite=overwrite, part=part) as writer:
        for episode in _play_all(table, seed, noise, min(workers, episodes)):
            tries += 1
            if tries >= PATIENCE and kept < tries // 2 and episode is None:
                raise DataError("the expert fails too often", field="env", got=f"{kept} of {tries} tries succeeded")
            if episode is None:
                continue
            for i in range(len(episode.actions)):
                images = {name: rows[i] for name, rows in episode.images.items()}
                writer.add(
                    {
                        "images": images,
                        "state": episode.states[i],
                        "action": episode.actions[i],
                        "prompt": episode.prompt,
                    }
                )
            writer.end_episode()
            kept, frames = kept + 1, frames + len(episode.actions)
            tasks[episode.task] += 1
            if progress is not None:
                progress(kept, episodes)
            if kept == episodes:
                break
    return Recorded(Path(path).expanduser(), kept, frames, tries, dict(tasks))


def demonstrations(env: str, settings: Any, revision: int) -> Dataset:
    """Demonstrations that a dataset part makes on demand: from their folder when they are there, else recorded now.

    The folder is `settings.path`, or a folder named by a digest of the settings below `$VLA_CACHE` (~/.cache/vla).

    Args:
        env: name of the environment part, which is its robot's name too.
        settings: of the dataset part: `path`, `episodes`, `seed`, `noise`, `workers`, whatever else makes the data
            another, and `env()`, the settings of the environment.
        revision: raised when the same settings would give other data (scene, expert, recording).

    Raises:
        PartError: nothing is recorded yet, and the environment needs a package that is not installed.
        VlaError: it cannot be recorded (`record`), or the folder cannot be written.
    """
    facts = {k: v for k, v in asdict(settings).items() if k not in ("path", "workers")}
    name = hashlib.sha256(json.dumps([revision, facts], sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(settings.path or Path(os.environ.get("VLA_CACHE", "~/.cache/vla")) / env / name).expanduser()
    there = folder / "meta" / "info.json"
    if not there.is_file():
        check_on_demand(f"demonstrations of {env} with these settings")
        table = {"part": env, **asdict(settings.env())}
        try:
            record(table, folder, settings.episodes, seed=settings.seed, noise=settings.noise, workers=settings.workers)
        except StoreError:
            if not there.is_file():  # else someone recorded the same meanwhile: theirs is as good
                raise
    return open_dataset(folder.absolute(), {"robot": env})


def make_env(table: Mapping[str, Any], seed: int | None = None) -> tuple[Any, str]:
    """The environment of a table {"part": name, settings...}, and the robot it has."""
    from vla.compose import load_object, resolve

    chosen = resolve("env", table, "env")
    make = load_object(chosen.part.numpy, f"env {chosen.part.name!r}")
    return make(chosen.settings, seed), str(chosen.offers.get("robot", ""))


def _describe(table: Mapping[str, Any]) -> DatasetInfo:
    env, robot = make_env(table)
    try:
        if not hasattr(env.unwrapped, "expert"):
            raise PartError("this environment has no expert to record", field="env", got=table["part"])
        spaces, about = env.observation_space, env.metadata
        return DatasetInfo(
            cameras={name: space.shape[:2] for name, space in spaces["images"].items()},
            state_dim=spaces["state"].shape[0],
            action_dim=env.action_space.shape[0],
            hz=float(about["render_fps"]),
            robot=robot,
            units=about.get("units", {}),
            action_names=tuple(about.get("action_names", ())),
            state_names=tuple(about.get("state_names", ())),
        )
    finally:
        env.close()


def _play_all(table: Mapping[str, Any], seed: int, noise: float, workers: int) -> Iterator[Episode | None]:
    """Endless tries in the order of their seeds; None for a failure."""
    first = FIRST_SEED + 1_000_003 * seed
    if workers == 1:
        player = _Player(table)
        try:
            while True:
                yield player.play(first, noise)
                first += 1
        finally:
            player.close()
    # Spawned, not forked: a GL library does not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (dict(table),))
    waiting: deque[Future] = deque()
    try:
        while True:
            while len(waiting) < 4 * workers:  # ahead by little, so that little is thrown away at the end
                waiting.append(pool.submit(_work, first, noise))
                first += 1
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a recording process ended unexpectedly", field="workers", got=workers,
            fix="run with --workers 1 to see why; a script that records needs `if __name__ == '__main__':`",
        ) from error  # fmt: skip
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_player: _Player | None = None


def _start_worker(table: dict[str, Any]) -> None:
    global _player
    _player = _Player(table)


def _work(seed: int, noise: float) -> Episode | None:
    assert _player is not None
    return _player.play(seed, noise)


class _Player:
    """One environment, and its expert at work in it."""

    def __init__(self, table: Mapping[str, Any]):
        self.env, _ = make_env(table)

    def close(self) -> None:
        self.env.close()

    def play(self, seed: int, noise: float) -> Episode | None:
        """The episode of this seed; None when the expert does not succeed."""
        env = self.env
        seen, info = env.reset(seed=seed)
        expert = env.unwrapped.expert()
        rng = np.random.default_rng([seed, 1])
        sd = noise if rng.random() < 0.5 else 0.0
        disturbed = env.metadata.get("noise_dims", env.action_space.shape[0])
        images: dict[str, list[np.ndarray]] = {name: [] for name in seen["images"]}
        states, actions, done = [], [], False
        while not done:
            action = np.asarray(expert(), np.float32)
            for name, image in seen["images"].items():
                images[name].append(image)
            states.append(seen["state"])
            actions.append(action)
            executed = action.copy()
            executed[:disturbed] += rng.normal(0, sd, disturbed) if sd else 0.0
            prompt = seen["prompt"]
            seen, _, ended, cut, info = env.step(executed)
            done = ended or cut
        if not info["success"]:
            return None
        stacked = {name: np.stack(rows) for name, rows in images.items()}
        return Episode(stacked, np.stack(states), np.stack(actions), prompt, str(info.get("task", prompt)))
