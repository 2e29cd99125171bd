"""Two sides that name a robot: what counts as a difference, and what the message says."""

import attrs
import numpy as np
import pytest
from attrs import evolve

from vla.datasets import DatasetInfo, EveryNth, Mixture, chunk, ways_out
from vla.embodiment import Embodiment, check_same, differences
from vla.errors import DataError, SettingsError
from vla.training.prepare import check_same_robot

ARM = Embodiment(
    robot="arm", cameras=("front", "wrist"), state_dim=3, action_dim=2, state_names=("x", "y", "grip"),
    action_names=("x", "y"), state_units=("m", "m", "1"), action_units=("m", "m"), hz=30.0,
)  # fmt: skip


def fields(**changes):
    return [d.field for d in differences(ARM, evolve(ARM, **changes))]


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, []),
        ({"robot": "leg"}, ["robot"]),
        ({"robot": ""}, []),
        ({"state_dim": 4, "state_names": (), "state_units": ()}, ["state_dim"]),
        ({"action_names": ("y", "x")}, ["action_names"]),
        ({"action_names": ()}, []),
        ({"action_names": (" X", "y ")}, []),
        ({"state_names": ("x", "y", "gripper")}, ["state_names"]),
        ({"action_units": ("mm", "m")}, ["action_units"]),
        ({"hz": 29.97}, []),
        ({"hz": 15.0}, ["hz"]),
        ({"hz": 0.0}, []),
        ({"cameras": ("front",)}, []),
        ({"cameras": ("front", "wrist", "side")}, []),
        ({"cameras": ("front", "top")}, ["cameras"]),
        ({"cameras": ("top", "wrist"), "hz": 10.0, "robot": "leg"}, ["robot", "cameras", "hz"]),
    ],
)
def test_what_both_say_is_compared(changes, want):
    assert fields(**changes) == want
    assert [d.field for d in differences(evolve(ARM, **changes), ARM)] == want


def test_everything_at_once_is_ten_lines():
    other = Embodiment("leg", ("a",), 4, 3, tuple("abcd"), tuple("abc"), tuple("kkkk"), tuple("kkk"), 5.0)
    found = differences(ARM, other)
    assert sorted(d.field for d in found) == sorted(a.name for a in attrs.fields(Embodiment))
    with pytest.raises(DataError) as caught:
        check_same(ARM, other, "the policy", "the robot", "hire another robot")
    text = str(caught.value)
    assert len(text.splitlines()[1:-2]) == 9 and "hz: 30 in the policy, 5 in the robot" in text
    assert text.endswith("fix:      hire another robot")
    check_same(ARM, other, "a", "b", ignore=[d.field for d in found])


def test_long_lists_show_where_they_differ_and_hide_nothing():
    names = tuple(f"joint {i}" for i in range(40))
    mixed = (*names[:7], names[8], names[7], *names[9:])
    a, b = (Embodiment(action_dim=40, action_names=n) for n in (names, mixed))
    (only,) = differences(a, b)
    assert only.mine == "[7] 'joint 7', [8] 'joint 8'" and only.theirs == "[7] 'joint 8', [8] 'joint 7'"
    (all_of_them,) = differences(a, evolve(a, action_names=names[::-1]))
    assert "(40 of 40 differ)" in all_of_them.mine
    evil = Embodiment(action_names=("\x1b]0;owned\x07" + "x" * 5000, "y"))
    (told,) = differences(ARM, evil)
    assert "\x1b" not in str(told) and len(str(told)) < 200


def test_there_and_back_through_a_table():
    info = DatasetInfo(
        {"front": (4, 4), "wrist": (4, 4)}, 3, 2, 30, "arm", {"state": ("m", "m", "1"), "actions": ("m", "m")},
        action_names=("x", "y"), state_names=("x", "y", "grip"),
    )  # fmt: skip
    assert Embodiment.of(info) == ARM
    assert Embodiment.from_table(ARM.to_table()) == ARM and Embodiment().to_table() == {}
    assert Embodiment.from_table({"action_names": ["x", "y"]}).action_dim == 2


