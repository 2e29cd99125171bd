"""Steps, their order, groups of whole variants, batching. openpi's exact numbers: tests/test_goldens_transforms.py."""

from types import SimpleNamespace

import numpy as np
import pytest
from attrs import evolve, frozen
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vla.compose import build
from vla.contracts import Spec
from vla.errors import DataError, PartError, SettingsError
from vla.parts import Part
from vla.testing.closeness import close
from vla.transforms import (
    STAGES,
    FunctionStep,
    Group,
    Repack,
    Stats,
    SubsampleActions,
    build_group,
    camera_steps,
    collate,
    flatten,
    identity_stats,
    make_bool_mask,
    nest,
    normalize,
    pad_to,
    resize_with_pad,
    shift,
    to_uint8,
    unnormalize,
)
from vla.transforms.group import check_order, order

BASE, LEFT, RIGHT = "base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"


class Words:
    """A tokenizer without a codec, as far as transforms know one."""

    codec, max_len = None, 4

    def tokenize(self, prompt, state, actions, cut=False):
        ids = np.zeros(4, np.int32)
        ids[: len(prompt.split())] = 1
        return {
            "tokenized_prompt": ids,
            "tokenized_prompt_mask": ids > 0,
            "token_ar_mask": ids * 0,
            "token_loss_mask": ids > 5,
        }

    def tokenize_batch(self, prompts, states, actions, cut=False):
        rows = [self.tokenize(p, None, None) for p in prompts]
        return {k: np.stack([r[k] for r in rows]) for k in rows[0]}


class Chunks(Words):
    """A tokenizer whose token n stands for a whole chunk of the value n / 10."""

    codec = object()

    def tokenize(self, prompt, state, actions, cut=False):
        assert actions is None or actions.shape == (3, 2)
        return super().tokenize(prompt, state, actions)

    def without_padded(self, sample, real):
        return sample

    def decode(self, tokens, horizon, dim):
        return np.full((horizon, dim), tokens[0] / 10)


def variant(robot="plain", sets=(), **spec):
    """A variant whose only real part is the robot."""
    made = build(robot=robot, set=sets).robot
    shape = {"image_size": (8, 8), "state_dim": 6, "action_dim": 5, "action_horizon": 3, **spec}
    return SimpleNamespace(parts={"robot": made}, spec=Spec(**shape))


def sample(state=4, actions=2, cameras=(BASE, LEFT), size=(8, 8), steps=3):
    rng = np.random.default_rng(1)
    return {
        "images": {c: rng.integers(0, 255, (*size, 3), dtype=np.uint8) for c in cameras},
        "state": rng.uniform(-1, 1, state).astype(np.float32),
        "actions": rng.uniform(-1, 1, (steps, actions)).astype(np.float32),
        "actions_is_pad": np.array([False] * (steps - 1) + [True]),
        "prompt": "lift it",
        "episode": 7,
    }


def group(tokenizer=None, stats=None, default_prompt=None, **kw):
    return build_group(
        variant(**kw),
        stats=stats or identity_stats(4, 2),
        tokenizer=tokenizer or Words(),
        default_prompt=default_prompt,
    )


# ---- numbers ----------------------------------------------------------------------------------------------------------

floats = st.floats(-1e3, 1e3, width=32)


@st.composite
def data_and_stats(draw):
    d = draw(st.integers(1, 6))
    x = draw(arrays(np.float64, (draw(st.integers(1, 5)), d), elements=floats))
    low = draw(arrays(np.float64, d, elements=floats))
    width = draw(arrays(np.float64, d, elements=st.floats(0.015625, 100, width=32)))
    return x, Stats(low, width, low, low + width)


@settings(deadline=None)
@given(data_and_stats(), st.sampled_from(["zscore", "quantile"]))
def test_unnormalize_reverses_normalize(case, norm):
    x, stats = case
    back = unnormalize(normalize(x, stats, norm), stats, norm)
    close(back, x, 1e-9, scale=np.abs([stats.q01, stats.q99]).max())


