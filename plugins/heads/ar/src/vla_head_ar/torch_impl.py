"""Next-token prediction of action tokens, in PyTorch. `jax_impl.py` mirrors this file.

Axes: B batch, L prompt and target tokens, M predicted tokens, D width of the backbone, V vocabulary,
v tokens of the codec, n decoded tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from attrs import evolve
from torch import Tensor, nn

from vla.contracts import Actions, DecodeGrammar, Observation, Sampling, Spec
from vla.layout import BACKBONE
from vla.torch_kit.model import Entry, Tokens
from vla.torch_kit.ops import masked_mean, token_nll
from vla_head_ar.config import Settings


class ARHead(nn.Module):
    """No weights of its own: it reads and writes the backbone's vocabulary."""

    def __init__(self, settings: Settings, spec: Spec, backbone: Mapping[str, Any], inner: Mapping[str, Any]):
        super().__init__()
        self.settings, self.spec = settings, spec

    def weights(self) -> dict[str, float]:
        """Loss name -> weight."""
        return {"tokens": 1.0}

    def enter(self, obs: Observation, actions: Actions, draws: Mapping[str, Any]) -> Entry:
        """The targets are already in the prompt; only note where they are."""
        index, valid = obs.extra.get("target_index"), obs.extra.get("target_valid")
        if index is None:  # not packed on the host: every position may have a target
            valid = obs.token_loss_mask[:, 1:]
            index = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
        index = index.long()
        targets = obs.tokenized_prompt.long().gather(1, index + 1)
        weight = obs.extra.get("target_weight", 1.0)
        return Entry(notes={"index": index, "valid": valid, "targets": targets, "weight": weight})

    def losses(self, model: Any, hidden: Mapping[str, Tensor], entry: Entry) -> dict[str, Tensor]:
        """{"tokens": [B]}: cross-entropy averaged over the row's targets, logits at target positions only.

        `extra["target_weight"]` [B] is how much a row counts: its share of steps within the episode, where tokens stand
        for all steps together.
        """
        index, valid, targets = (entry.notes[k] for k in ("index", "valid", "targets"))
        text = hidden["prompt"]  # [B L D]
        at = text.gather(1, index[..., None].expand(-1, -1, text.shape[-1]))  # [B M D]
        nll = token_nll(at.flatten(0, 1), model.backbone.llm.unembed().to(at.dtype), targets.flatten())
        return {"tokens": entry.notes["weight"] * masked_mean(nll.view(valid.shape), valid)}

    def sample(self, model: Any, obs: Observation, noise: Tensor | None, sampling: Sampling) -> dict[str, Tensor]:
        """Decode until every row has its chunk: {"tokens": [B n]} text ids, 0 after the end; {"finite": [B]}.

        With `constrained`, "Action: " is given, only codec tokens compete, and a row ends when the values its tokens
        stand for are complete. Without: any token, until the one that ends an answer. Without a grammar: any token,
        `max_decode` of them. noise [B max_decode] holds one uniform number per decoded token, used at a temperature
        above 0. `finite` is False where a logit was NaN or infinite: the largest of such is any token, and the row is
        no answer.
        """
        rules = Rules(sampling.grammar, model, self.settings, obs.batch)
        device, batch, n = obs.tokenized_prompt.device, obs.batch, rules.max_tokens
        given = torch.tensor(rules.given, dtype=torch.long, device=device).expand(batch, -1)
        ones = torch.ones(batch, n, dtype=torch.long, device=device)
        prefix = (model.text(given, torch.ones_like(given).bool(), torch.ones_like(given)),) if rules.given else ()
        nothing = torch.empty(batch, n, 0, device=device)
        later = Tokens(("prompt", "target"), BACKBONE, nothing, ones.bool(), ones)
        decode = model.decoder(obs, [later], varying=("target",), prefix=prefix, hidden=True)
        decode = evolve(decode, positions=decode.positions + int(self.settings.positions == "openpi"))
        cache = decode.cache.layers
        last = self._last(decode.hidden["prompt"], obs.tokenized_prompt_mask, given.shape[1])
        out = torch.zeros(batch, n, dtype=torch.long, device=device)
        forced = None if sampling.prefix is None else sampling.prefix.tokens
        for i in range(n):
            uniform = None if noise is None else noise[:, i]
            out[:, i] = token = rules.choose(last, i, uniform, sampling.temperature, forced)
            if rules.finished():  # the only look at a value on the host
                break
            new = model.text(token[:, None], ones[:, :1].bool(), ones[:, :1])
            hidden, cache = decode.append([new], i, cache)
            last = hidden["prompt"][:, 0]
        return {"tokens": rules.finish(given, out), "finite": rules.finite}

    @staticmethod
    def _last(text: Tensor, valid: Tensor, given: int) -> Tensor:
        """The hidden state [B D] that predicts the first decoded token: of the last given or last prompt token."""
        if given:
            return text[:, -1]
        at = valid.long().sum(1) - 1
        return text[torch.arange(len(text), device=text.device), at]


