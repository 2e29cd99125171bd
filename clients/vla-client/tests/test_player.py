"""The tick never waits and never plays what is late, twice, stale or beyond a limit."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vla_client import ChunkPlayer, Guard, NoAnswer, OtherModel

OBS = {"state": np.zeros(1)}


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def player(fallback="hold", **more):
    """A player that nobody asks for: chunks are added by hand."""
    clock = Clock()
    made = ChunkPlayer(None, hz=10, fallback=fallback, clock=clock, **more)
    return made, clock


def ticks(made, clock, n):
    out = []
    for _ in range(n):
        out.append(made.tick(OBS))
        clock.now += 0.1
    return out


def chunk(step, length=5, width=1):
    """Action k of the chunk of step s is 100 s + k: each names its own chunk."""
    return np.arange(length)[:, None] + 100.0 * step + np.zeros(width)


def test_actions_follow_their_steps():
    made, clock = player()
    first = made.tick(OBS)
    assert (first.action, first.source, first.state) == (None, "none", "starting")
    made.add(0, clock.now, chunk(0))
    clock.now += 0.1
    seen = ticks(made, clock, 4)
    assert [t.action[0] for t in seen] == [1, 2, 3, 4] and {t.source for t in seen} == {"chunk"}
    assert [round(t.age, 6) for t in seen] == [0.1, 0.2, 0.3, 0.4] and seen[0].state == "streaming"
    assert made.counts["late"] == 1  # the action of the tick that asked
    held = made.tick(OBS)
    assert (held.action[0], held.source, held.state, held.age) == (4, "hold", "degraded", None)


@settings(max_examples=150, deadline=None)
@given(st.permutations([0, 0, 2, 3, 3, 5, 7]), st.integers(0, 6))
def test_order_and_repetition_do_not_matter(order, at):
    """Chunks of steps 0 to 7 arrive at tick `at` in any order, some twice: the newest observation decides."""
    made, clock = player()
    ticks(made, clock, at + 1)
    for step in order:
        made.add(step, 100.0 + step * 0.1, chunk(step))
    for tick in ticks(made, clock, 6):
        right = [step for step in (0, 2, 3, 5, 7) if step <= tick.step < step + 5]
        if right and tick.age is not None:
            assert tick.action[0] == 100 * right[-1] + tick.step - right[-1]
        assert bool(right) == (tick.source == "chunk")


def test_a_late_chunk_never_moves_time_back():
    made, clock = player()
    ticks(made, clock, 8)
    made.add(6, clock.now - 0.1, chunk(6))
    assert made.add(1, clock.now - 0.6, chunk(1)) == 0
    assert [t.action[0] for t in ticks(made, clock, 3)] == [602, 603, 604]


def test_stale_actions_are_never_executed():
    made, clock = player(max_age=0.25)
    made.tick(OBS)
    made.add(0, clock.now, chunk(0))
    clock.now += 0.1
    seen = ticks(made, clock, 4)
    assert [t.source for t in seen] == ["chunk", "chunk", "hold", "hold"] and made.counts["stale"] == 2
    assert all(t.age is None or t.age <= 0.25 for t in seen)


def test_the_usual_limit_is_one_chunk_even_when_ticks_are_late():
    made, clock = player()
    made.tick(OBS)
    made.add(0, clock.now, chunk(0))
    clock.now += 0.6  # the control loop itself hung
    assert made.tick(OBS).source == "none"


def test_fallbacks():
    for fallback, want in (("hold", [4, 4, 4, 4]), ("continue", [5, 6, 6, 6]), ("stop", [0, 0, 0, 0])):
        made, clock = player(fallback, stop_action=[0.0], coast=2)
        made.tick(OBS)
        made.add(0, clock.now, chunk(0))
        ticks(made, clock, 4)
        assert [t.action[0] for t in ticks(made, clock, 4)] == want
    assert player("stop", stop_action=[0.0])[0].tick(OBS).action == [0.0]


def test_a_fallback_is_chosen_not_guessed():
    with pytest.raises(TypeError):
        ChunkPlayer(None, hz=10)
    for wrong in (
        {"fallback": "pray"}, {"fallback": "stop"}, {"fallback": "hold", "control": "velocity"},
        {"fallback": "continue", "control": "velocity"}, {"fallback": "hold", "control": "torque"},
        {"fallback": "hold", "hz": 0},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            ChunkPlayer(None, **{"hz": 10, **wrong})
    ChunkPlayer(None, hz=10, fallback="stop", control="velocity", stop_action=[0.0])


def test_the_guard_looks_at_everything_that_moves():
    made, clock = player("continue", guard=Guard(high=3.0, max_step=1.0, patience=9))
    made.tick(OBS)
    made.add(0, clock.now, np.array([[0.0], [1.0], [9.0], [2.5], [2.9]]))
    values = [t.action[0] for t in ticks(made, clock, 7)]
    assert values[:4] == [1, 2, 2.5, 2.9] and all(v <= 3 for v in values)
    assert made.guard.counts["step"] == 1 and made.guard.counts["limit"] >= 1


def test_a_stall_holds_until_reset():
    made, clock = player(guard=Guard(high=1.0, patience=3))
    made.tick(OBS)
    made.add(0, clock.now, np.array([[0.0], [0.5], [2.0], [2.0], [2.0], [0.7], [0.7]]))
    seen = ticks(made, clock, 6)
    assert [t.action[0] for t in seen] == [0.5, 1, 1, 1, 1, 1]
    assert [t.state for t in seen] == ["streaming"] * 3 + ["stalled"] * 3
    made.reset()
    made.add(made.step, clock.now, chunk(0, 3))
    assert made.tick(OBS).source == "chunk"


class Policy:
    """Answers after `seconds`, or with errors."""

    def __init__(self, seconds=0.0, errors=()):
        self.seconds, self.errors, self.steps = seconds, list(errors), []
        self.go = threading.Event()
        self.go.set()

    def infer(self, obs, *, step):
        self.go.wait(5)
        time.sleep(self.seconds)
        self.steps.append(step)
        if self.errors:
            raise self.errors.pop(0)
        return {"actions": chunk(step, 20)}


def until(what, seconds=5.0):
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.002)
    assert what()


def test_asking_happens_in_the_background():
    policy = Policy()
    policy.go.clear()
    with ChunkPlayer(policy, hz=50, fallback="hold", every=10) as made:
        for _ in range(5):
            assert made.tick(OBS).source == "none"  # the policy hangs, the tick does not
        policy.go.set()
        until(lambda: made.ahead)
        assert made.tick(OBS).source == "chunk"
        first = policy.steps[0]
        while made.step < first + 9:
            made.tick(OBS)
        assert policy.steps == [first]
        made.tick(OBS)
        until(lambda: len(policy.steps) == 2)
        assert policy.steps[1] == first + 10


def test_slow_answers_are_asked_for_sooner():
    """With answers that take 15 ticks, waiting for tick 18 of 20 would leave a gap."""
    policy = Policy()
    with ChunkPlayer(policy, hz=50, fallback="hold", every=18) as made:
        policy.go.clear()
        made.tick(OBS)
        until(lambda: made._asked == 0)
        for _ in range(15):
            made.tick(OBS)
        policy.go.set()
        until(lambda: len(policy.steps) >= 2)  # what is left is less than an answer took: it asks again at once
        assert policy.steps[:2] == [0, 15]


@pytest.mark.parametrize(("rtc", "told"), [("best", {}), ("guided", {"rtc": "guided"})])
def test_the_next_chunk_is_told_what_it_goes_on_from(rtc, told):
    """From the step of its observation on: what is planned, and how much of it an answer's time takes."""
    asked = []

    class Goes(Policy):
        def infer(self, obs, *, step, **more):
            asked.append((step, more))
            return super().infer(obs, step=step)

    with ChunkPlayer(Goes(), hz=50, fallback="hold", every=10, rtc=rtc) as made:
        made.tick(OBS)
        until(lambda: made.ahead)
        for _ in range(10):
            made.tick(OBS)
        until(lambda: len(asked) == 2)
    (first, nothing), (second, more) = asked
    assert nothing == {} and second == first + 10
    prefix, delay = more.pop("prefix"), more.pop("delay")
    np.testing.assert_array_equal(prefix, chunk(first, 20)[10:])
    assert 1 <= delay <= len(prefix) and more == told