@settings(deadline=None)
@given(
    arrays(np.float64, (4, 5), elements=floats),
    arrays(np.float64, 6, elements=floats),
    st.lists(st.integers(-2, 2), min_size=1, max_size=2),
)
def test_absolute_reverses_delta_and_masked_dims_stay(actions, state, runs):
    mask = np.array(make_bool_mask(*runs), bool)
    delta = shift(actions, state, mask, -1)
    close(shift(delta, state, mask, 1), actions, 1e-12, scale=np.abs(state).max())
    still = np.ones(5, bool)
    still[: len(mask)] = ~mask
    np.testing.assert_array_equal(delta[:, still], actions[:, still])
    moved = ~still
    np.testing.assert_array_equal(delta[:, moved], (actions - state[:5])[:, moved])


def test_delta_works_on_batches_of_chunks():
    rng = np.random.default_rng(0)
    actions, states, mask = rng.normal(size=(3, 4, 5)), rng.normal(size=(3, 6)), np.array([True, False, True])
    each = np.stack([shift(a, s, mask, -1) for a, s in zip(actions, states)])
    np.testing.assert_array_equal(shift(actions, states, mask, -1), each)


def test_make_bool_mask():
    assert make_bool_mask(2, -1, 0, 1) == (True, True, False, True)


@settings(deadline=None)
@given(arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 5)), elements=floats), st.integers(5, 9))
def test_pad_then_cut_is_identity(x, dim):
    padded = pad_to(x, dim, "actions")
    assert padded.shape[-1] == dim and padded.dtype == x.dtype
    np.testing.assert_array_equal(padded[..., : x.shape[-1]], x)
    assert not padded[..., x.shape[-1] :].any()


def test_wider_data_is_never_cut():
    with pytest.raises(DataError, match="--set spec.action_dim=6"):
        pad_to(np.zeros((2, 6)), 5, "actions")
    with pytest.raises(DataError, match="--set spec.state_dim=6"):
        pad_to(np.zeros(6), 5, "state")


def test_statistics_narrower_than_the_data_are_an_error():
    with pytest.raises(DataError, match="vla stats"):
        normalize(np.zeros(3), identity_stats(2, 2)["state"], "zscore")


def test_subsample_keeps_the_padding_in_step():
    out = SubsampleActions(2)({"actions": np.arange(10).reshape(5, 2), "actions_is_pad": np.arange(5) > 2})
    assert out["actions"][:, 0].tolist() == [0, 4, 8] and out["actions_is_pad"].tolist() == [False, False, True]
    with pytest.raises(DataError, match="stride"):
        SubsampleActions(0)


def test_repack_picks_and_renames():
    out = Repack({"images/a": "cam", "state": "x/y", "prompt": "task?"})({"cam": 1, "x/y": 2, "other": 3})
    assert out == {"images/a": 1, "state": 2}


# ---- images -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 32), st.integers(1, 32))
def test_resize_keeps_proportions_and_centres(h, w, height, width):
    out = resize_with_pad(np.full((h, w, 3), 200, np.uint8), height, width)
    assert out.shape == (height, width, 3)
    rows, cols = out[..., 0].any(1), out[..., 0].any(0)
    ratio = max(h / height, w / width)
    tall, wide = max(1, int(h / ratio)), max(1, int(w / ratio))
    assert rows.sum() == tall and cols.sum() == wide
    assert rows.argmax() == (height - tall) // 2 and cols.argmax() == (width - wide) // 2
    assert (out[rows][:, cols] == 200).all()


def test_right_size_is_not_touched():
    x = np.zeros((8, 9, 3), np.uint8)
    assert resize_with_pad(x, 8, 9) is x


def test_to_uint8_formats():
    chw = np.zeros((3, 4, 5), np.uint8)
    chw[1] = 9
    assert to_uint8(chw).shape == (4, 5, 3) and (to_uint8(chw)[..., 1] == 9).all()
    assert to_uint8(np.full((4, 5, 3), 0.5)).max() == 127
    for bad in (np.zeros((4, 5)), np.full((4, 5, 3), 1.5), np.full((4, 5, 3), np.nan), np.zeros((4, 5, 3), np.int64)):
        with pytest.raises(DataError):
            to_uint8(bad, "images['x']")


def fit(places, spec=(BASE, LEFT, RIGHT), **kw):
    return camera_steps("r2", places, spec, **kw)[0][1]


