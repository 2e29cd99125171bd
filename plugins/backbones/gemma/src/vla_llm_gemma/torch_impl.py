"""Gemma with any number of experts side by side, in PyTorch. `jax_impl.py` mirrors this file.

Every expert has its own weights; layer by layer their queries, keys and values are joined in one attention.
Formulas: openpi `gemma.py` (RMSNorm with 1 + scale, adaRMS, GeGLU, RoPE on split halves, float32 logits).

Axes: B batch, T tokens of all experts, S keys (cached and new), N query heads, K kv heads, H head width,
D width of an expert, F mlp width, L layers, E tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vla.layout import BACKBONE, Read, clip
from vla.parts import Expert
from vla.torch_kit.ops import attend_with_stops, rms_norm, rope, rope_angles, write
from vla_llm_gemma.config import Settings

# [L 2 B 3D] for the two norms of every layer, [B 3D] for the final norm; or [L 2 B E 3D] and [B E 3D], per token.
Styles = tuple[Tensor, Tensor]


class Norm(nn.Module):
    """RMSNorm with a learned scale, or modulated by a condition (adaRMS)."""

    def __init__(self, expert: Expert):
        super().__init__()
        if expert.adarms:
            self.modulation = nn.Linear(expert.width, 3 * expert.width)  # -> scale, shift, gate
        else:
            self.scale = nn.Parameter(torch.zeros(expert.width))

    def forward(self, x: Tensor, style: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[B E D], [B 3D] or [B E 3D] -> normalised [B E D], and the gate [B 1 D] or [B E D] of the next residual."""
        if style is None:
            return (rms_norm(x) * (1 + self.scale.float())).to(x.dtype), None
        scale, shift, gate = (style if style.ndim == 3 else style[:, None]).chunk(3, -1)
        return (rms_norm(x) * (1 + scale) + shift).to(x.dtype), gate.to(x.dtype)


