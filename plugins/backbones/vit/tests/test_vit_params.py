"""The name table of the plain ViT covers the modules exactly."""

import importlib.util

import pytest
from vla_vision_vit import params
from vla_vision_vit.config import Settings

from vla.contracts import Spec
from vla.params import Site, cover, other_shapes, shapes

SIZE = (24, 32)
SETTINGS = Settings(width=16, depth=3, mlp_dim=24, num_heads=2, patch_size=8)
SITE = Site(SETTINGS, Spec(image_size=SIZE), {}, {})


def test_table_covers_the_torch_module():
    torch = pytest.importorskip("torch")
    from vla_vision_vit.torch_impl import ViT

    with torch.device("meta"):
        module = ViT(SETTINGS, SIZE)
    cover(shapes(params.rows(SITE)), module.state_dict(), "ViT")


def test_table_covers_the_jax_module():
    nnx = pytest.importorskip("flax.nnx")
    if importlib.util.find_spec("vla_vision_vit.jax_impl") is None:
        pytest.skip("no JAX module yet")
    from vla_vision_vit.jax_impl import ViT

    module = nnx.eval_shape(lambda: ViT(SETTINGS, SIZE, rngs=nnx.Rngs(0)))
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    found = {"/".join(map(str, path)): leaf.get_value().shape for path, leaf in state}
    cover(other_shapes(params.rows(SITE)), found, "ViT")
