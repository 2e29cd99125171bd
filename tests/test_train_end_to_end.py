"""`vla train` with real parts on a dataset written to disk: what it computes by itself, what it refuses, what it saves."""

import json

import numpy as np
import pytest
from attrs import evolve

for needed in ("torch", "vla_dataset_lerobot", "vla_head_ki", "vla_tokenizer_fast", "vla_tokenizer_paligemma"):
    pytest.importorskip(needed)

import vla  # noqa: E402
from vla.cli import main  # noqa: E402
from vla.datasets import DatasetInfo, Mixture, create_dataset, open_dataset  # noqa: E402
from vla.errors import DataError  # noqa: E402
from vla.store import open_model, read_weights  # noqa: E402
from vla.testing.closeness import close  # noqa: E402
from vla.training.checkpoints import checkpoint_folder, checkpoint_steps  # noqa: E402
from vla.training.config import TrainConfig, TrainingError  # noqa: E402
from vla.training.loop import train  # noqa: E402
from vla.training.metrics import read_metrics  # noqa: E402
from vla.training.order import sample_ids  # noqa: E402
from vla.training.prepare import prepare  # noqa: E402

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb")
SIZES = {
    "spec.image_size": [32, 32], "backbone.vision.depth": 1, "backbone.llm.depth": 1, "backbone.llm.width": 32,
    "backbone.llm.mlp_dim": 32, "backbone.llm.num_heads": 2, "backbone.llm.head_dim": 16,
}  # fmt: skip


def write(path, episodes=5, frames=12, dims=(6, 5), cameras=CAMERAS, robot="", seed=0):
    """A dataset whose action is the next state."""
    rng = np.random.default_rng(seed)
    info = DatasetInfo(
        {c: (32, 32) for c in cameras}, dims[0], dims[1], 10.0, robot=robot,
        action_names=tuple(f"joint_{i}" for i in range(dims[1])),
    )  # fmt: skip
    with create_dataset(path, info) as writer:
        for e in range(episodes):
            walk = np.cumsum(rng.normal(size=(frames + 1, max(dims))), 0).astype(np.float32)
            for f in range(frames):
                action = walk[f + 1, : dims[1]].copy()
                images = {c: rng.integers(0, 255, (32, 32, 3), dtype=np.uint8) for c in cameras}
                writer.add(
                    {"images": images, "state": walk[f, : dims[0]], "action": action, "prompt": f"do task {e % 2}"}
                )
            writer.end_episode()
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "walk")


def small(type="pi05_ki", **sets):
    return vla.build(type=type, preset="tiny", set={**SIZES, **sets})


def config(steps=3, **values):
    return TrainConfig(**{"steps": steps, "batch_size": 4, "lr": 1e-3, "log_every": 1, "progress": False, **values})


@pytest.mark.parametrize("type", ["pi0", "pi05", "pi0_fast", "pi05_ki"])
def test_every_model_type_trains_and_the_model_opens(tmp_path, data, type):
    variant = small(type)
    result = train(variant, str(data), out=tmp_path / "run", config=config(val_episodes=1, val_batches=1))
    records = read_metrics(result.out)
    assert len(records) == 3 and all(np.isfinite(r["loss"]) for r in records)
    validation = read_metrics(result.out, "validation")[0]
    if "action_error" in validation:  # an untrained token head may give nothing decodable
        assert list(validation["action_error"]) == [f"joint_{i}" for i in range(5)]
    assert "action_error" in validation or validation["undecodable"] == 1
    opened = open_model(result.model)
    assert opened.stats["actions"].mean.shape == (5,)
    assert set(read_weights(opened.weights)) and opened.record["steps"] == 3
    if variant.parts["tokenizer"].part.name == "fast":
        assert opened.tokenizer.codec.fitted


