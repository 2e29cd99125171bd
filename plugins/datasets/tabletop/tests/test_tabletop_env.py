"""The tabletop: what success means, that instructions decide, that the expert solves it, and what it sees."""

import functools

import gymnasium
import numpy as np
import pytest
from vla_dataset_tabletop.config import COLORS, FAMILIES, DatasetSettings, EnvSettings
from vla_dataset_tabletop.dataset import demonstrations
from vla_dataset_tabletop.env import make

from vla import recording
from vla.datasets import open_dataset
from vla.errors import DataError, SettingsError, StoreError
from vla.recording import make_env, record


@functools.cache
def blind() -> gymnasium.Env:
    """All families, without cameras."""
    return make(EnvSettings(), images=False)


def play(env, act) -> tuple[bool, int]:
    for steps in range(1, 200):
        _, reward, ended, cut, info = env.step(act())
        if ended or cut:
            assert reward == float(info["success"])
            return info["success"], steps
    raise AssertionError("the episode does not end")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_expert_solves_every_family(family):
    env = blind()
    done = []
    for seed in range(25):
        _, info = env.reset(seed=seed, options={"family": family})
        if info["task"] == family:
            done.append(play(env, env.expert())[0])
    assert len(done) >= 15 and np.mean(done) >= 0.95, (family, done)


def test_doing_what_another_instruction_asks_is_no_success():
    """The same scene, the same motion, judged by another instruction: it is the words that decide."""
    env = blind()
    right = wrong = 0
    for seed in range(12):
        env.reset(seed=seed, options={"family": FAMILIES[seed % 4]})
        asked, others = str(env.task), [i for i in env.instructions() if i != str(env.task)]
        actions = []
        expert = env.expert()
        right += play(env, lambda e=expert, a=actions: a.append(e()) or a[-1])[0]
        other = others[seed % len(others)]
        seen, info = env.reset(seed=seed, options={"instruction": other})
        assert seen["prompt"] == other == info["instruction"] != asked
        replay = iter(actions + [np.zeros(7)] * 200)
        wrong += play(env, lambda r=replay: next(r))[0]
    assert right == 12 and wrong <= 1


def test_the_same_seed_gives_the_same_episode():
    def run(env):
        seen, _ = env.reset(seed=7, options={"family": "lift"})
        states = [seen["state"]]
        expert = env.expert()
        for _ in range(6):
            states.append(env.step(expert())[0]["state"])
        return seen["prompt"], np.stack(states)

    first, again, fresh = run(blind()), run(blind()), run(make(EnvSettings(), images=False))
    assert first[0] == again[0] == fresh[0]
    np.testing.assert_array_equal(first[1], again[1])
    np.testing.assert_array_equal(first[1], fresh[1])
    assert len({str(blind().reset(seed=s)[0]["prompt"]) for s in range(12)}) > 4
    a, b = make(EnvSettings(), 3, images=False).reset()[0], make(EnvSettings(seed=3), images=False).reset()[0]
    np.testing.assert_array_equal(a["state"], b["state"])


def test_touching_the_wrong_block_ends_the_episode():
    env = make(EnvSettings(families=("touch",)), images=False)
    env.reset(seed=0)
    env.target = (env.target + 1) % 3  # the expert goes for another block than the one that is named
    success, steps = play(env, env.expert())
    assert not success and steps < 20


def test_actions_and_state_mean_what_they_say():
    env = blind()
    seen, _ = env.reset(seed=1, options={"family": "lift"})
    before = seen["state"]
    for _ in range(4):
        seen = env.step([0, 0.5, 0, 0, 0, 0.2, 1])[0]  # 2.5 cm to +y, 0.1 rad about the vertical, close
    moved = seen["state"] - before
    assert 0.06 < moved[1] < 0.12 and abs(moved[0]) < 0.01 and abs(moved[2]) < 0.01
    assert seen["state"].dtype == np.float32 and (seen["state"][6:] < 0.005).all() and (before[6:] > 0.035).all()
    assert abs(np.linalg.norm(seen["state"][3:6]) - np.pi) < 0.1  # pointing down: half a turn about a level axis
    yaw = 2 * np.arctan2(seen["state"][4], seen["state"][3])
    assert 0.25 < abs(yaw) < 0.5
    assert env.action_space.shape == (7,) and env.step(np.full(7, 9.0))[0]["state"].shape == (
        8,
    )  # clipped, not refused


@pytest.mark.parametrize("action", [np.zeros(6), np.full(7, np.nan)])
def test_a_wrong_action_is_refused(action):
    blind().reset(seed=0)
    with pytest.raises(DataError, match="cannot execute"):
        blind().step(action)


def test_wrong_settings_are_named():
    for settings in ({"families": ["tuch"]}, {"image_size": 8}, {"colors": ["red"], "n_blocks": 2}, {"families": []}):
        with pytest.raises(SettingsError, match=next(iter(settings))):
            make_env({"part": "tabletop", **settings})
    with pytest.raises(DataError, match="no such instruction"):
        blind().reset(seed=0, options={"instruction": "sing"})


def test_the_named_block_can_be_seen():
    """Each block shows as enough pixels of its own colour in a 64 x 64 front view, where it should be."""
    env, _ = make_env({"part": "tabletop", "families": ["touch"], "image_size": 64})
    widths = []
    for seed in range(8):
        seen, _ = env.reset(seed=seed)
        image = seen["images"]["front"].astype(float) / 255
        assert seen["images"]["wrist"].shape == image.shape == (64, 64, 3)
        for i, color in enumerate(env.colors):
            hue = image - image.mean(-1, keepdims=True)
            want = np.array(COLORS[color]) - np.mean(COLORS[color])
            like = (hue @ want) / (np.linalg.norm(hue, axis=-1) * np.linalg.norm(want) + 1e-6)
            rows, cols = np.nonzero((like > 0.97) & (np.linalg.norm(hue, axis=-1) > 0.15))
            assert len(cols) >= 12, (seed, color, len(cols))
            widths.append(np.ptp(cols) + 1)
            assert (np.median(cols) - 31.5) * env.block(i)[1] > -3  # +y is to the right
    assert np.median(widths) >= 5
    env.close()
    env.close()


