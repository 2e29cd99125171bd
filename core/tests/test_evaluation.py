"""Rollouts, intervals, baselines and videos, on an environment small enough to check by hand."""

import io
import math

import numpy as np
import pytest
from attrs import evolve, frozen
from hypothesis import given, settings
from hypothesis import strategies as st

from vla import evaluation
from vla.compose import resolve
from vla.datasets import DatasetInfo, create_dataset, open_dataset
from vla.embodiment import Embodiment
from vla.errors import ActionError, DataError, SettingsError
from vla.evaluation import baselines, rollout, summary, video
from vla.evaluation.baselines import MeanAction, NearestNeighbour
from vla.evaluation.results import Episode, Evaluation, compare, wilson
from vla.parts import Part
from vla.testing.closeness import close
from vla.transforms.images import resize_with_pad

gymnasium = pytest.importorskip("gymnasium")


@frozen
class ToySettings:
    lonely: bool = False
    endless: bool = False


class ToyEnv(gymnasium.Env):
    """Move +1 when told "go right", -1 when told "go left"; success after three steps the right way."""

    metadata = {"render_fps": 10}
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    opened = 0

    def __init__(self, settings):
        self.settings = settings
        ToyEnv.opened += 1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.side = 1 if self.np_random.random() < 0.5 else -1
        self.at, self.t = 0.0, 0
        return self._obs(), {"task": "walk", "success": False}

    def step(self, action):
        self.at += float(action[0])
        self.t += 1
        won = self.at * self.side >= 3
        over = not self.settings.endless and self.t >= 8
        return self._obs(), 0.0, won, over, {"task": "walk", "success": won}

    def instructions(self):
        return [self._prompt(self.side)] if self.settings.lonely else ["go left", "go right"]

    def close(self):
        ToyEnv.opened -= 1

    def _prompt(self, side):
        return "go right" if side > 0 else "go left"

    def _obs(self):
        images = {"front": np.full((16, 16, 3), self.t % 25 * 10, np.uint8), "wrist": np.zeros((12, 16, 3), np.uint8)}
        return {"images": images, "state": np.array([self.at], np.float32), "prompt": self._prompt(self.side)}


TOY = Part(kind="env", name="toy", summary="", settings=ToySettings, numpy=f"{__name__}:ToyEnv")


def toy(**settings):
    return resolve("env", {"part": TOY, **settings}, "env")


@pytest.fixture(autouse=True)
def toy_is_importable(monkeypatch):
    monkeypatch.setattr("vla.evaluation.environments.load_object", lambda where, what="": ToyEnv)
    ToyEnv.opened = 0


class Obedient:
    """Does what it is told, with a little noise from its seeds; keeps a record of what it was asked."""

    name = "obedient"

    def __init__(self, horizon=4):
        self.horizon, self.asked, self.batches = horizon, [], []

    def infer_batch(self, rows, *, seeds=None):
        self.asked += list(zip([row["prompt"] for row in rows], seeds, strict=True))
        self.batches.append(len(rows))
        out = []
        for row, seed in zip(rows, seeds, strict=True):
            way = 1 if row["prompt"] == "go right" else -1
            jitter = np.random.default_rng(seed).uniform(0, 0.05, (self.horizon, 2))
            out.append({"actions": way * (1 - jitter)})
        return out

    def reset(self):
        self.asked = []


def test_a_refused_chunk_ends_its_episode_and_no_other():
    class Careful(Obedient):
        def infer_batch(self, rows, *, seeds=None):
            for row in rows:
                if row["prompt"] == "go left" and float(row["state"][0]) < -1:
                    raise ActionError("an action lies far out", field="actions[0, 0]", got=1e9)
            return super().infer_batch(rows, seeds=seeds)

    found = evaluation.evaluate(Careful(horizon=2), toy(), episodes=12, num_envs=3)
    left = [e for e in found.episodes if e.prompt == "go left"]
    assert len(left) == found.refused > 0 and all(e.refused == "an action lies far out" and not e.success for e in left)
    assert found.successes == 12 - len(left) and all(e.calls == 2 and e.steps == 2 for e in left)
    assert f"{len(left)} of 12 episodes ended by a chunk that was refused: an action lies far out" in str(found)
    assert [e["refused"] for e in found.to_dict()["episodes"]].count("") == found.successes


