"""Image augmentation: what it does to pixels, its ranges, and that it depends on (seed, step, row) alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.training.augment import CROP, Draw, augment, draws

NEUTRAL = Draw(0.5, 0.5, 0.0, 1.0, 1.0, 1.0)
ramp = np.stack(np.meshgrid(np.arange(64), np.arange(64)), -1).astype(np.float32) * 4
IMAGE = np.concatenate([ramp, np.full((64, 64, 1), 40)], -1).astype(np.uint8)


def test_a_wrist_camera_without_colour_change_is_untouched():
    assert np.array_equal(augment({"left_wrist_0_rgb": IMAGE}, NEUTRAL)["left_wrist_0_rgb"], IMAGE)


def test_colours_follow_openpis_formula():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
    draw = Draw(0.5, 0.5, 3.0, 1.2, 0.7, 1.4)
    x = image.astype(np.float64) * 1.2
    mean = x.mean()
    x = (x - mean) * 0.7 + mean
    grey = x.mean(-1, keepdims=True)
    want = np.clip(grey + (x - grey) * 1.4, 0, 255)
    got = augment({"wrist": image}, draw)["wrist"]
    assert np.abs(got - want).max() <= 0.51


@pytest.mark.parametrize(("top", "left"), [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (0.3, 0.8)])
def test_the_crop_takes_95_percent_from_where_it_says(top, left):
    """On a ramp the value is the place: red is 4 x, green 4 y, sampled at pixel centres."""
    got = augment({"base_0_rgb": IMAGE}, Draw(top, left, 0.0, 1.0, 1.0, 1.0))["base_0_rgb"].astype(float)
    at = (np.arange(64) + 0.5) * CROP - 0.5
    want_x, want_y = at + left * 0.05 * 64, at + top * 0.05 * 64
    inside = slice(2, 62)  # bilinear sampling stops at the outermost pixel centres
    assert np.abs(got[30, inside, 0] - 4 * want_x[inside]).max() <= 1
    assert np.abs(got[inside, 30, 1] - 4 * want_y[inside]).max() <= 1


def test_rotation_turns_about_the_centre_and_fills_with_black():
    white = np.full((65, 65, 3), 255, np.uint8)
    white[31:34, 31:34] = 0
    got = augment({"base": white}, Draw(0.5, 0.5, 5.0, 1.0, 1.0, 1.0))["base"]
    assert got[32, 32].max() == 0  # the centre stays
    marked = np.zeros((65, 65, 3), np.uint8)
    marked[32, 52] = 255  # 20 pixels right of the centre
    y, x = np.argwhere(augment({"base": marked}, Draw(0.5, 0.5, 5.0, 1, 1, 1))["base"][..., 0] > 40).mean(0)
    radius = 20 / CROP
    assert abs(np.hypot(y - 32, x - 32) - radius) < 0.7
    assert abs(abs(y - 32) - radius * np.sin(np.radians(5))) < 0.7


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**40), step=st.integers(0, 10**7))
def test_draws_are_a_function_of_seed_step_and_row(seed, step):
    whole = draws(seed, step, 8)
    assert draws(seed, step, 8) == whole
    assert draws(seed, step, 3) == whole[:3]  # the row counts, not the batch
    assert len(set(whole)) == 8 and draws(seed, step + 1, 8) != whole


def test_ranges_are_openpis():
    many = [d for k in range(200) for d in draws(1, k, 32)]
    for name, low, high in (
        ("top", 0, 1), ("left", 0, 1), ("angle", -5, 5), ("brightness", 0.7, 1.3), ("contrast", 0.6, 1.4), ("saturation", 0.5, 1.5),
    ):  # fmt: skip
        values = np.array([getattr(d, name) for d in many])
        assert low <= values.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.02 * (high - low)


def test_all_cameras_of_a_sample_share_the_draw():
    out = augment({"base_0_rgb": IMAGE, "base_1_rgb": IMAGE}, draws(0, 0, 1)[0])
    assert np.array_equal(out["base_0_rgb"], out["base_1_rgb"])