class ExpertLayer(nn.Module):
    """The weights of one expert in one layer."""

    def __init__(self, s: Settings, expert: Expert):
        super().__init__()
        d, f, n, k, h = expert.width, expert.mlp_dim, s.num_heads, s.num_kv_heads, s.head_dim
        self.heads, self.kv_heads = n, k
        self.norm_attn = Norm(expert)
        self.q = nn.Linear(d, n * h, bias=False)
        self.k = nn.Linear(d, k * h, bias=False)
        self.v = nn.Linear(d, k * h, bias=False)
        self.o = nn.Linear(n * h, d, bias=False)
        self.norm_mlp = Norm(expert)
        self.gate = nn.Linear(d, f, bias=False)
        self.up = nn.Linear(d, f, bias=False)
        self.down = nn.Linear(f, d, bias=False)

    def keys(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Normalised x [B E D] -> k, v [B E K H]."""
        k = rope(self.k(x).unflatten(-1, (self.kv_heads, -1)), angles)
        return k, self.v(x).unflatten(-1, (self.kv_heads, -1))

    def queries(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Normalised x [B E D] -> q [B E N H]."""
        return rope(self.q(x).unflatten(-1, (self.heads, -1)), angles)

    def finish(self, x: Tensor, attended: Tensor, gate: Tensor | None, style: Tensor | None) -> Tensor:
        """Residuals and the MLP: x [B E D], attended [B E (N H)] -> [B E D]."""
        x = _residual(x, self.o(attended), gate)
        y, gate = self.norm_mlp(x, style)
        return _residual(x, self.down(F.gelu(self.gate(y), approximate="tanh") * self.up(y)), gate)


def _residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    return x + y if gate is None else x + y * gate


class Layer(nn.ModuleDict):
    """One layer of every expert. A module of its own, so that it can be checkpointed, compiled or sharded whole."""

    def forward(  # type: ignore[override]
        self,
        xs: Mapping[str, Tensor],
        mask: Tensor,
        angles: Mapping[str, tuple[Tensor, Tensor]],
        styles: Mapping[str, Tensor],
        reads: Sequence[Read],
        cache: tuple[Tensor, Tensor] | None,
        write_at: int,
        outputs: Sequence[str],
        fused: bool,
        in_place: bool,
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """xs {expert: [B E D]}, mask [B T S], styles {expert: [2 B 3D]} -> xs of `outputs`, and k, v [B S K H]."""
        normed = {e: self[e].norm_attn(x, styles[e][0] if e in styles else None) for e, x in xs.items()}
        keys, values = zip(*(self[e].keys(normed[e][0], angles[e]) for e in xs), strict=True)
        k, v = _cat(keys), _cat(values)
        if cache is not None:
            k, v = (write(old, new, write_at, in_place=in_place) for old, new in zip(cache, (k, v), strict=True))
        queries = {e: self[e].queries(normed[e][0], angles[e]) for e in outputs}
        if not outputs:
            return {}, (k, v)
        if len(outputs) == len(xs):
            attended = attend_with_stops(_cat(list(queries.values())), k, v, mask, reads, fused=fused)
            rows = dict(zip(xs, attended.split([x.shape[1] for x in xs.values()], 1), strict=True))
        else:
            ends, rows = _ends(xs), {}
            for e, q in queries.items():
                start, stop = ends[e] - q.shape[1], ends[e]
                rows[e] = attend_with_stops(q, k, v, mask[:, start:stop], clip(reads, start, stop), fused=fused)
        done = {
            e: self[e].finish(xs[e], rows[e], normed[e][1], styles[e][1] if e in styles else None) for e in outputs
        }
        return done, (k, v)


def _cat(xs: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(xs), 1) if len(xs) > 1 else xs[0]


def _ends(xs: Mapping[str, Tensor]) -> dict[str, int]:
    """Expert -> where its tokens end in the joined sequence."""
    ends, at = {}, 0
    for expert, x in xs.items():
        at += x.shape[1]
        ends[expert] = at
    return ends


class Gemma(nn.Module):
    """The decoder. `experts` are those that the head adds beside `backbone`, whose sizes are the settings."""

    def __init__(self, settings: Settings, experts: Mapping[str, Expert]):
        super().__init__()
        s = self.settings = settings
        sizes = {BACKBONE: Expert(s.width, s.mlp_dim), **experts}
        self.embedder = nn.Embedding(s.vocab_size, s.width)
        self.layers = nn.ModuleList(
            Layer({name: ExpertLayer(s, expert) for name, expert in sizes.items()}) for _ in range(s.depth)
        )
        self.final_norm = nn.ModuleDict({name: Norm(expert) for name, expert in sizes.items()})
        self.checkpointing = False  # recompute each layer in the backward pass
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Variance 1 / fan_in for matrices, 1 / width for the embedding, zero norms and modulations (as in openpi).

        What writes into the residual stream starts at 1 / sqrt(2 depth) of that (GPT-2): text as loud as images and
        quiet layers train from scratch where openpi's embedding of 0.01 drowns the prompt.
        """
        nn.init.normal_(self.embedder.weight, std=self.settings.width**-0.5)
        for name, p in self.layers.named_parameters():
            if "norm" in name:
                nn.init.zeros_(p)
            else:
                quiet = (2 * self.settings.depth) ** -0.5 if name.endswith((".o.weight", ".down.weight")) else 1
                nn.init.normal_(p, std=quiet * p.shape[1] ** -0.5)
        for p in self.final_norm.parameters():
            nn.init.zeros_(p)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [B n] -> [B n D], times sqrt(D) rounded to the table's dtype."""
        table = self.embedder.weight
        return F.embedding(ids, table) * torch.tensor(self.settings.width**0.5, dtype=table.dtype, device=table.device)

    def unembed(self) -> Tensor:
        """The tied output table [V D]; logits are `hidden @ table.T`."""
        return self.embedder.weight

    def styles(self, expert: str, cond: Tensor) -> Styles:
        """The adaRMS modulation of every norm from the condition [B D], or of every token [B E D].

        It depends on time alone: compute it once.
        """
        norms = [n for layer in self.layers for n in (layer[expert].norm_attn, layer[expert].norm_mlp)]
        flat = torch.stack([norm.modulation(cond) for norm in norms])
        return flat.unflatten(0, (-1, 2)), self.final_norm[expert].modulation(cond)

    @staticmethod
    def style_at(styles: Styles, row: int | Tensor) -> Styles:
        """The styles of one row of the condition, as a batch of one; or of a row for every token [B E]."""
        if isinstance(row, Tensor):
            return styles[0][:, :, row], styles[1][row]
        return styles[0][:, :, row : row + 1], styles[1][row : row + 1]

    @staticmethod
    def room(layers: Sequence[tuple[Tensor, Tensor]], tokens: int) -> list[tuple[Tensor, Tensor]]:
        """The cache with space for `tokens` more, so that nothing is reallocated later."""
        return [(F.pad(k, (0, 0, 0, 0, 0, tokens)), F.pad(v, (0, 0, 0, 0, 0, tokens))) for k, v in layers]

    def forward(
        self,
        xs: Mapping[str, Tensor],
        mask: Tensor,
        positions: Tensor,
        *,
        styles: Mapping[str, Styles] | None = None,
        reads: Sequence[Read] = (),
        cache: Sequence[tuple[Tensor, Tensor]] | None = None,
        write_at: int = 0,
        outputs: Sequence[str] | None = None,
        fused: bool = False,
        in_place: bool = False,
    ) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
        """Run tokens of one or several experts.

        Args:
            xs: expert -> [B E D], in sequence order.
            mask: [B T S] bool, over all new tokens and all keys of the cache (or of the new tokens, without one).
            positions: [B T].
            styles: expert -> its adaRMS modulation.
            reads: where attention cuts gradients.
            cache: per layer keys and values [B S K H]; the new ones are written from `write_at` on.
            outputs: experts whose result is wanted; the last layer computes no other. Default all.
            fused: attend with fused kernels (`vla.torch_kit.ops.attend`).
            in_place: write into the buffers of `cache`, which a gradient could not follow.

        Returns:
            expert -> hidden [B E D] after the final norm, and the keys and values of every layer.
        """
        styles = styles or {}
        outputs = list(xs) if outputs is None else [e for e in xs if e in outputs]
        angles = rope_angles(positions, self.settings.head_dim)
        ends = _ends(xs)
        rows = {e: tuple(a[:, ends[e] - x.shape[1] : ends[e]] for a in angles) for e, x in xs.items()}
        new_cache = []
        for i, layer in enumerate(self.layers):
            wanted = outputs if i == len(self.layers) - 1 else list(xs)
            style = {e: s[0][i] for e, s in styles.items()}
            args = (xs, mask, rows, style, reads, cache and cache[i], write_at, wanted, fused, in_place)
            if self.checkpointing and torch.is_grad_enabled():
                xs, kv = checkpoint(layer, *args, use_reentrant=False)
            else:
                xs, kv = layer(*args)
            new_cache.append(kv)
        done = {e: self.final_norm[e](x, styles[e][1] if e in styles else None)[0] for e, x in xs.items()}
        return done, new_cache
