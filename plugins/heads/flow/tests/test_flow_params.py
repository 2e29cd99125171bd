"""The name table of the flow head covers the modules exactly."""

import importlib.util

import pytest
from vla_head_flow import params
from vla_head_flow.config import Settings

from vla.contracts import Spec
from vla.params import Site, cover, other_shapes, shapes

SPEC = Spec(state_dim=5, action_dim=3)
CASES = [Settings(width=8, mlp_dim=12, time=t, state=s) for t in ("adarms", "concat") for s in ("tokens", "continuous")]


def site(settings):
    return Site(settings, SPEC, {"width": 16}, {})


@pytest.mark.parametrize("settings", CASES, ids=lambda s: f"{s.time}-{s.state}")
def test_table_covers_the_torch_module(settings):
    torch = pytest.importorskip("torch")
    from vla_head_flow.torch_impl import FlowHead

    with torch.device("meta"):
        module = FlowHead(settings, SPEC, {"width": 16}, {})
    cover(shapes(params.rows(site(settings))), module.state_dict(), "FlowHead")
    assert (
        shapes(params.hf(site(settings)))
        == shapes(params.openpi(site(settings)))
        == shapes(params.rows(site(settings)))
    )


@pytest.mark.parametrize("settings", CASES, ids=lambda s: f"{s.time}-{s.state}")
def test_table_covers_the_jax_module(settings):
    nnx = pytest.importorskip("flax.nnx")
    if importlib.util.find_spec("vla_head_flow.jax_impl") is None:
        pytest.skip("no JAX module yet")
    from vla_head_flow.jax_impl import FlowHead

    module = nnx.eval_shape(lambda: FlowHead(settings, SPEC, {"width": 16}, {}, rngs=nnx.Rngs(0)))
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    found = {"/".join(map(str, path)): leaf.get_value().shape for path, leaf in state}
    cover(other_shapes(params.rows(site(settings))), found, "FlowHead")
