"""The ViT in JAX is the ViT in PyTorch: every pooling, outputs and gradients."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
nnx = pytest.importorskip("flax.nnx")

from vla_vision_vit import jax_impl, params, torch_impl  # noqa: E402
from vla_vision_vit.config import Settings  # noqa: E402

from vla.contracts import Spec  # noqa: E402
from vla.params import Site  # noqa: E402
from vla.testing.parity import part_parity  # noqa: E402

SIZES = {"width": 16, "depth": 3, "mlp_dim": 24, "num_heads": 2, "patch_size": 8}


@pytest.mark.parametrize("pool", ["none", "patches", "cls", "mean"])
def test_outputs_and_gradients(pool):
    settings, size = Settings(**SIZES, pool=pool), (24, 32)
    images = np.random.default_rng(0).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    found = part_parity(
        torch_impl.ViT(settings, size),
        nnx.eval_shape(lambda: jax_impl.ViT(settings, size, rngs=nnx.Rngs(0))),
        params.rows(Site(settings, Spec(image_size=size), {}, {})),
        lambda vision, images: [vision(images)],
        images,
    )
    assert len(found) > 10 and not [row for row in found if not row.fine]
