"""gemma_fast has the weights of gemma without other experts, under the same names."""

import importlib.util
from importlib import import_module

import pytest
from vla_llm_gemma_fast import PART
from vla_llm_gemma_fast.config import Settings

from vla.contracts import Spec
from vla.params import Site, cover, other_shapes, shapes

SETTINGS = Settings(width=16, depth=3, mlp_dim=24, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=32)
SITE = Site(SETTINGS, Spec(), {}, {})


def rows():
    return tuple(import_module(PART.params).rows(SITE))


def test_table_covers_the_torch_module():
    torch = pytest.importorskip("torch")
    from vla_llm_gemma_fast.torch_impl import GemmaFast

    with torch.device("meta"):
        module = GemmaFast(SETTINGS, {})
    cover(shapes(rows()), module.state_dict(), "GemmaFast")


def test_table_covers_the_jax_module():
    nnx = pytest.importorskip("flax.nnx")
    if importlib.util.find_spec("vla_llm_gemma_fast.jax_impl") is None:
        pytest.skip("no JAX module yet")
    from vla_llm_gemma_fast.jax_impl import GemmaFast

    module = nnx.eval_shape(lambda: GemmaFast(SETTINGS, {}, rngs=nnx.Rngs(0)))
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    found = {"/".join(map(str, path)): leaf.get_value().shape for path, leaf in state}
    cover(other_shapes(rows()), found, "GemmaFast")
