"""A decoder of `transformers` as the LLM core of a policy, in PyTorch.

The decoder's own layers run the backbone's tokens; projections, norms, rotary embedding and MLP are theirs. Their
attention is ours: registered with transformers under a name, it joins cached keys, applies the layout's mask and its
gradient stops, and hands keys and values on. Beside each layer stand the layers of the experts (width, MLP, adaRMS
as in `gemma`), which look at the keys and values of that layer and at their own. No token of the backbone looks at an
expert (`config.needs`), so a layer runs the backbone first and the experts behind it: equal to one joint attention.

Axes: B batch, T tokens of all experts, S keys (cached and new), N query heads, K kv heads, H head width, D width of an
expert, L layers, E tokens of one expert.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vla.layout import BACKBONE, Read, clip
from vla.parts import Expert
from vla.torch_kit.ops import detach, rms_norm, write
from vla_llm_hf.config import Settings, head_dim

ATTENTION = "vla_layout"  # the name under which transformers finds our attention
# [L 2 B 3D] for the two norms of every layer, [B 3D] for the final norm; or [L 2 B E 3D] and [B E 3D], per token.
Styles = tuple[Tensor, Tensor]


@define
class Pass:
    """What the attention of one layer needs beside queries, keys and values, and what it leaves behind."""

    mask: Tensor  # [B E S] of the backbone's tokens
    reads: Sequence[Read]
    cached: tuple[Tensor, Tensor] | None  # [B S K H]
    write_at: int
    in_place: bool
    found: list[tuple[Tensor, Tensor]] = field(factory=list)


def layout_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, softcap: float | None = None, vla: Pass | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention that transformers' layers call: [B N E H], [B K E H] x 2 -> [B E N H]; `vla` says the rest."""
    assert vla is not None, "this model was made for a policy; run it through one"
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if vla.cached is not None:
        k, v = _written(vla.cached, (k, v), vla.write_at, vla.in_place)
    vla.found[:] = [(k, v)]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(q, k, v, vla.mask, vla.reads, scale, softcap).unflatten(-1, (-1, q.shape[-1])), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, layout_attention)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, reads: Sequence[Read], scale: float, softcap: float | None
) -> Tensor:
    """[B T N H], [B S K H] x 2 under a mask [B T S] -> [B T (N H)]; with gradient stops, scale and cap of the family.

    A query that may see nothing (padding) sees all keys; nobody reads its result.
    """
    if reads:
        pieces = [
            attend(
                q[:, r.start : r.stop], detach(k, r.detached), detach(v, r.detached), mask[:, r.start : r.stop],
                (), scale, softcap,
            )
            for r in reads
        ]  # fmt: skip
        return torch.cat(pieces, 1)
    mask = (mask | ~mask.any(-1, keepdim=True))[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not softcap:
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2).flatten(2)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = (q @ k.transpose(-1, -2)).float() * scale
    logits = (softcap * torch.tanh(logits / softcap)).masked_fill(~mask, -math.inf)
    return (logits.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)