def test_it_says_what_it_computed_and_keeps_it_for_resuming(tmp_path, data):
    train(small(), str(data), out=tmp_path / "run", config=config(4, save_every=2))
    notes = [r["text"] for r in read_metrics(tmp_path / "run", "note")]
    assert "weights: new, seed 42" in notes
    assert any("statistics: of the data, all 60 frames" in n for n in notes)
    assert any("fast tokenizer is not fitted" in n for n in notes)
    folder = checkpoint_folder(tmp_path / "run", 4)
    assert (folder / "norm_stats.json").is_file() and (folder / "assets" / "tokenizer").is_dir()
    train(small(), str(data), out=tmp_path / "run", config=config(6, save_every=2), resume=True)
    later = [r["text"] for r in read_metrics(tmp_path / "run", "note") if r["step"] == 4]
    assert later == [f"weights and statistics: of {folder}"]  # nothing was computed again
    assert checkpoint_steps(tmp_path / "run") == [4, 6]


def test_fine_tuning_starts_from_the_models_weights_statistics_and_tokenizer(tmp_path, data):
    first = train(small(), str(data), out=tmp_path / "one", config=config())
    other = write(tmp_path / "other", seed=9)
    mine = config(1, lr=1e-9, ema_decay=0)
    second = train(first.model, str(other), out=tmp_path / "two", config=mine, stats="base")
    notes = [r["text"] for r in read_metrics(tmp_path / "two", "note")]
    assert notes[0] == f"weights: {len(read_weights(first.model / 'model.safetensors'))} of {first.model}"
    assert notes[1] == "statistics: of the base model, not of this data" and "% outside the range" in notes[2]
    a, b = (open_model(r.model) for r in (first, second))
    assert np.array_equal(a.stats["state"].mean, b.stats["state"].mean)
    third = open_model(train(first.model, str(other), out=tmp_path / "three", config=mine).model)
    assert not np.array_equal(a.stats["state"].mean, third.stats["state"].mean)  # those of the new data, unless asked
    assert (b.record["statistics"], third.record["statistics"]) == ("base", "data")
    one, two = (read_weights(m.weights) for m in (a, b))
    for name in one:
        close(two[name], one[name], 1e-6, name, scale=1e-3)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_lora_leaves_a_plain_model_and_an_adapter_that_merges_into_its_base(tmp_path, data, framework, capsys):
    from vla.training.lora import FACTS

    if framework == "jax":
        pytest.importorskip("jax")
    base = train(small("pi05"), str(data), out=tmp_path / "base", config=config(1)).model
    out, words = tmp_path / "run", ["--steps", "2", "--batch-size", "2", "--lr", "0.01", "--no-progress"]
    words += ["--framework", framework, "--freeze", "backbone.vision", "--freeze", "head", "--lora.rank", "2"]
    assert main(["train", str(base), "--data", str(data), "--out", str(out), *words, "--lora.alpha", "4"]) == 0
    before, after = (read_weights(folder / "model.safetensors") for folder in (base, out / "model"))
    changed = {n for n in before if not np.array_equal(before[n], after[n])}
    assert {n.split(".")[-2] for n in changed} <= {"q", "k", "v", "o", "gate", "up", "down", "projector"}
    assert any(".action.up." in n for n in changed) and "backbone.projector.weight" in changed
    assert vla.open(out / "model").variant.name == "pi05"
    assert open_model(out / "model").record["config"]["lora"]["alpha"] == 4
    assert json.loads((out / "adapter" / FACTS).read_text())["freeze"] == ["backbone.vision", "head"]

    assert main(["merge", str(base), str(out / "adapter"), "--out", str(tmp_path / "merged")]) == 0
    records = [json.loads((folder / "record.json").read_text()) for folder in (out / "model", tmp_path / "merged")]
    assert records[1].pop("merged") and records[0] == records[1] and records[0]["embodiment"]["state_dim"]
    for file in ("model.safetensors", "norm_stats.json", "variant.toml"):
        assert (tmp_path / "merged" / file).read_bytes() == (out / "model" / file).read_bytes(), file
    capsys.readouterr()
    assert main(["merge", str(out / "model"), str(out / "adapter"), "--out", str(tmp_path / "other")]) == 2
    assert "trained on other weights" in capsys.readouterr().err
    assert (
        main(["train", str(base), "--data", str(data), "--out", str(out), *words, "--lora.alpha", "8", "--resume"]) == 2
    )
    assert "adapters of a run cannot change" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_given_statistics_win(tmp_path, data):
    from vla.transforms.stats import compute_stats

    stats = {k: evolve(s, mean=s.mean + 1) for k, s in compute_stats(open_dataset(str(data)), small()).items()}
    result = train(small(), str(data), out=tmp_path / "run", config=config(1), stats=stats)
    assert np.array_equal(open_model(result.model).stats["actions"].mean, stats["actions"].mean)


