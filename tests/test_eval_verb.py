"""`vla record` and `vla eval` on the tabletop: every baseline and control on the same episodes."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import vla
from vla.cli import main
from vla.datasets import open_dataset, open_recorded
from vla.training.config import TrainConfig

for module in ("torch", "mujoco", "vla_head_flow", "vla_tokenizer_paligemma", "vla_dataset_tabletop"):
    pytest.importorskip(module)

SCENE = ["--env", "tabletop", "--preset", "tiny", "--set", "env.image_size=32"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(a model directory after one step of training, the demonstrations it saw)."""
    folder = tmp_path_factory.mktemp("eval_verb")
    assert main(["record", *SCENE, "--episodes", "3", "--workers", "1", "--out", str(folder / "data")]) == 0
    variant = vla.build(type="pi0", robot="tabletop", preset="tiny", set={"backbone.llm.depth": 1})
    config = TrainConfig(steps=1, batch_size=2, device="cpu")
    return vla.train(variant, folder / "data", out=folder / "run", config=config).model, folder / "data"


def test_every_contestant_meets_the_same_episodes(world, tmp_path, monkeypatch, capsys):
    model, data = world
    monkeypatch.setenv("VLA_CACHE", str(tmp_path / "cache"))
    against = ["shuffled", "swapped", "untrained", "mean-action", "nearest"]
    options = [word for name in against for word in ("--against", name)]
    words = ["eval", str(model), *SCENE, "--set", "env.max_steps=4", "--episodes", "3", "--num-workers", "0"]
    assert main([*words, *options, "--data", str(data), "--out", str(tmp_path / "report"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["evaluations"]
    assert [(e["instruction"], e["pictures"]) for e in found] == [
        ("given", "given"), ("shuffled", "given"), ("given", "swapped"), *[("given", "given")] * 3,
    ]  # fmt: skip
    assert [e["policy"].rpartition(" ")[2] for e in found[3:]] == ["(untrained)", "action", "neighbour"]
    seeds = [[episode["seed"] for episode in e["episodes"]] for e in found]
    assert all(s == [0, 1, 2] for s in seeds)
    page = (tmp_path / "report" / "report.html").read_text()
    for text in ("instruction shuffled", "pictures of another scene", "nearest neighbour"):
        assert text in page
    assert [f.suffix for f in (tmp_path / "cache" / "frames").iterdir()] == [".npy"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--against", "nearest", "--set", "data.preset=tiny"], "settings of data that is not named"),
        (["--against", "mean-action", "--data", "nowhere"], "nowhere"),
        (["--against", "luck"], "no such baseline"),
        (["--against", "swapped", "--episodes", "1"], "given twice"),
        (["--num-workers", "-2"], "num_workers"),
    ],
)
def test_wrong_options_are_one_clear_error(world, capsys, words, message):
    assert main(["eval", str(world[0]), *SCENE, "--episodes", "2", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_a_control_that_is_impossible_loses_nothing(world, tmp_path, capsys):
    words = ["eval", str(world[0]), *SCENE, "--set", "env.max_steps=2", "--episodes", "1", "--num-workers", "0"]
    assert main([*words, "--against", "swapped", "--out", str(tmp_path / "report"), "--json"]) == 2
    said = capsys.readouterr()
    assert "no other scene" in said.err and len(json.loads(said.out)["evaluations"]) == 1
    assert len(json.loads((tmp_path / "report" / "results.json").read_text())["evaluations"]) == 1


def test_a_report_that_is_in_the_way_is_said_before_the_first_episode(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vla.evaluation, "evaluate", lambda *a, **k: pytest.fail("it began"))
    (tmp_path / "notes.txt").write_text("mine")
    for more, message in (([], "add --overwrite"), (["--overwrite"], "not written by vla")):
        assert main(["eval", str(world[0]), *SCENE, "--episodes", "2", "--out", str(tmp_path), *more]) == 2
        assert message in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


def test_the_command_of_the_documentation_with_a_model_folder(world, tmp_path, monkeypatch, capsys):
    """Its baselines are made from the demonstrations that the record of the model names."""
    monkeypatch.setenv("VLA_CACHE", str(tmp_path / "cache"))
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    command = re.search(r"```\n(vla eval .*?)```", page, re.S)[1]
    words = shlex.split(command.replace("\\\n", ""))
    assert words[:3] == ["vla", "eval", "runs/demo/train/model"] and "nearest" in words and "--data" not in words
    words[2], words[words.index("--out") + 1] = str(world[0]), str(tmp_path / "report")
    words[words.index("--episodes") + 1] = "2"
    less = ["--set", "env.image_size=32", "--set", "env.max_steps=4", "--num-workers", "0"]
    assert main([*words[1:], *less, "--json"]) == 0
    said = capsys.readouterr()
    assert f"demonstrations: {world[1]} (the model was trained on them)" in said.err
    assert json.loads(said.out)["evaluations"][-1]["policy"].endswith("nearest neighbour")


def test_demonstrations_that_moved_or_changed_are_asked_for(world, tmp_path, capsys):
    model, data = shutil.copytree(world[0], tmp_path / "model"), shutil.copytree(world[1], tmp_path / "data")
    words = ["eval", str(model), *SCENE, "--set", "env.max_steps=2", "--episodes", "1", "--num-workers", "0",
             "--against", "mean-action", "--json"]  # fmt: skip

    def said(**record) -> str:
        from vla.manifest import write_manifest

        facts = {**json.loads((world[0] / "record.json").read_text()), **record}
        (model / "record.json").write_text(json.dumps(facts))
        write_manifest(model, "model")
        assert main(words) == 2
        return capsys.readouterr().err

    assert json.loads((world[0] / "record.json").read_text())["source"] == {"part": "lerobot", "path": str(world[1])}
    for source in (str(tmp_path / "gone"), {"part": "tabletop", "path": str(tmp_path / "gone")}):
        text = said(source=source)
        assert "cannot be opened" in text and "gone" in text and "add --data DATA" in text
        assert not (tmp_path / "gone").exists()
    assert "other data now" in said(source=str(data), data="0" * 64)
    assert "does not say where the data is" in said(source=None)
    assert main([*words, "--data", str(data)]) == 0
    assert "trained on other data" not in capsys.readouterr().err
    other = tmp_path / "other"
    assert main(["record", *SCENE, "--episodes", "1", "--workers", "1", "--seed", "5", "--out", str(other)]) == 0
    assert main([*words, "--data", str(other)]) == 0
    assert "the model was trained on other data" in capsys.readouterr().err


def test_settings_of_the_data_on_the_command_line(world, tmp_path, monkeypatch, capsys):
    """`--set data.X` reaches the dataset of `train` and `stats`, and the record names it."""
    monkeypatch.setenv("VLA_CACHE", str(tmp_path / "cache"))
    of_data = [
        word
        for item in ("preset=tiny", "episodes=2", "image_size=32", "workers=1")
        for word in ("--set", f"data.{item}")
    ]
    assert main(["stats", "tabletop", *of_data, "--out", str(tmp_path / "norm_stats.json")]) == 0
    assert "2 episodes" in capsys.readouterr().out
    words = [
        "train",
        "--type",
        "pi0",
        "--preset",
        "tiny",
        "--set",
        "backbone.llm.depth=1",
        "--data",
        "tabletop",
        *of_data,
    ]
    assert main([*words, "--out", str(tmp_path / "run"), "--steps", "1", "--batch-size", "2", "--device", "cpu"]) == 0
    record = json.loads((tmp_path / "run" / "model" / "record.json").read_text())
    assert record["source"] == {"part": "tabletop", "preset": "tiny", "episodes": 2, "image_size": 32, "workers": 1}
    # Handed over opened, as the demo does.
    opened = open_dataset({**record["source"]})
    variant = vla.build(type="pi0", robot="tabletop", preset="tiny", set={"backbone.llm.depth": 1})
    config = TrainConfig(steps=1, batch_size=2, device="cpu")
    again = vla.train(variant, opened, out=tmp_path / "again", config=config)
    assert open_recorded(json.loads((again.model / "record.json").read_text())).digest() == record["data"]
    capsys.readouterr()
    assert main([*words, "--set", "data.colour=red", "--out", str(tmp_path / "second")]) == 2
    said = capsys.readouterr().err
    assert "data.colour" in said and "Traceback" not in said and not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["tabeltop"], ["no dataset of this name", "did you mean tabletop?"]),
        (["tabeltop:x"], ["did you mean tabletop?"]),
        (["tabletop", "--set", "data.episodes=0"], ["data.episodes", "got:      0", "1 to"]),
        (["tabletop", "--set", "data.families=touch"], ["data.families", """--set data.families='["touch"]'"""]),
        (["tabletop", "--set", "data.preset=huge"], ["huge", "tiny"]),
        (["{data}", "--model", "nowhere"], ["no such variant file", "vla build"]),
        (["{data}", "--model", "{data}"], ["no variant.toml", "vla build"]),
        (["{data}", "--set", "data.state_key=pose"], ["state_key", "pose", "observation.state"]),
    ],
)
def test_wrong_data_is_one_error_with_a_way_out(world, tmp_path, capsys, words, messages):
    out = tmp_path / "norm_stats.json"
    assert (
        main(["stats", *(w.format(data=world[1]) if w.startswith("{") else w for w in words), "--out", str(out)]) == 2
    )
    said = capsys.readouterr().err
    assert all(text in said for text in messages) and "Traceback" not in said and not out.exists(), said
