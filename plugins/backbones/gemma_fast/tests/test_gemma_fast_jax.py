"""The decoding core in JAX: as in PyTorch, and as `gemma` with one expert, with its packed projections."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
nnx = pytest.importorskip("flax.nnx")

from vla_llm_gemma_fast import PART, jax_impl, torch_impl  # noqa: E402
from vla_llm_gemma_fast.config import Settings  # noqa: E402

from vla.compose import load_object  # noqa: E402
from vla.contracts import Spec  # noqa: E402
from vla.jax_kit.model import fill  # noqa: E402
from vla.params import Site  # noqa: E402
from vla.testing.parity import part_parity, random_weights, relative  # noqa: E402

SETTINGS = Settings(width=16, depth=3, mlp_dim=24, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=32)
B, T = 2, 6
X = np.random.default_rng(0).standard_normal((B, T, 16)).astype(np.float32)
MASK = np.tril(np.ones((B, T, T), bool))
WHERE = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))


def rows():
    return tuple(load_object(f"{PART.params}:rows")(Site(SETTINGS, Spec(), {}, {})))


def abstract():
    return nnx.eval_shape(lambda: jax_impl.GemmaFast(SETTINGS, {}, rngs=nnx.Rngs(0)))


def test_outputs_and_gradients():
    def call(llm, x, mask, where):
        done, _ = llm({"backbone": x}, mask, where)
        return [done["backbone"]]

    found = part_parity(torch_impl.GemmaFast(SETTINGS, {}), abstract(), rows(), call, X, MASK, WHERE)
    assert not [row for row in found if not row.fine]


def test_decoding_with_packed_projections_equals_one_pass():
    llm, prefix = abstract(), 3
    fill(llm, rows(), random_weights(rows()))
    whole, _ = llm({"backbone": X}, MASK, WHERE)
    none, cache = llm({"backbone": X[:, :prefix]}, MASK[:, :prefix, :prefix], WHERE[:, :prefix], outputs=())
    assert none == {}
    cache = llm.room(cache, T - prefix)
    shapes = [a.shape for a in cache]
    assert shapes[2:] == [(3, 16, (4 + 2 * 2) * 8), (3, 16, 2 * 24)]
    for i in range(prefix, T):
        at = slice(i, i + 1)
        done, cache = llm({"backbone": X[:, at]}, MASK[:, at], WHERE[:, at], cache=cache, write_at=i)
        assert relative(np.asarray(done["backbone"]), np.asarray(whole["backbone"][:, at])) < 1e-5
        assert [a.shape for a in cache] == shapes
