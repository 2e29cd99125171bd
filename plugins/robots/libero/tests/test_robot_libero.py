"""LIBERO: wire names, settings, whole groups. openpi's numbers: tests/test_goldens_transforms.py."""

from types import SimpleNamespace

import numpy as np
import pytest
from vla_robot_libero import PART

from vla.compose import resolve
from vla.contracts import Spec
from vla.errors import DataError
from vla.testing.closeness import close
from vla.transforms import build_group, identity_stats, stats_steps


def variant(**settings):
    spec = Spec(image_size=(8, 8), action_horizon=4)
    return SimpleNamespace(parts={"robot": resolve("robot", {"part": PART, **settings})}, spec=spec)


def group(**settings):
    return build_group(variant(**settings), stats=identity_stats(8, 7), tokenizer=None)


def wire():
    rng = np.random.default_rng(0)
    return {
        "observation/image": rng.integers(0, 255, (6, 9, 3), dtype=np.uint8),
        "observation/wrist_image": rng.uniform(0, 1, (3, 6, 9)).astype(np.float32),
        "observation/state": rng.uniform(-1, 1, 8),
        "actions": rng.uniform(-1, 1, (4, 7)),
        "prompt": "put the bowl on the plate",
    }


def test_wire_and_dataset_samples_are_one():
    w = wire()
    raw = {
        "images": {"image": w["observation/image"], "wrist_image": w["observation/wrist_image"]},
        "state": w["observation/state"],
        "prompt": "x",
    }
    one, two = group().inputs(w), group().inputs(raw)
    np.testing.assert_array_equal(one["state"], two["state"])
    for name in ("base_0_rgb", "left_wrist_0_rgb"):
        np.testing.assert_array_equal(one["images"][name], two["images"][name])
    assert one["image_masks"] == {"base_0_rgb": True, "left_wrist_0_rgb": True, "right_wrist_0_rgb": False}


@pytest.mark.parametrize("delta", [True, False])
def test_actions_there_and_back(delta):
    g, w = group(delta=delta), wire()
    done = g.inputs(w)
    moved = w["actions"][:, :6] - (w["observation/state"][:6] if delta else 0)
    close(done["actions"][:, :6], moved, 1e-5)
    close(done["actions"][:, 6], w["actions"][:, 6], 1e-5)
    back = g.outputs({"actions": done["actions"], "state": done["state"]})["actions"]
    assert back.shape == (4, 7)
    close(back, w["actions"], 1e-5)


def test_absent_camera_as_openpis_fast():
    done = group(mask_absent=False).inputs(wire())
    assert all(done["image_masks"].values()) and not done["images"]["right_wrist_0_rgb"].any()


def test_bad_observations():
    w = wire()
    with pytest.raises(DataError, match="another number of values in state"):
        group().inputs({**w, "observation/state": np.zeros(7)})
    del w["observation/image"]
    with pytest.raises(DataError, match="'image'"):
        group().inputs(w)
    with pytest.raises(DataError, match="state"):
        group().inputs({k: v for k, v in wire().items() if k != "observation/state"})


def test_facets_and_statistics():
    offers = resolve("robot", {"part": PART}).offers
    assert (offers["state_dim"], offers["action_dim"]) == (8, 7)
    assert [type(p.step).__name__ for p in stats_steps(variant(delta=True))] == ["ReadState", "DeltaActions"]