@pytest.mark.parametrize("error", [NoAnswer("slow"), OtherModel("other"), ZeroDivisionError("theirs")])
def test_errors_are_counted_and_asking_goes_on(error):
    policy = Policy(errors=[error])
    with ChunkPlayer(policy, hz=50, fallback="hold") as made:
        made.tick(OBS)
        until(lambda: made.error)
        assert type(error).__name__ in made.error or str(error) in made.error
        made.tick(OBS)
        until(lambda: made.ahead)
        assert made.error == "" and made.counts.get(type(error).__name__, 0) + made.counts.get("failed", 0) == 1


# ---- the guard by itself ---------------------------------------------------------------------------------------------


def test_nothing_that_is_not_finite_passes():
    guard = Guard(patience=2)
    for bad in ([np.nan], [np.inf], [-np.inf]):
        assert guard.check(bad) is None
    assert guard.stalled and guard.counts["non_finite"] == 3


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=30))
def test_what_passes_is_within_all_limits(wanted):
    guard = Guard(low=-1.0, high=2.0, max_step=0.5, max_bend=0.25, patience=1000)
    sent = []
    for value in wanted:
        allowed = guard.check([value])
        if allowed is None:
            assert not np.isfinite(value)
            continue
        assert -1 <= allowed[0] <= 2
        if (
            sent
        ):  # the limits come last: coming back into them may be a greater step only if we were outside, never here
            assert abs(allowed[0] - sent[-1]) <= 0.5 + 1e-9
        guard.executed(allowed)
        sent.append(allowed[0])
    assert not guard.stalled


def test_actions_within_limits_pass_unchanged():
    guard = Guard(low=[-1, -2], high=[1, 2], max_step=[0.5, 1])
    for action in ([0.0, 0.0], [0.5, 1.0], [1.0, 2.0]):
        np.testing.assert_array_equal(guard.check(action), action)
        guard.executed(action)
    assert sum(guard.counts.values()) == 0
    with pytest.raises(ValueError, match="shape"):
        guard.check([0.0])


@pytest.mark.parametrize(
    "wrong", [{"low": 1, "high": 0}, {"low": np.nan}, {"max_step": 0}, {"max_bend": -1}, {"patience": 0}]
)
def test_limits_that_limit_nothing_are_refused(wrong):
    with pytest.raises(ValueError):
        Guard(**wrong)