def test_cameras_take_their_place():
    step = fit({"front": (BASE,), "hand": (LEFT, "wrist_0_rgb"), "low": ()})
    out = step(flatten(sample(cameras=("front", "hand", "low"))))
    assert sorted(k for k in out if k.startswith("images/")) == [f"images/{BASE}", f"images/{LEFT}"]
    assert out[f"image_masks/{LEFT}"] is True and out[f"image_masks/{RIGHT}"] is False
    fast = fit({"front": (BASE,), "hand": (LEFT, "wrist_0_rgb")}, spec=(BASE, "base_1_rgb", "wrist_0_rgb"))
    assert f"images/{'wrist_0_rgb'}" in fast(flatten(sample(cameras=("front", "hand"))))


def test_absent_cameras_may_count_as_seen():
    out = fit({"front": (BASE,)}, mask_absent=False)(flatten(sample(cameras=("front",))))
    assert not out[f"images/{RIGHT}"].any() and out[f"image_masks/{RIGHT}"] is True


def test_a_masked_camera_is_left_out():
    data = sample(cameras=("front", "hand")) | {"image_masks": {"hand": False}}
    out = fit({"front": (BASE,), "hand": (LEFT,)})(flatten(data))
    assert f"images/{LEFT}" not in out and out[f"image_masks/{LEFT}"] is False


def test_camera_errors_name_the_camera_and_what_came():
    step = fit({"front": (BASE,), "hand": (LEFT,)}, required=("front",))
    with pytest.raises(DataError, match=r"(?s)images\['side'\].*\['front', 'side'\]"):
        step(flatten(sample(cameras=("front", "side"))))
    with pytest.raises(DataError, match=r"(?s)needs a camera.*images\['front'\].*\['hand'\]"):
        step(flatten(sample(cameras=("hand",))))
    with pytest.raises(SettingsError, match="names no camera of the model"):
        fit({"front": (BASE,)}, override=("top=front",))
    with pytest.raises(SettingsError, match="no camera of the robot"):
        fit({"front": ("top",)})
    with pytest.raises(SettingsError, match="two cameras"):
        fit({}, override=(f"{BASE}=a", f"{BASE}=b"))


# ---- order ------------------------------------------------------------------------------------------------------------


def named(name, reads=(), writes=()):
    return FunctionStep(name, lambda d: {**d, "log": [*d.get("log", []), name]}, tuple(reads), tuple(writes))


@settings(deadline=None, max_examples=50)
@given(st.permutations(list(STAGES)))
def test_stage_order_does_not_depend_on_how_contributions_are_listed(stages):
    ins, outs = order([("robot", [(s, named(s)) for s in stages])])
    want = [s for s in STAGES if s.startswith("inputs")], [s for s in STAGES if s.startswith("outputs")]
    assert [p.step.name for p in ins] == want[0] and [p.step.name for p in outs] == want[1]


def test_outputs_mirror_inputs_within_a_stage():
    parts = [(p, [("inputs.robot", named(p)), ("outputs.robot", named(p))]) for p in ("a", "b", "core")]
    ins, outs = order(parts)
    assert [p.step.name for p in ins] == ["a", "b", "core"] and [p.step.name for p in outs] == ["core", "b", "a"]


def test_steps_of_one_contributor_keep_their_order_in_a_stage():
    ins, outs = order(
        [("a", [(f"{way}.robot", named(f"{way}{i}")) for i in range(3) for way in ("inputs", "outputs")])]
    )
    assert [p.step.name for p in ins] == ["inputs0", "inputs1", "inputs2"]
    assert [p.step.name for p in outs] == ["outputs0", "outputs1", "outputs2"]


def test_push_is_openpis_rule():
    g = Group().push([named("a")], [named("z")]).push([named("b")], [named("y")])
    assert g.inputs({"x": 1})["log"] == ["a", "b"] and g.outputs({"x": 1})["log"] == ["y", "z"]


def test_order_refuses_strangers():
    with pytest.raises(PartError, match="no such stage"):
        order([("a", [("robot", named("a"))])])
    with pytest.raises(PartError, match="what it reads"):
        order([("a", [("inputs.robot", lambda d: d)])])


