"""ALOHA: conventions there and back, settings, whole groups. openpi's numbers: tests/test_goldens_transforms.py."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from vla_robot_aloha import PART
from vla_robot_aloha.transforms import (
    FLIP,
    decode_state,
    encode_actions,
    encode_actions_reversed,
    gripper_to_pi,
)

from vla.compose import resolve
from vla.contracts import Spec
from vla.errors import DataError
from vla.testing.closeness import close
from vla.transforms import build_group, identity_stats, stats_steps

unit = st.floats(-3, 3, width=32)
CAMERAS = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")


def variant(**settings_):
    spec = Spec(image_size=(8, 8), action_horizon=4)
    return SimpleNamespace(parts={"robot": resolve("robot", {"part": PART, **settings_})}, spec=spec)


def group(**settings_):
    return build_group(variant(**settings_), stats=identity_stats(14, 14), tokenizer=None)


def sample(cameras=CAMERAS):
    rng = np.random.default_rng(0)
    images = {c: rng.integers(0, 255, (3, 6, 9), dtype=np.uint8) for c in cameras}
    state, actions = rng.uniform(0.1, 0.9, 14), rng.uniform(0.1, 0.9, (4, 14))
    return {"images": images, "state": state, "actions": actions, "prompt": "transfer the cube"}


@settings(deadline=None)
@given(arrays(np.float64, (5, 14), elements=unit))
def test_actions_there_and_back(x):
    close(encode_actions(encode_actions_reversed(x)), x, 1e-9, scale=1)
    close(encode_actions_reversed(encode_actions(x)), x, 1e-9, scale=1)


@settings(deadline=None)
@given(arrays(np.float64, 14, elements=unit))
def test_state_flips_joints_and_never_gives_nan(x):
    before = x.copy()
    out = decode_state(x)
    joints = [i for i in range(14) if i not in (6, 13)]
    np.testing.assert_array_equal(out[joints], (FLIP * x)[joints])
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(x, before)


def test_gripper_opens_upwards():
    angles = gripper_to_pi(np.linspace(0, 1, 50))
    assert (np.diff(angles) > 0).all()
    # fully open is a quarter turn of the crank: (pi / 2 - 0.5476) / (1.6296 - 0.5476)
    close(angles[-1], 0.9456, 1e-3)


@pytest.mark.parametrize("adapt", [True, False])
@pytest.mark.parametrize("delta", [True, False])
def test_a_whole_group_there_and_back(adapt, delta):
    g, s = group(adapt_to_pi=adapt, delta=delta), sample()
    done = g.inputs(s)
    assert set(done["images"]) == {"base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"}
    assert done["images"]["base_0_rgb"].shape == (8, 8, 3)
    assert done["actions_mask"][:, :14].all() and not done["actions_mask"][:, 14:].any()
    back = g.outputs({"actions": done["actions"], "state": done["state"]})["actions"]
    if not delta:
        close(back, s["actions"], 1e-5)
    close(back[:, [6, 13]], s["actions"][:, [6, 13]], 1e-5)  # grippers stay absolute
    close(back, s["actions"], 1e-5)
    state = decode_state(s["state"]) if adapt else s["state"]
    close(done["state"][:14], state, 1e-5)


def test_wrist_cameras_may_be_missing_and_cam_high_not():
    done = group().inputs(sample(("cam_high",)))
    assert set(done["images"]) == {"base_0_rgb"} and not done["image_masks"]["left_wrist_0_rgb"]
    with pytest.raises(DataError, match="cam_high"):
        group().inputs(sample(("cam_low",)))


def test_a_camera_can_be_chosen():
    s = sample()
    done = group(cameras=["base_0_rgb=cam_low"]).inputs(s)
    assert set(done["images"]) == {"base_0_rgb"}
    other = group().inputs(s)
    assert not np.array_equal(done["images"]["base_0_rgb"], other["images"]["base_0_rgb"])


def test_another_robots_state_is_refused():
    with pytest.raises(DataError, match="14"):
        group().inputs({**sample(), "state": np.zeros(8)})


def test_facets_and_statistics():
    chosen = resolve("robot", {"part": PART})
    assert chosen.offers["state_dim"] == chosen.offers["action_dim"] == 14 and chosen.offers["hz"] == 50
    assert "base_0_rgb" in chosen.offers["cameras"]
    assert [type(p.step).__name__ for p in stats_steps(variant())] == ["ToPi", "DeltaActions"]
