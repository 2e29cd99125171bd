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
