"""Save, open, sample: bit-equal actions; and what a policy refuses."""

import json
import shutil

import attrs
import numpy as np
import pytest

import vla
from vla import manifest, store
from vla.cli import main
from vla.errors import DataError, PartError, SettingsError, StoreError
from vla.policy import GUARD, ActionError, Policy, untrained
from vla.testing.closeness import close
from vla.tokenizer import open_tokenizer
from vla.transforms.stats import Stats

torch = pytest.importorskip("torch")

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb")
STATE, ACTIONS = 6, 4
SMALL = {
    "spec.image_size": [32, 32], "spec.action_horizon": 4, "backbone.llm.depth": 2, "backbone.vision.depth": 1,
    "robot.state_dim": STATE, "robot.action_dim": ACTIONS,
}  # fmt: skip


def stats():
    rng = np.random.default_rng(0)

    def one(width):
        mean = rng.normal(size=width)
        return Stats(mean=mean, std=np.full(width, 0.5), q01=mean - 1, q99=mean + 1)

    return {"state": one(STATE), "actions": one(ACTIONS)}


def build(head, tokenizer):
    return vla.build(head=head, tokenizer=tokenizer, backbone="paligemma", preset="tiny", set=SMALL)


def fitted(variant):
    tokenizer = open_tokenizer(variant.parts["tokenizer"], variant.spec, None)
    time = np.linspace(0, 3, 4)
    phases = np.random.default_rng(1).uniform(0, 6, (64, 1, ACTIONS))
    return tokenizer.fit(np.sin(time[None, :, None] + phases))


def save(folder, head="ki", tokenizer="fast", **record):
    variant = build(head, tokenizer)
    policy = untrained(variant, stats(), fitted(variant), seed=3)
    weights = policy.runner.weights()
    store.save_model(folder, variant, weights, policy.model.stats, policy.model.tokenizer, record=record)
    return policy


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(the policy in memory, the folder it was saved to)."""
    folder = tmp_path_factory.mktemp("policy") / "model"
    return save(folder, cameras=list(CAMERAS)), folder


def observation(seed=0, **changes):
    rng = np.random.default_rng(seed)
    images = {c: rng.integers(0, 255, (40, 48, 3), dtype=np.uint8) for c in CAMERAS}
    return {
        "images": images,
        "state": rng.normal(size=STATE).astype(np.float32),
        "prompt": "touch the red block",
    } | changes


@pytest.mark.parametrize(("head", "tokenizer"), [("ki", "fast"), ("flow", "paligemma"), ("ar", "fast")])
def test_saved_opened_and_sampled_gives_bit_equal_actions(tmp_path, head, tokenizer):
    before = save(tmp_path / "model", head, tokenizer)
    after = vla.open(tmp_path / "model")
    rows = [observation(i) for i in range(3)]
    for a, b in zip(before.infer_batch(rows, seeds=[1, 2, 3]), after.infer_batch(rows, seeds=[1, 2, 3]), strict=True):
        assert a["actions"].shape == (4, ACTIONS) and a["actions"].dtype == np.float64
        np.testing.assert_array_equal(a["actions"], b["actions"])
        assert b["policy_timing"]["infer_ms"] > 0
    assert after.metadata["digest"] == after.model.digest != ""
    assert all(np.array_equal(x, after.runner.weights()[n]) for n, x in before.runner.weights().items())


def test_one_directory_serves_both_frameworks(saved):
    pytest.importorskip("flax")
    rows = [observation(i) for i in range(2)]
    answers = [vla.open(saved[1], f).infer_batch(rows, seeds=[1, 2]) for f in ("torch", "jax")]
    for ours, theirs in zip(*answers, strict=True):
        close(ours["actions"], theirs["actions"], 2e-4)


def test_the_same_seed_gives_the_same_chunk_and_another_another(saved):
    policy = vla.open(saved[1], seed=7)
    first, second = (policy.infer(observation())["actions"] for _ in range(2))
    assert not np.array_equal(first, second)
    policy.reset()
    np.testing.assert_array_equal(policy.infer(observation())["actions"], first)
    again = vla.open(saved[1], seed=7).infer(observation())["actions"]
    np.testing.assert_array_equal(again, first)
    by_seed = [policy.infer(observation(), seed=s)["actions"] for s in (1, 1, 2)]
    np.testing.assert_array_equal(by_seed[0], by_seed[1])
    assert not np.array_equal(by_seed[0], by_seed[2])


def test_given_noise_is_used(saved):
    policy, spec = saved[0], saved[0].variant.spec
    noise = np.random.default_rng(0).normal(size=(spec.action_horizon, spec.action_dim)).astype(np.float32)
    one, two, other = (policy.infer(observation(), noise=n)["actions"] for n in (noise, noise, noise * 2))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)
    with pytest.raises(DataError, match="noise"):
        policy.infer(observation(), noise=noise[:, :2])
    with pytest.raises(DataError, match="noise"):
        policy.infer(observation(), noise=noise * np.nan)


def test_a_batch_is_its_rows(saved):
    policy = saved[0]
    rows = [observation(i, prompt=p) for i, p in enumerate(["touch the red block", "go", "lift the blue block now"])]
    together = policy.infer_batch(rows, seeds=[4, 5, 6])
    for row, seed, answer in zip(rows, (4, 5, 6), together, strict=True):
        close(policy.infer(row, seed=seed)["actions"], answer["actions"], 2e-5)
    assert policy.infer_batch([]) == []


def test_recorded_actions_are_not_seen(saved):
    """A dataset's sample goes in as it is; its answer must not come back out."""
    policy = saved[0]
    told = observation(actions=np.full((4, ACTIONS), 0.7, np.float32), actions_is_pad=np.zeros(4, bool))
    np.testing.assert_array_equal(policy.infer(told, seed=1)["actions"], policy.infer(observation(), seed=1)["actions"])