class Rules:
    """Which token may come next, per row, on the device."""

    def __init__(self, grammar: DecodeGrammar | None, model: Any, settings: Settings, batch: int):
        table = model.backbone.llm.unembed()
        device = table.device
        self.table = table
        self.end = None if grammar is None else grammar.end  # of an answer without constraint
        self.grammar = grammar = grammar if settings.constrained else None
        self.done = torch.zeros(batch, dtype=torch.bool, device=device)
        self.finite = ~self.done
        self.given: tuple[int, ...] = ()
        self.max_tokens = settings.max_decode
        if grammar is None:
            return
        self.given = grammar.prefix
        self.max_tokens = min(settings.max_decode, grammar.total)
        self.ids = torch.as_tensor(np.asarray(grammar.action_ids), dtype=torch.long, device=device)
        self.lengths = torch.as_tensor(np.asarray(grammar.lengths), dtype=torch.long, device=device)
        self.longest = int(np.asarray(grammar.lengths).max())
        self.table = table[self.ids]  # only these rows compete: [v D] instead of [V D]
        self.left = torch.full((batch,), grammar.total, dtype=torch.long, device=device)

    def choose(
        self, hidden: Tensor, step: int, uniform: Tensor | None, temperature: float, forced: Tensor | None = None
    ) -> Tensor:
        """Hidden [B D] -> the next text id [B]; 0 for rows that are done. forced [B m]: codec ids, -1 where free."""
        logits = (hidden @ self.table.T.to(hidden.dtype)).float()
        self.finite = self.finite & (logits.isfinite().all(-1) | self.done)
        if self.grammar is not None:
            left = self.left[:, None]
            rest = (self.max_tokens - step - 1) * self.longest  # values that later tokens can still bring
            allowed = (self.lengths > 0) & (self.lengths <= left) & (left - self.lengths <= rest)
            logits = logits.masked_fill(~allowed, torch.finfo(torch.float32).min)
        if temperature > 0 and uniform is not None:
            edges = (logits / temperature).softmax(-1).cumsum(-1)
            choice = (edges < uniform[:, None] * edges[:, -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)
        else:
            choice = logits.argmax(-1)
        if forced is not None and self.grammar is not None and step < forced.shape[1]:
            choice = torch.where(forced[:, step] >= 0, forced[:, step].long(), choice)
        if self.grammar is None:
            token = torch.where(self.done, 0, choice)
            if self.end is not None:
                self.done = self.done | (choice == self.end)
            return token
        token = torch.where(self.done, 0, self.ids[choice])
        self.left = torch.where(self.done, self.left, self.left - self.lengths[choice])
        self.done = self.left <= 0
        return token

    def finished(self) -> bool:
        """Whether every row has its answer."""
        return bool(self.done.all())

    def finish(self, given: Tensor, out: Tensor) -> Tensor:
        """The whole answer [B n]: given prefix, decoded tokens and, where the grammar knows it, the suffix."""
        if self.grammar is None or not self.grammar.suffix:
            return torch.cat([given, out], 1)
        suffix = torch.tensor(self.grammar.suffix, device=out.device)
        count = (out != 0).sum(1, keepdim=True)
        whole = torch.nn.functional.pad(out, (0, len(suffix)))
        where = count + torch.arange(len(suffix), device=out.device)
        return torch.cat([given, whole.scatter(1, where, suffix.expand(len(out), -1))], 1)
