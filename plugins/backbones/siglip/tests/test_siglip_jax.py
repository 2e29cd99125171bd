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
from vla.posemb import sincos_2d  # noqa: E402
from vla.testing.closeness import close  # noqa: E402
from vla.testing.parity import part_parity  # noqa: E402

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
    table = sincos_2d(5, 7, 32)[0].reshape(5, 7, 4, 8)  # rows, columns, (sin x, cos x, sin y, cos y), frequencies
    assert (table[:, 3:4, :2] == table[:1, 3:4, :2]).all() and (table[2:3, :, 2:] == table[2:3, :1, 2:]).all()
    close(table[4, 6, :, 0], [np.sin(6), np.cos(6), np.sin(4), np.cos(4)], 1e-6)
    close(table[4, 6, :, -1], [6e-4, 1, 4e-4, 1], 1e-6)
