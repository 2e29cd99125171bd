"""Gemma with one expert, made for decoding, in JAX. Mirror of `torch_impl.py`; the layers are stacked and scanned.

Same weights and same outputs as `gemma` with one expert. `room` makes the decoding cache, once per answer: a buffer for
the keys and values to come, and the projections that read the same input packed into one matrix (q|k|v and gate|up), so
that a decoded token costs four matrix products a layer and allocates nothing.

Axes: B batch, T new tokens, S keys (cached and new), N query heads, K kv heads, H head width, D width, F mlp width,
L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import Array
from jax import numpy as jnp

from vla.jax_kit.ops import (
    Embedder,
    Linear,
    attend,
    fan_in,
    in_compute_dtype,
    matmul,
    rms_norm,
    rope,
    rope_angles,
    run_layers,
    stack,
    write,
)
from vla.layout import BACKBONE, Read
from vla.parts import Expert
from vla_llm_gemma_fast.config import Settings

KV = tuple[Array, Array]  # keys and values, [B S K H] of a layer or [L B S K H] of all
Decoding = tuple[Array, Array, Array, Array]  # k, v [L B S K H], q|k|v [L D (N+2K)H], gate|up [L D 2F]


class Norm(nnx.Module):
    """RMSNorm with a learned scale."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Array) -> Array:
        """[B T D] -> [B T D]."""
        return (rms_norm(x) * (1 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


class Layer(nnx.Module):
    """One layer."""

    def __init__(self, s: Settings, *, rngs: nnx.Rngs):
        quiet = partial(fan_in, scale=(2 * s.depth) ** -0.5)
        d, f, n, k, h = s.width, s.mlp_dim, s.num_heads, s.num_kv_heads, s.head_dim
        self.sizes = (n * h, k * h, k * h)
        self.head_dim, self.mlp_dim = h, f
        self.norm_attn = Norm(d)
        self.q = Linear(d, (n, h), bias=False, rngs=rngs)
        self.k = Linear(d, (k, h), bias=False, rngs=rngs)
        self.v = Linear(d, (k, h), bias=False, rngs=rngs)
        self.o = Linear((n, h), d, bias=False, init=quiet, rngs=rngs)
        self.norm_mlp = Norm(d)
        self.gate = Linear(d, f, bias=False, rngs=rngs)
        self.up = Linear(d, f, bias=False, rngs=rngs)
        self.down = Linear(f, d, bias=False, init=quiet, rngs=rngs)

    def __call__(
        self,
        x: Array,
        mask: Array,
        angles: tuple[Array, Array],
        cache: Decoding | None,
        write_at: Any,
        only_cache: bool,
    ) -> tuple[Array, KV]:
        """x [B T D], mask [B T S] -> x [B T D], and the new k, v [B T K H]."""
        y = self.norm_attn(x)
        if cache is None:
            q, k, v = self.q(y), self.k(y), self.v(y)
        else:
            q, k, v = jnp.split(matmul(y, cache[2]), (self.sizes[0], self.sizes[0] + self.sizes[1]), -1)
        q, k, v = (z.reshape(*z.shape[:2], -1, self.head_dim) for z in (q, k, v))
        k = rope(k, angles)
        new = k, v
        if cache is not None:
            k, v = (write(c, n, write_at) for c, n in zip(cache, new, strict=False))
        if only_cache:
            return x, new
        x = x + self.o(attend(rope(q, angles), k, v, mask))
        y = self.norm_mlp(x)
        if cache is None:
            gate, up = self.gate(y), self.up(y)
        else:
            gate, up = jnp.split(matmul(y, cache[3]), 2, -1)
        return x + self.down(jax.nn.gelu(gate, approximate=True) * up), new


class GemmaFast(nnx.Module):
    """The decoder, one expert: names and weights of `gemma` with `backbone` alone."""

    def __init__(self, settings: Settings, experts: Mapping[str, Expert], *, rngs: nnx.Rngs):
        s = self.settings = settings
        # Initialisation as in torch_impl.py, `reset_parameters`.
        self.embedder = Embedder(s.vocab_size, s.width, std=s.width**-0.5, rngs=rngs)
        self.layers = stack(lambda rngs: nnx.Dict({BACKBONE: Layer(s, rngs=rngs)}), s.depth, rngs)
        self.final_norm = nnx.Dict({BACKBONE: Norm(s.width)})
        self.checkpointing = False  # recompute each layer in the backward pass

    def embed(self, ids: Array) -> Array:
        """Token ids [B n] -> [B n D], times sqrt(D) rounded to the table's dtype."""
        table = self.unembed()
        return jnp.take(table, ids, axis=0) * jnp.asarray(self.settings.width**0.5, table.dtype)

    def unembed(self) -> Array:
        """The tied output table [V D]; logits are `hidden @ table.T`."""
        return self.embedder.embedding[...]

    def room(self, layers: KV, tokens: int) -> Decoding:
        """The decoding cache with space for `tokens` more, so that nothing is allocated later. For inference."""
        k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, tokens), (0, 0), (0, 0))) for x in layers)
        layer = self.layers[BACKBONE]

        def packed(*projections: Linear) -> Array:
            whole = [p.matrix() for p in projections]
            return in_compute_dtype(jnp.concatenate([w.reshape(*w.shape[:2], -1) for w in whole], -1))

        return k, v, packed(layer.q, layer.k, layer.v), packed(layer.gate, layer.up)

    def __call__(
        self,
        xs: Mapping[str, Array],
        mask: Array,
        positions: Array,
        *,
        styles: Mapping[str, object] | None = None,
        reads: Sequence[Read] = (),
        cache: Decoding | None = None,
        write_at: Any = 0,
        outputs: Sequence[str] | None = None,
    ) -> tuple[dict[str, Array], tuple[Array, ...]]:
        """Run tokens of the one expert; arguments and results as in `gemma`."""
        x = xs[BACKBONE]
        angles = rope_angles(positions, self.settings.head_dim)
        only_cache = outputs is not None and not outputs

        def run(only_cache: bool, layer: nnx.Dict, x: Array, own: Decoding | None) -> tuple[Array, KV]:
            return layer[BACKBONE](x, mask, angles, own, write_at, only_cache)

        last = partial(run, True) if only_cache else None
        x, new = run_layers(
            self.layers, self.settings.depth, partial(run, False), x, cache, last=last, checkpointing=self.checkpointing
        )
        if cache is not None:
            new = (*(write(c, n, write_at, axis=2) for c, n in zip(cache, new, strict=False)), *cache[2:])
        if only_cache:
            return {}, new
        return {BACKBONE: self.final_norm[BACKBONE](x)}, new