def test_a_policy_of_another_robot_is_noted():
    rate = float(ToyEnv.metadata["render_fps"])
    policy = Obedient()
    policy.embodiment = Embodiment(hz=rate, action_dim=2)
    assert evaluation.evaluate(policy, toy(), episodes=2).differences == ()
    policy.embodiment = Embodiment(hz=rate * 2, action_dim=3)
    found = evaluation.evaluate(policy, toy(), episodes=2)
    assert found.differences == ("action_dim: 3 and 2", f"hz: {rate * 2:g} and {rate:g}")
    assert "the environment and the data of the policy differ in hz" in str(found)


def test_a_policy_that_listens_succeeds_and_fails_when_told_otherwise():
    told_right = evaluation.evaluate(Obedient(), toy(), episodes=20, num_envs=3)
    assert told_right.successes == 20 and {e.prompt for e in told_right.episodes} == {"go left", "go right"}
    told_wrong = evaluation.evaluate(Obedient(), toy(), episodes=20, num_envs=3, instruction="shuffled")
    assert told_wrong.successes == 0
    for a, b in zip(told_right.episodes, told_wrong.episodes, strict=True):
        assert (a.seed, a.prompt) == (b.seed, b.prompt) and b.told != b.prompt and a.told == a.prompt
    assert compare(told_right, told_wrong).p < 1e-4
    assert ToyEnv.opened == 0


class Sighted(Obedient):
    """Goes where the picture says, whatever it is told; keeps what it was shown."""

    def infer_batch(self, rows, *, seeds=None):
        self.asked += [(row["state"], row["images"]) for row in rows]
        ways = [1 if row["images"]["front"][0, 0, 1] == 255 else -1 for row in rows]
        return [{"actions": np.full((self.horizon, 2), way, np.float64)} for way in ways]


class Signpost(ToyEnv):
    """The picture shows the way in green, and in red which episode it is of."""

    def _obs(self):
        image = np.zeros((16, 16, 3), np.uint8)
        image[..., 0], image[..., 1] = self.number, 255 * (self.side > 0)
        return {**super()._obs(), "images": {"front": image}}

    def reset(self, *, seed=None, options=None):
        self.number = seed
        return super().reset(seed=seed)


def test_a_policy_that_looks_succeeds_and_is_led_astray_by_the_pictures_of_another_scene(monkeypatch):
    monkeypatch.setattr("vla.evaluation.environments.load_object", lambda where, what="": Signpost)
    policy = Sighted()
    own = evaluation.evaluate(policy, toy(), episodes=20, num_envs=4)
    assert own.successes == 20 and own.pictures == "given"
    swapped = evaluation.evaluate(policy, toy(), episodes=20, num_envs=4, pictures="swapped")
    # The first batch: environment i is shown what environment i + 1 sees.
    assert [int(images["front"][0, 0, 0]) for _, images in policy.asked[:4]] == [1, 2, 3, 0]
    assert 0 < swapped.successes < 20 and swapped.to_dict()["pictures"] == "swapped"
    assert [(e.seed, e.prompt, e.told) for e in swapped.episodes] == [(e.seed, e.prompt, e.told) for e in own.episodes]
    assert swapped == evolve(
        evaluation.evaluate(policy, toy(), episodes=20, num_envs=4, pictures="swapped"), seconds=swapped.seconds
    )
    assert "pictures of another scene" in summary.report_page([own, swapped])
    assert ToyEnv.opened == 0


def test_a_policy_that_only_listens_does_not_notice_other_pictures():
    told = evaluation.evaluate(Obedient(), toy(), episodes=9, num_envs=3)
    swapped = evaluation.evaluate(Obedient(), toy(), episodes=9, num_envs=3, pictures="swapped")
    assert told.episodes == swapped.episodes
    both = evaluation.evaluate(Obedient(), toy(), episodes=2, pictures="swapped", instruction="shuffled")
    assert summary.name_of(both) == "obedient (instruction shuffled, pictures of another scene)"


@pytest.mark.parametrize("options", [{"episodes": 1}, {"episodes": 5, "num_envs": 1}])
def test_pictures_of_another_scene_need_another_scene(options):
    with pytest.raises(SettingsError, match="no other scene"):
        evaluation.evaluate(Obedient(), toy(), pictures="swapped", **options)


