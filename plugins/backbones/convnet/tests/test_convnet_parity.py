"""The convolutional encoder: JAX is PyTorch, outputs and gradients, sizes that do not halve evenly, bad settings."""

import numpy as np
import pytest
from vla_vision_convnet.config import Settings

from vla.contracts import Spec
from vla.errors import SettingsError
from vla.params import Site


@pytest.mark.parametrize("size", [(32, 32), (20, 28)])
def test_outputs_and_gradients(size):
    pytest.importorskip("torch")
    nnx = pytest.importorskip("flax.nnx")
    from vla_vision_convnet import jax_impl, params, torch_impl

    from vla.testing.parity import part_parity

    settings = Settings(widths=(8, 16), residual=(0, 2))
    images = np.random.default_rng(0).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    module = torch_impl.ConvNet(settings, size)
    found = part_parity(
        module,
        nnx.eval_shape(lambda: jax_impl.ConvNet(settings, size, rngs=nnx.Rngs(0))),
        params.rows(Site(settings, Spec(image_size=size), {}, {})),
        lambda vision, images: [vision(images)],
        images,
    )
    assert len(found) > 10 and not [row for row in found if not row.fine]
    rows, columns = settings.grid(size)
    assert module.position.shape == (1, rows * columns, 16)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"widths": (8, 12)}, "widths"), ({"widths": ()}, "widths"), ({"residual": (1,)}, "residual")],
)
def test_wrong_settings_name_the_field(settings, words):
    with pytest.raises(SettingsError, match=words):
        Settings(**settings)