def test_a_step_before_its_source_is_refused():
    early, late = named("early", ["depth"]), named("late", (), ["depth"])
    ins, _ = order([("a", [("inputs.robot", early), ("inputs.pad", late)])])
    with pytest.raises(PartError, match=r"(?s)early.*only a later step.*late"):
        check_order(ins, ("state",))
    check_order(ins, ("depth",))


def test_missing_input_names_step_key_and_what_is_there():
    ins, outs = order([("robot", [("inputs.robot", named("depthy", ["depth/*"]))])])
    with pytest.raises(DataError, match=r"(?s)depthy.*depth/\*.*\['state'\].*comes from robot"):
        Group(ins, outs).inputs({"state": 1})


def test_flatten_and_nest():
    deep = {"a": {"b": {"c": 1}}, "d/e": 2}
    assert flatten(deep) == {"a/b/c": 1, "d/e": 2}
    assert nest(flatten(deep)) == {"a": {"b/c": 1}, "d": {"e": 2}}


# ---- groups of variants -----------------------------------------------------------------------------------------------


def test_a_raw_sample_becomes_model_input_and_back():
    given_sample = sample(size=(6, 10))
    copy = {k: np.array(v) if k != "images" else dict(v) for k, v in given_sample.items()}
    g = group()
    out = g.inputs(given_sample)
    assert set(out) == {
        "images", "image_masks", "state", "actions", "actions_mask",
        "tokenized_prompt", "tokenized_prompt_mask", "token_ar_mask", "token_loss_mask",
    }  # fmt: skip
    assert out["images"][BASE].shape == (8, 8, 3) and out["image_masks"] == {BASE: True, LEFT: True, RIGHT: False}
    assert out["state"].shape == (6,) and out["state"].dtype == np.float32 == out["actions"].dtype
    want = np.zeros((3, 5), bool)
    want[:2, :2] = True
    np.testing.assert_array_equal(out["actions_mask"], want)
    back = g.outputs({"actions": out["actions"], "state": out["state"]})
    assert back["actions"].shape == (3, 2) and g.codec_dim == 2
    close(back["actions"], given_sample["actions"], 1e-6)
    close(back["state"], given_sample["state"], 1e-6)
    for key in ("state", "actions"):
        np.testing.assert_array_equal(given_sample[key], copy[key])


def test_the_model_sees_normalised_values_in_both_norms():
    stats = {
        k: Stats(np.full(d, 0.5), np.full(d, 2.0), np.full(d, -3.0), np.full(d, 1.0))
        for k, d in (("state", 4), ("actions", 2))
    }
    s = sample()
    z = group(stats=stats, norm="zscore").inputs(s)
    close(z["state"][:4], (s["state"] - 0.5) / (2 + 1e-6), 1e-6)
    q = group(stats=stats, norm="quantile").inputs(s)
    close(q["actions"][:, :2], (s["actions"] + 3) / (4 + 1e-6) * 2 - 1, 1e-6)


def test_delta_actions_of_plain_and_back():
    g = group(sets=["robot.delta=[1, -1]"])
    s = sample()
    out = g.inputs(s)
    close(out["actions"][:, 0], s["actions"][:, 0] - s["state"][0], 1e-5)
    close(out["actions"][:, 1], s["actions"][:, 1], 1e-5)
    back = g.outputs({"actions": out["actions"], "state": out["state"]})
    close(back["actions"], s["actions"], 1e-5)


def test_until_stops_after_a_stage():
    out = group().inputs({"state": np.zeros(4), "actions": np.zeros((3, 2))}, until="normalize")
    assert set(out) == {"state", "actions"} and out["actions"].shape == (3, 2)
    with pytest.raises(DataError, match="no such input stage"):
        group().inputs(sample(), until="later")


def test_tokens_are_read_when_there_are_no_actions():
    g = group(tokenizer=Chunks())
    inputs = g.inputs(sample())
    out = g.outputs({"tokens": np.array([5]), "state": inputs["state"]})
    close(out["actions"], 0.5, 1e-5)
    both = g.outputs({"tokens": np.array([5]), "actions": np.zeros((3, 5)), "state": inputs["state"]})
    close(both["actions"], 0, 1e-5, scale=1)
    with pytest.raises(DataError, match="neither actions nor tokens"):
        g.outputs({"state": inputs["state"]})


