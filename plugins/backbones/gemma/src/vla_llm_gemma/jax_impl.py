"""Gemma with any number of experts side by side, in JAX. Mirror of `torch_impl.py`; the layers are stacked and scanned.

Every expert has its own weights; layer by layer their queries, keys and values are joined in one attention.
Formulas: openpi `gemma.py` (RMSNorm with 1 + scale, adaRMS, GeGLU, RoPE on split halves, float32 logits).

Axes: B batch, T tokens of all experts, S keys (cached and new), N query heads, K kv heads, H head width,
D width of an expert, F mlp width, L layers, E tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import Array, lax
from jax import numpy as jnp

from vla.jax_kit.ops import (
    Embedder,
    Linear,
    attend_with_stops,
    fan_in,
    linear,
    rms_norm,
    rope,
    rope_angles,
    run_layers,
    stack,
    write,
)
from vla.layout import BACKBONE, Read, clip
from vla.parts import Expert
from vla_llm_gemma.config import Settings

# [L 2 B 3D] for the two norms of every layer, [B 3D] for the final norm; or [L 2 B E 3D] and [B E 3D], per token.
Styles = tuple[Array, Array]
KV = tuple[Array, Array]  # keys and values, [B S K H] of a layer or [L B S K H] of all


class Norm(nnx.Module):
    """RMSNorm with a learned scale, or modulated by a condition (adaRMS)."""

    def __init__(self, expert: Expert, *, rngs: nnx.Rngs):
        if expert.adarms:
            self.modulation = Linear(expert.width, 3 * expert.width, init=zeros, rngs=rngs)  # -> scale, shift, gate
        else:
            self.scale = nnx.Param(jnp.zeros(expert.width))

    def __call__(self, x: Array, style: Array | None) -> tuple[Array, Array | None]:
        """[B E D], [B 3D] or [B E 3D] -> normalised [B E D], and the gate [B 1 D] or [B E D] of the next residual."""
        if style is None:
            return (rms_norm(x) * (1 + self.scale[...].astype(jnp.float32))).astype(x.dtype), None
        scale, shift, gate = jnp.split(style if style.ndim == 3 else style[:, None], 3, -1)
        return (rms_norm(x) * (1 + scale) + shift).astype(x.dtype), gate.astype(x.dtype)


class ExpertLayer(nnx.Module):
    """The weights of one expert in one layer."""

    def __init__(self, s: Settings, expert: Expert, *, rngs: nnx.Rngs):
        quiet = partial(fan_in, scale=(2 * s.depth) ** -0.5)
        d, f, n, k, h = expert.width, expert.mlp_dim, s.num_heads, s.num_kv_heads, s.head_dim
        self.heads, self.kv_heads = n, k
        self.norm_attn = Norm(expert, rngs=rngs)
        self.q = Linear(d, (n, h), bias=False, rngs=rngs)
        self.k = Linear(d, (k, h), bias=False, rngs=rngs)
        self.v = Linear(d, (k, h), bias=False, rngs=rngs)
        self.o = Linear((n, h), d, bias=False, init=quiet, rngs=rngs)
        self.norm_mlp = Norm(expert, rngs=rngs)
        self.gate = Linear(d, f, bias=False, rngs=rngs)
        self.up = Linear(d, f, bias=False, rngs=rngs)
        self.down = Linear(f, d, bias=False, init=quiet, rngs=rngs)

    def keys(self, x: Array, angles: tuple[Array, Array]) -> KV:
        """Normalised x [B E D] -> k, v [B E K H]."""
        k = rope(self.k(x).reshape(*x.shape[:2], self.kv_heads, -1), angles)
        return k, self.v(x).reshape(*x.shape[:2], self.kv_heads, -1)

    def queries(self, x: Array, angles: tuple[Array, Array]) -> Array:
        """Normalised x [B E D] -> q [B E N H]."""
        return rope(self.q(x).reshape(*x.shape[:2], self.heads, -1), angles)

    def finish(self, x: Array, attended: Array, gate: Array | None, style: Array | None) -> Array:
        """Residuals and the MLP: x [B E D], attended [B E (N H)] -> [B E D]."""
        x = _residual(x, self.o(attended), gate)
        y, gate = self.norm_mlp(x, style)
        return _residual(x, self.down(jax.nn.gelu(self.gate(y), approximate=True) * self.up(y)), gate)


def _residual(x: Array, y: Array, gate: Array | None) -> Array:
    return x + y if gate is None else x + y * gate


class Layer(nnx.Dict):
    """One layer of every expert."""

    def __call__(
        self,
        xs: Mapping[str, Array],
        mask: Array,
        angles: Mapping[str, tuple[Array, Array]],
        styles: Mapping[str, Array],
        reads: Sequence[Read],
        cache: KV | None,
        write_at: Any,
        outputs: Sequence[str],
    ) -> tuple[dict[str, Array], KV]:
        """xs {expert: [B E D]}, mask [B T S], styles {expert: [2 B 3D]} -> xs of `outputs`, and new k, v [B T K H]."""
        normed = {e: self[e].norm_attn(x, styles[e][0] if e in styles else None) for e, x in xs.items()}
        keys, values = zip(*(self[e].keys(normed[e][0], angles[e]) for e in xs), strict=True)
        new = _cat(keys), _cat(values)
        if not outputs:
            return {}, new
        k, v = new
        if cache is not None:
            k, v = (write(old, n, write_at) for old, n in zip(cache, new, strict=True))
        queries = {e: self[e].queries(normed[e][0], angles[e]) for e in outputs}
        if len(outputs) == len(xs):
            attended = attend_with_stops(_cat(list(queries.values())), k, v, mask, reads)
            ends = _ends(xs)
            rows = {e: attended[:, ends[e] - x.shape[1] : ends[e]] for e, x in xs.items()}
        else:
            ends, rows = _ends(xs), {}
            for e, q in queries.items():
                start, stop = ends[e] - q.shape[1], ends[e]
                rows[e] = attend_with_stops(q, k, v, mask[:, start:stop], clip(reads, start, stop))
        done = {e: self[e].finish(xs[e], rows[e], normed[e][1], styles[e][1] if e in styles else None) for e in outputs}
        return done, new


def _cat(xs: Sequence[Array]) -> Array:
    return jnp.concatenate(list(xs), 1) if len(xs) > 1 else xs[0]


def _ends(xs: Mapping[str, Array]) -> dict[str, int]:
    """Expert -> where its tokens end in the joined sequence."""
    ends, at = {}, 0
    for expert, x in xs.items():
        at += x.shape[1]
        ends[expert] = at
    return ends


class Gemma(nnx.Module):
    """The decoder. `experts` are those that the head adds beside `backbone`, whose sizes are the settings."""

    def __init__(self, settings: Settings, experts: Mapping[str, Expert], *, rngs: nnx.Rngs):
        s = self.settings = settings
        sizes = {BACKBONE: Expert(s.width, s.mlp_dim), **experts}
        # Initialisation as in torch_impl.py, `reset_parameters`.
        self.embedder = Embedder(s.vocab_size, s.width, std=s.width**-0.5, rngs=rngs)
        self.layers = stack(
            lambda rngs: Layer({name: ExpertLayer(s, expert, rngs=rngs) for name, expert in sizes.items()}),
            s.depth,
            rngs,
        )
        self.final_norm = nnx.Dict({name: Norm(expert, rngs=rngs) for name, expert in sizes.items()})
        self.checkpointing = False  # recompute each layer in the backward pass

    def embed(self, ids: Array) -> Array:
        """Token ids [B n] -> [B n D], times sqrt(D) rounded to the table's dtype."""
        table = self.unembed()
        return jnp.take(table, ids, axis=0) * jnp.asarray(self.settings.width**0.5, table.dtype)

    def unembed(self) -> Array:
        """The tied output table [V D]; logits are `hidden @ table.T`."""
        return self.embedder.embedding[...]

    def styles(self, expert: str, cond: Array) -> Styles:
        """The adaRMS modulation of every norm from the condition [B D], or of every token [B E D].

        It depends on time alone: compute it once.
        """
        layer = self.layers[expert]
        flat = [
            jax.vmap(lambda w, b: linear(cond, w, b, w.shape[-1]))(norm.modulation.matrix(), norm.modulation.bias[...])
            for norm in (layer.norm_attn, layer.norm_mlp)
        ]
        return jnp.stack(flat, 1), self.final_norm[expert].modulation(cond)

    @staticmethod
    def style_at(styles: Styles, row: Any) -> Styles:
        """The styles of one row of the condition, as a batch of one; or of a row for every token [B E]."""
        if jnp.ndim(row):
            return jnp.take(styles[0], row, 2), jnp.take(styles[1], row, 0)
        return lax.dynamic_slice_in_dim(styles[0], row, 1, 2), lax.dynamic_slice_in_dim(styles[1], row, 1, 0)

    @staticmethod
    def room(layers: KV, tokens: int) -> KV:
        """The cache with space for `tokens` more, so that nothing is reallocated later."""
        k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, tokens), (0, 0), (0, 0))) for x in layers)
        return k, v

    def __call__(
        self,
        xs: Mapping[str, Array],
        mask: Array,
        positions: Array,
        *,
        styles: Mapping[str, Styles] | None = None,
        reads: Sequence[Read] = (),
        cache: KV | None = None,
        write_at: Any = 0,
        outputs: Sequence[str] | None = None,
    ) -> tuple[dict[str, Array], KV]:
        """Run tokens of one or several experts.

        Args:
            xs: expert -> [B E D], in sequence order.
            mask: [B T S] bool, over all new tokens and all keys of the cache (or of the new tokens, without one).
            positions: [B T].
            styles: expert -> its adaRMS modulation.
            reads: where attention cuts gradients.
            cache: keys and values of every layer [L B S K H], with room for the new ones; they are written from
                `write_at` (int or traced) on.
            outputs: experts whose result is wanted; the last layer computes no other. Default all.

        Returns:
            expert -> hidden [B E D] after the final norm, and the keys and values of every layer.
        """
        styles = styles or {}
        outputs = list(xs) if outputs is None else [e for e in xs if e in outputs]
        angles = rope_angles(positions, self.settings.head_dim)
        ends = _ends(xs)
        rows = {e: tuple(a[:, ends[e] - x.shape[1] : ends[e]] for a in angles) for e, x in xs.items()}

        def run(wanted: Sequence[str], layer: Layer, xs: Sequence[Array], own: Any) -> tuple[tuple[Array, ...], KV]:
            styles, cache = own
            streams = dict(zip(rows, xs, strict=True))
            done, new = layer(streams, mask, rows, styles, reads, cache, write_at, wanted)
            return tuple(done.values()), new

        each = {e: s[0] for e, s in styles.items()}, cache
        last = partial(run, outputs) if len(outputs) < len(xs) else None
        x, new = run_layers(
            self.layers, self.settings.depth, partial(run, list(xs)), tuple(xs.values()), each,
            last=last, checkpointing=self.checkpointing,
        )  # fmt: skip
        if cache is not None:
            new = tuple(write(c, n, write_at, axis=2) for n, c in zip(new, cache, strict=True))
        done = {
            e: self.final_norm[e](x, styles[e][1] if e in styles else None)[0] for e, x in zip(outputs, x, strict=True)
        }
        return done, new


def zeros(rngs: nnx.Rngs, shape: tuple[int, int]) -> Array:
    """A norm starts unmodulated."""
    return jnp.zeros(shape)
