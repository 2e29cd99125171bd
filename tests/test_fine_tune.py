"""Fine-tuning a model of one's own: what may change, where weights and statistics come from, and the run directory."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

for needed in ("torch", "vla_dataset_lerobot", "vla_head_flow", "vla_tokenizer_paligemma"):
    pytest.importorskip(needed)

import vla  # noqa: E402
from vla.cli import main  # noqa: E402
from vla.datasets import open_dataset  # noqa: E402
from vla.errors import StoreError  # noqa: E402
from vla.runs import find_model  # noqa: E402
from vla.store import open_model, read_weights  # noqa: E402
from vla.testing.closeness import close  # noqa: E402
from vla.training.checkpoints import checkpoint_folder, checkpoint_steps  # noqa: E402
from vla.training.loop import train  # noqa: E402

_spec = importlib.util.spec_from_file_location("end_to_end", Path(__file__).parent / "test_train_end_to_end.py")
world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world)
SMALL = {**world.SIZES, "backbone.vision.posemb": "learn", "head.width": 32, "head.mlp_dim": 32}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return world.write(tmp_path_factory.mktemp("data") / "walk", episodes=3, frames=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory, data):
    """A run of a small pi05: three checkpoints and a model."""
    variant = vla.build(type="pi05", preset="tiny", set=SMALL)
    config = world.config(3, save_every=1, keep_last=3)
    return train(variant, str(data), out=tmp_path_factory.mktemp("base") / "run", config=config).out


def test_a_run_and_its_checkpoints_open_as_models(base, data, tmp_path):
    assert find_model(base) == base / "model" == open_model(base).folder
    assert find_model(f"{base}@2") == checkpoint_folder(base, 2)
    seen = open_dataset(str(data)).sample(0, 8)
    last, whole = (vla.open(where).infer(seen, seed=1)["actions"] for where in (f"{base}@3", base))
    assert np.array_equal(last, whole)  # the last checkpoint holds the weights of the model
    middle = vla.open(f"{base}@2")
    assert middle.metadata["record"]["steps"] == 2 and not np.array_equal(middle.infer(seen, seed=1)["actions"], last)
    assert vla.read_variant(f"{base}@2").to_toml() == vla.read_variant(base).to_toml()
    running = tmp_path / "running"  # as it looks before the run has ended
    (running / "checkpoints").mkdir(parents=True)
    with pytest.raises(StoreError, match="no model and no checkpoint yet"):
        vla.open(running)
    (running / "checkpoints" / "step-00000002").symlink_to(checkpoint_folder(base, 2))
    assert vla.open(running).metadata["record"]["steps"] == 2
    with pytest.raises(StoreError, match="no checkpoint of this step") as caught:
        vla.open(f"{base}@9")
    assert f"{base}@3" in str(caught.value) and "[1, 2, 3]" in str(caught.value)


def say(*words):
    return main([str(w) for w in words])


QUICK = ["--steps", "1", "--batch-size", "2", "--no-progress"]


def test_what_no_weight_depends_on_changes_and_the_rest_is_refused_by_name(base, data, tmp_path, capsys):
    free = [
        "spec.action_horizon=5", "spec.max_token_len=120", "spec.norm=zscore", "spec.image_size=[48,64]",
        'spec.cameras=["base_0_rgb"]', 'robot.cameras=["base_0_rgb=left_wrist_0_rgb"]', "head.num_steps=3",
        "tokenizer.prompt=pi0", "head.state=none",
    ]  # fmt: skip
    words = [w for one in free for w in ("--set", one)]
    assert say("train", base, "--data", data, "--out", tmp_path / "run", *QUICK, *words, "--lr", "1e-9") == 0
    said = capsys.readouterr().err
    assert f"of {base / 'model'}\n  resampled  backbone.vision.position" in said and "statistics: of the data" in said
    before, after = (read_weights(open_model(run).weights) for run in (base, tmp_path / "run"))
    for name in before:
        if name != "backbone.vision.position":
            close(after[name], before[name], 1e-6, name, scale=1e-3)
    assert before["backbone.vision.position"].shape[1] == 4 and after["backbone.vision.position"].shape[1] == 12
    record = open_model(tmp_path / "run").record
    assert record["weights"]["base"] == str(base / "model") and record["weights"]["digest"] == open_model(base).digest
    assert record["weights"]["resampled"] == ["backbone.vision.position"] and "new" not in record["weights"]

    wide = ["--set", "spec.action_dim=12", "--set", "spec.action_horizon=5"]
    assert say("train", base, "--data", data, "--out", tmp_path / "wide", *QUICK, *wide) == 2
    said = capsys.readouterr().err
    assert "spec.action_dim: 8 -> 12" in said and "action_horizon" not in said and not (tmp_path / "wide").exists()
    assert "head.action_in_proj.weight [32, 8] -> [32, 12]" in said
    way = said.partition("make these weights anew: ")[2].split()
    assert way == ["--reinit", "head.action_in_proj.weight,head.action_out_proj"]
    assert say("train", base, "--data", data, "--out", tmp_path / "wide", *QUICK, *wide, *way) == 0
    anew = ["head.action_in_proj.weight", "head.action_out_proj.bias", "head.action_out_proj.weight"]
    assert sorted(open_model(tmp_path / "wide").record["weights"]["reinit"]) == anew
    assert say("train", base, "--data", data, "--out", tmp_path / "no", *QUICK, "--reinit", "head.nothing") == 2
    assert "no weights have this name" in capsys.readouterr().err


def test_heads_that_share_an_axis_are_told_apart(base, data, tmp_path, capsys):
    """2 heads of 16 and 4 of 8 have equal PyTorch shapes: only the other layout shows that the weights mean another."""
    sets = ["--set", "backbone.llm.num_heads=4", "--set", "backbone.llm.head_dim=8"]
    assert say("train", base, "--data", data, "--out", tmp_path / "run", *QUICK, *sets) == 2
    assert "backbone.llm" in capsys.readouterr().err


def test_overwrite_never_removes_the_model_that_it_starts_from(base, data, capsys):
    for model in (base, base / "model", f"{base}@2"):
        assert say("train", model, "--data", data, "--out", base, "--overwrite", *QUICK) == 2
        said = capsys.readouterr().err
        assert "would remove the model that training starts from" in said and "choose another --out" in said
    assert (base / "model").is_dir() and checkpoint_steps(base) == [1, 2, 3]


def test_reinit_without_weights_is_refused(base, tmp_path, capsys):
    assert say("build", "--base", base, "--reinit", "head", "--out", tmp_path / "model") == 2
    assert "add --init MODEL" in capsys.readouterr().err and not (tmp_path / "model").exists()


def test_a_width_that_is_set_too_small_for_the_data_is_refused(data, capsys):
    """What is set wins, but not over the data: and the way out is not the option that is there already."""
    words = ["build", "--for", data, "--head", "flow", "--preset", "tiny"]
    assert say(*words, "--set", "spec.action_dim=3") == 2
    said = capsys.readouterr().err
    assert "spec.action_dim" in said and ">= 5" in said and "--fit-data" not in said
    assert say(*words, "--set", "spec.action_dim=5") == 0


def test_a_wrong_setting_of_recorded_data_is_named(base, capsys):
    assert say("sample", base, "--set", "data.nope=2") == 2
    said = capsys.readouterr().err
    assert "unknown setting" in said and "data.nope" in said and "--data DATA" not in said


def test_build_with_weights_follows_the_same_rule(base, data, tmp_path, capsys):
    words = ["build", "--base", base, "--init", base, "--out", tmp_path / "model"]
    assert say(*words, "--set", "spec.action_dim=12") == 2
    assert "--reinit head.action_in_proj.weight,head.action_out_proj" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
    assert say(*words, "--set", "spec.action_horizon=3", "--seed", "5", "--reinit", "head.action_in_proj") == 0
    made = open_model(tmp_path / "model")
    assert made.variant.spec.action_horizon == 3 and made.record["weights"]["seed"] == 5
    old, new = read_weights(open_model(base).weights), read_weights(made.weights)
    changed = {name for name in old if not np.array_equal(old[name], new[name])}
    assert changed == {"head.action_in_proj.weight", "head.action_in_proj.bias"}
    assert vla.open(tmp_path / "model").infer(open_dataset(str(data)).sample(0, 3))["actions"].shape == (3, 5)
    # Another head than the base's: what has no place, and what is missing, are both said.
    assert (
        say("build", "--base", base, "--head", "ki", "--tokenizer", "fast", "--init", base, "--out", tmp_path / "ki")
        == 2
    )
    said = capsys.readouterr().err
    assert "head.action_in_proj.weight [32, 8] -> no place" in said and "head.actions.action_in_proj.weight" in said


def test_weights_that_were_never_trained_do_not_stay_as_drawn_unasked(base, data, tmp_path, capsys):
    variant = tmp_path / "variant"
    variant.mkdir()
    (variant / "variant.toml").write_text(vla.read_variant(base).to_toml())
    words = ["train", variant, "--data", data, "--out", tmp_path / "run", *QUICK]
    for frozen in (["--lora.rank", "2"], ["--freeze", "backbone.vision"]):
        assert say(*words, *frozen) == 2
        said = capsys.readouterr().err
        assert "never trained" in said and "--yes-random" in said and not (tmp_path / "run").exists()
    assert say(*words, "--freeze", "backbone.vision", "--yes-random") == 0
    assert "weights: new, seed 42" in capsys.readouterr().err
    left = open_model(tmp_path / "run").record["weights"]["untrained"]
    assert left and all(name.startswith("backbone.vision") for name in left)
    # What stayed as drawn is still untrained in the next run; what a run has trained is not.
    again = ["train", tmp_path / "run", "--data", data, "--out", tmp_path / "next", *QUICK]
    assert say(*again, "--freeze", "backbone.vision") == 2 and "backbone.vision" in capsys.readouterr().err
    assert say(*again, "--freeze", "head") == 0
    # New weights in a model that is trained otherwise: the same.
    mine = ["train", base, "--data", data, "--out", tmp_path / "mine", *QUICK, "--reinit", "head.action_in_proj"]
    assert say(*mine, "--freeze", "head") == 2
    assert "head.action_in_proj" in capsys.readouterr().err


def test_a_run_goes_on_with_its_folder_alone(base, data, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["--data", data, "--set", "spec.action_horizon=5", "--lr", "0.01", "--reinit", "head.action_out_proj"]
    assert say("train", base, "--out", out, *words, *QUICK, "--seed", "7") == 0
    assert say("train", "--out", out, "--resume") == 0  # nothing is left to do
    assert say("train", "--out", out, "--resume", "--steps", "2") == 0
    whole = tmp_path / "whole"
    plan = ["--steps", "2", *QUICK[2:], "--seed", "7", "--lr-decay-steps", "1"]
    assert say("train", base, "--out", whole, *words, *plan) == 0
    one, two = (read_weights(open_model(run).weights) for run in (out, whole))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    capsys.readouterr()
    for given, named in (
        (["--lr", "0.5"], "lr: 0.01 -> 0.5"), (["--set", "spec.action_horizon=6"], "--set"),
        (["--reinit", "head"], "--reinit"), (["--stats", "base"], "--stats"), (["--type", "pi0"], "--type"),
    ):  # fmt: skip
        assert say("train", "--out", out, "--resume", "--steps", "3", *given) == 2
        assert named in capsys.readouterr().err
    assert say("train", base, "--out", out, *words, "--resume", "--steps", "3") == 0  # given again, and the same
    assert say("train", "--out", tmp_path / "nothing", "--resume") == 2
    assert "does not say what its run is made of" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text('{"mine": 1}')  # a file of that name that is not ours stays
    assert say("train", base, "--out", tmp_path / "mine", *words, *QUICK) == 2
    assert "no record of a run" in capsys.readouterr().err and "mine" in (tmp_path / "mine" / "run.json").read_text()


@pytest.mark.slow
def test_a_run_goes_on_without_its_base_and_with_lora_opens_at_any_step(base, data, tmp_path, capsys):
    pytest.importorskip("jax")
    mine, out = shutil.copytree(base / "model", tmp_path / "mine"), tmp_path / "run"
    words = [
        "--data",
        data,
        *QUICK,
        "--save-every",
        "1",
        "--lora.rank",
        "2",
        "--set",
        "spec.max_token_len=120",
        "--lr",
        "0.01",
    ]
    assert say("train", mine, "--out", out, *words, "--framework", "jax") == 0
    shutil.rmtree(mine)
    assert say("train", "--out", out, "--resume", "--steps", "2", "--framework", "torch", "--allow-change") == 0
    seen = open_dataset(str(data)).sample(0, 8)
    last, whole, other = (
        vla.open(*where).infer(seen, seed=1)["actions"] for where in ((f"{out}@2",), (out,), (f"{out}@2", "jax"))
    )
    assert np.array_equal(last, whole)  # adapters merged, averages in their place
    close(other, whole, 1e-4)
    assert say("merge", base, out, "--out", tmp_path / "merged") == 0
    merged = read_weights(tmp_path / "merged" / "model.safetensors")
    assert all(np.array_equal(merged[n], a) for n, a in read_weights(out / "model" / "model.safetensors").items())
    assert say("show", f"{out}@1", "--no-sizes") == 0 and "who sees whom" in capsys.readouterr().out


def test_a_run_killed_before_its_first_checkpoint_begins_again(base, data, tmp_path, monkeypatch):
    from vla.training import loop

    def stop(*_):
        raise KeyboardInterrupt

    words = ["train", base, "--data", data, "--out", tmp_path / "run", *QUICK, "--set", "spec.action_horizon=5"]
    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "go", stop)
        assert say(*words, "--reinit", "head.action_out_proj") == 130
    assert sorted(f.name for f in (tmp_path / "run").iterdir() if f.name[0] != ".") == ["metrics.jsonl", "run.json"]
    assert say("train", "--out", tmp_path / "run", "--resume") == 0
    record = open_model(tmp_path / "run").record["weights"]
    assert record["base"] == str(base / "model") and record["reinit"] and record["seed"] == 42


def test_a_recipe_on_a_model_sets_what_it_says_and_no_part(base, data, tmp_path, capsys):
    file = tmp_path / "mine.toml"
    text = 'vla_recipe = 1\ntype = "pi05"\nrobot = "plain"\n[spec]\naction_horizon = 4\n[set]\n"head.num_steps" = 2\n'
    file.write_text(text + "[train]\nsteps = 1\nbatch_size = 2\nprogress = false\n")
    assert say("train", base, "--recipe", file, "--data", data, "--out", tmp_path / "run") == 0
    opened = open_model(tmp_path / "run")
    assert opened.variant.spec.action_horizon == 4 and opened.variant.head.settings.num_steps == 2
    assert opened.variant.backbone.table() == open_model(base).variant.backbone.table()
    assert opened.record["steps"] == 1 and opened.record["weights"]["base"] == str(base / "model")
    for type, named in (("pi05_ki", "tokenizer"), ("pi0", "head.time")):
        file.write_text(f'vla_recipe = 1\ntype = "{type}"\n')
        assert say("train", base, "--recipe", file, "--data", data, "--out", tmp_path / "no") == 2
        assert f"field:    {named}\n" in capsys.readouterr().err


def test_statistics_that_do_not_fit_are_said_and_refused(base, data, tmp_path, capsys):
    stats = json.loads((base / "model" / "norm_stats.json").read_text())
    for key in ("mean", "q01", "q99"):
        stats["norm_stats"]["state"][key] = [v + 1000 for v in stats["norm_stats"]["state"][key]]
    file = tmp_path / "stats.json"
    file.write_text(json.dumps(stats))
    words = ["train", base, "--data", data, "--out", tmp_path / "run", *QUICK]
    assert say(*words, "--stats", file) == 2
    said = capsys.readouterr().err
    assert "state[0]: 100% outside the range" in said and "--stats data" in said and not (tmp_path / "run").exists()
    assert say(*words, "--stats", "base") == 0
    assert "statistics: of the base model" in capsys.readouterr().err
    assert say("train", tmp_path / "run", "--data", data, "--out", tmp_path / "next", *QUICK, "--stats", "no.json") == 2
    assert (
        say("train", "--type", "pi0", "--preset", "tiny", "--data", data, "--out", tmp_path / "x", "--stats", "base")
        == 2
    )
    assert "no statistics of a base model" in capsys.readouterr().err


def test_several_datasets_are_a_mixture(base, data, tmp_path, capsys):
    other = world.write(tmp_path / "other:0.5", episodes=2, frames=4, seed=3)  # a colon in a name is no weight
    words = ["train", base, *QUICK, "--out", tmp_path / "run"]
    assert say(*words, "--data", data, "--data", other) == 0
    said = capsys.readouterr().err
    assert f"data: 75% {data} (24 frames" in said and f"data: 25% {other} (8 frames" in said
    assert say("sample", tmp_path / "run", "--json") == 0  # the record opens the mixture again
    assert len(json.loads(capsys.readouterr().out)["actions"]) == 8
    assert say("train", "--out", tmp_path / "run", "--resume", "--steps", "2") == 0
    assert len(open_model(tmp_path / "run").record["source"]["mixture"]) == 2
    words[-1] = tmp_path / "two"
    assert say(*words, "--data", f"{data}:0.1", "--data", f"lerobot:{other}:0.3", "--set", "data.1.prompt=pick") == 0
    said = capsys.readouterr().err
    assert f"data: 25% {data} (24 frames" in said and f"data: 75% {other} (" in said
    words[-1] = tmp_path / "no"
    for given, named in (
        ([f"{data}:0.3", other], "some datasets of a mixture have a weight"), ([f"{data}:0.3"], "of a single dataset"),
        ([data, data], "named twice"), ([f"{data}:0", f"{other}:1"], "weight must be positive"),
    ):  # fmt: skip
        assert say(*words, *(word for one in given for word in ("--data", one))) == 2
        assert named in capsys.readouterr().err
    assert say(*words, "--data", data, "--data", other, "--set", "data.2.stride=2") == 2
    assert "data.0 to data.1" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_what_is_no_list_is_given_once(base, data, tmp_path, capsys):
    words = ["train", base, "--data", data, "--out", tmp_path / "run", *QUICK]
    for given in (["--lr", "1", "--lr", "1"], ["--resume", "--resume"], ["--augment", "--no-augment"], ["--steps=2"]):
        assert say(*words, *given) == 2
        assert "given twice" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_follows_from_the_data_is_chosen_and_said_and_what_is_set_wins(base, data, tmp_path, capsys):
    other = world.write(tmp_path / "other", episodes=2, frames=7, dims=(9, 11), cameras=("top", "wrist_right"))
    parts = ["--head", "flow", "--tokenizer", "paligemma", "--preset", "tiny", "--set", "head.width=32"]
    out = tmp_path / "variant"
    assert say("build", *parts, "--for", other, "--set", "spec.action_dim=16", "--out", out) == 0
    said = capsys.readouterr().err
    assert "spec.state_dim = 9   (the data's states have 9 values)" in said and "spec.action_dim" not in said
    assert 'robot.cameras = ["base_0_rgb=top", "right_wrist_0_rgb=wrist_right"]' in said
    assert "spec.action_horizon = 7   (half of the episodes" in said and "spec.max_token_len" in said
    spec = vla.read_variant(out).spec
    assert (spec.state_dim, spec.action_dim, spec.action_horizon) == (9, 16, 7)
    assert spec.cameras == ("base_0_rgb", "right_wrist_0_rgb") and spec.max_token_len % 16 == 0
    assert (
        say("train", "--data", other, *parts, *QUICK, "--out", tmp_path / "run", "--set", "spec.action_horizon=4") == 0
    )
    made = open_model(tmp_path / "run").variant.spec
    assert (made.action_dim, made.action_horizon) == (11, 4) and made.max_token_len >= spec.max_token_len
    # A model keeps every shape that can hold the data; what cannot stay is made anew.
    assert say("train", base, "--data", other, "--fit-data", *QUICK, "--out", tmp_path / "tuned", "--allow-change") == 0
    said = capsys.readouterr().err
    assert "--reinit head.action_in_proj.weight,head.action_out_proj" in said and "action_horizon" not in said
    tuned = open_model(tmp_path / "tuned")
    assert tuned.variant.spec.action_dim == 11 and tuned.variant.spec.state_dim == 9
    assert tuned.variant.robot.settings.cameras == ("base_0_rgb=top", "left_wrist_0_rgb=wrist_right")
    assert len(tuned.record["weights"]["reinit"]) == 3
    # Another robot was allowed, another plan was not.
    assert say("train", "--out", tmp_path / "tuned", "--resume", "--steps", "2", "--lr", "0.5") == 2
    assert "lr: " in capsys.readouterr().err
    assert say("train", "--out", tmp_path / "tuned", "--resume", "--steps", "2") == 0
    assert say("build", "--base", base, "--init", base, "--for", other, "--out", tmp_path / "model") == 0
    assert open_model(tmp_path / "model").record["weights"]["reinit"] == tuned.record["weights"]["reinit"]


def test_the_adapter_of_the_robot_is_taken_and_what_is_set_of_it_stays(tmp_path, capsys):
    pytest.importorskip("vla_robot_libero")
    cameras = ("image", "wrist_image")
    data = world.write(tmp_path / "libero", episodes=2, frames=6, dims=(8, 7), cameras=cameras, robot="libero")
    words = ["build", "--head", "flow", "--tokenizer", "paligemma", "--preset", "tiny", "--for", data]
    assert say(*words, "--out", tmp_path / "a") == 0 and "robot adapter: libero" in capsys.readouterr().err
    made = vla.read_variant(tmp_path / "a")
    assert (made.robot.part.name, made.spec.state_dim, made.spec.action_dim) == ("libero", 8, 7)
    mine = ["--robot", "plain", "--set", 'robot.cameras=["front=image"]']
    assert say(*words, *mine, "--set", 'spec.cameras=["front"]', "--out", tmp_path / "b") == 0
    made = vla.read_variant(tmp_path / "b")
    assert made.robot.settings.cameras == ("front=image",) and made.spec.cameras == ("front",)


def test_cameras_find_their_places_by_name():
    from vla.training.for_data import camera_pairs

    mine = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    for theirs, pairs in (
        (["ego_view"], "base_0_rgb=ego_view"),
        (["wrist", "front"], "base_0_rgb=front left_wrist_0_rgb=wrist"),
        (["cam_right_wrist", "cam_high", "cam_left_wrist"],
         "base_0_rgb=cam_high left_wrist_0_rgb=cam_left_wrist right_wrist_0_rgb=cam_right_wrist"),
        (["left", "right"], "base_0_rgb=left left_wrist_0_rgb=right"),
        (["right_wrist_0_rgb", "top"], "base_0_rgb=top right_wrist_0_rgb=right_wrist_0_rgb"),
        (["a", "b", "c", "d"], "base_0_rgb=a left_wrist_0_rgb=b right_wrist_0_rgb=c"),
    ):  # fmt: skip
        assert " ".join(f"{k}={v}" for k, v in camera_pairs(theirs, mine).items()) == pairs
