"""openpi's LoRA leaves, merged into the weights they belong to.

    attn/q_einsum[_1]/{w, lora_a, lora_b}          [l n d h], [l n d r], [l n r h]
    attn/kv_einsum[_1]/{w, lora_a, lora_b}         [l 2 k d h], [l 2 k d r], [l 2 k r h]
    attn/attn_vec_einsum[_1]/{w, lora_a, lora_b}   [l n h d], [l n h r], [l n r d]
    mlp[_1]/gating_einsum[_lora_a, _lora_b]        [l 2 d f], [l 2 d r], [l 2 r f]
    mlp[_1]/linear[_lora_a, _lora_b]               [l f d], [l f r], [l r d]

With s = alpha / rank (rslora: alpha / sqrt(rank)):

- q and kv compute `BTD,NDL->BTNL` and `BTNL,NLH->BTNH`: W + s A B, head by head.
- attn_vec computes `BTNH,NHL->BTL` and then `BTL,NLD->BTD`: both einsums sum over the heads, so every head's A meets
  the sum of all heads' B: W[n] + s A[n] (sum over m of B[m]).
- The MLP adds x A B without a scale, whatever alpha is (openpi `lora.py`, `FeedForward._dot`).

The rank is in the shapes; alpha and rslora are in openpi's code only. Its variants (gemma_2b_lora, gemma_300m_lora)
have alpha equal to the rank, hence s = 1, and no rslora.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from attrs import field, frozen

from vla.errors import SettingsError, StoreError


@frozen
class Merged:
    """A weight with its adapter added, float32; `np.asarray(leaf)` reads and computes it."""

    base: Any = field(repr=False)
    a: Any = field(repr=False)
    b: Any = field(repr=False)
    scale: float
    heads: bool  # A of every head with the sum of all B

    @property
    def shape(self) -> tuple[int, ...]:
        """As the weight alone."""
        return tuple(self.base.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        out = np.array(self.base, np.float32)
        a, b = np.asarray(self.a, np.float32), np.asarray(self.b, np.float32)
        for layer in range(len(out)):  # one after the other: a difference is as large as the weight
            right = b[layer].sum(0) if self.heads else b[layer]
            out[layer] += np.float32(self.scale) * (a[layer] @ right)
        return out if dtype is None else out.astype(dtype)


def merge_leaves(
    leaves: Mapping[str, Any], where: str, alpha: float | None = None, rslora: bool = False
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The leaves with every LoRA pair merged into its weight, and the ranks that were met, sorted.

    Args:
        leaves: path -> lazy array.
        where: the checkpoint, for messages.
        alpha: of the attention's adapters; None: their rank, as in openpi's variants.
        rslora: whether the scale is alpha / sqrt(rank).

    Raises:
        SettingsError: alpha is not positive.
        StoreError: a pair is incomplete, belongs to no weight, or does not fit it; all such are listed.
    """
    if alpha is not None and not alpha > 0:
        raise SettingsError("alpha is positive", field="--lora-alpha", got=alpha, expected="> 0")
    out = {path: leaf for path, leaf in leaves.items() if not _LORA.search(path)}
    ranks, faults = set(), []
    pairs = {(path[: found.start()], found[1]) for path in leaves if (found := _LORA.search(path))}
    for stem, style in sorted(pairs):
        names = [f"{stem}{style}lora_{x}" for x in "ab"]
        target = f"{stem}/w" if style == "/" else stem
        if missing := [name for name in (*names, target) if name not in leaves]:
            faults.append(f"missing      {missing[0]}, of the pair {names[0]}")
            continue
        base, a, b = (leaves[name] for name in (target, *names))
        rank = a.shape[-1]
        if (
            len(base.shape) < 3
            or (*base.shape[:-1], rank) != a.shape
            or (*base.shape[:-2], rank, base.shape[-1]) != b.shape
        ):
            faults.append(f"wrong shape  {names[0]} {a.shape}, {names[1]} {b.shape}, for {target} {base.shape}")
            continue
        ranks.add(rank)
        scale = 1.0
        if style == "/":
            scale = (rank if alpha is None else alpha) / (rank**0.5 if rslora else rank)
        out[target] = Merged(base, a, b, scale, "attn_vec_einsum" in stem)
    if faults:
        raise StoreError(
            "\n".join(["LoRA weights of the checkpoint do not fit", *(f"    {line}" for line in faults)]),
            field=where,
            fix="the checkpoint is incomplete, or not openpi's",
        )
    return out, tuple(sorted(ranks))


_LORA = re.compile(r"([/_])lora_[ab]$")
