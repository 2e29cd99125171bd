"""Maths shared by parts, in PyTorch.

Axes: B batch, T query, S key, N query heads, K kv heads, G = N // K, H head width, D width, V vocabulary, M rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vla.layout import Read


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + 1e-6) over the last axis, in float32 (openpi `gemma.RMSNorm`); scaling is the caller's."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def rope_angles(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [B T 1 H/2] of the rotary embedding, float32; wavelength 10000^(2i/H)."""
    i = torch.arange(head_dim // 2, dtype=torch.float64, device=positions.device)
    frequency = (10_000.0 ** -(i / (head_dim // 2))).float()
    angle = positions[..., None, None].float() * frequency  # a product rounds alike everywhere, a quotient does not
    return angle.cos(), angle.sin()


def rope(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the two halves of the head width: [B T N H] -> [B T N H]; float32 inside, x's dtype outside."""
    cos, sin = angles
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, fused: bool = False) -> Tensor:
    """Attention [B T N H], [B S K H] x 2 -> [B T (N H)] under a mask [B T S] or none; logits and softmax in float32.

    A query that may see nothing (padding) sees all keys; nobody reads its result. `fused` kernels are 3-4 times faster
    forward, and their backward on CPU in bfloat16 3 times slower: the caller knows which of the two it wants.
    """
    b, t, n, h = q.shape
    s, kv = k.shape[1:3]
    if fused:
        if mask is not None:
            mask = (mask | ~mask.any(-1, keepdim=True))[:, None]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=n != kv)
        return out.transpose(1, 2).flatten(2)
    # All G query heads of a kv head become rows of one matrix product: no copy of k and v per head.
    q = (q * h**-0.5).view(b, t, kv, n // kv, h).transpose(1, 2).reshape(b, kv, t * (n // kv), h)
    logits = (q @ k.permute(0, 2, 3, 1)).float().view(b, kv, t, n // kv, s)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, :, None, :], torch.finfo(torch.float32).min)
    weights = logits.softmax(-1).to(v.dtype).view(b, kv, -1, s)
    out = (weights @ v.transpose(1, 2)).view(b, kv, t, n // kv, h)
    return out.transpose(1, 2).reshape(b, t, n * h)


def attend_with_stops(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, reads: Sequence[Read], *, fused: bool = False
) -> Tensor:
    """`attend`, in which some queries see some keys and values without gradient (`Layout.reads`)."""
    if not reads:
        return attend(q, k, v, mask, fused=fused)
    return torch.cat(
        [
            attend(q[:, at], detach(k, read.detached), detach(v, read.detached), mask[:, at], fused=fused)
            for read in reads
            for at in (slice(read.start, read.stop),)
        ],
        1,
    )


def write(buffer: Tensor, new: Tensor, at: int, *, in_place: bool) -> Tensor:
    """A cache [B S K H] with new keys or values [B T K H] from `at` on; no gradient can follow what is in place."""
    if not in_place:
        return torch.cat([buffer[:, :at], new, buffer[:, at + new.shape[1] :]], 1)
    buffer[:, at : at + new.shape[1]] = new
    return buffer


def detach(x: Tensor, slices: Sequence[tuple[int, int]]) -> Tensor:
    """x with these slices of axis 1 cut off from gradients."""
    pieces, at = [], 0
    for start, stop in slices:
        pieces += [x[:, at:start], x[:, start:stop].detach()]
        at = stop
    return torch.cat([*pieces, x[:, at:]], 1) if pieces else x


def time_embedding(time: Tensor, width: int, min_period: float, max_period: float) -> Tensor:
    """Sinusoids of t, [...] -> [... width]: sin then cos of 2 pi t / period, periods spaced geometrically (openpi)."""
    fraction = torch.linspace(0, 1, width // 2, dtype=torch.float64, device=time.device)
    period = min_period * (max_period / min_period) ** fraction
    angle = time[..., None].double() / period * (2 * math.pi)
    return torch.cat([angle.sin(), angle.cos()], -1).float()


def masked_mean(error: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of each row over what is real: error [B ...], mask bool that broadcasts to it, or None -> [B].

    A row with nothing real is 0.
    """
    axes = tuple(range(1, error.ndim))
    if mask is None:
        return error.mean(axes)
    real = mask.to(error.dtype).expand_as(error)
    return (error * real).sum(axes) / real.sum(axes).clamp(min=1)


def token_nll(hidden: Tensor, table: Tensor, targets: Tensor, chunk_elements: int = 1 << 25) -> Tensor:
    """Negative log-likelihood of `targets` [M] under logits `hidden @ table.T`, [M D], [V D] -> [M] float32.

    Rows are taken in chunks of at most `chunk_elements` logits; with more than one chunk the backward pass computes
    the logits again instead of keeping them, so memory does not grow with M x V.
    """
    rows = max(1, chunk_elements // table.shape[0])
    if hidden.shape[0] <= rows:
        return F.cross_entropy((hidden @ table.T).float(), targets, reduction="none")
    return _ChunkedNLL.apply(hidden, table, targets, rows)


class _ChunkedNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, table, targets, rows):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(hidden, table, targets)
        ctx.rows = rows
        parts = [
            F.cross_entropy((h @ table.T).float(), y, reduction="none")
            for h, y in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        hidden, table, targets = ctx.saved_tensors
        d_hidden, d_table = [], torch.zeros_like(table, dtype=torch.float32)
        for h, y, g in zip(hidden.split(ctx.rows), targets.split(ctx.rows), grad.split(ctx.rows), strict=True):
            d_logits = (h @ table.T).float().softmax(-1)
            d_logits[torch.arange(len(y), device=y.device), y] -= 1
            d_logits = (d_logits * g[:, None]).to(h.dtype)
            d_hidden.append(d_logits @ table)
            d_table += d_logits.T @ h
        return torch.cat(d_hidden), d_table.to(table.dtype), None, None
