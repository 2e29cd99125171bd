"""SigLIP in JAX. Mirror of `torch_impl.py`; the blocks are stacked and scanned.

Formulas: big_vision `models/vit.py` (pre-norm, LayerNorm eps 1e-6, GELU tanh, patch embedding without padding).

Axes: B batch, P patches (row-major), D width, N heads, H head width, F mlp width.
"""

from __future__ import annotations

import jax
from flax import nnx
from jax import Array
from jax import numpy as jnp

from vla.jax_kit.ops import Linear, attend, layer_norm, normal, patches, run_layers, stack, uniform
from vla.posemb import sincos_2d
from vla_vision_siglip.config import Settings


class Attention(nnx.Module):
    """Multi-head attention with biases."""

    def __init__(self, s: Settings, *, rngs: nnx.Rngs):
        heads = (s.num_heads, s.width // s.num_heads)
        self.q = Linear(s.width, heads, init=xavier, rngs=rngs)
        self.k = Linear(s.width, heads, init=xavier, rngs=rngs)
        self.v = Linear(s.width, heads, init=xavier, rngs=rngs)
        self.o = Linear(heads, s.width, init=xavier, rngs=rngs)
        self.heads = s.num_heads

    def __call__(self, x: Array, source: Array) -> Array:
        """Queries of x [B T D], keys and values of source [B S D] -> [B T D]."""
        q, k, v = (
            y.reshape(*y.shape[:2], self.heads, -1)
            for y in (self.q(x), self.k(source), self.v(source))  # [B T N H]
        )
        return self.o(attend(q, k, v, None))


class Mlp(nnx.Module):
    """Two layers with a GELU between."""

    def __init__(self, s: Settings, *, rngs: nnx.Rngs):
        self.fc1 = Linear(s.width, s.mlp_dim, init=xavier, rngs=rngs)
        self.fc2 = Linear(s.mlp_dim, s.width, init=xavier, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[B T D] -> [B T D]."""
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))


class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, s: Settings, *, rngs: nnx.Rngs):
        self.norm_attn = layer_norm(s.width, rngs)
        self.attn = Attention(s, rngs=rngs)
        self.norm_mlp = layer_norm(s.width, rngs)
        self.mlp = Mlp(s, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[B P D] -> [B P D]."""
        y = self.norm_attn(x)
        x = x + self.attn(y, y)
        return x + self.mlp(self.norm_mlp(x))


class MapPool(nnx.Module):
    """Multi-head attention pooling: one learned query looks at all patches."""

    def __init__(self, s: Settings, *, rngs: nnx.Rngs):
        self.probe = nnx.Param(xavier(rngs, (s.width, 1)).reshape(1, 1, -1))
        self.attn = Attention(s, rngs=rngs)
        self.norm = layer_norm(s.width, rngs)
        self.mlp = Mlp(s, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[B P D] -> [B 1 D]."""
        x = self.attn(jnp.broadcast_to(self.probe[...], (x.shape[0], 1, x.shape[2])), x)
        return x + self.mlp(self.norm(x))


class SigLIP(nnx.Module):
    """Images to patch tokens."""

    def __init__(self, settings: Settings, image_size: tuple[int, int], *, rngs: nnx.Rngs):
        s = self.settings = settings
        self.width = s.width
        grid = self.grid = tuple(side // s.patch_size for side in image_size)
        self.patch = Linear((s.patch_size, s.patch_size, 3), s.width, rngs=rngs)
        if s.posemb == "learn":
            self.position = nnx.Param(normal(rngs, (1, grid[0] * grid[1], s.width), s.width**-0.5))
        if s.pool == "tok":
            self.class_token = nnx.Param(jnp.zeros((1, 1, s.width)))
        self.blocks = stack(lambda rngs: Block(s, rngs=rngs), s.depth, rngs)
        self.norm = layer_norm(s.width, rngs)
        if s.pool == "map":
            self.pool = MapPool(s, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Images [B h w 3] float32 in [-1, 1] -> [B P D] (pool none) or [B 1 D]."""
        position = self.position[...] if self.settings.posemb == "learn" else sincos_2d(*self.grid, self.width)
        x = self.patch(patches(images, *self.grid, self.settings.patch_size)) + position
        if self.settings.pool == "tok":
            x = jnp.concatenate([jnp.broadcast_to(self.class_token[...], (x.shape[0], 1, x.shape[2])), x], 1)
        x, _ = run_layers(self.blocks, self.settings.depth, lambda block, x, _: (block(x), None), x, None)
        x = self.norm(x)
        if self.settings.pool == "gap":
            return x.mean(1, keepdims=True)
        if self.settings.pool == "map":
            return self.pool(x)
        return x[:, :1] if self.settings.pool == "tok" else x


def xavier(rngs: nnx.Rngs, shape: tuple[int, int]) -> Array:
    """Uniform with variance 2 / (fan in + fan out) (big_vision)."""
    return uniform(rngs, shape, (6 / sum(shape)) ** 0.5)
