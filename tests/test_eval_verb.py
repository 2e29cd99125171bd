"""`vla record` and `vla eval` on the tabletop: every baseline and control on the same episodes."""

import json

import pytest

import vla
from vla.cli import main
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
        (["--against", "nearest"], "nearest is made from demonstrations"),
        (["--against", "mean-action"], "mean-action is made from demonstrations"),
        (["--against", "luck"], "no such baseline"),
        (["--against", "swapped", "--episodes", "1"], "no other scene"),
        (["--num-workers", "-2"], "num_workers"),
    ],
)
def test_wrong_options_are_one_clear_error(world, capsys, words, message):
    assert main(["eval", str(world[0]), *SCENE, "--episodes", "2", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
