"""The robot adapter that data asks for is taken, whatever else is set, and is never lost by following a message."""

from types import SimpleNamespace

import pytest

import vla
from vla.errors import SettingsError
from vla.fitting import MisfitError
from vla.training.prepare import for_robot_of

pytest.importorskip("vla_robot_aloha")


def adapter(robot="aloha", **sets):
    notes = []
    data = SimpleNamespace(info=SimpleNamespace(robot=robot))
    sets = {"spec.state_dim": 14, "spec.action_dim": 14, **sets}
    variant = for_robot_of(vla.build(type="pi0", preset="tiny", set=sets), data, notes.append)
    return variant.parts["robot"], notes


def test_settings_made_for_plain_go_to_the_adapter_of_the_robot():
    untouched, notes = adapter()
    assert untouched.part.name == "aloha" and notes == ["robot adapter: aloha (the data was recorded on it)"]
    named, _ = adapter(**{"robot.cameras": ["base_0_rgb=top"]})  # the advice for a camera of another name
    assert named.part.name == "aloha" and named.settings.cameras == ("base_0_rgb=top",) and named.settings.delta
    wide, _ = adapter(**{"robot.state_dim": 14, "robot.action_dim": 14})  # what the adapter has anyway
    assert wide.part.name == "aloha"


@pytest.mark.parametrize(
    "sets", [{"robot.delta": [6, -1]}, {"robot.state_dim": 7, "robot.cameras": ["base_0_rgb=top"]}]
)
def test_a_setting_that_the_adapter_lacks_is_refused_with_both_ways_out(sets):
    with pytest.raises(SettingsError, match=r"robot\.(delta|state_dim)(.|\n)*data\.robot=plain"):
        adapter(**sets)
    kept, notes = adapter(robot="plain", **sets)
    assert kept.part.name == "plain" and not notes


def test_an_adapter_that_was_chosen_stays():
    assert adapter(robot="unheard of")[0].part.name == "plain"
    data = SimpleNamespace(info=SimpleNamespace(robot="aloha"))
    sets = {"spec.state_dim": 14, "spec.action_dim": 14, "robot.adapt_to_pi": False}
    chosen = vla.build(type="pi0", preset="tiny", robot="aloha", set=sets)
    assert for_robot_of(chosen, data) is chosen


def test_a_robot_wider_than_the_model_is_no_reason_to_take_another_adapter():
    with pytest.raises(MisfitError, match="--set spec.state_dim=14 --set spec.action_dim=14") as caught:
        adapter(**{"spec.state_dim": 8, "spec.action_dim": 8})
    assert "--robot" not in str(caught.value)


def test_statistics_are_of_the_adapter_that_training_takes(tmp_path, capsys):
    import json

    import numpy as np

    from vla.cli import main
    from vla.datasets import DatasetInfo, create_dataset

    pytest.importorskip("vla_dataset_lerobot")
    info = DatasetInfo({"top": (16, 16)}, 14, 14, 50.0, robot="aloha")
    with create_dataset(tmp_path / "data", info) as writer:
        for i in range(6):
            frame = {"images": {"top": np.zeros((16, 16, 3), np.uint8)}, "prompt": "go"}
            writer.add({**frame, "state": np.full(14, 0.1 * i, np.float32), "action": np.full(14, 0.1 * i, np.float32)})
        writer.end_episode()
    sets = ("--set", 'robot.cameras=["base_0_rgb=top"]')
    variant = ("--type", "pi0", "--preset", "tiny", *sets, "--set", "spec.state_dim=14", "--set", "spec.action_dim=14")
    assert main(["build", *variant, "--out", str(tmp_path / "v")]) == 0
    for model in ((), ("--model", str(tmp_path / "v"))):
        words = ["stats", str(tmp_path / "data"), *model, "--out", str(tmp_path / "s.json")]
        assert main([*words, *(() if model else sets)]) == 0
        assert json.loads((tmp_path / "s.json").read_text())["vla"]["robot"]["part"] == "aloha"
        assert "robot adapter: aloha" in capsys.readouterr().err


@pytest.mark.slow
def test_fine_tuning_on_other_names_is_refused_and_what_it_says_works_when_typed(tmp_path, capsys):
    import json
    import re
    import shlex

    import numpy as np

    from vla.cli import main
    from vla.datasets import DatasetInfo, create_dataset

    for needed in ("torch", "vla_dataset_lerobot"):
        pytest.importorskip(needed)

    def data(name, names=("x", "y"), hz=10, camera="front"):
        info = DatasetInfo({camera: (16, 16)}, 2, 2, hz, action_names=names)
        with create_dataset(tmp_path / name, info) as writer:
            for i in range(8):
                frame = {"images": {camera: np.zeros((16, 16, 3), np.uint8)}, "prompt": "go"}
                writer.add({**frame, "state": np.full(2, i / 9), "action": np.full(2, i / 9)})
            writer.end_episode()
        return str(tmp_path / name)

    words = ["--steps", "1", "--batch-size", "2", "--no-progress", "--overwrite"]
    sets = ("spec.image_size=[32,32]", 'spec.cameras=["front"]', "backbone.llm.depth=1", "backbone.vision.depth=1")
    small = ["--type", "pi0", "--preset", "tiny", *(w for s in sets for w in ("--set", s))]
    first = data("first")
    assert main(["train", *small, "--data", first, "--out", str(tmp_path / "run"), *words]) == 0
    record = json.loads((tmp_path / "run/model/record.json").read_text())
    assert record["embodiment"] == {
        "cameras": ["front"], "state_dim": 2, "action_dim": 2, "action_names": ["x", "y"], "hz": 10.0
    }  # fmt: skip
    tune = ["train", str(tmp_path / "run"), "--out", str(tmp_path / "tuned"), *words]
    for name, changes in (
        ("swapped", {"names": ("y", "x")}), ("fast", {"hz": 30}), ("renamed", {"camera": "top"}),
    ):  # fmt: skip
        other = data(name, **changes)
        capsys.readouterr()
        assert main([*tune, "--data", other]) == 2
        fix = re.search(r"fix: +(.*)", capsys.readouterr().err).group(1)
        way = shlex.split(re.search(r"if it means the same: (.*); to train", fix).group(1))
        assert main([*tune, "--data", other, *way]) == 0, way
        assert main([*tune, "--data", other, "--allow-change"]) == (2 if name == "renamed" else 0)  # no camera is left
        capsys.readouterr()
        mix = ["train", *small, "--data", first, "--data", other, "--out", str(tmp_path / "mixed"), *words]
        assert main(mix) == 2
        fix = re.search(r"fix: +(.*)", capsys.readouterr().err).group(1)
        way = shlex.split(fix.partition("if they mean the same: ")[2])
        assert way and main([*mix, *way]) == 0, way
