"""Real-time chunking: the formulas, and how a chunk joins those before it."""

import gymnasium
import numpy as np
import pytest

from vla.errors import DataError, SettingsError
from vla.evaluation.rollout import motion
from vla.rtc import MODES, Timeline, check_prefix, guidance, prefix_of, refusal, steps_of, trained_delay, weights
from vla.testing.closeness import close


def test_guidance_is_the_papers_step_times_its_weight():
    """min(beta, (1 - tau) / (tau r^2)), r^2 = (1 - tau)^2 / (tau^2 + (1 - tau)^2), for flow matching in five steps."""
    tau = np.arange(6) / 5
    got = guidance(tau, 1 - tau, 5.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        r2 = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
        want = np.minimum(5.0, (1 - tau) / (tau * r2))[:5] / 5
    close(np.array(got), want, 1e-12)
    assert got[0] == pytest.approx(1.0)  # at tau = 0 the weight is the limit


def test_weights_hold_what_is_executed_and_fade_to_the_end_of_the_overlap():
    w = weights(10, 3, 8)
    assert (w[:3] == 1).all() and (w[8:] == 0).all() and (np.diff(w[2:8]) < 0).all()
    c = (8 - 5) / (8 - 3 + 1)
    assert w[5] == pytest.approx(c * (np.e**c - 1) / (np.e - 1))
    assert (weights(6, 0, 0) == 0).all() and (weights(6, 6, 6) == 1).all()


def test_a_row_without_a_previous_chunk_is_free():
    prefix = prefix_of([None, np.ones((3, 2))], [4, 2], (5, 2), "guided")
    assert prefix.delay.tolist() == [0, 2] and not prefix.weights[0].any() and prefix.values[1, :3].all()
    assert not prefix.values[1, 3:].any() and prefix.weights[1, :2].tolist() == [1, 1] and prefix.weights[1, 3] == 0


@pytest.mark.parametrize(
    ("why", "case"),
    [
        ("", ("guided", 3, 6, 8)),
        ("only 2 are left", ("guided", 3, 2, 8)),
        ("a chunk has 8", ("guided", 8, 9, 8)),
        ("at most 4 steps", ("trained", 5, 6, 8, 4)),
        ("", ("trained", 4, 6, 8, 4)),
    ],
)
def test_what_is_admitted(why, case):
    assert why in refusal(*case) and bool(refusal(*case)) == bool(why)


def chunk(start, n=8):
    return np.arange(start, start + n, dtype=float)[:, None]


def played(mode, latency, execute, horizon=8, steps=20, **options):
    """Actions that are numbered by the step they are meant for; a hold is NaN."""
    line, coming, asked, out = Timeline(mode, **options), None, -1, []
    for step in range(steps):
        left = 0 if line.plan is None else len(line.plan)
        due = not left if mode == "none" else left <= latency if mode == "append" else step - asked >= execute
        if coming is None and (asked < 0 or due or not left):
            coming, asked = chunk(step, horizon), step
        if coming is not None and (step == 0 or step - asked >= latency):
            line.add(coming, asked, execute, latency)
            coming = None
        action = line.next()
        out.append(np.nan if action is None else float(action[0]))
    return np.array(out), line


def test_aligned_chunks_are_executed_at_the_steps_they_are_meant_for():
    for mode in ("aligned", "guided", "trained", "inpaint"):
        out, line = played(mode, 3, 4)
        assert (out == np.arange(20)).all() and line.late == 0
        assert line.seams == [0, 7, 11, 15, 19]


def test_without_it_the_robot_waits_and_append_executes_what_is_stale():
    out, line = played("none", 3, 4)
    assert np.isnan(out[4:7]).all() and out[7] == 4 and line.seams[:2] == [0, 7]  # made for step 4, executed at 7
    out, _ = played("append", 3, 4)
    assert not np.isnan(out).any() and out[4] == 1  # asked for when three steps were left: three steps old


def test_blending_goes_from_the_old_to_the_new():
    line = Timeline("blend", blend=3)
    line.add(np.zeros((8, 1)), 0, 8)
    line.add(np.ones((8, 1)), 0, 8)
    assert line.plan[:, 0].tolist() == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


def test_late_chunks_are_not_used():
    """None of its steps is still to come; or more were executed than the policy was told of."""
    line = Timeline("aligned")
    assert line.add(chunk(0), 0, 8)
    for _ in range(8):
        line.next()
    assert not line.add(chunk(0), 0, 8) and line.late == 1
    line = Timeline("guided")
    line.add(chunk(0), 0, 8)
    for _ in range(4):
        line.next()
    assert not line.add(chunk(0), 0, 8, promised=3) and line.late == 1 and len(line.plan) == 4
    assert line.add(chunk(1), 1, 8, promised=3) and line.plan[0, 0] == 4


def test_an_unknown_mode_is_refused():
    with pytest.raises(SettingsError, match="guided"):
        Timeline("magic")
    assert len(set(MODES)) == 8


@pytest.mark.parametrize("prefix", [np.zeros((0, 2)), np.zeros(3), np.zeros((2, 3)), [[np.nan, 0]], "actions"])
def test_a_prefix_that_means_nothing_is_refused(prefix):
    with pytest.raises(DataError, match="prefix"):
        check_prefix(prefix, 0, 2)
    for delay in (-1, 1.5, True, None):
        with pytest.raises(DataError, match="delay"):
            check_prefix(np.zeros((2, 2)), delay, 2)


def test_the_trained_delay_is_in_the_record():
    assert trained_delay({"config": {"rtc": {"max_delay": 4}}}) == 4
    assert [trained_delay(r) for r in ({"config": {"rtc": None}}, {"config": {}}, {}, None)] == [0] * 4


def test_motion_measures_jumps_in_half_ranges_of_the_action_space():
    space = gymnasium.spaces.Box(-2.0, 2.0, (2,))
    actions = [np.array([x, x]) for x in (0.0, 0.2, 0.4, 2.4, 2.6)]  # a jump of 2 at step 3
    found = motion(actions, [0, 3], space)
    assert found.seam_jump == pytest.approx(1.0) and found.step == pytest.approx((0.1 * 3 + 1.0) / 4)
    assert found.seam_jerk == pytest.approx(0.9) and found.jerk == pytest.approx((2 * 0.81 / 3) ** 0.5)
    assert motion(actions[:2], [0], space).seam_jump is None


@pytest.mark.parametrize(
    ("latency", "steps"), [(4, 4), ("4", 4), ("4steps", 4), ("80ms", 4), ("81ms", 5), ("0.4s", 20), ("0", 0), (0, 0)]
)
def test_a_latency_is_a_time_or_steps(latency, steps):
    assert steps_of(latency, 50.0) == steps


@pytest.mark.parametrize("latency", ["soon", "-80ms", -1, 1.5, "80 m", "", "nan", "1e3ms"])
def test_no_such_latency(latency):
    with pytest.raises(SettingsError, match="80ms"):
        steps_of(latency, 50.0)
