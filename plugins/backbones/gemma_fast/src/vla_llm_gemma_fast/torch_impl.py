"""Gemma with one expert, made for decoding, in PyTorch. `jax_impl.py` mirrors this file.

Same weights and same outputs as `gemma` with one expert. `room` makes the decoding cache, once per answer: a buffer for
the keys and values to come, and the projections that read the same input packed into one matrix (q|k|v and gate|up), so
that a decoded token costs four matrix products a layer and allocates nothing.

Axes: B batch, T new tokens, S keys (cached and new), N query heads, K kv heads, H head width, D width, F mlp width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vla.layout import BACKBONE, Read
from vla.parts import Expert
from vla.torch_kit.lora import matrix
from vla.torch_kit.ops import attend, rms_norm, rope, rope_angles, write
from vla_llm_gemma_fast.config import Settings

Decoding = tuple[Tensor, Tensor, Tensor, Tensor]  # k, v [B S K H], q|k|v [(N+2K)H D], gate|up [2F D]


class Norm(nn.Module):
    """RMSNorm with a learned scale."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """[B T D] -> [B T D]."""
        return (rms_norm(x) * (1 + self.scale.float())).to(x.dtype)


class Layer(nn.Module):
    """One layer."""

    def __init__(self, s: Settings):
        super().__init__()
        d, f, n, k, h = s.width, s.mlp_dim, s.num_heads, s.num_kv_heads, s.head_dim
        self.sizes = (n * h, k * h, k * h)
        self.head_dim, self.mlp_dim = h, f
        self.norm_attn = Norm(d)
        self.q = nn.Linear(d, n * h, bias=False)
        self.k = nn.Linear(d, k * h, bias=False)
        self.v = nn.Linear(d, k * h, bias=False)
        self.o = nn.Linear(n * h, d, bias=False)
        self.norm_mlp = Norm(d)
        self.gate = nn.Linear(d, f, bias=False)
        self.up = nn.Linear(d, f, bias=False)
        self.down = nn.Linear(f, d, bias=False)

    def room(self, k: Tensor, v: Tensor, tokens: int) -> Decoding:
        """Keys and values with space for more tokens, and the packed projections."""
        qkv = torch.cat([matrix(self.q), matrix(self.k), matrix(self.v)])
        gate_up = torch.cat([matrix(self.gate), matrix(self.up)])
        return F.pad(k, (0, 0, 0, 0, 0, tokens)), F.pad(v, (0, 0, 0, 0, 0, tokens)), qkv, gate_up

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        angles: tuple[Tensor, Tensor],
        cache: Decoding | None,
        write_at: int,
        only_cache: bool,
        fused: bool,
        in_place: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x [B T D], mask [B T S] -> x [B T D], and the cache with the new keys and values."""
        y = self.norm_attn(x)
        if cache is None:
            q, k, v = self.q(y), self.k(y), self.v(y)
        else:
            q, k, v = F.linear(y, cache[2]).split(self.sizes, -1)
        q, k, v = (z.unflatten(-1, (-1, self.head_dim)) for z in (q, k, v))
        k = rope(k, angles)
        if cache is not None:
            k, v = (write(old, new, write_at, in_place=in_place) for old, new in zip(cache, (k, v), strict=False))
        after = (k, v, *(cache or ())[2:])
        if only_cache:
            return x, after
        x = x + self.o(attend(rope(q, angles), k, v, mask, fused=fused))
        y = self.norm_mlp(x)
        if cache is None:
            gate, up = self.gate(y), self.up(y)
        else:
            gate, up = F.linear(y, cache[3]).split(self.mlp_dim, -1)
        return x + self.down(F.gelu(gate, approximate="tanh") * up), after


class GemmaFast(nn.Module):
    """The decoder, one expert: names and weights of `gemma` with `backbone` alone."""

    def __init__(self, settings: Settings, experts: Mapping[str, Expert]):
        super().__init__()
        s = self.settings = settings
        self.embedder = nn.Embedding(s.vocab_size, s.width)
        self.layers = nn.ModuleList(nn.ModuleDict({BACKBONE: Layer(s)}) for _ in range(s.depth))
        self.final_norm = nn.ModuleDict({BACKBONE: Norm(s.width)})
        self.checkpointing = False  # recompute each layer in the backward pass
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in `gemma`."""
        nn.init.normal_(self.embedder.weight, std=self.settings.width**-0.5)
        for name, p in self.layers.named_parameters():
            if p.ndim == 1:
                nn.init.zeros_(p)
            else:
                quiet = (2 * self.settings.depth) ** -0.5 if name.endswith((".o.weight", ".down.weight")) else 1
                nn.init.normal_(p, std=quiet * p.shape[1] ** -0.5)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [B n] -> [B n D], times sqrt(D) rounded to the table's dtype."""
        table = self.embedder.weight
        return F.embedding(ids, table) * torch.tensor(self.settings.width**0.5, dtype=table.dtype, device=table.device)

    def unembed(self) -> Tensor:
        """The tied output table [V D]; logits are `hidden @ table.T`."""
        return self.embedder.weight

    def room(self, layers: Sequence[tuple[Tensor, Tensor]], tokens: int) -> list[Decoding]:
        """The decoding cache with space for `tokens` more, so that nothing is allocated later. For inference."""
        return [layer[BACKBONE].room(k, v, tokens) for layer, (k, v) in zip(self.layers, layers, strict=True)]

    def forward(
        self,
        xs: Mapping[str, Tensor],
        mask: Tensor,
        positions: Tensor,
        *,
        styles: Mapping[str, object] | None = None,
        reads: Sequence[Read] = (),
        cache: Sequence[Decoding] | None = None,
        write_at: int = 0,
        outputs: Sequence[str] | None = None,
        fused: bool = False,
        in_place: bool = False,
    ) -> tuple[dict[str, Tensor], list[tuple[Tensor, ...]]]:
        """Run tokens of the one expert; arguments and results as in `gemma`."""
        x = xs[BACKBONE]
        angles = rope_angles(positions, self.settings.head_dim)
        new_cache = []
        for i, layer in enumerate(self.layers):
            only_cache = i == len(self.layers) - 1 and outputs is not None and not outputs
            args = (x, mask, angles, cache and cache[i], write_at, only_cache, fused, in_place)
            run = layer[BACKBONE]
            if self.checkpointing and torch.is_grad_enabled():
                x, kv = checkpoint(run, *args, use_reentrant=False)
            else:
                x, kv = run(*args)
            new_cache.append(kv)
        if outputs is not None and not outputs:
            return {}, new_cache
        return {BACKBONE: self.final_norm[BACKBONE](x)}, new_cache
