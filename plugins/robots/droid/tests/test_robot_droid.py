"""DROID: wire names, settings, whole groups. openpi's numbers: tests/test_goldens_transforms.py."""

from types import SimpleNamespace

import numpy as np
import pytest
from vla_robot_droid import PART

from vla.compose import resolve
from vla.contracts import Spec
from vla.errors import DataError
from vla.testing.closeness import close
from vla.transforms import build_group, identity_stats, stats_steps

USUAL = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
FAST = ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")


def variant(spec_cameras=USUAL, **settings):
    spec = Spec(image_size=(8, 8), action_horizon=4, cameras=spec_cameras)
    return SimpleNamespace(parts={"robot": resolve("robot", {"part": PART, **settings})}, spec=spec)


def group(**settings):
    return build_group(variant(**settings), stats=identity_stats(8, 8), tokenizer=None)


def wire():
    rng = np.random.default_rng(0)
    return {
        "observation/exterior_image_1_left": rng.integers(0, 255, (6, 9, 3), dtype=np.uint8),
        "observation/wrist_image_left": rng.integers(0, 255, (6, 9, 3), dtype=np.uint8),
        "observation/joint_position": rng.uniform(-1, 1, 7),
        "observation/gripper_position": np.array([0.25]),
        "actions": rng.uniform(-1, 1, (4, 8)),
        "prompt": "open the drawer",
    }


def test_wire_and_dataset_samples_are_one():
    w = wire()
    state = np.append(w["observation/joint_position"], 0.25)
    raw = {
        "images": {k: w[f"observation/{k}"] for k in ("exterior_image_1_left", "wrist_image_left")},
        "state": state,
        "actions": w["actions"],
        "prompt": "open the drawer",
    }
    one, two = group().inputs(w), group().inputs(raw)
    np.testing.assert_array_equal(one["state"], two["state"])
    for name in ("base_0_rgb", "left_wrist_0_rgb"):
        np.testing.assert_array_equal(one["images"][name], two["images"][name])
    close(one["state"][:8], state, 1e-5)
    assert not one["image_masks"]["right_wrist_0_rgb"] and "right_wrist_0_rgb" not in one["images"]


def test_nested_observations_do_too():
    w = wire()
    nested = {"observation": {k.partition("/")[2]: v for k, v in w.items() if "/" in k}, "prompt": "x"}
    np.testing.assert_array_equal(group().inputs(nested)["state"], group().inputs(w)["state"])


def test_scalar_gripper():
    one = group().inputs({**wire(), "observation/gripper_position": 0.25})
    np.testing.assert_array_equal(one["state"], group().inputs(wire())["state"])


@pytest.mark.parametrize("delta", [True, False])
def test_actions_there_and_back(delta):
    g, w = group(delta=delta), wire()
    done = g.inputs(w)
    moved = w["actions"][:, :7] - (w["observation/joint_position"] if delta else 0)
    close(done["actions"][:, :7], moved, 1e-5)
    close(done["actions"][:, 7], w["actions"][:, 7], 1e-5)
    back = g.outputs({"actions": done["actions"], "state": done["state"]})["actions"]
    assert back.shape == (4, 8)
    close(back, w["actions"], 1e-5)


def test_openpis_fast_cameras():
    done = group(cameras=["base_0_rgb=exterior_image_1_left"]).inputs(wire())
    assert set(done["images"]) == {"base_0_rgb"}
    v = variant(FAST, mask_absent=False)
    done = build_group(v, stats=identity_stats(8, 8), tokenizer=None).inputs(wire())
    assert set(done["images"]) == set(FAST) and all(done["image_masks"].values())
    assert not done["images"]["base_1_rgb"].any() and done["images"]["wrist_0_rgb"].any()


@pytest.mark.parametrize(
    "key", ["observation/joint_position", "observation/gripper_position", "observation/wrist_image_left"]
)
def test_incomplete_observations(key):
    w = wire()
    del w[key]
    with pytest.raises(DataError, match=key.partition("/")[2]):
        group().inputs(w)


def test_wrong_widths():
    with pytest.raises(DataError, match="7 joints"):
        group().inputs({**wire(), "observation/joint_position": np.zeros(6)})


def test_facets_and_statistics():
    offers = dict(resolve("robot", {"part": PART}).offers)
    assert offers["hz"] == 15 and "action_space" not in offers
    assert dict(resolve("robot", {"part": PART, "delta": True}).offers)["action_space"] == "joint_position"
    assert [type(p.step).__name__ for p in stats_steps(variant(delta=True))] == ["ReadState", "DeltaActions"]