def test_the_default_instruction(saved):
    asked = vla.open(saved[1], default_prompt="touch the red block")
    silent = {k: v for k, v in observation().items() if k != "prompt"}
    np.testing.assert_array_equal(asked.infer(silent, seed=1)["actions"], asked.infer(observation(), seed=1)["actions"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": None}, "prompt"),
        ({"state": np.zeros(STATE + 1, np.float32)}, "state"),
        ({"state": np.zeros(STATE - 1, np.float32)}, "state"),
        ({"state": np.full(STATE, np.nan, np.float32)}, "state"),
        ({"images": {"base_0_rgb": np.zeros((32, 32, 3), np.uint8)}}, "camera"),
        ({"images": {}}, "images"),
        ({"images": {**observation()["images"], "ceiling": np.zeros((32, 32, 3), np.uint8)}}, "ceiling"),
        ({"images": {c: np.zeros((32, 32), np.uint8) for c in CAMERAS}}, "image"),
    ],
    ids=[
        "no instruction",
        "wide state",
        "narrow state",
        "NaN state",
        "missing camera",
        "no camera",
        "unknown camera",
        "grey",
    ],
)
def test_a_bad_observation_is_one_clear_error(saved, change, words):
    obs = observation() | change
    if change.get("prompt", "") is None:
        del obs["prompt"]
    with pytest.raises(DataError, match=words) as caught:
        vla.open(saved[1]).infer(obs)
    assert "field:" in str(caught.value)


def test_a_chunk_that_is_not_finite_is_never_returned(saved):
    class Broken:
        def sample(self, obs, noise, sampling):
            actions = np.zeros((obs.batch, 4, 8), np.float32)
            actions[-1, 2, 1] = np.nan
            return {"actions": actions}

    policy = Policy(saved[0].model, Broken())
    with pytest.raises(ActionError, match=r"actions\[1, 2, 1\]"):
        policy.infer_batch([observation(), observation(1)])


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_logits_that_are_not_finite_are_no_answer(tmp_path, framework):
    """The largest of NaN is some token, which would stand for a well-formed and extreme chunk."""
    save(tmp_path / "good", "ar", "fast")
    model = store.open_model(tmp_path / "good")
    weights = {name: np.array(w) for name, w in model.read().items()}
    for name in [n for n in weights if "final_norm" in n]:
        weights[name][:] = np.nan
    with pytest.raises(StoreError, match="not finite"):
        store.save_model(tmp_path / "bad", model.variant, weights, model.stats, model.tokenizer)
    good = vla.open(tmp_path / "good", framework)
    policy = Policy(model, _loaded(framework, model, weights))
    for temperature in (0.0, 1.0):
        with pytest.raises(ActionError, match=r"logits(.|\n)*tokens\[0\]"):
            policy.infer(observation(), seed=0, sampling={"temperature": temperature})
    assert policy.refused == 2
    assert np.isfinite(good.infer(observation(), seed=0)["actions"]).all() and good.refused == 0

    name = "backbone.vision.blocks.0.attn.k.weight"  # PyTorch's fused attention hides it: the logits are finite
    weights = {n: np.array(w) for n, w in model.read().items()}
    weights[next(n for n in weights if n.startswith("backbone.vision") and ".k." in n or n == name)].flat[0] = np.nan
    (tmp_path / "good/model.safetensors").unlink()
    store.write_weights(tmp_path / "good/model.safetensors", weights)
    manifest.write_manifest(tmp_path / "good", "model")
    policy = vla.open(tmp_path / "good", framework)
    with pytest.raises(ActionError, match=r"weights have NaN(.|\n)*field: +backbone\.vision"):
        policy.infer(observation(), seed=0)
    assert policy.refused == 1


