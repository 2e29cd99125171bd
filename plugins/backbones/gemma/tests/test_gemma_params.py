"""The name table of Gemma covers the modules exactly, whatever experts there are."""

import importlib.util

import pytest
from vla_llm_gemma import params
from vla_llm_gemma.config import Settings

from vla.contracts import Spec
from vla.params import Site, cover, other_shapes, shapes
from vla.parts import Expert

SMALL = {"width": 16, "depth": 3, "mlp_dim": 24, "num_heads": 4, "head_dim": 8, "vocab_size": 32}
EXPERTS = {
    "alone": {},
    "plain": {"action": Expert(8, 12)},
    "adarms": {"action": Expert(8, 12, adarms=True)},
    "two": {"action": Expert(8, 12, adarms=True), "plan": Expert(12, 20)},
}


def site(experts, kv_heads=1):
    return Site(Settings(**SMALL, num_kv_heads=kv_heads), Spec(), {}, EXPERTS[experts])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("experts", EXPERTS)
def test_table_covers_the_torch_module(experts, kv_heads):
    torch = pytest.importorskip("torch")
    from vla_llm_gemma.torch_impl import Gemma

    here = site(experts, kv_heads)
    with torch.device("meta"):
        module = Gemma(here.settings, here.experts)
    cover(shapes(params.rows(here)), module.state_dict(), "Gemma")


@pytest.mark.parametrize("experts", EXPERTS)
def test_table_covers_the_jax_module(experts):
    nnx = pytest.importorskip("flax.nnx")
    if importlib.util.find_spec("vla_llm_gemma.jax_impl") is None:
        pytest.skip("no JAX module yet")
    from vla_llm_gemma.jax_impl import Gemma

    here = site(experts)
    module = nnx.eval_shape(lambda: Gemma(here.settings, here.experts, rngs=nnx.Rngs(0)))
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    found = {"/".join(map(str, path)): leaf.get_value().shape for path, leaf in state}
    cover(other_shapes(params.rows(here)), found, "Gemma")


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("experts", EXPERTS)
def test_foreign_tables_name_every_weight(experts, kv_heads):
    here = site(experts, kv_heads)
    ours = shapes(params.rows(here))
    assert shapes(params.openpi(here)) == ours == shapes(params.hf(here))


def test_openpi_shapes():
    """Axes as in openpi's tree: facts of its `gemma.py` at these sizes."""
    found = other_shapes(params.openpi(site("adarms")))
    assert found["layers/attn/q_einsum/w"] == (3, 4, 16, 8)
    assert found["layers/attn/kv_einsum_1/w"] == (3, 2, 1, 8, 8)
    assert found["layers/attn/attn_vec_einsum_1/w"] == (3, 4, 8, 8)
    assert found["layers/mlp/gating_einsum"] == (3, 2, 16, 24)
    assert found["layers/mlp_1/linear"] == (3, 12, 8)
    assert found["layers/pre_ffw_norm_1/Dense_0/kernel"] == (3, 8, 24)
    assert found["final_norm_1/Dense_0/bias"] == (24,)
    assert other_shapes(params.openpi(site("plain", 4)))["layers/attn/qkv_einsum_1/w"] == (3, 3, 4, 8, 8)