def test_the_same_seeds_give_the_same_episodes_however_many_run_together():
    runs = [evaluation.evaluate(Obedient(), toy(), episodes=9, num_envs=n, seed=5).episodes for n in (1, 2, 9)]
    assert runs[0] == runs[1] == runs[2]
    other = evaluation.evaluate(Obedient(), toy(), episodes=9, seed=6).episodes
    assert [e.seed for e in other] != [e.seed for e in runs[0]]


def test_chunks_are_executed_open_loop_and_asked_for_in_one_batch():
    policy = Obedient(horizon=4)
    done = evaluation.evaluate(policy, toy(), episodes=6, num_envs=6, execute=2)
    assert policy.batches[0] == 6
    for episode in done.episodes:
        assert episode.calls == math.ceil(episode.steps / 2)
    whole = evaluation.evaluate(Obedient(horizon=4), toy(), episodes=6, num_envs=6)
    assert all(e.calls == math.ceil(e.steps / 4) for e in whole.episodes)


def test_clips_hold_successes_and_failures():
    clips = []

    class Half(Obedient):
        def infer_batch(self, rows, *, seeds=None):
            return [{"actions": np.ones((4, 2))} for _ in rows]  # always right

    done = evaluation.evaluate(Half(), toy(), episodes=30, clips=2, on_clip=clips.append)
    assert 0 < done.successes < 30
    assert sorted(c.episode.success for c in clips) == [False, False, True, True]
    for clip in clips:
        assert len(clip.frames) == clip.episode.steps + 1 and clip.frames[0].shape == (16, 32, 3) and clip.hz == 10


