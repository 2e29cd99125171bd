"""Gemma in JAX is Gemma in PyTorch: any experts, adaRMS, grouped heads, gradient stops, cache."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
nnx = pytest.importorskip("flax.nnx")

import jax  # noqa: E402
from vla_llm_gemma import jax_impl, params, torch_impl  # noqa: E402
from vla_llm_gemma.config import Settings  # noqa: E402

from vla.contracts import Spec  # noqa: E402
from vla.jax_kit.model import fill  # noqa: E402
from vla.layout import Read  # noqa: E402
from vla.params import Site  # noqa: E402
from vla.parts import Expert  # noqa: E402
from vla.testing.parity import part_parity, random_weights, relative  # noqa: E402

SMALL = {"width": 16, "depth": 3, "mlp_dim": 24, "num_heads": 4, "head_dim": 8, "vocab_size": 32}
EXPERTS = {
    "alone": {},
    "plain": {"action": Expert(8, 12)},
    "adarms": {"action": Expert(8, 12, adarms=True)},
    "three": {"action": Expert(8, 12, adarms=True), "abacus": Expert(12, 20)},  # not in alphabetical order
}
B, E = 2, 3  # rows, tokens of each expert
RNG = np.random.default_rng(0)


def modules(experts, kv_heads=1):
    settings, beside = Settings(**SMALL, num_kv_heads=kv_heads), EXPERTS[experts]
    rows = tuple(params.rows(Site(settings, Spec(), {}, beside)))
    ours = torch_impl.Gemma(settings, beside)
    return ours, nnx.eval_shape(lambda: jax_impl.Gemma(settings, beside, rngs=nnx.Rngs(0))), rows


def inputs(experts):
    widths = {"backbone": 16, **{n: e.width for n, e in EXPERTS[experts].items()}}
    t = E * len(widths)
    mask = np.tril(np.ones((B, t, t), bool))
    mask[1, :, 1] = False  # an absent token, that sees nobody either
    mask[1, 1] = False
    where = np.cumsum(np.ones((B, t), np.int32), 1).astype(np.int32) * 7
    return widths, mask, where, [RNG.standard_normal((B, E, w)).astype(np.float32) for w in widths.values()]


@pytest.mark.parametrize(
    ("experts", "kv_heads", "outputs", "reads"),
    [
        ("alone", 1, None, ()),
        ("alone", 2, None, ()),
        ("plain", 4, None, ()),
        ("adarms", 1, None, (Read(0, E, ()), Read(E, 2 * E, ((0, E),)))),
        ("adarms", 1, ("action",), (Read(0, E, ()), Read(E, 2 * E, ((0, E),)))),
        ("three", 2, ("backbone", "abacus"), ()),
    ],
)
def test_outputs_and_gradients(experts, kv_heads, outputs, reads):
    ours, theirs, rows = modules(experts, kv_heads)
    widths, mask, where, xs = inputs(experts)
    adarms = [n for n, e in EXPERTS[experts].items() if e.adarms]

    def call(llm, mask, where, cond, ids, *xs):
        styles = {name: llm.styles(name, cond) for name in adarms}
        streams = dict(zip(widths, xs, strict=True))
        done, _ = llm(streams, mask, where, styles=styles, reads=reads, outputs=outputs)
        assert list(done) == list(outputs or widths)
        seen = mask.any(-1)  # nobody reads what comes of a token that sees nothing
        at = {name: i * E for i, name in enumerate(widths)}
        return [x * seen[:, at[n] : at[n] + E, None] for n, x in done.items()] + [llm.embed(ids)]

    cond = RNG.standard_normal((B, 8)).astype(np.float32)
    found = part_parity(ours, theirs, rows, call, mask, where, cond, np.array([[3, 5], [3, 31]]), *xs)
    assert not [row for row in found if not row.fine]


@pytest.mark.parametrize("experts", ["alone", "adarms"])
def test_behind_a_cache(experts):
    """New tokens behind a prefix equal the whole sequence at once; the buffer keeps its size."""
    ours, theirs, rows = modules(experts)
    fill(theirs, rows, random_weights(rows))
    t, prefix = 7, 4
    x = RNG.standard_normal((B, t, 16)).astype(np.float32)
    mask = np.tril(np.ones((B, t, t), bool))
    where = np.broadcast_to(np.arange(t), (B, t))
    whole, kv = theirs({"backbone": x}, mask, where)
    before, cache = theirs({"backbone": x[:, :prefix]}, mask[:, :prefix, :prefix], where[:, :prefix], outputs=())
    assert before == {} and cache[0].shape == (3, B, prefix, 1, 8)
    room = theirs.room(cache, t - prefix)
    after, grown = theirs({"backbone": x[:, prefix:]}, mask[:, prefix:], where[:, prefix:], cache=room, write_at=prefix)
    assert relative(np.asarray(after["backbone"]), np.asarray(whole["backbone"][:, prefix:])) < 1e-5
    assert relative(np.asarray(grown[0]), np.asarray(kv[0])) < 1e-5

    @jax.jit
    def one_by_one(cache):
        """A traced place to write at."""

        def step(carry, i):
            at = [jax.lax.dynamic_slice_in_dim(a, i, 1, 1) for a in (x, mask, where)]
            done, carry = theirs({"backbone": at[0]}, at[1], at[2], cache=carry, write_at=i)
            return carry, done["backbone"][:, 0]

        return jax.lax.scan(step, cache, jax.numpy.arange(prefix, t))[1]

    steps = np.asarray(one_by_one(room)).transpose(1, 0, 2)
    assert relative(steps, np.asarray(whole["backbone"][:, prefix:])) < 1e-5
