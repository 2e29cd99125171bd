"""A small convolutional encoder in JAX. Mirror of `torch_impl.py`.

Axes: B batch, P tokens (row-major), D width, h w pixels.
"""

from __future__ import annotations

import jax
from flax import nnx
from jax import Array, lax

from vla.jax_kit.ops import in_compute_dtype, layer_norm, normal
from vla.posemb import sincos_2d
from vla_vision_convnet.config import GROUPS, Settings


class Layer(nnx.Module):
    """3 x 3 convolution, group norm, GELU; added to its input unless it halves the image."""

    def __init__(self, before: int, width: int, stride: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(normal(rngs, (3, 3, before, width), (9 * before) ** -0.5))
        self.norm = nnx.GroupNorm(width, num_groups=GROUPS, epsilon=1e-6, use_fast_variance=False, rngs=rngs)
        self.stride = stride

    def __call__(self, x: Array) -> Array:
        """[B h w c] -> [B h w d] or [B h/2 w/2 d]."""
        y = lax.conv_general_dilated(
            in_compute_dtype(x), in_compute_dtype(self.kernel[...]), (self.stride, self.stride), ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        y = jax.nn.gelu(self.norm(y), approximate=False)
        return x + y if self.stride == 1 else y


class ConvNet(nnx.Module):
    """Images to tokens."""

    def __init__(self, settings: Settings, image_size: tuple[int, int], *, rngs: nnx.Rngs):
        self.settings, self.image_size = settings, tuple(image_size)
        self.width = settings.widths[-1]
        self.layers = nnx.List([Layer(*layer, rngs=rngs) for layer in settings.layers()])
        self.norm = layer_norm(self.width, rngs)

    def __call__(self, images: Array) -> Array:
        """Images [B h w 3] float32 in [-1, 1] -> [B P D]."""
        x = images
        for layer in self.layers:
            x = layer(x)
        position = sincos_2d(*self.settings.grid(self.image_size), self.width)
        return self.norm(x.reshape(x.shape[0], -1, self.width) + position)