@pytest.mark.parametrize(
    "table",
    [
        None, 7, "arm", [], {"robot": 7, "hz": "fast"}, {"hz": float("nan")}, {"hz": -1}, {"state_dim": "3"},
        {"state_dim": 2.5}, {"cameras": 7}, {"cameras": "front"}, {"state_dim": 3, "state_names": ["x"]},
        {"action_names": "xy"}, {"action_names": b"xy"},
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_not_said(table):
    got = Embodiment.from_table(table)
    assert not {"robot", "hz", "cameras", "state_names", "action_names"} & set(got.to_table())
    assert differences(got, ARM) == ()


class Counting:
    """Frame i has state and action i; episodes of the lengths given."""

    def __init__(self, lengths, hz=30.0, **info):
        ends = np.cumsum(lengths).tolist()
        self.episodes = [range(e - n, e) for e, n in zip(ends, lengths, strict=True)]
        self.info = evolve(DatasetInfo({"front": (2, 2)}, 1, 1, hz, source=f"{hz:g} Hz"), **info)

    def __len__(self):
        return self.episodes[-1].stop

    def sample(self, index, horizon, cameras=None, images=True):
        span = next(e for e in self.episodes if index in e)
        actions, pad = chunk(self.actions(), index, span.stop, horizon)
        return {
            "state": self.states()[index], "actions": actions, "actions_is_pad": pad, "prompt": str(index),
            "episode": self.episodes.index(span), "frame": index - span.start,
        }  # fmt: skip

    def states(self):
        return np.arange(len(self), dtype=np.float32)[:, None]

    actions = states

    def prompts(self):
        return [str(i) for i in range(len(self))]

    def digest(self):
        return f"counting {len(self)}"


def test_every_third_frame():
    thin = EveryNth(Counting((7, 1, 4)), 3)
    assert thin.info.hz == 10 and len(thin) == 6 and thin.episodes == [range(0, 3), range(3, 4), range(4, 6)]
    assert thin.states()[:, 0].tolist() == [0, 3, 6, 7, 8, 11] == [int(p) for p in thin.prompts()]
    sample = thin.sample(1, 4)
    assert sample["actions"][:, 0].tolist() == [3, 6, 6, 6] and sample["actions_is_pad"].tolist() == [0, 0, 1, 1]
    assert (sample["episode"], sample["frame"], sample["prompt"]) == (0, 1, "3")
    assert thin.digest() != EveryNth(Counting((7, 1, 4)), 2).digest() != Counting((7, 1, 4)).digest()
    for bad in (0, -1, 2.5, True, "3"):
        with pytest.raises(SettingsError, match=r"data\.stride"):
            EveryNth(Counting((3,)), bad)


def test_a_mixture_of_two_meanings_is_refused_and_the_way_out_works():
    slow, fast = Counting((4,), 10.0), Counting((9,), 30.0)
    with pytest.raises(DataError, match="hz: 10 in 10 Hz, 30 in 30 Hz") as caught:
        Mixture([(slow, 1.0), (fast, 1.0)])
    assert "--set data.1.stride=3" in str(caught.value)
    assert len(Mixture([(slow, 1.0), (EveryNth(fast, 3), 1.0)])) == 7
    named = [Counting((4,), action_names=(name,), source=name) for name in ("x", "y")]
    with pytest.raises(DataError, match=r"action_names: \['x'\] in x, \['y'\] in y"):
        Mixture([(d, 1.0) for d in named])
    with pytest.raises(DataError, match="cameras: .*'front'.*'top'"):
        Mixture([(slow, 1.0), (Counting((4,), 10.0, cameras={"top": (2, 2)}), 1.0)])
    with pytest.raises(DataError, match="cameras"):  # what the first does not say, the others do
        Mixture([(Counting((4,), cameras={}), 1.0), *((Counting((4,), cameras={c: (2, 2)}), 1.0) for c in ("a", "b"))])


def test_the_ways_out_are_what_to_type():
    other = evolve(ARM, action_names=("a b", "c"), cameras=("front", "hand"), hz=10.0)
    way = ways_out(ARM, other)
    assert way == '--set \'data.action_names=["x", "y"]\' --set \'data.cameras=["front", "wrist=hand"]\''
    assert ways_out(evolve(ARM, hz=10.0), ARM) == "--set data.stride=3"
    assert ways_out(evolve(ARM, hz=50.0), ARM, "data.1", "data.0") == "--set data.0.stride=5 --set data.1.stride=3"
    assert ways_out(ARM, evolve(ARM, action_units=("mm", "m"), robot="leg")) == ""


def test_a_model_is_not_fine_tuned_on_another_robot_unasked():
    record = {"embodiment": {"action_dim": 1, "action_names": ["x"], "hz": 10}}
    data = Counting((4,), 20.0, action_names=("y",))
    with pytest.raises(DataError, match="action_names(.|\n)*hz: 10 in the model, 20 in the data(.|\n)*--allow-change"):
        check_same_robot(record, data, False)
    notes = []
    check_same_robot(record, data, True, notes.append)
    assert len(notes) == 2 and "['x'] and ['y']" in notes[0]
    check_same_robot(record, EveryNth(Counting((4,), 20.0, action_names=("x",)), 2), False, notes.append)
    check_same_robot({}, data, False, notes.append)
    assert len(notes) == 2
