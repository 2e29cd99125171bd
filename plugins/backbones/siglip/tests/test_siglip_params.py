"""The name table of SigLIP covers the modules exactly."""

import importlib.util

import pytest
from vla_vision_siglip import params
from vla_vision_siglip.config import Settings

from vla.contracts import Spec
from vla.params import Site, cover, other_shapes, shapes

SIZE = (24, 32)
SMALL = {"width": 16, "depth": 3, "mlp_dim": 24, "num_heads": 2, "patch_size": 8}
CASES = [Settings(**SMALL, posemb=p, pool=q) for p in ("learn", "sincos2d") for q in ("none", "gap", "map", "tok")]


def site(settings):
    return Site(settings, Spec(image_size=SIZE), {}, {})


@pytest.mark.parametrize("settings", CASES, ids=lambda s: f"{s.posemb}-{s.pool}")
def test_table_covers_the_torch_module(settings):
    torch = pytest.importorskip("torch")
    from vla_vision_siglip.torch_impl import SigLIP

    with torch.device("meta"):
        module = SigLIP(settings, SIZE)
    cover(shapes(params.rows(site(settings))), module.state_dict(), "SigLIP")


@pytest.mark.parametrize("settings", CASES, ids=lambda s: f"{s.posemb}-{s.pool}")
def test_table_covers_the_jax_module(settings):
    nnx = pytest.importorskip("flax.nnx")
    if importlib.util.find_spec("vla_vision_siglip.jax_impl") is None:
        pytest.skip("no JAX module yet")
    from vla_vision_siglip.jax_impl import SigLIP

    module = nnx.eval_shape(lambda: SigLIP(settings, SIZE, rngs=nnx.Rngs(0)))
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    found = {"/".join(map(str, path)): leaf.get_value().shape for path, leaf in state}
    cover(other_shapes(params.rows(site(settings))), found, "SigLIP")


def test_foreign_tables_name_every_weight_of_the_default_encoder():
    here = site(Settings(**SMALL))
    ours = shapes(params.rows(here))
    assert shapes(params.openpi(here)) == ours == shapes(params.hf(here))
