"""A plain ViT in JAX (Dosovitskiy et al. 2020). Mirror of `torch_impl.py`; the blocks are stacked and scanned.

Axes: B batch, P patches (row-major), D width, N heads, H head width.
"""

from __future__ import annotations

import jax
from flax import nnx
from jax import Array
from jax import numpy as jnp

from vla.jax_kit.ops import Linear, attend, layer_norm, normal, patches, run_layers, stack
from vla_vision_vit.config import Settings

STD = 0.02


class Block(nnx.Module):
    """Pre-norm block: LayerNorm eps 1e-6, fused query-key-value projection, exact GELU."""

    def __init__(self, s: Settings, *, rngs: nnx.Rngs):
        heads = (s.num_heads, s.width // s.num_heads)
        self.heads = s.num_heads
        self.norm_attn = layer_norm(s.width, rngs)
        self.qkv = Linear(s.width, (3, *heads), init=matrix, rngs=rngs)
        self.o = Linear(heads, s.width, init=matrix, rngs=rngs)
        self.norm_mlp = layer_norm(s.width, rngs)
        self.fc1 = Linear(s.width, s.mlp_dim, init=matrix, rngs=rngs)
        self.fc2 = Linear(s.mlp_dim, s.width, init=matrix, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[B P D] -> [B P D]."""
        qkv = self.qkv(self.norm_attn(x)).reshape(*x.shape[:2], 3, self.heads, -1)  # [B P 3 N H]
        q, k, v = (qkv[:, :, i] for i in range(3))
        x = x + self.o(attend(q, k, v, None))
        return x + self.fc2(jax.nn.gelu(self.fc1(self.norm_mlp(x)), approximate=False))


class ViT(nnx.Module):
    """Images to patch tokens, the class token first."""

    def __init__(self, settings: Settings, image_size: tuple[int, int], *, rngs: nnx.Rngs):
        s = self.settings = settings
        self.width = s.width
        self.grid = tuple(side // s.patch_size for side in image_size)
        self.patch = Linear((s.patch_size, s.patch_size, 3), s.width, init=matrix, rngs=rngs)
        self.class_token = nnx.Param(normal(rngs, (1, 1, s.width), STD))
        self.position = nnx.Param(normal(rngs, (1, self.grid[0] * self.grid[1] + 1, s.width), STD))
        self.blocks = stack(lambda rngs: Block(s, rngs=rngs), s.depth, rngs)
        self.norm = layer_norm(s.width, rngs)

    def __call__(self, images: Array) -> Array:
        """Images [B h w 3] float32 in [-1, 1] -> [B 1+P D], [B P D] (pool patches) or [B 1 D] (cls, mean)."""
        x = self.patch(patches(images, *self.grid, self.settings.patch_size))
        class_token = jnp.broadcast_to(self.class_token[...], (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([class_token, x], 1) + self.position[...]
        x, _ = run_layers(self.blocks, self.settings.depth, lambda block, x, _: (block(x), None), x, None)
        x = self.norm(x)
        pools = {"none": x, "patches": x[:, 1:], "cls": x[:, :1], "mean": x[:, 1:].mean(1, keepdims=True)}
        return pools[self.settings.pool]


def matrix(rngs: nnx.Rngs, shape: tuple[int, int]) -> Array:
    """Normal; PyTorch's truncation, at 100 standard deviations, does nothing."""
    return normal(rngs, shape, STD)