def test_gymnasium_accepts_it():
    from gymnasium.utils.env_checker import check_env

    env = make(EnvSettings(image_size=32))
    check_env(env, skip_render_check=True)
    env.close()


def test_recording_depends_on_the_seed_alone(tmp_path):
    table = {"part": "tabletop", "preset": "tiny"}
    counts = []
    done = record(table, tmp_path / "one", 5, noise=0.2, workers=1, progress=lambda kept, of: counts.append((kept, of)))
    record(table, tmp_path / "two", 5, noise=0.2, workers=2)
    record(table, tmp_path / "other", 5, noise=0.2, workers=1, seed=1)
    one, two, other = (open_dataset(tmp_path / name) for name in ("one", "two", "other"))
    assert done.episodes == len(one.episodes) == 5 and done.frames == len(one) and counts[-1] == (5, 5)
    np.testing.assert_array_equal(one.actions(), two.actions())
    for i in range(0, len(one), 7):
        np.testing.assert_array_equal(one.sample(i, 1)["images"]["wrist"], two.sample(i, 1)["images"]["wrist"])
    assert one.digest() == two.digest() != other.digest()
    assert (one.info.robot, one.info.hz, one.info.cameras) == ("tabletop", 10, {"front": (64, 64), "wrist": (64, 64)})
    assert one.info.units["state"][0] == "m" and one.info.action_names[-1] == "gripper"
    assert np.abs(one.actions()).max() <= 1 and set(one.prompts()) <= {f"touch the {c} block" for c in COLORS}


def test_the_dataset_part_records_once_and_then_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_CACHE", str(tmp_path))
    settings = {"preset": "tiny", "episodes": 3, "workers": 1}
    first = open_dataset("tabletop", settings)
    assert len(first.episodes) == 3 and first.info.robot == "tabletop"
    monkeypatch.setattr("vla.recording.record", lambda *a, **k: pytest.fail("recorded again"))
    assert open_dataset("tabletop", settings).digest() == first.digest()
    assert open_dataset({"part": "tabletop", **settings, "workers": 2}).digest() == first.digest()
    assert DatasetSettings(seed=1).env().seed == 1


def test_who_comes_second_reads_what_another_process_recorded(tmp_path, monkeypatch):
    """Both began to record the same folder."""
    settings = DatasetSettings(path=str(tmp_path / "data"), episodes=1, workers=1, families=("touch",), image_size=32)
    first = recording.record

    def late(*args, **more):
        first(*args, **more)
        raise StoreError("the folder is already there")

    monkeypatch.setattr(recording, "record", late)
    assert len(demonstrations(settings).episodes) == 1
    monkeypatch.setattr(recording, "record", lambda *a, **k: first("tabletop", tmp_path, 1))
    with pytest.raises(StoreError, match="already there"):
        demonstrations(DatasetSettings(path=str(tmp_path / "other"), episodes=1))


def test_the_robot_adapter_puts_cameras_in_their_places(tmp_path):
    from vla_dataset_tabletop.transforms import steps

    from vla.compose import resolve
    from vla.contracts import Spec

    robot = resolve("robot", "tabletop")
    assert (robot.offers["state_dim"], robot.offers["action_dim"], robot.offers["hz"]) == (8, 7, 10)

    class Variant:
        spec = Spec()

    class Context:
        variant = Variant

    ((_, fit),) = steps(robot.settings, Context)
    pixels = np.zeros((4, 4, 3), np.uint8)
    out = fit({"images/front": pixels, "images/wrist": pixels + 1, "state": np.zeros(8)})
    assert out["images/base_0_rgb"].max() == 0 and out["images/left_wrist_0_rgb"].min() == 1
    assert not out["image_masks/right_wrist_0_rgb"] and "images/front" not in out


def test_every_colour_stands_anywhere_in_its_lane():
    settings = EnvSettings(families=("touch",), colors=("red", "green", "blue"), n_blocks=3, lanes=True)
    inner = make(settings, images=False).unwrapped
    places = []
    for seed in range(30):
        inner.reset(seed=seed)
        assert inner.colors == ["red", "green", "blue"]
        places.append([inner.block(i)[:2] for i in range(3)])
    depth, side = np.moveaxis(np.array(places), 2, 0)
    assert (np.ptp(depth, 0) > 0.15).all() and (np.ptp(side, 0) < 0.07).all() and (np.diff(side) > 0.05).all()
    with pytest.raises(SettingsError, match="plates"):
        EnvSettings(lanes=True)


def test_looks_change_the_pictures_and_nothing_else():
    plain, varied = (make(EnvSettings(families=("touch",), looks=looks)) for looks in (0.0, 1.0))
    try:
        tables = []
        for seed in (3, 4, 3):
            one, other = plain.reset(seed=seed)[0], varied.reset(seed=seed)[0]
            assert other["prompt"] == one["prompt"]
            tables.append(np.median(other["images"]["front"], axis=(0, 1)))
            assert np.abs(tables[-1] - np.median(one["images"]["front"], axis=(0, 1))).max() > 5
        assert (tables[0] == tables[2]).all() and (tables[0] != tables[1]).any()
    finally:
        plain.close()
        varied.close()
