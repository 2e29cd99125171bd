"""Settings, instructions and the robot of Meta-World: all that needs no simulator."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from vla_dataset_metaworld.config import FEW, LIMIT, MT10, TASKS, DatasetSettings, EnvSettings

import vla
from vla.compose import resolve
from vla.contracts import Spec
from vla.errors import PartError, SettingsError
from vla.testing.closeness import close
from vla.transforms import build_group, identity_stats


def test_fifty_tasks_have_fifty_instructions():
    assert len(TASKS) == len(set(TASKS.values())) == 50
    assert set(MT10) | set(FEW) <= set(TASKS) and len(set(MT10)) == 10
    assert all(set(text) <= set("abcdefghijklmnopqrstuvwxyz ") and len(text) <= 80 for text in TASKS.values())


def test_presets_choose_tasks():
    assert len(resolve("env", {"part": "metaworld", "preset": "mt50"}, "env").settings.tasks) == 50
    tiny = resolve("dataset", {"part": "metaworld", "preset": "tiny"}, "dataset").settings
    assert tiny.env() == resolve("env", {"part": "metaworld", "preset": "tiny"}, "env").settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ("open-drawer",)}, "open-drawer"),
        ({"tasks": ()}, "no task"),
        ({"max_steps": LIMIT + 1}, "1 to 500"),
        ({"image_size": 8}, "16 to 640"),
    ],
)
@pytest.mark.parametrize("record", [EnvSettings, DatasetSettings])
def test_wrong_settings_are_refused(settings, message, record):
    with pytest.raises(SettingsError, match=message):
        record(**settings)


def test_without_the_simulator_the_extra_is_named(monkeypatch):
    pytest.importorskip("gymnasium")
    from vla_dataset_metaworld.env import make

    for name in [n for n in sys.modules if n.partition(".")[0] == "metaworld"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(PartError, match=r"vla-dataset-metaworld\[sim\]"):
        make(EnvSettings())


def test_the_robot_puts_cameras_in_their_places():
    robot = resolve("robot", {"part": "metaworld"})
    assert robot.offers["state_dim"] == robot.offers["action_dim"] == 4 and robot.offers["hz"] == 80
    variant = SimpleNamespace(parts={"robot": robot}, spec=Spec(image_size=(32, 32), action_horizon=2))
    group = build_group(variant, stats=identity_stats(4, 4), tokenizer=None)
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for name in ("front", "wrist")}
    row = {"images": images, "state": rng.normal(size=4), "actions": rng.normal(size=(2, 4)), "prompt": "reach"}
    done = group.inputs(row)
    np.testing.assert_array_equal(done["images"]["base_0_rgb"], images["front"])
    np.testing.assert_array_equal(done["images"]["left_wrist_0_rgb"], images["wrist"])
    back = group.outputs({"actions": done["actions"], "state": done["state"]})["actions"]
    close(back, row["actions"], 1e-5)


def test_a_variant_takes_the_robot_by_name():
    pytest.importorskip("vla_head_flow")
    variant = vla.build(type="pi0", robot="metaworld", preset="tiny")
    assert set(variant.parts["robot"].offers["cameras"]) == {"base_0_rgb", "left_wrist_0_rgb"}