def test_a_mixture_trains_in_its_proportions(tmp_path, data):
    other = write(tmp_path / "other", episodes=2, seed=5)
    mixed = Mixture([(open_dataset(str(data)), 0.25), (open_dataset(str(other)), 0.75)])
    made = prepare(small(), mixed, config(val_episodes=0), note=lambda text: None)
    assert made.shares == ((60, 0.25), (24, 0.75))
    result = train(small(), mixed, out=tmp_path / "run", config=config(2))
    assert result.step == 2


REFUSALS = {
    "missing camera": ({"cameras": ("top",)}, {}, "top"),
    "state too wide": ({"dims": (11, 5)}, {}, "spec.state_dim"),
    "actions too wide": ({"dims": (6, 9)}, {}, "spec.action_dim"),
    "both too wide": ({"dims": (11, 9)}, {}, "--set spec.state_dim=11 --set spec.action_dim=9"),
    "all episodes held out": ({"episodes": 2}, {"val_episodes": 2}, "val_episodes"),
    "unknown listener": ({}, {"listeners": ("mlflow",)}, "tensorboard"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, case):
    how, values, named = REFUSALS[case]
    path = write(tmp_path / "data", **how)
    with pytest.raises(vla.VlaError) as caught:
        train(small(), str(path), out=tmp_path / "run", config=config(**values))
    assert named in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_data_of_another_robot_is_refused(tmp_path):
    pytest.importorskip("vla_robot_droid")
    path = write(tmp_path / "data", robot="libero")
    with pytest.raises(DataError, match="another robot"):
        train(vla.build(type="pi0", preset="tiny", robot="droid"), str(path), out=tmp_path / "run", config=config())
    path = write(tmp_path / "unheard", robot="unheard-of")
    with pytest.raises(DataError, match="no adapter of this name(.|\n)*--set data.robot=droid"):
        train(vla.build(type="pi0", preset="tiny", robot="droid"), str(path), out=tmp_path / "run", config=config())


def test_an_empty_dataset_is_refused(data):
    opened = open_dataset(str(data))

    class Empty:
        info, episodes, sample = opened.info, [], opened.sample

        def __len__(self):
            return 0

    with pytest.raises(DataError, match="the dataset is empty"):
        prepare(small(), Empty(), config())


class Poisoned:
    """A dataset with a NaN in one action of one frame, as a careless recorder leaves it; `late`: only beside images."""

    def __init__(self, inner, frame, late=True):
        self.inner, self.frame, self.late = inner, frame, late
        self.info, self.episodes, self.states, self.prompts = inner.info, inner.episodes, inner.states, inner.prompts
        self.actions, self.digest = inner.actions, inner.digest

    def __len__(self):
        return len(self.inner)

    def sample(self, index, *args, **options):
        found = self.inner.sample(index, *args, **options)
        if index == self.frame and options.get("images", True) >= self.late:
            found["actions"] = found["actions"].copy()
            found["actions"][0, 2] = np.nan
        return found


def test_a_nan_in_the_data_is_one_error_and_the_steps_before_are_kept(tmp_path, data):
    opened = Poisoned(open_dataset(str(data)), int(sample_ids(42, 5, 4, 60)[1]))  # first asked for at step 5
    with pytest.raises(DataError, match="NaN"):
        train(small("pi0"), opened, out=tmp_path / "run", config=config(60, workers=1, prefetch=1))
    assert checkpoint_steps(tmp_path / "run") == [5]
    assert read_metrics(tmp_path / "run", "end")[-1]["interrupted"]
    early = Poisoned(opened.inner, 17, late=False)  # found before the first step, with the lengths
    with pytest.raises(DataError, match="NaN"):
        train(small("pi0"), early, out=tmp_path / "other", config=config(60))
    assert not (tmp_path / "other").exists()


def test_the_console_trains_resumes_and_refuses(tmp_path, data, capsys):
    folder = tmp_path / "variant"
    folder.mkdir()
    (folder / "variant.toml").write_text(small("pi0").to_toml())
    words = [
        "train",
        str(folder),
        "--data",
        str(data),
        "--out",
        str(tmp_path / "run"),
        "--batch-size",
        "4",
        "--no-progress",
    ]
    words = [w for w in words if w != "--no-progress"]
    assert main([*words, "--steps", "2"]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert main([*words, "--steps", "4"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*words, "--steps", "4", "--resume"]) == 0
    assert [r["step"] for r in read_metrics(tmp_path / "run", "end")] == [4]
    stats = tmp_path / "run" / "model" / "norm_stats.json"
    other = json.loads(stats.read_text())
    other["norm_stats"]["state"]["q99"][0] += 1
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert main([*words, "--steps", "5", "--resume", "--stats", str(tmp_path / "other.json")]) == 2
    assert "other normalisation statistics" in capsys.readouterr().err
    assert main([*words, "--steps", "5", "--resume", "--stats", str(stats)]) == 0
    assert main(["train", str(tmp_path / "nothing"), "--data", str(data)]) == 2
    assert main(["train", str(folder)]) == 2
    assert main(["train", str(folder), "--data", str(data), "--steps", "0"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_record_is_plain_json(tmp_path, data):
    result = train(small("pi0"), str(data), out=tmp_path / "run", config=config(1))
    record = json.loads((result.model / "record.json").read_text())
    assert record["train_frames"] == 60 and record["config"]["steps"] == 1 and len(record["data"]) == 64
    with pytest.raises(TrainingError, match="holds a run"):
        train(small("pi0"), str(data), out=tmp_path / "run", config=config(1))


@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_statistics_from_the_file_give_the_same_run_and_what_they_find_is_said(tmp_path, noise, capsys):
    """A gripper that rests in 99 % of the frames: openpi's formula makes a loss of 10^8 of it."""
    rng = np.random.default_rng(0)
    info = DatasetInfo({"base_0_rgb": (32, 32)}, 3, 3, 10.0, action_names=("x", "y", "grip"))
    with create_dataset(tmp_path / "data", info) as writer:
        for e in range(4):
            walk = np.cumsum(rng.normal(size=(60, 3)), 0).astype(np.float32)
            walk[:, 2] = noise * rng.normal(size=60)
            walk[30:32, 2] += e == 1
            for row in walk:
                image = np.full((32, 32, 3), 90, np.uint8)
                writer.add({"images": {"base_0_rgb": image}, "state": row, "action": row, "prompt": "go"})
            writer.end_episode()
    data, file = str(tmp_path / "data"), str(tmp_path / "norm_stats.json")
    assert main(["stats", data, "--horizon", "8", "--out", file]) == 0
    assert "actions[2] rests" in capsys.readouterr().err
    variant = small("pi0", **{"spec.norm": "quantile"})
    runs = []
    for name, stats in (("none", None), ("file", file)):
        out = train(variant, data, out=tmp_path / name, config=config(3, batch_size=32), stats=stats).out
        runs.append([r["loss"] for r in read_metrics(out)])
        notes = " ".join(r["text"] for r in read_metrics(out, "note"))
        assert ("actions[2] rests" in notes) == (stats is None)
    assert runs[0] == runs[1] and max(runs[0]) < 50
    one, two = (read_weights(tmp_path / n / "model" / "model.safetensors") for n in ("none", "file"))
    assert all(np.array_equal(one[k], two[k]) for k in one)
