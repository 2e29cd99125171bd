"""The network of the `fsq` tokenizer in numpy: openpi's `FsqAttentionTokenizer`, under its parameter names.

    actions [n h d] -> proj -> encoder: learned queries read the chunk -> codebook: tanh, round to digits, one id per
    token ids [n k] -> digits -> proj_up -> decoder: learned queries read the tokens -> proj_mean -> actions [n h d]

Parameters are a dict "proj/kernel" -> float32 array, names and axes as flax makes them. `torch_impl.py` mirrors this
file for training. Axes: n chunks, h steps, d dims, k tokens, e embed_dim, q queries, s keys, a heads, c head width.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Params = Mapping[str, np.ndarray]
EPSILON = 1e-6  # of flax's LayerNorm


def encode(p: Params, actions: np.ndarray, levels: tuple[int, ...], layers: int) -> np.ndarray:
    """Ids int64 [n k] of chunks [n h d]."""
    x = read(p, "encoder", dense(p, "proj", actions.astype(np.float32)), layers)
    z = np.tanh(dense(p, "codebook/proj_down", x))
    bases = np.asarray(levels)
    digits = np.rint((z + 1) * (bases - 1) / 2).astype(np.int64)
    return (digits * places(levels)).sum(-1)


def decode(p: Params, ids: np.ndarray, levels: tuple[int, ...], layers: int) -> np.ndarray:
    """Chunks float32 [n h d] of ids [n k]."""
    bases = np.asarray(levels)
    digits = ids[..., None] // places(levels) % bases
    z = (digits / (bases - 1) * 2 - 1).astype(np.float32)
    x = read(p, "decoder", dense(p, "codebook/proj_up", z), layers)
    return dense(p, "proj_mean", x) * p["out_scale"]


def places(levels: tuple[int, ...]) -> np.ndarray:
    """What a step of each digit adds to the id; the first digit counts single."""
    return np.cumprod((1, *levels[:-1]))


def read(p: Params, name: str, y: np.ndarray, layers: int) -> np.ndarray:
    """Learned queries [q e] read y [n s e]: gives [n q e]."""
    x = np.broadcast_to(p[f"{name}/q_embed"], (len(y), *p[f"{name}/q_embed"].shape))
    y = y + p[f"{name}/y_pos_enc"]
    for i in range(layers):
        block = f"{name}/CrossAttentionLayer_{i}"
        a = layer_norm(p, f"{block}/LayerNorm_0", x)
        x = x + attend(p, f"{block}/MultiHeadDotProductAttention_0", a, a)
        a = layer_norm(p, f"{block}/LayerNorm_1", x)
        x = x + attend(p, f"{block}/MultiHeadDotProductAttention_1", a, y)
        a = dense(p, f"{block}/Dense_0", layer_norm(p, f"{block}/LayerNorm_2", x))
        a, gate = np.split(dense(p, f"{block}/GeGLU_0/Dense_0", a), 2, -1)
        x = x + dense(p, f"{block}/Dense_1", a * gelu(gate))
    return x


def dense(p: Params, name: str, x: np.ndarray) -> np.ndarray:
    """x W + b."""
    return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]


def layer_norm(p: Params, name: str, x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON)
    return x * p[f"{name}/scale"] + p[f"{name}/bias"]


def attend(p: Params, name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Queries from x [n q e], keys and values from y [n s e]."""
    q, k, v = (heads(p, f"{name}/{part}", source) for part, source in (("query", x), ("key", y), ("value", y)))
    scores = q @ k.swapaxes(-1, -2) / np.float32(np.sqrt(q.shape[-1]))  # [n a q s]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = (weights @ v).swapaxes(1, 2)  # [n q a c]
    kernel = p[f"{name}/out/kernel"]  # [a c e]
    return mixed.reshape(*mixed.shape[:2], -1) @ kernel.reshape(-1, kernel.shape[-1]) + p[f"{name}/out/bias"]


def heads(p: Params, name: str, x: np.ndarray) -> np.ndarray:
    """[n s e] -> [n a s c]."""
    kernel = p[f"{name}/kernel"]  # [e a c]
    flat = x @ kernel.reshape(kernel.shape[0], -1) + p[f"{name}/bias"].ravel()
    return flat.reshape(*x.shape[:2], *kernel.shape[1:]).swapaxes(1, 2)


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form, flax's default."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi).astype(np.float32) * (x + 0.044715 * x**3)))


def shapes(
    e: int, d: int, h: int, k: int, layers: int, ratio: float, digits: int, head_dim: int
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all parameters."""
    wide, a = int(e * ratio), e // head_dim
    out: dict[str, tuple[int, ...]] = {"out_scale": ()}

    def linear(name: str, inner: tuple[int, ...], outer: tuple[int, ...]) -> None:
        out[f"{name}/kernel"], out[f"{name}/bias"] = inner + outer, outer

    linear("proj", (d,), (e,))
    linear("codebook/proj_down", (e,), (digits,))
    linear("codebook/proj_up", (digits,), (e,))
    linear("proj_mean", (e,), (d,))
    for name, queries, keys in (("encoder", k, h), ("decoder", h, k)):
        out[f"{name}/q_embed"], out[f"{name}/y_pos_enc"] = (queries, e), (keys, e)
        for i in range(layers):
            block = f"{name}/CrossAttentionLayer_{i}"
            for j in range(3):
                out[f"{block}/LayerNorm_{j}/scale"] = out[f"{block}/LayerNorm_{j}/bias"] = (e,)
            for j in range(2):
                for part in ("query", "key", "value"):
                    linear(f"{block}/MultiHeadDotProductAttention_{j}/{part}", (e,), (a, head_dim))
                linear(f"{block}/MultiHeadDotProductAttention_{j}/out", (a, head_dim), (e,))
            linear(f"{block}/Dense_0", (e,), (wide,))
            linear(f"{block}/GeGLU_0/Dense_0", (wide,), (2 * wide,))
            linear(f"{block}/Dense_1", (wide,), (e,))
    return out
