"""Training the `fsq` network in PyTorch: the mirror of `net.py`, with a straight-through rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Params = Mapping[str, Tensor]
EPSILON = 1e-6


def reconstruct(p: Params, actions: Tensor, levels: tuple[int, ...], layers: int) -> Tensor:
    """Chunks [n h d] through encoder, codebook and decoder; gradients pass the rounding unchanged."""
    x = read(p, "encoder", dense(p, "proj", actions), layers)
    z = torch.tanh(dense(p, "codebook/proj_down", x))
    steps = torch.tensor(levels, dtype=z.dtype) - 1
    rounded = torch.round((z + 1) * steps / 2) / steps * 2 - 1
    z = z + (rounded - z).detach()
    x = read(p, "decoder", dense(p, "codebook/proj_up", z), layers)
    return dense(p, "proj_mean", x) * p["out_scale"]


def read(p: Params, name: str, y: Tensor, layers: int) -> Tensor:
    """Learned queries [q e] read y [n s e]: gives [n q e]."""
    x = p[f"{name}/q_embed"].expand(len(y), -1, -1)
    y = y + p[f"{name}/y_pos_enc"]
    for i in range(layers):
        block = f"{name}/CrossAttentionLayer_{i}"
        a = layer_norm(p, f"{block}/LayerNorm_0", x)
        x = x + attend(p, f"{block}/MultiHeadDotProductAttention_0", a, a)
        a = layer_norm(p, f"{block}/LayerNorm_1", x)
        x = x + attend(p, f"{block}/MultiHeadDotProductAttention_1", a, y)
        a = dense(p, f"{block}/Dense_0", layer_norm(p, f"{block}/LayerNorm_2", x))
        a, gate = dense(p, f"{block}/GeGLU_0/Dense_0", a).chunk(2, -1)
        x = x + dense(p, f"{block}/Dense_1", a * F.gelu(gate, approximate="tanh"))
    return x


def dense(p: Params, name: str, x: Tensor) -> Tensor:
    """x W + b."""
    return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]


def layer_norm(p: Params, name: str, x: Tensor) -> Tensor:
    """Over the last axis."""
    return F.layer_norm(x, x.shape[-1:], p[f"{name}/scale"], p[f"{name}/bias"], EPSILON)


def attend(p: Params, name: str, x: Tensor, y: Tensor) -> Tensor:
    """Queries from x [n q e], keys and values from y [n s e]."""
    q, k, v = (heads(p, f"{name}/{part}", source) for part, source in (("query", x), ("key", y), ("value", y)))
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [n q a*c]
    return mixed @ p[f"{name}/out/kernel"].flatten(0, 1) + p[f"{name}/out/bias"]


def heads(p: Params, name: str, x: Tensor) -> Tensor:
    """[n s e] -> [n a s c]."""
    kernel = p[f"{name}/kernel"]  # [e a c]
    flat = x @ kernel.flatten(1) + p[f"{name}/bias"].flatten()
    return flat.unflatten(-1, kernel.shape[1:]).transpose(1, 2)


def initial(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Fresh parameters: Lecun-normal kernels, sinusoids for queries and positions, as in openpi."""
    rng = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in sorted(shapes.items()):
        if name.endswith("kernel"):
            fan_in = math.prod(shape[:-1]) if name.endswith("out/kernel") else shape[0]
            out[name] = torch.randn(shape, generator=rng) / math.sqrt(fan_in)
        elif name.endswith(("q_embed", "y_pos_enc")):
            out[name] = sinusoids(*shape)
        else:
            out[name] = torch.ones(shape) if name.endswith("scale") else torch.zeros(shape)
    return out


def sinusoids(length: int, width: int) -> Tensor:
    """[length width]: sines, then cosines."""
    angle = torch.arange(length)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    return torch.cat([angle.sin(), angle.cos()], -1)


def fit(
    chunks: np.ndarray,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    levels: tuple[int, ...],
    layers: int,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Train on chunks [n h d] for the mean square error; the same parameters on every run on one machine.

    Adam, warm-up over the first 5 % of the steps, then a cosine to zero, gradients clipped to norm 1.
    """
    params = {name: value.requires_grad_() for name, value in initial(shapes, seed).items()}
    data = torch.from_numpy(np.ascontiguousarray(chunks, np.float32))
    rng = torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.Adam(params.values(), lr=lr, betas=(0.9, 0.98))
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: (i + 1) / warm if i < warm else 0.5 * (1 + math.cos(math.pi * (i - warm) / max(1, steps - warm))),
    )
    for step in range(steps):
        rows = data[torch.randint(len(data), (min(batch, len(data)),), generator=rng)]
        loss = F.mse_loss(reconstruct(params, rows, levels, layers), rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(params.values()), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step + 1, steps)
    return {name: value.detach().numpy().copy() for name, value in params.items()}