class Norm(nn.Module):
    """RMSNorm of an expert with a learned scale, or modulated by a condition (adaRMS)."""

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
    """The weights of one expert in one layer: heads and head width of the decoder, a width and an MLP of its own."""

    def __init__(self, expert: Expert, heads: int, kv_heads: int, width: int):
        super().__init__()
        d, f = expert.width, expert.mlp_dim
        self.heads, self.kv_heads = heads, kv_heads
        self.norm_attn = Norm(expert)
        self.q = nn.Linear(d, heads * width, bias=False)
        self.k = nn.Linear(d, kv_heads * width, bias=False)
        self.v = nn.Linear(d, kv_heads * width, bias=False)
        self.o = nn.Linear(heads * width, d, bias=False)
        self.norm_mlp = Norm(expert)
        self.gate = nn.Linear(d, f, bias=False)
        self.up = nn.Linear(d, f, bias=False)
        self.down = nn.Linear(f, d, bias=False)

    def project(self, x: Tensor, turn: Any, normed: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised x [B E D] -> q [B E N H], k and v [B E K H], turned as the decoder turns its own.

        Where the decoder normalises queries and keys (`normed`), so does the expert, without a scale of its own.
        """
        q, k = self.q(x).unflatten(-1, (self.heads, -1)), self.k(x).unflatten(-1, (self.kv_heads, -1))
        if normed:
            q, k = rms_norm(q).to(x.dtype), rms_norm(k).to(x.dtype)
        q, k = turn(q, k)
        return q, k, self.v(x).unflatten(-1, (self.kv_heads, -1))

    def finish(self, x: Tensor, attended: Tensor, gate: Tensor | None, style: Tensor | None) -> Tensor:
        """Residuals and the MLP: x [B E D], attended [B E (N H)] -> [B E D]."""
        x = _residual(x, self.o(attended), gate)
        y, gate = self.norm_mlp(x, style)
        return _residual(x, self.down(F.gelu(self.gate(y), approximate="tanh") * self.up(y)), gate)


def _residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    return x + y if gate is None else x + y * gate


class Layer(nn.ModuleDict):
    """One layer of the decoder and of every expert. A module of its own: checkpointed, compiled or sharded whole."""

    def forward(  # type: ignore[override]
        self,
        xs: Mapping[str, Tensor],
        mask: Tensor,
        positions: Tensor,
        turning: tuple[Tensor, Tensor],
        styles: Mapping[str, Tensor],
        reads: Sequence[Read],
        cache: tuple[Tensor, Tensor] | None,
        write_at: int,
        outputs: Sequence[str],
        in_place: bool,
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """xs {expert: [B E D]}, mask [B T S], styles {expert: [2 B 3D]} -> xs of `outputs`, and k, v [B S K H]."""
        done: dict[str, Tensor] = {}
        at, keys = 0, cache
        for name, x in xs.items():
            stop = at + x.shape[1]
            angles = tuple(a[:, at:stop] for a in turning)
            sees = mask[:, at:stop]
            if name == BACKBONE:
                # Keys that come later belong to experts; here they do not exist yet.
                until = mask.shape[2] - mask.shape[1] + stop if cache is None else mask.shape[2]
                here = Pass(sees[:, :, :until], clip(reads, at, stop), keys, write_at + at, in_place)
                out = self[name](
                    x, attention_mask=None, position_embeddings=angles, position_ids=positions[:, at:stop],
                    use_cache=False, vla=here,
                )  # fmt: skip
                x, keys = out[0] if isinstance(out, tuple) else out, here.found[0]
            else:
                style = styles.get(name)
                normed, gate = self[name].norm_attn(x, None if style is None else style[0])
                q, k, v = self[name].project(normed, _turn(self._attention, angles), self._normed)
                if keys is None:
                    keys = (k, v)
                elif cache is None:
                    keys = (torch.cat([keys[0], k], 1), torch.cat([keys[1], v], 1))
                else:
                    keys = _written(keys, (k, v), write_at + at, in_place)
                if name in outputs:
                    until = keys[0].shape[1]
                    attended = attend(
                        q, *keys, sees[:, :, :until], clip(reads, at, stop), self._scale(q), self._softcap
                    )
                    x = self[name].finish(x, attended, gate, None if style is None else style[1])
            if name in outputs:
                done[name] = x
            at = stop
        assert keys is not None
        return done, keys

    @property
    def _attention(self) -> nn.Module:
        return self[BACKBONE].self_attn  # type: ignore[return-value]

    @property
    def _normed(self) -> bool:
        return hasattr(self._attention, "q_norm")

    @property
    def _softcap(self) -> float | None:
        return getattr(self._attention, "attn_logit_softcapping", None)

    def _scale(self, q: Tensor) -> float:
        return float(getattr(self._attention, "scaling", q.shape[-1] ** -0.5))


def _turn(attention: nn.Module, angles: tuple[Tensor, ...]) -> Any:
    """The family's own rotary embedding for q [B E N H] and k [B E K H]; the identity where a layer has none."""
    if not getattr(attention, "use_rope", True):
        return lambda q, k: (q, k)
    apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb  # type: ignore[attr-defined]
    return lambda q, k: apply(q, k, *angles, unsqueeze_dim=2)


def _written(cached: Sequence[Tensor], new: Sequence[Tensor], at: int, in_place: bool) -> tuple[Tensor, Tensor]:
    """Keys and values [B E K H] in their place among the cached ones [B S K H]."""
    k, v = (write(old, n, at, in_place=in_place) for old, n in zip(cached, new, strict=True))
    return k, v


class HuggingFace(nn.Module):
    """The decoder. `experts` are those that the head adds beside `backbone`, whose sizes are the configuration's."""

    def __init__(self, settings: Settings, experts: Mapping[str, Expert]):
        super().__init__()
        self.settings = settings
        model = make_decoder(settings)
        body, c = model.model, model.config
        kv = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        width = head_dim(settings.values)
        self.embedder = body.embed_tokens
        self.layers = nn.ModuleList(
            Layer({
                BACKBONE: block,
                **{name: ExpertLayer(e, c.num_attention_heads, kv, width) for name, e in experts.items()},
            })
            for block in body.layers
        )  # fmt: skip
        self.final_norm = nn.ModuleDict({BACKBONE: body.norm, **{name: Norm(e) for name, e in experts.items()}})
        self.rotary = body.rotary_emb
        # A table of its own for the output, where the family does not tie it to the embedding.
        self.unembedder = None if c.tie_word_embeddings else model.lm_head
        kinds = getattr(c, "layer_types", None) or [""] * len(self.layers)
        window = getattr(c, "sliding_window", None) or 0
        if not hasattr(c, "layer_types") and window:  # every layer has the window
            kinds = ["sliding_attention"] * len(self.layers)
        self._kinds = tuple(kinds)
        self._window = int(window) if "sliding_attention" in self._kinds else 0
        self._turns_by_kind = "layer_type" in inspect.signature(body.rotary_emb.forward).parameters
        self.checkpointing = False  # recompute each layer in the backward pass
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Experts: variance 1 / fan_in, quiet residual writers, zero norms and modulations; the decoder: its own."""
        for layer in self.layers:
            for name, part in layer.items():
                if name == BACKBONE:
                    continue
                for leaf, p in part.named_parameters():
                    if "norm" in leaf:
                        nn.init.zeros_(p)
                    else:
                        quiet = (2 * len(self.layers)) ** -0.5 if leaf.startswith(("o.", "down.")) else 1
                        nn.init.normal_(p, std=quiet * p.shape[1] ** -0.5)
        for name, norm in self.final_norm.items():
            if name != BACKBONE:
                for p in norm.parameters():
                    nn.init.zeros_(p)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [B n] -> [B n D], scaled where the family scales."""
        return self.embedder(ids)

    def unembed(self) -> Tensor:
        """The output table [V D]; logits are `hidden @ table.T`."""
        return (self.embedder if self.unembedder is None else self.unembedder).weight

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
    def room(layers: Sequence[tuple[Tensor, ...]], tokens: int) -> list[tuple[Tensor, ...]]:
        """The cache with space for `tokens` more, so that nothing is reallocated later."""
        return [tuple(F.pad(a, (*([0, 0] * (a.ndim - 2)), 0, tokens)) for a in layer) for layer in layers]

    def forward(
        self,
        xs: Mapping[str, Tensor],
        mask: Tensor,
        positions: Tensor,
        *,
        styles: Mapping[str, Styles] | None = None,
        reads: Sequence[Read] = (),
        cache: Sequence[tuple[Tensor, ...]] | None = None,
        write_at: int = 0,
        outputs: Sequence[str] | None = None,
        fused: bool = False,
        in_place: bool = False,
    ) -> tuple[dict[str, Tensor], list[tuple[Tensor, ...]]]:
        """Run tokens of one or several experts; arguments and result as of `vla_llm_gemma`'s.

        Attention has fused kernels always, but for families that cap their logits.

        Sliding windows bind the backbone's own tokens; experts see what the layout says. With windows, the cache also
        holds the positions [B S] of its tokens.
        """
        styles = styles or {}
        outputs = list(xs) if outputs is None else [e for e in xs if e in outputs]
        backbone = xs[BACKBONE].shape[1] if BACKBONE in xs else 0
        where = positions
        if cache is not None and self._window:
            where = write(cache[0][2], positions, write_at, in_place=in_place)
        near = self._near(mask, positions, where, backbone) if self._window and backbone else mask
        first = next(iter(xs.values()))
        turning = {
            kind: self.rotary(first, positions, *([kind] if self._turns_by_kind else []))
            for kind in (dict.fromkeys(self._kinds) if self._turns_by_kind else [""])
        }
        new_cache: list[tuple[Tensor, ...]] = []
        for i, layer in enumerate(self.layers):
            wanted = outputs if i == len(self.layers) - 1 else list(xs)
            style = {e: s[0][i] for e, s in styles.items()}
            kind = self._kinds[i]
            sees = near if kind == "sliding_attention" else mask
            args = (
                xs, sees, positions, turning[kind if self._turns_by_kind else ""], style, reads,
                cache and cache[i][:2], write_at, wanted, in_place,
            )  # fmt: skip
            if self.checkpointing and torch.is_grad_enabled():
                xs, kv = checkpoint(layer, *args, use_reentrant=False)
            else:
                xs, kv = layer(*args)
            new_cache.append((*kv, where) if self._window else kv)
        done = {}
        for e, x in xs.items():
            norm = self.final_norm[e]
            done[e] = norm(x) if e == BACKBONE else norm(x, styles[e][1] if e in styles else None)[0]
        return done, new_cache

    def _near(self, mask: Tensor, positions: Tensor, where: Tensor, backbone: int) -> Tensor:
        """The mask with the window on the backbone's queries: keys nearer than `sliding_window` positions."""
        far = (positions[:, :backbone, None] - where[:, None]).abs() >= self._window
        return torch.cat([mask[:, :backbone] & ~far, mask[:, backbone:]], 1)


def make_decoder(settings: Settings) -> Any:
    """The model of transformers with fresh weights; its attention is ours, dropout is off."""
    values = dict(settings.values)
    values["vocab_size"] += settings.extra_ids
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    for name in ("attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout", "dropout"):
        if getattr(config, name, 0):
            setattr(config, name, 0.0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