def test_inference_needs_no_actions():
    s = sample()
    out = group().inputs({k: s[k] for k in ("images", "state", "prompt")})
    assert "actions" not in out and "actions_mask" not in out


def test_prompts():
    s = sample()
    prompts = (b"lift it", np.array("lift it"), "lift it")
    got = [group().inputs({**s, "prompt": p})["tokenized_prompt"].tolist() for p in prompts]
    assert got == [[1, 1, 0, 0]] * 3
    del s["prompt"]
    assert group(default_prompt="one two three").inputs(s)["tokenized_prompt"].tolist() == [1, 1, 1, 0]
    with pytest.raises(DataError, match="no instruction"):
        group().inputs(s)
    with pytest.raises(DataError, match="no text"):
        group().inputs({**s, "prompt": 3})


def test_batched_inputs_equal_single_ones():
    rows = [sample(), {**sample(cameras=(BASE,)), "prompt": "a b c"}]
    many = group().inputs_batch(rows)
    for one, row in zip(many, rows):
        want = group().inputs(row)
        assert flatten(one).keys() == flatten(want).keys()
        for key, value in flatten(want).items():
            np.testing.assert_array_equal(flatten(one)[key], value)


def test_no_statistics_says_what_to_do():
    with pytest.raises(DataError, match="vla stats"):
        build_group(variant(), stats=None, tokenizer=Words())
    half = {"state": identity_stats(4, 2)["state"]}
    with pytest.raises(DataError, match="norm_stats.json: actions"):
        build_group(variant(), stats=half, tokenizer=Words())
    without = {k: evolve(s, q01=None, q99=None) for k, s in identity_stats(4, 2).items()}
    with pytest.raises(DataError, match="spec.norm=zscore"):
        group(stats=without)
    group(stats=without, norm="zscore").inputs(sample())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"state": np.array([0, np.nan, 0, 0])}, r"state\[1\]"),
        ({"actions": np.full((3, 2), np.inf)}, r"actions\[0, 0\]"),
        ({"actions": np.zeros((4, 2)), "actions_is_pad": np.zeros(4, bool)}, "spec.action_horizon=4"),
        ({"actions_is_pad": np.zeros(4, bool)}, "actions_is_pad"),
        ({"state": "home"}, "numbers"),
        ({"state": np.zeros(0)}, "shape"),
        ({"images": {}}, r"images/\*"),
        ({"images": {BASE: np.zeros((4, 4), np.uint8)}}, "RGB"),
    ],
)
def test_bad_samples(change, words):
    with pytest.raises(DataError, match=words):
        group().inputs({**sample(), **change})


def test_stats_wider_than_the_spec_and_data_wider_than_the_spec():
    with pytest.raises(DataError, match="spec.action_dim=9"):
        group(stats=identity_stats(4, 9)).inputs(sample(actions=9))


def test_known_widths_are_checked():
    g = group(sets=["robot.state_dim=4", "robot.action_dim=2"])
    with pytest.raises(DataError, match="another number of values in state"):
        g.inputs(sample(state=3))


def test_a_row_is_as_wide_as_what_our_statistics_recorded():
    """Dims at the end that rested at 0 are dims all the same; only openpi's files, of padded data, may be wider."""
    rest = np.array([1.0, 0.0, 0.0, 0.0])
    parts = {"mean": rest, "std": rest, "q01": -rest, "q99": rest}
    theirs, ours = Stats(**parts), Stats(**parts, min=-rest, max=rest)
    actions = identity_stats(4, 2)["actions"]
    assert group(stats={"state": theirs, "actions": actions}).inputs(sample(state=3))
    g = group(stats={"state": ours, "actions": actions})
    assert g.inputs(sample(state=4))
    with pytest.raises(DataError, match="another number of values in state"):
        g.inputs(sample(state=3))


def test_cameras_of_which_none_is_looked_at_are_named():
    g = group(sets=[f'robot.cameras=["{BASE}=front"]'])
    with pytest.raises(DataError, match="none of the cameras that came") as error:
        g.inputs(sample())
    assert BASE in str(error.value.got) and "front" in str(error.value.expected)