def test_results_read_as_tables_and_json():
    done = evaluation.evaluate(Obedient(), toy(), episodes=5)
    record = done.to_dict()
    assert record["success"]["n"] == 5 and record["success"]["rate"] == 1.0
    assert [e["seed"] for e in record["episodes"]] == [rollout.first_seed(0) + i for i in range(5)]
    assert record["tasks"] == [{"task": "walk", "successes": 5, "episodes": 5, "low": wilson(5, 5)[0], "high": 1.0}]
    assert "5 of 5 (100%" in str(done)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 0}, "episodes"),
        ({"instruction": "loud"}, "shuffled"),
        ({"execute": -1}, "execute"),
        ({"clips": -1}, "clips"),
        ({"pictures": "upside down"}, "swapped"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(SettingsError, match=message):
        evaluation.evaluate(Obedient(), toy(), **{"episodes": 2, **options})


def test_nothing_to_shuffle_is_said():
    with pytest.raises(SettingsError, match="no other instruction"):
        evaluation.evaluate(Obedient(), toy(lonely=True), episodes=2, instruction="shuffled")
    assert ToyEnv.opened == 0


def test_actions_that_are_not_finite_are_refused():
    class Lost(Obedient):
        def infer_batch(self, rows, *, seeds=None):
            return [{"actions": np.array([[0.0, 0.0], [np.nan, 0.0]])} for _ in rows]

    with pytest.raises(DataError, match="NaN or infinite(?s:.*)seed 0, call 0"):
        evaluation.evaluate(Lost(), toy(), episodes=2)
    assert ToyEnv.opened == 0


def test_actions_of_another_width_are_refused():
    class Wide(Obedient):
        def infer_batch(self, rows, *, seeds=None):
            return [{"actions": np.zeros((4, 3))} for _ in rows]

    with pytest.raises(DataError, match="do not fit the environment"):
        evaluation.evaluate(Wide(), toy(), episodes=2)
    assert ToyEnv.opened == 0


def test_an_episode_that_never_ends_is_an_error(monkeypatch):
    monkeypatch.setattr(rollout, "MAX_STEPS", 30)

    class Idle(Obedient):
        def infer_batch(self, rows, *, seeds=None):
            return [{"actions": np.zeros((4, 2))} for _ in rows]

    with pytest.raises(DataError, match="did not end"):
        evaluation.evaluate(Idle(), toy(endless=True), episodes=1)


def test_the_mean_action_is_the_mean():
    class Demonstrations:
        def __len__(self):
            return 3

        def actions(self):
            return np.array([[1.0, 0.0], [0.0, 0.5], [0.5, 0.1]], np.float32)

    answer = MeanAction(Demonstrations(), horizon=2).infer_batch([{}, {}])
    close(answer[1]["actions"], [[0.5, 0.2], [0.5, 0.2]], 1e-7)


def recorded(folder, episodes=6, length=9, prompts=("go left", "go right"), video=False):
    """Demonstrations with two cameras, written as a dataset."""
    rng = np.random.default_rng(3)
    info = DatasetInfo({"front": (24, 32), "wrist": (16, 16)}, state_dim=3, action_dim=2, hz=10)
    with create_dataset(folder, info, video=video) as writer:
        for e in range(episodes):
            for _ in range(length):
                images = {k: rng.integers(0, 256, (*size, 3), dtype=np.uint8) for k, size in info.cameras.items()}
                state = np.array([rng.normal(0, 100), rng.normal(0, 0.01), 7.0])  # other scales, and a constant
                row = {"images": images, "state": state, "action": rng.normal(size=2)}
                writer.add({**row, "prompt": prompts[e % len(prompts)]})
            writer.end_episode()
    return open_dataset(folder)


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    pytest.importorskip("vla_dataset_lerobot")
    return recorded(tmp_path_factory.mktemp("nearest") / "data")


def test_the_nearest_to_a_demonstrated_moment_is_that_moment(demonstrations, tmp_path):
    policy = NearestNeighbour(demonstrations, horizon=4, folder=tmp_path)
    rows = [demonstrations.sample(i, 4) for i in range(len(demonstrations))]
    for i, (row, answer) in enumerate(zip(rows, policy.infer_batch(rows), strict=True)):
        assert answer["frame"] == i
        # Cut at the end of its episode: nobody demonstrated the repeated actions.
        assert len(answer["actions"]) == min(4, 9 - i % 9)
        np.testing.assert_array_equal(answer["actions"], row["actions"][: len(answer["actions"])])


def test_instructions_are_kept_apart_and_new_ones_look_everywhere(demonstrations, tmp_path):
    policy = NearestNeighbour(demonstrations, folder=tmp_path)
    row = demonstrations.sample(3, 1)  # of "go left"
    other = policy.nearest({**row, "prompt": "go right"})
    assert demonstrations.prompts()[other] == "go right"
    assert policy.nearest({**row, "prompt": "dance"}) == 3


def test_the_distance_is_the_one_that_is_promised(demonstrations, tmp_path, monkeypatch):
    """By hand, in float64, over all frames at once; the blocks are small so that there are several."""
    monkeypatch.setattr(baselines, "BLOCK", 5)
    policy = NearestNeighbour(demonstrations, folder=tmp_path)
    n = len(demonstrations)
    small = [
        np.stack([resize_with_pad(demonstrations.sample(i, 1)["images"][k], 8, 8) for i in range(n)]).astype(float)
        for k in ("front", "wrist")
    ]
    states = demonstrations.states().astype(float)
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b, c = rng.integers(0, n, 3)
        row = {
            "state": states[a] + 0.1 * states[b],
            "images": {
                "front": demonstrations.sample(b, 1)["images"]["front"],
                "wrist": demonstrations.sample(c, 1)["images"]["wrist"],
            },
            "prompt": "anything",
        }
        sd = np.array([states[:, 0].std(), states[:, 1].std(), 1.0])
        distance = np.square((states - row["state"]) / sd).mean(1)
        for pixels, at in zip(small, (b, c), strict=True):
            distance += np.square(pixels - pixels[at]).mean((1, 2, 3)) / pixels.var(0).mean()
        assert policy.nearest(row) == distance.argmin()


def test_pictures_are_decoded_once_and_kept_small(demonstrations, tmp_path):
    seen = []
    NearestNeighbour(demonstrations, folder=tmp_path, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(i, 6) for i in range(1, 7)]
    NearestNeighbour(demonstrations, folder=tmp_path, progress=lambda done, of: seen.append("again"))
    assert seen[-1] == (6, 6)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size < 54 * 2 * 8 * 8 * 3 + 300


def test_the_nearest_neighbour_takes_part_in_evaluation(tmp_path):
    """Demonstrated in the environment itself, it goes where it is told."""
    pytest.importorskip("vla_dataset_lerobot")
    info = DatasetInfo({"front": (16, 16), "wrist": (12, 16)}, state_dim=1, action_dim=2, hz=10)
    with create_dataset(tmp_path / "data", info) as writer:
        for seed in range(4):
            env = ToyEnv(ToySettings())
            seen, _ = env.reset(seed=100 + seed)
            for _ in range(3):
                action = np.array([env.side, 0.0])
                writer.add({**seen, "action": action})
                seen = env.step(action)[0]
            writer.end_episode()
            env.close()
    policy = NearestNeighbour(open_dataset(tmp_path / "data"), horizon=2, folder=tmp_path / "frames")
    assert {*policy.dataset.prompts()} == {"go left", "go right"}
    assert evaluation.evaluate(policy, toy(), episodes=10, num_envs=3).successes == 10
    assert evaluation.evaluate(policy, toy(), episodes=10, num_envs=3, instruction="shuffled").successes == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: {**row, "images": {"front": row["images"]["front"]}}, "lacks a camera"),
        (lambda row: {**row, "state": np.zeros(5)}, "3 finite numbers"),
        (lambda row: {**row, "state": np.array([0, np.nan, 0])}, "3 finite numbers"),
    ],
)
def test_observations_of_another_robot_are_refused(demonstrations, tmp_path, change, message):
    policy = NearestNeighbour(demonstrations, folder=tmp_path)
    with pytest.raises(DataError, match=message):
        policy.infer_batch([change(demonstrations.sample(0, 1))])


