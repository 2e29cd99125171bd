"""Environments in worker processes: the same episodes, and clear errors when an environment or its process fails."""

import multiprocessing
import sys

import numpy as np
import pytest

from vla.compose import resolve
from vla.errors import DataError, PartError, SettingsError
from vla.evaluation import environments, evaluate
from vla.parts import Part

pytest.importorskip("gymnasium")

# Workers import it by name, so it is a file of its own.
MODULE = '''
import os

import gymnasium
import numpy as np
from attrs import frozen

from vla.errors import PartError


@frozen
class Settings:
    fault: str = ""


class Broken(Exception):
    def __init__(self, first, second):  # cannot be unpickled from its message
        super().__init__(f"{first} {second}")


class Env(gymnasium.Env):
    """Walk to a place that only the picture tells; the picture and the steps are noisy, the noise is the seed's."""

    metadata = {"render_fps": 5}
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, settings):
        self.fault = settings.fault
        if self.fault == "unmade":
            raise PartError("no screen here", field="env")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.number, self.at, self.t = seed, 0.0, 0
        self.goal = self.np_random.normal()
        return self.seen(), {"task": f"walk {seed % 2}"}

    def step(self, action):
        self.t += 1
        if self.number == 3 and self.t == 2:
            if self.fault == "raises":
                raise Broken("a joint", "flew off")
            if self.fault == "refuses":
                raise PartError("the table is gone", field="env.table")
            if self.fault == "dies":
                os._exit(9)
        self.at += float(action[0]) + 0.2 * self.np_random.normal()
        won = abs(self.at - self.goal) < 0.1
        return self.seen(), 0.0, won, self.t >= 4, {"task": f"walk {self.number % 2}", "success": won}

    def seen(self):
        image = self.np_random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image[0, 0, 0] = np.clip(128 + 40 * (self.goal - self.at), 0, 255)
        return {"images": {"front": image}, "state": np.array([self.at], np.float32), "prompt": f"go {self.number % 2}"}

    def instructions(self):
        return ["go 0", "go 1"]
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "walking_env.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import walking_env

    def make(**settings):
        part = Part(kind="env", name="walk", summary="", settings=walking_env.Settings, numpy="walking_env:Env")
        return resolve("env", {"part": part, **settings}, "env")

    yield make
    assert multiprocessing.active_children() == []
    del sys.modules["walking_env"]


class Looks:
    """Goes where the picture says, a little astray by its seed."""

    name = "looks"

    def infer_batch(self, rows, *, seeds=None):
        chunks = []
        for row, seed in zip(rows, seeds, strict=True):
            way = (int(row["images"]["front"][0, 0, 0]) - 128) / 40 + 0.05 * np.random.default_rng(seed).normal()
            chunks.append({"actions": np.array([[way, 0.0], [0.0, 0.0]])})
        return chunks

    def reset(self):
        pass


def test_the_episodes_do_not_depend_on_the_number_of_processes(toy):
    runs, films = [], []
    for workers in (0, 1, 3):
        clips = []
        runs.append(
            evaluate(
                Looks(), toy(), episodes=11, num_envs=4, num_workers=workers, clips=11, on_clip=clips.append,
                instruction="shuffled",
            )
        )  # fmt: skip
        films.append({c.episode.index: np.stack(c.frames) for c in clips})
        assert all(c.hz == 5 for c in clips) and len(clips) == 11
    assert runs[0].episodes == runs[1].episodes == runs[2].episodes
    assert 0 < runs[0].successes < 11 and all(e.told != e.prompt for e in runs[0].episodes)
    for film in films[1:]:
        assert all(np.array_equal(film[i], films[0][i]) for i in range(11))
    swapped = [
        evaluate(Looks(), toy(), episodes=7, num_envs=3, num_workers=w, pictures="swapped").episodes for w in (0, 2)
    ]
    assert swapped[0] == swapped[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_environment_that_raises_is_one_error_with_seed_and_task(toy, workers):
    with pytest.raises(DataError, match="the environment 'walk' failed") as caught:
        evaluate(Looks(), toy(fault="raises"), episodes=6, num_envs=3, num_workers=workers)
    assert "Broken: a joint flew off (seed 3, task 'walk 1')" in str(caught.value)
    if workers:  # for whoever repairs the environment
        assert "os._exit(9)" not in str(caught.value.__cause__) and "walking_env.py" in str(caught.value.__cause__)
    else:
        assert type(caught.value.__cause__).__name__ == "Broken"


@pytest.mark.parametrize("workers", [0, 2])
def test_what_an_environment_itself_says_is_passed_on(toy, workers):
    with pytest.raises(PartError, match="the table is gone") as caught:
        evaluate(Looks(), toy(fault="refuses"), episodes=6, num_envs=3, num_workers=workers)
    assert caught.value.field == "env.table"
    with pytest.raises(PartError, match="no screen here"):
        evaluate(Looks(), toy(fault="unmade"), episodes=6, num_envs=3, num_workers=workers)


def test_a_process_that_dies_is_one_error_with_its_episodes(toy):
    with pytest.raises(DataError, match="ended unexpectedly") as caught:
        evaluate(Looks(), toy(fault="dies"), episodes=6, num_envs=3, num_workers=3)
    assert "seed 3, task 'walk 1'" in str(caught.value) and "--num-workers 0" in str(caught.value)


def test_a_number_of_workers_is_chosen_and_checked(toy, monkeypatch):
    for cores, envs, expected in ((1, 8, 0), (2, 8, 2), (16, 8, 8), (16, 1, 0)):
        monkeypatch.setattr("os.sched_getaffinity", lambda pid, n=cores: set(range(n)), raising=False)
        assert environments.default_workers(envs) == expected
    with pytest.raises(SettingsError, match="num_workers"):
        evaluate(Looks(), toy(), episodes=2, num_workers=-2)