def test_the_way_out_of_an_unknown_camera_keeps_the_known():
    with pytest.raises(DataError, match="knows no such camera") as error:
        image = np.zeros((8, 8, 3), np.uint8)
        group().inputs({**sample(), "images": {BASE: image, "top": image, "side": image}})
    assert f"{BASE}={BASE}" in error.value.fix and "=top" in error.value.fix


def test_the_table_shows_every_step():
    g = group(sets=["robot.delta=[1]"])
    text = str(g)
    for word in ("InjectDefaultPrompt", "FitCameras", "DeltaActions", "Normalize", "ResizeImages", "Pad", "Unpad"):
        assert word in text
    assert text.index("DeltaActions") < text.index("Normalize") < text.index("Tokenize")
    assert f"images/{BASE} [8, 8, 3]" in g.table(sample())


@frozen
class DepthSettings:
    scale: float = 2.0


def depth_steps(settings, context):
    double = FunctionStep(
        "Double", lambda d: {**d, "state": np.asarray(d["state"]) * settings.scale}, ("state",), ("state",)
    )
    return [("inputs.repack", double)]


def broken_steps(settings, context):
    raise ZeroDivisionError("oops")


def test_any_part_may_contribute_and_a_broken_one_is_named():
    part = Part(
        kind="tokenizer", name="deep", summary="s", settings=DepthSettings, transforms=f"{__name__}:depth_steps"
    )
    v = variant()
    inner = SimpleNamespace(part=part, settings=DepthSettings(), inner={})
    outer = SimpleNamespace(part=Part(kind="head", name="h", summary="s"), settings=None, inner={"deep": inner})
    v.parts = {"head": outer, **v.parts}
    import sys

    sys.modules.setdefault(__name__, sys.modules[depth_steps.__module__])
    g = build_group(v, stats=identity_stats(4, 2), tokenizer=Words())
    s = sample()
    close(g.inputs(s)["state"][:4], s["state"] * 2, 1e-5)
    inner.part = evolve(part, transforms=f"{__name__}:broken_steps")
    with pytest.raises(PartError, match=r"(?s)tokenizer 'deep' fails.*ZeroDivisionError: oops"):
        build_group(v, stats=identity_stats(4, 2), tokenizer=Words())


def test_hooks_contribute_too_and_a_broken_listener_is_only_reported(monkeypatch, caplog):
    from vla import hooks, registry

    step, made = named("seen", (), ("log",)), variant()
    answers = [hooks.Answer("good", [("inputs.repack", step)]), hooks.Answer("bad", problem="hooks 'bad' fail")]
    monkeypatch.setattr(hooks, "ask", lambda hook, context: answers if hook == "vla_transforms" else [])
    monkeypatch.setattr(registry, "listed", lambda kind: [1])
    g = build_group(made, stats=identity_stats(4, 2), tokenizer=Words())
    assert any(p.step is step and p.origin == "hook good" for p in g.input_steps)
    assert "hooks 'bad' fail" in caplog.text


# ---- batches ----------------------------------------------------------------------------------------------------------


def test_collate_fills_absent_cameras_and_drops_what_nobody_has():
    rows = [group().inputs(sample(cameras=c)) for c in ((BASE,), (BASE, LEFT))]
    batch = collate(rows)
    assert set(batch["images"]) == {BASE, LEFT} == set(batch["image_masks"])
    assert batch["image_masks"][LEFT].tolist() == [False, True] and not batch["images"][LEFT][0].any()
    np.testing.assert_array_equal(batch["images"][LEFT][1], rows[1]["images"][LEFT])
    assert batch["state"].shape == (2, 6) and batch["actions_mask"].dtype == bool
    assert batch["tokenized_prompt"].dtype == np.int32


def test_collate_refuses_uneven_rows():
    row = group().inputs(sample())
    with pytest.raises(DataError, match="no samples"):
        collate([])
    with pytest.raises(DataError, match="actions"):
        collate([row, {k: v for k, v in row.items() if k != "actions"}])
    with pytest.raises(DataError, match="more"):
        collate([row, {**row, "more": 1}])
    with pytest.raises(DataError, match="state"):
        collate([row, {**row, "state": np.zeros(9, np.float32)}])
    small = {**row, "images": {**row["images"], BASE: np.zeros((4, 4, 3), np.uint8)}}
    with pytest.raises(DataError, match="images"):
        collate([row, small])
