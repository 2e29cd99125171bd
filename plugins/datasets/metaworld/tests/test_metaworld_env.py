"""Meta-World itself; skipped where the `sim` extra is not installed."""

import numpy as np
import pytest

pytest.importorskip("metaworld", reason="Meta-World is not installed: pip install 'vla-dataset-metaworld[sim]'")

from gymnasium.utils.env_checker import check_env
from vla_dataset_metaworld.config import FEW, TASKS, DatasetSettings, EnvSettings
from vla_dataset_metaworld.dataset import demonstrations
from vla_dataset_metaworld.env import make

from vla.datasets import open_dataset
from vla.errors import DataError
from vla.evaluation import MeanAction, NearestNeighbour, evaluate
from vla.recording import record

TWO = {"tasks": ("drawer-open", "button-press-topdown"), "image_size": 32}


@pytest.fixture
def blind():
    env = make(EnvSettings(tasks=FEW), images=False)
    yield env
    env.close()


def play(env, seed, task=None):
    """States, actions and success of the expert's episode."""
    seen, info = env.reset(seed=seed, options={"task": task} if task else None)
    expert, states, actions, over = env.unwrapped.expert(), [seen["state"]], [], False
    while not over:
        actions.append(expert())
        seen, reward, ended, cut, info = env.step(actions[-1])
        assert ended == info["success"] == bool(reward)
        states.append(seen["state"])
        over = ended or cut
    return np.stack(states), np.stack(actions), info["success"]


def test_it_is_a_gymnasium_environment():
    env = make(EnvSettings(tasks=("reach",), image_size=16))
    check_env(env, skip_render_check=True)
    assert env.render().shape == (16, 16, 3)
    env.close()


@pytest.mark.parametrize("task", FEW)
def test_the_experts_succeed_and_doing_nothing_does_not(blind, task):
    runs = [play(blind, seed, task) for seed in range(3)]
    assert all(won for *_, won in runs)
    for _, actions, _ in runs:
        assert actions.dtype == np.float32 and np.abs(actions).max() <= 1
    seen, info = blind.reset(seed=0, options={"task": task})
    assert seen["prompt"] == TASKS[task] and info["task"] == task and not info["success"]
    for _ in range(30):
        *_, info = blind.step(np.zeros(4))
    assert not info["success"]


def test_the_seed_fixes_the_episode_whatever_was_played_before(blind):
    first = [play(blind, seed)[:2] for seed in range(6)]
    fresh = make(EnvSettings(tasks=FEW), images=False)
    for seed in (5, 3, 0):
        again = play(fresh, seed)
        np.testing.assert_array_equal(again[0], first[seed][0])
        np.testing.assert_array_equal(again[1], first[seed][1])
    fresh.close()
    assert len({a.shape for a, _ in first}) > 1


def test_only_a_few_simulators_stay_open(monkeypatch):
    monkeypatch.setattr("vla_dataset_metaworld.env.KEPT", 2)
    env = make(EnvSettings(tasks=("reach", "drawer-open", "window-open"), image_size=16))
    pictures = []
    for task in [*env.settings.tasks, env.settings.tasks[0]]:
        pictures.append(env.reset(seed=1, options={"task": task})[0]["images"]["front"])
        assert len(env._simulators) <= 2
    np.testing.assert_array_equal(pictures[0], pictures[-1])
    assert pictures[0].std() > 10
    env.close()


def test_the_front_camera_stands_upright():
    """The hand is lifted and moves up in the picture."""
    env = make(EnvSettings(tasks=("reach",), image_size=96))
    low = env.reset(seed=0)[0]["images"]["front"].astype(int)
    for _ in range(40):
        seen, *_ = env.step(np.array([0, 0, 1, 0]))
    high = seen["images"]["front"].astype(int)
    moved = np.abs(high - low).sum(-1)
    came, went = ((moved > 60) & (np.sign((high - low).sum(-1)) == s) for s in (1, -1))
    red = [np.argwhere((p[..., 0] > 1.6 * p[..., 1]) & (p[..., 0] > 60))[:, 0].mean() for p in (low, high)]
    assert red[1] < red[0] - 2 and came.any() and went.any()
    env.close()


def test_wrong_actions_and_tasks_are_refused(blind):
    with pytest.raises(DataError, match="no such task here"):
        blind.reset(seed=0, options={"task": "hammer"})
    blind.reset(seed=0)
    for action in (np.zeros(7), np.array([0, np.nan, 0, 0])):
        with pytest.raises(DataError, match="cannot execute"):
            blind.step(action)


def test_demonstrations_are_recorded_opened_and_compared_with(tmp_path):
    done = record({"part": "metaworld", **TWO}, tmp_path / "data", 2, workers=1)
    assert set(done.tasks) <= set(TWO["tasks"]) and done.episodes == 2
    data = open_dataset("metaworld", {"path": str(tmp_path / "data")})
    assert data.info.robot == "metaworld" and data.info.hz == 80 and data.info.cameras["wrist"] == (32, 32)
    assert {TASKS[t] for t in done.tasks} == set(data.info.tasks)
    assert demonstrations(DatasetSettings(path=str(tmp_path / "data"))).digest() == data.digest()
    table = {"part": "metaworld", **TWO, "max_steps": 20}
    for baseline in (MeanAction(data, 8), NearestNeighbour(data, 8, folder=tmp_path / "frames")):
        found = evaluate(baseline, table, episodes=2, num_envs=2)
        assert all(e.steps == 20 and e.task in TWO["tasks"] for e in found.episodes)
