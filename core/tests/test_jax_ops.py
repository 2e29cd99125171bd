"""Shared maths in JAX: the chunked cross-entropy, attention against PyTorch's, autocast, pytrees of records."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")

from jax import numpy as jnp  # noqa: E402

from vla.contracts import DecodeGrammar  # noqa: E402
from vla.jax_kit import model as _  # noqa: E402, F401 (registers the records)
from vla.jax_kit import ops  # noqa: E402
from vla.layout import Read  # noqa: E402
from vla.testing.closeness import close  # noqa: E402
from vla.torch_kit import ops as torch_ops  # noqa: E402

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def test_chunked_cross_entropy_equals_the_direct_one():
    hidden, table, targets, weights = normal(37, 16), normal(50, 16), RNG.integers(0, 50, 37), RNG.random(37)

    def loss(hidden, table, chunk):
        return (ops.token_nll(hidden, table, targets, chunk) * weights).sum()

    direct, chunked = (jax.value_and_grad(loss, (0, 1))(hidden, table, chunk) for chunk in (1 << 25, 200))
    close(direct[0], chunked[0], 1e-6)
    for a, b in zip(direct[1], chunked[1], strict=True):
        close(a, b, 1e-5)
    want = torch_ops.token_nll(*map(torch.as_tensor, (hidden, table, targets)))
    close(ops.token_nll(hidden, table, targets, 200), want.numpy(), 1e-5)


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_attention_equals_that_of_pytorch(kv):
    q, k, v = normal(2, 5, 4, 8), normal(2, 7, kv, 8), normal(2, 7, kv, 8)
    mask = RNG.random((2, 5, 7)) < 0.6
    mask[..., 0] = True
    for m in (mask, None):
        want = torch_ops.attend(*map(torch.as_tensor, (q, k, v)), None if m is None else torch.as_tensor(m))
        close(ops.attend(q, k, v, m), want.numpy(), 2e-6)


def test_stops_cut_gradients_and_change_no_value():
    q, k, v, mask = normal(1, 4, 2, 8), normal(1, 4, 1, 8), normal(1, 4, 1, 8), np.ones((1, 4, 4), bool)
    reads = (Read(0, 2, ()), Read(2, 4, ((0, 2),)))

    def out(k, reads):
        return ops.attend_with_stops(q, k, v, mask, reads)

    close(out(k, reads), out(k, ()), 1e-6)
    of_last = jax.grad(lambda k: out(k, reads)[:, 2:].sum())(jnp.asarray(k))
    assert (np.asarray(of_last)[:, :2] == 0).all() and (np.asarray(of_last)[:, 2:] != 0).any()
    assert (np.asarray(jax.grad(lambda k: out(k, reads)[:, :2].sum())(jnp.asarray(k)))[:, :2] != 0).any()


def test_autocast_is_for_products_alone_and_ends():
    a, b = jnp.asarray(normal(3, 4)), jnp.asarray(normal(4, 5))
    assert ops.matmul(a, b).dtype == jnp.float32
    with ops.autocast("bfloat16"):
        assert ops.matmul(a, b).dtype == jnp.bfloat16
        assert ops.rms_norm(a).dtype == jnp.float32
        with ops.autocast(None):
            assert ops.matmul(a, b).dtype == jnp.float32
    assert ops.matmul(a, b).dtype == jnp.float32


def test_a_grammar_passes_through_jit():
    grammar = DecodeGrammar((1, 2), np.arange(3), np.ones(3, np.int32), total=4, suffix=())
    traced = []

    @jax.jit
    def use(g):
        traced.append(g.total)
        return g.lengths.sum() * g.total + len(g.prefix)

    assert int(use(grammar)) == 14 and int(use(grammar)) == 14 and traced == [4]
    assert int(use(DecodeGrammar((1, 2), np.arange(3), np.ones(3, np.int32), total=5, suffix=()))) == 17
