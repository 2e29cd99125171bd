"""The layout table against a slow, obvious reference, against openpi's rule, and in all three array libraries."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.layout import Layout, LayoutError, Look, Row, Span, attention_mask, gradient_routes, positions

KI = Layout.parse("""
    role     expert     sees
    image    backbone   image prompt
    prompt   backbone   image prompt
    target   backbone   image prompt target:causal
    action   action     image:stop prompt:stop action
""")


@st.composite
def layouts(draw):
    n = draw(st.integers(1, 5))
    names = [f"r{i}" for i in range(n)]
    rows = []
    for name in names:
        seen = draw(st.lists(st.sampled_from(names), unique=True, max_size=n))
        rows.append(Row(name, draw(st.sampled_from(["backbone", "other"])), tuple(Look(s, causal=draw(st.booleans())) for s in seen)))
    return Layout(tuple(rows))


@st.composite
def sequences(draw):
    layout = draw(layouts())
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 9)))
    size = shape[0] * shape[1]
    roles = np.array(draw(st.lists(st.integers(0, len(layout.rows) - 1), min_size=size, max_size=size))).reshape(shape)
    valid = np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size))).reshape(shape)
    return layout, roles, valid


def slow(layout, roles, valid):
    """Two loops over tokens, exactly as the table reads."""
    b, t = roles.shape
    mask, pos = np.zeros((b, t, t), bool), np.zeros((b, t), int)
    for i in range(b):
        for q in range(t):
            row = layout.rows[roles[i, q]]
            for k in range(t):
                look = row.look(layout.roles[roles[i, k]])
                sees = look is not None and valid[i, k] and (not look.causal or k <= q)
                mask[i, q, k] = sees and valid[i, q]
                pos[i, q] += look is not None and valid[i, k] and k < q
    return mask, pos


@given(sequences())
@settings(max_examples=300, deadline=None)
def test_equals_the_obvious_reference(case):
    layout, roles, valid = case
    mask, pos = slow(layout, roles, valid)
    np.testing.assert_array_equal(attention_mask(layout, roles, valid), mask)
    np.testing.assert_array_equal(positions(layout, roles, valid)[valid], pos[valid])
    half = roles.shape[1] // 2
    if half:
        np.testing.assert_array_equal(attention_mask(layout, roles, valid, queries=half), mask[:, -half:])


@given(
    st.lists(st.tuples(st.integers(0, 1), st.booleans()), min_size=1, max_size=12),
)
@settings(max_examples=300, deadline=None)
def test_openpis_cumulative_sum_is_the_special_case(tokens):
    """Blocks opened by ar_mask = 1; each block sees itself and all before it."""
    ar = np.array([[a for a, _ in tokens]])
    valid = np.array([[v for _, v in tokens]])
    c = np.cumsum(ar, 1)
    expected = (c[:, None, :] <= c[:, :, None]) & valid[:, None, :] & valid[:, :, None]
    blocks = [f"b{i}" for i in range(c.max() + 1)]
    layout = Layout(tuple(Row(b, "backbone", tuple(Look(x) for x in blocks[: i + 1])) for i, b in enumerate(blocks)))
    np.testing.assert_array_equal(attention_mask(layout, c, valid), expected)
    np.testing.assert_array_equal(positions(layout, c, valid)[valid], (np.cumsum(valid, 1) - 1)[valid])


@given(sequences())
@settings(max_examples=30, deadline=None)
def test_torch_and_jax_arrays_give_the_same(case):
    torch = pytest.importorskip("torch")
    jnp = pytest.importorskip("jax.numpy")
    layout, roles, valid = case
    for rule in (attention_mask, positions):
        want = rule(layout, roles, valid)
        np.testing.assert_array_equal(rule(layout, torch.tensor(roles), torch.tensor(valid)).numpy(), want)
        np.testing.assert_array_equal(np.asarray(rule(layout, jnp.asarray(roles), jnp.asarray(valid))), want)


def test_a_target_never_shifts_an_action():
    roles = np.array([[0, 0, 1, 1, 2, 2, 3, 3, 3]])
    with_targets = positions(KI, roles, np.ones_like(roles, bool))[0, -3:]
    without = positions(KI, roles, roles != 2)[0, -3:]
    np.testing.assert_array_equal(with_targets, [4, 5, 6])
    np.testing.assert_array_equal(without, with_targets)


def test_table_reads_back():
    assert Layout.parse(str(KI)) == KI
    assert KI.experts == ("backbone", "action")


def test_insulation_is_a_stop_at_every_backbone_role():
    open_table = Layout.parse(str(KI).replace(":stop", ""))
    assert open_table != KI
    assert open_table.insulated() == KI


def test_reads_name_the_detached_keys():
    spans = [Span(("image",), "backbone", 4), Span(("prompt", "target"), "backbone", 3), Span(("action",), "action", 2)]
    (backbone, action) = KI.reads(spans)
    assert (backbone.start, backbone.stop, backbone.detached) == (0, 7, ())
    assert (action.start, action.stop, action.detached) == (7, 9, ((0, 7),))
    assert Layout.parse(str(KI).replace(":stop", "")).reads(spans) == ()


def test_reads_refuse_a_half_stopped_span():
    half = Layout.parse(str(KI).replace("prompt:stop", "prompt").replace("image:stop", "image:stop target:stop"))
    with pytest.raises(LayoutError, match="agree about the stop"):
        half.reads([Span(("prompt", "target"), "backbone", 3), Span(("action",), "action", 2)])


def test_cacheable_and_routes():
    assert KI.cacheable(["action"]) == ("image", "prompt", "target")
    pi0 = Layout.parse("""
        image  backbone image prompt
        prompt backbone image prompt
        state  action   image prompt state
        action action   image prompt state action
    """)
    assert pi0.cacheable(["action"]) == ("image", "prompt", "state")
    routes = gradient_routes(KI, {"tokens": "target", "actions": "action"})
    assert routes["tokens"] == {"backbone": True, "action": False, "vision": True}
    assert routes["actions"] == {"backbone": False, "action": True, "vision": False}
    assert gradient_routes(pi0, {"actions": "action"})["actions"] == {"backbone": True, "action": True, "vision": True}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image backbone", "needs a role"),
        ("image backbone ghost", "no row"),
        ("image backbone image:often", "unknown modifier"),
        ("a backbone a\na backbone a", "two rows"),
    ],
)
def test_bad_tables_say_so(text, message):
    with pytest.raises(LayoutError, match=message):
        Layout.parse(text)