def _loaded(framework, model, weights):
    if framework == "torch":
        from vla.torch_kit.runner import load
    else:
        pytest.importorskip("flax")
        from vla.jax_kit.runner import load
    return load(model.variant, weights, device="cpu", source="weights")


@pytest.mark.parametrize("norm", ["quantile", "zscore"])
def test_a_chunk_far_beyond_what_was_recorded_is_refused_and_counted(saved, norm):
    class Far:
        def __init__(self, z):
            self.z = z

        def sample(self, obs, noise, sampling):
            actions = np.zeros((obs.batch, 4, 8), np.float32)
            actions[0, 3, 2] = self.z
            return {"actions": actions}

    variant = vla.build(base=saved[0].variant, set={"spec.norm": norm})
    model = attrs.evolve(saved[0].model, variant=variant)
    at = (1 + 2 * GUARD) * (1 if norm == "quantile" else 2)  # the range is 2 wide, in units of z or of half deviations
    assert Policy(model, Far(at - 0.1)).infer(observation())["actions"].shape == (4, ACTIONS)
    policy = Policy(model, Far(at + 0.1))
    with pytest.raises(ActionError, match=r"actions\[3, 2\](.|\n)*recorded:(.|\n)*guard"):
        policy.infer(observation())
    assert policy.refused == 1
    assert Policy(model, Far(1e6), guard=None).infer(observation())["actions"].max() > 1e5
    with pytest.raises(ActionError):
        Policy(model, Far(3.0), guard=0.1).infer(observation())


def test_the_guard_goes_by_the_extremes_where_they_are_known(saved, tmp_path):
    """A gripper that opens in one frame of a thousand is recorded, far outside the percentiles."""
    from vla.transforms.numbers import RefuseFar
    from vla.transforms.stats import load_stats, save_stats

    seen = Stats([0.0], [0.01], [-0.001], [0.001], min=[-0.001], max=[1.0])
    save_stats({"actions": seen, "state": seen}, tmp_path / "norm_stats.json")
    read = load_stats(tmp_path / "norm_stats.json")["actions"]
    for stats, far in (
        (seen, 2.1),
        (read, 2.1),
        (Stats([0.0], [0.01], [-0.001], [0.001]), 0.004),
        (Stats([0.0], [0.01]), 0.1),
    ):
        RefuseFar(stats, 1.0)({"actions": np.full((2, 1), far * 0.5)})
        with pytest.raises(ActionError):
            RefuseFar(stats, 1.0)({"actions": np.full((2, 1), far)})


def test_options_of_a_call_win_over_those_of_the_policy(saved):
    opened = vla.open(saved[1], sampling={"num_steps": 2})
    with pytest.raises(SettingsError, match="sampling"):
        opened.infer(observation(), sampling="num_steps=2")
    plain, few, one = (
        opened.infer(observation(), seed=1, sampling=sampling)["actions"]
        for sampling in ({"num_steps": 10}, None, {"num_steps": 1})
    )
    assert np.array_equal(plain, saved[0].infer(observation(), seed=1)["actions"])
    assert np.array_equal(few, vla.open(saved[1], num_steps=2).infer(observation(), seed=1)["actions"])
    assert not np.array_equal(few, plain) and not np.array_equal(few, one)
    for sampling, words in (
        ({"steps": 3}, "unknown setting 'steps'"),
        ({"num_steps": 0}, "sampling.num_steps"),
        ({"num_steps": 2.5}, "sampling.num_steps"),
        ({"temperature": -1}, "sampling.temperature"),
        ({"temperature": float("nan")}, "sampling.temperature"),
    ):
        with pytest.raises(SettingsError, match=words):
            opened.infer(observation(), sampling=sampling)
    with pytest.raises(SettingsError, match="given twice"):
        vla.open(saved[1], num_steps=3, sampling={"num_steps": 2})