@pytest.mark.parametrize("key", ["states", "actions"])
def test_demonstrations_with_nan_are_refused(demonstrations, tmp_path, monkeypatch, key):
    broken = np.array(getattr(demonstrations, key)())
    broken[5, 0] = np.nan
    monkeypatch.setattr(demonstrations, key, lambda: broken)
    baselines = [lambda d: NearestNeighbour(d, folder=tmp_path)] + [MeanAction] * (key == "actions")
    for baseline in baselines:
        with pytest.raises(DataError, match="frame 5"):
            baseline(demonstrations)


def test_nothing_demonstrated_is_said(demonstrations):
    class Empty:
        def __len__(self):
            return 0

    for baseline in (MeanAction, NearestNeighbour):
        with pytest.raises(DataError, match="empty"):
            baseline(Empty())


def test_wilson_against_values_from_a_table():
    # Brown, Cai and DasGupta 2001; R's prop.test(correct=FALSE) gives the same.
    close(wilson(8, 10), (0.4901625, 0.9433178), 1e-6)
    close(wilson(0, 20), (0.0, 0.1611252), 1e-6)
    close(wilson(50, 50), (0.9286524, 1.0), 1e-6)
    with pytest.raises(ValueError, match="3 successes in 2"):
        wilson(3, 2)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_rate_and_is_symmetric(pair):
    k, n = pair
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    close(wilson(n - k, n), (1 - high, 1 - low), 1e-12)


def test_mcnemar_is_exact():
    def run(outcomes):
        rows = tuple(Episode(i, i, "t", "p", "p", bool(o), 1, 1) for i, o in enumerate(outcomes))
        return Evaluation("x", "toy", {}, 1, "given", rows)

    found = compare(run([1] * 6 + [0]), run([0] * 6 + [1]))
    assert (found.better, found.worse) == (6, 1) and found.p == pytest.approx(2 * (1 + 7) / 2**7)
    assert compare(run([1, 0]), run([1, 0])).p == 1.0
    with pytest.raises(ValueError, match="same episodes"):
        compare(run([1]), run([1, 0]))


def test_a_montage_encodes_to_a_video_that_plays():
    av = pytest.importorskip("av")
    clips = []
    evaluation.evaluate(Obedient(), toy(), episodes=3, clips=3, on_clip=clips.append)
    frames = video.montage(clips, columns=2)
    assert len({frame.shape for frame in frames}) == 1
    data = video.encode(frames, 10)
    with av.open(io.BytesIO(data)) as container:
        decoded = list(container.decode(video=0))
        assert container.streams.video[0].codec_context.name == "h264"
    assert len(decoded) == len(frames)
    picture = decoded[0].to_ndarray(format="rgb24").astype(int)
    assert abs(picture - frames[0][: picture.shape[0], : picture.shape[1]]).mean() < 8
