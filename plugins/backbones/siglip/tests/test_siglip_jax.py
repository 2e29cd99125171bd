"""SigLIP in JAX is SigLIP in PyTorch: every pooling, both position embeddings, outputs and gradients."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
nnx = pytest.importorskip("flax.nnx")

from vla_vision_siglip import (  # noqa: E402
    jax_impl,
    params,  # noqa: E402
    torch_impl,
)
from vla_vision_siglip.config import Settings  # noqa: E402

from vla.contracts import Spec  # noqa: E402
from vla.params import Site  # noqa: E402
from vla.testing.parity import part_parity, relative  # noqa: E402

SIZES = {"width": 16, "depth": 3, "mlp_dim": 24, "num_heads": 2, "patch_size": 8}


@pytest.mark.parametrize("pool", ["none", "gap", "map", "tok"])
@pytest.mark.parametrize("posemb", ["learn", "sincos2d"])
def test_outputs_and_gradients(pool, posemb):
    settings, size = Settings(**SIZES, pool=pool, posemb=posemb), (24, 43)  # 43: the last 3 columns belong to no patch
    images = np.random.default_rng(0).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    rows = params.rows(Site(settings, Spec(image_size=size), {}, {}))
    found = part_parity(
        torch_impl.SigLIP(settings, size),
        nnx.eval_shape(lambda: jax_impl.SigLIP(settings, size, rngs=nnx.Rngs(0))),
        rows,
        lambda vision, images: [vision(images)],
        images,
    )
    assert len(found) > 10 and not [row for row in found if not row.fine]


def test_sincos_table():
    assert relative(jax_impl.sincos_2d(5, 7, 32), torch_impl.sincos_2d(5, 7, 32).numpy()) < 1e-6