def test_wrong_options_are_refused(saved):
    for options, words in (
        ({"framework": "tensorflow"}, "framework"),
        ({"precision": "float8"}, "precision"),
        ({"device": "abacus"}, "device"),
        *(({"num_steps": n}, "num_steps") for n in (0, -1, 1.5, True, "10", 10**9, np.nan)),
        *(({"temperature": t}, "temperature") for t in (-0.1, 1e-40, np.nan, np.inf, "hot", None, True)),
        *(({"guard": g}, "guard") for g in (-1, np.nan, "wide")),
        *(({"seed": s}, "seed") for s in (-1, 1.5, "7", None)),
        *(({"default_prompt": p}, "default_prompt") for p in ("", "  _ ", "\ud800", 7)),
    ):
        with pytest.raises(SettingsError, match=words):
            vla.open(saved[1], **options)
    for seeds in ([-1], [1.5], ["1"], [None], [1, 2], "1", 7, []):
        with pytest.raises((SettingsError, DataError), match="seeds"):
            saved[0].infer_batch([observation()], seeds=seeds)
    policy = vla.open(saved[1])
    policy.seed = -1
    with pytest.raises(SettingsError, match="seed"):
        policy.infer(observation())


def test_a_damaged_directory_is_never_used(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved[1], folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-100] ^= 4
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(StoreError, match=r"model\.safetensors"):
        vla.open(folder)


def test_weights_of_another_variant_are_refused(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved[1], folder)
    text = (folder / "variant.toml").read_text()
    (folder / "variant.toml").write_text(text.replace("depth = 2", "depth = 3"))
    manifest.write_manifest(folder, "model")
    with pytest.raises(StoreError, match=r"missing \(\d+\): backbone\.llm\.layers\.2"):
        vla.open(folder)


def test_a_missing_plugin_says_what_to_install(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved[1], folder)
    text = (folder / "variant.toml").read_text()
    assert 'from = "vla-head-ki' in text
    changed = text.replace('part = "ki"', 'part = "telepathy"').replace("vla-head-ki ", "vla-head-telepathy ")
    (folder / "variant.toml").write_text(changed)
    manifest.write_manifest(folder, "model")
    with pytest.raises(PartError, match="pip install vla-head-telepathy"):
        vla.open(folder)


def test_sample_at_the_console(saved, tmp_path, capsys):
    from vla.datasets import DatasetInfo, create_dataset

    pytest.importorskip("vla_dataset_lerobot")
    info = DatasetInfo(
        cameras={c: (40, 48) for c in CAMERAS}, state_dim=STATE, action_dim=ACTIONS, hz=10,
        action_names=("x", "y", "z", "grip"),
    )  # fmt: skip
    with create_dataset(tmp_path / "data", info) as writer:
        for frame in range(5):
            seen = observation(frame)
            writer.add({**seen, "action": np.full(ACTIONS, frame / 10, np.float32)})
        writer.end_episode()

    def vla_sample(*words):
        status = main(["sample", str(saved[1]), "--data", str(tmp_path / "data"), *words])
        return status, *capsys.readouterr()

    status, out, _ = vla_sample("--frame", "2", "--json")
    answer = json.loads(out)
    assert status == 0 and np.shape(answer["actions"]) == (4, ACTIONS)
    assert answer["recorded"][1] == pytest.approx([0.3] * ACTIONS) and answer["names"] == ["x", "y", "z", "grip"]
    assert answer["prompt"] == "touch the red block"
    assert "grip" in vla_sample("--prompt", "lift the [blue] block")[1]
    status, _, err = vla_sample("--frame", "9")
    assert status == 2 and "no such frame" in err
    assert vla_sample("--episode", "1")[0] == 2
    assert vla_sample("--frame", "2", "--set", "data.stride=2")[0] == 0  # the last of frames 0, 2 and 4
    status, _, err = vla_sample("--frame", "3", "--set", "data.stride=2")
    assert status == 2 and "0 to 2" in err
    moved = json.loads(vla_sample("--frame", "2", "--json", "--set", "robot.delta=[3]")[1])["actions"]
    shift = np.asarray(moved) - np.asarray(answer["actions"])  # actions are now relative to the state
    close(shift[:, :3], np.broadcast_to(observation(2)["state"][:3], (4, 3)), 1e-4)
    status, _, err = vla_sample("--set", "spec.action_dim=3")
    assert status == 2 and "data.NAME=VALUE or robot.NAME=VALUE" in err
