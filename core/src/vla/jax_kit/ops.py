"""Maths shared by parts, in JAX. Mirror of `torch_kit/ops.py`; the end of the file has what PyTorch brings itself.

Axes: B batch, T query, S key, N query heads, K kv heads, G = N // K, H head width, D width, V vocabulary, M rows,
L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array, lax
from jax import numpy as jnp

from vla.layout import Read


def rms_norm(x: Array) -> Array:
    """x / sqrt(mean(x^2) + 1e-6) over the last axis, in float32 (openpi `gemma.RMSNorm`); scaling is the caller's."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def rope_angles(positions: Array, head_dim: int) -> tuple[Array, Array]:
    """cos and sin [B T 1 H/2] of the rotary embedding, float32; wavelength 10000^(2i/H)."""
    i = np.arange(head_dim // 2, dtype=np.float64)
    frequency = (10_000.0 ** -(i / (head_dim // 2))).astype(np.float32)
    angle = positions[..., None, None].astype(jnp.float32) * frequency  # XLA would divide by way of the reciprocal
    return jnp.cos(angle), jnp.sin(angle)


def rope(x: Array, angles: tuple[Array, Array]) -> Array:
    """Rotate the two halves of the head width: [B T N H] -> [B T N H]; float32 inside, x's dtype outside."""
    cos, sin = angles
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def attend(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Attention [B T N H], [B S K H] x 2 -> [B T (N H)] under a mask [B T S] or none; logits and softmax in float32.

    A query that may see nothing (padding) sees all keys; nobody reads its result.
    """
    b, t, n, h = q.shape
    s, kv = k.shape[1:3]
    # All G query heads of a kv head become rows of one matrix product: no copy of k and v per head.
    q = (q * h**-0.5).reshape(b, t, kv, n // kv, h).transpose(0, 2, 1, 3, 4).reshape(b, kv, t * (n // kv), h)
    logits = matmul(q, k.transpose(0, 2, 3, 1)).astype(jnp.float32).reshape(b, kv, t, n // kv, s)
    if mask is not None:
        logits = jnp.where(mask[:, None, :, None, :], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits).astype(v.dtype).reshape(b, kv, -1, s)
    out = matmul(weights, v.transpose(0, 2, 1, 3)).reshape(b, kv, t, n // kv, h)
    return out.transpose(0, 2, 1, 3, 4).reshape(b, t, n * h)


def attend_with_stops(q: Array, k: Array, v: Array, mask: Array, reads: Sequence[Read]) -> Array:
    """`attend`, in which some queries see some keys and values without gradient (`Layout.reads`)."""
    if not reads:
        return attend(q, k, v, mask)
    return jnp.concatenate(
        [
            attend(q[:, r.start : r.stop], detach(k, r.detached), detach(v, r.detached), mask[:, r.start : r.stop])
            for r in reads
        ],
        1,
    )


def write(buffer: Array, new: Array, at: Any, *, axis: int = 1) -> Array:
    """A cache [B S K H] with new keys or values [B T K H] from `at` (int or traced) on; `axis` is that of S."""
    return lax.dynamic_update_slice_in_dim(buffer, new.astype(buffer.dtype), at, axis)


def detach(x: Array, slices: Sequence[tuple[int, int]]) -> Array:
    """x with these slices of axis 1 cut off from gradients."""
    pieces, at = [], 0
    for start, stop in slices:
        pieces += [x[:, at:start], lax.stop_gradient(x[:, start:stop])]
        at = stop
    return jnp.concatenate([*pieces, x[:, at:]], 1) if pieces else x


def time_embedding(time: Array, width: int, min_period: float, max_period: float) -> Array:
    """Sinusoids of t, [...] -> [... width]: sin then cos of 2 pi t / period, periods spaced geometrically (openpi).

    t / period goes to 250 turns and more, of which float32 keeps too little behind the point. Both factors are split
    into a part of few bits and a rest, so that the big product is exact and its whole turns can be dropped.
    """
    turns = 1 / (min_period * (max_period / min_period) ** np.linspace(0, 1, width // 2))  # per unit of time, float64
    coarse = _few_bits(turns.astype(np.float32))
    fine = (turns - coarse).astype(np.float32)
    time = time.astype(jnp.float32)[..., None]
    big = _few_bits(time)
    whole = big * coarse  # exact: 12 bits times 12 bits
    angle = (whole - jnp.floor(whole) + (big * fine + (time - big) * turns.astype(np.float32))) * (2 * math.pi)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)


def _few_bits(x: Any) -> Any:
    """float32 with all but the 12 leading bits of its fraction cut off; numpy or JAX."""
    if isinstance(x, np.ndarray):
        return (x.view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)
    bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
    return lax.bitcast_convert_type(bits, jnp.float32)


def masked_mean(error: Array, mask: Array | None) -> Array:
    """Mean of each row over what is real: error [B ...], mask bool that broadcasts to it, or None -> [B].

    A row with nothing real is 0.
    """
    axes = tuple(range(1, error.ndim))
    if mask is None:
        return error.mean(axes)
    real = jnp.broadcast_to(mask.astype(error.dtype), error.shape)
    return (error * real).sum(axes) / jnp.maximum(real.sum(axes), 1)


def token_nll(hidden: Array, table: Array, targets: Array, chunk_elements: int = 1 << 25) -> Array:
    """Negative log-likelihood of `targets` [M] under logits `hidden @ table.T`, [M D], [V D] -> [M] float32.

    Rows are taken in chunks of at most `chunk_elements` logits; with more than one chunk the backward pass computes
    the logits again instead of keeping them, so memory does not grow with M x V.
    """
    rows = max(1, chunk_elements // table.shape[0])
    m = hidden.shape[0]
    if m <= rows:
        return _nll(hidden, table, targets)
    chunks = -(-m // rows)
    hidden = jnp.pad(hidden, ((0, chunks * rows - m), (0, 0))).reshape(chunks, rows, -1)
    targets = jnp.pad(targets, (0, chunks * rows - m)).reshape(chunks, rows)
    return _chunked_nll(hidden, table, targets).reshape(-1)[:m]


def _nll(hidden: Array, table: Array, targets: Array) -> Array:
    logits = matmul(hidden, table.T).astype(jnp.float32)
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[:, None], -1)[:, 0]


@jax.custom_vjp
def _chunked_nll(hidden: Array, table: Array, targets: Array) -> Array:
    """[C M D], [V D], [C M] -> [C M]."""
    return lax.map(lambda chunk: _nll(chunk[0], table, chunk[1]), (hidden, targets))


def _chunked_forward(hidden: Array, table: Array, targets: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _chunked_nll(hidden, table, targets), (hidden, table, targets)


def _chunked_backward(saved: tuple[Array, Array, Array], grad: Array) -> tuple[Array, Array, None]:
    hidden, table, targets = saved

    def chunk(d_table: Array, row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        h, y, g = row
        d_logits = jax.nn.softmax(matmul(h, table.T).astype(jnp.float32))
        d_logits = d_logits.at[jnp.arange(len(y)), y].add(-1)
        d_logits = (d_logits * g[:, None]).astype(h.dtype)
        return d_table + matmul(d_logits.T, h), matmul(d_logits, table).astype(h.dtype)

    d_table, d_hidden = lax.scan(chunk, jnp.zeros(table.shape, jnp.float32), (hidden, targets, grad))
    return d_hidden, d_table.astype(table.dtype), None


_chunked_nll.defvjp(_chunked_forward, _chunked_backward)


# ---- what PyTorch brings itself --------------------------------------------------------------------------------------

_COMPUTE: ContextVar[Any] = ContextVar("compute dtype", default=None)


@contextmanager
def autocast(dtype: Any) -> Iterator[None]:
    """Matrix products in this dtype (torch.autocast): weights stay float32, norms and softmax compute in float32.

    Read while a function is traced, so enter it inside the function that is compiled. None: as the operands are.
    """
    token = _COMPUTE.set(None if dtype is None else jnp.dtype(dtype))
    try:
        yield
    finally:
        _COMPUTE.reset(token)


def matmul(a: Array, b: Array) -> Array:
    """a @ b, in the dtype of `autocast`."""
    return in_compute_dtype(a) @ in_compute_dtype(b)


def in_compute_dtype(x: Array) -> Array:
    """x in the dtype of `autocast`."""
    dtype = _COMPUTE.get()
    return x if dtype is None else x.astype(dtype)


Init = Callable[[Any, tuple[int, int]], Any]  # (nnx.Rngs, (fan in, fan out)) -> kernel


def fan_in(rngs: nnx.Rngs, shape: tuple[int, int], scale: float = 1.0) -> Array:
    """Standard deviation scale / sqrt(fan in)."""
    return normal(rngs, shape, scale * shape[0] ** -0.5)


def normal(rngs: nnx.Rngs, shape: Sequence[int], std: float) -> Array:
    """Normal numbers. Drawn in numpy, as XLA compiles ten seconds for the initialisation of a tiny model."""
    key = rngs.params()
    if isinstance(key, jax.core.Tracer):  # under eval_shape or jit
        return jax.random.normal(key, shape) * std
    return jnp.asarray(_numpy(key).standard_normal(shape, np.float32) * np.float32(std))


def uniform(rngs: nnx.Rngs, shape: Sequence[int], bound: float) -> Array:
    """Uniform numbers in [-bound, bound]; as `normal`."""
    key = rngs.params()
    if isinstance(key, jax.core.Tracer):
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
    return jnp.asarray((_numpy(key).random(shape, np.float32) * 2 - 1) * np.float32(bound))


def _numpy(key: Array) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


class Linear(nnx.Module):
    """x @ kernel + bias. kernel [*into *out]; axes of heads are kept apart in it and joined in x and in the result."""

    def __init__(
        self,
        into: int | tuple[int, ...],
        out: int | tuple[int, ...],
        *,
        bias: bool = True,
        init: Init = fan_in,
        rngs: nnx.Rngs,
    ):
        into, out = ((n,) if isinstance(n, int) else n for n in (into, out))
        flat = (math.prod(into), math.prod(out))
        self.kernel = nnx.Param(init(rngs, flat).reshape(*into, *out))
        self.bias = nnx.Param(jnp.zeros(out)) if bias else None
        self.fan_out = flat[1]

    def __call__(self, x: Array) -> Array:
        """[... (into)] -> [... (out)]: one matrix product, which is 1.4 times an einsum over many axes on CPU."""
        return linear(x, self.kernel[...], self.bias[...] if self.bias is not None else None, self.fan_out)

    def matrix(self) -> Array:
        """The whole kernel, for who bypasses `__call__`: with an adapter (`vla.jax_kit.lora`) it is not `kernel`."""
        return self.kernel[...]


def linear(x: Array, kernel: Array, bias: Array | None, fan_out: int) -> Array:
    """The function of `Linear`, for kernels that are stacked or mapped."""
    y = matmul(x, kernel.reshape(-1, fan_out))
    return y if bias is None else y + bias.reshape(-1).astype(y.dtype)


class Embedder(nnx.Module):
    """A table of vectors, [V D]."""

    def __init__(self, vocab_size: int, width: int, *, std: float, rngs: nnx.Rngs):
        self.embedding = nnx.Param(normal(rngs, (vocab_size, width), std))


def patches(images: Array, rows: int, cols: int, size: int) -> Array:
    """Images [B h w 3] -> the pixels of each patch [B P (size size 3)]; a rest at the right and bottom is cut off."""
    b = images.shape[0]
    x = images[:, : rows * size, : cols * size].reshape(b, rows, size, cols, size, 3)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * cols, -1)


def layer_norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm, eps 1e-6. Mean first, then variance: as exact as PyTorch's."""
    return nnx.LayerNorm(width, epsilon=1e-6, use_fast_variance=False, rngs=rngs)


def stack(make: Callable[[nnx.Rngs], Any], depth: int, rngs: nnx.Rngs) -> Any:
    """`depth` modules as one, every weight with a leading axis [L ...]."""

    if not isinstance(rngs.params(), jax.core.Tracer):
        graphs, weights = zip(*(nnx.split(make(rngs)) for _ in range(depth)), strict=True)
        return nnx.merge(graphs[0], jax.tree.map(lambda *ws: jnp.asarray(np.stack(ws)), *weights))

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def create(rngs: nnx.Rngs) -> Any:
        return make(rngs)

    return create(rngs)


Run = Callable[[Any, Any, Any], tuple[Any, Any]]  # (layer, x, what is this layer's own) -> x, result


def run_layers(
    stacked: Any, depth: int, run: Run, x: Any, own: Any, *, last: Run | None = None, checkpointing: bool = False
) -> tuple[Any, Any]:
    """x through all layers of a stacked module by `lax.scan`: one layer is compiled, not `depth` of them.

    Args:
        stacked: what `stack` made.
        depth: how many layers.
        run: one layer. x keeps its structure; dicts would come back with their keys sorted.
        x: what goes through.
        own: tree of arrays with a leading layer axis, cut up for the layers.
        last: runs the last layer instead, apart; its x may differ.
        checkpointing: recompute each layer in the backward pass.

    Returns:
        x behind the last layer, and the results of all layers with a leading layer axis.
    """
    graph, weights = nnx.split(stacked)

    def body(x: Any, at: tuple[Any, Any]) -> tuple[Any, Any]:
        return run(nnx.merge(graph, at[0]), x, at[1])

    def body_at(x: Any, i: Any) -> tuple[Any, Any]:
        return body(x, jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, 0, keepdims=False), (weights, own)))

    def maybe(body: Any) -> Any:
        return jax.checkpoint(body) if checkpointing else body

    if last is None:
        return lax.scan(maybe(body), x, (weights, own))
    # Indexed, not sliced: a slice of the stacked weights would be a copy of them.
    x, results = lax.scan(maybe(body_at), x, jnp.arange(depth - 1))
    at_last = jax.tree.map(lambda a: a[depth - 1], (weights, own))
    x, result = last(nnx.merge(graph, at_last[0]), x, at_last[1])
    return x, jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), results, result)
