"""Next-token prediction of action tokens, in JAX. Mirror of `torch_impl.py`.

Axes: B batch, L prompt and target tokens, M predicted tokens, D width of the backbone, V vocabulary,
v tokens of the codec, n decoded tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from attrs import evolve
from flax import nnx
from jax import Array, lax
from jax import numpy as jnp

from vla.contracts import Actions, DecodeGrammar, Observation, Sampling, Spec
from vla.jax_kit.model import Entry, Tokens
from vla.jax_kit.ops import in_compute_dtype, masked_mean, matmul, token_nll
from vla.layout import BACKBONE
from vla_head_ar.config import Settings

Progress = tuple[Array, Array, Array]  # of each row [B]: values still missing, whether it is done, all logits finite


class ARHead(nnx.Module):
    """No weights of its own: it reads and writes the backbone's vocabulary."""

    def __init__(
        self, settings: Settings, spec: Spec, backbone: Mapping[str, Any], inner: Mapping[str, Any], *, rngs: nnx.Rngs
    ):
        self.settings, self.spec = settings, spec

    def weights(self) -> dict[str, float]:
        """Loss name -> weight."""
        return {"tokens": 1.0}

    def enter(self, obs: Observation, actions: Actions, draws: Mapping[str, Any]) -> Entry:
        """The targets are already in the prompt; only note where they are."""
        index, valid = obs.extra.get("target_index"), obs.extra.get("target_valid")
        if index is None:  # not packed on the host: every position may have a target
            valid = obs.token_loss_mask[:, 1:]
            index = jnp.broadcast_to(jnp.arange(valid.shape[1]), valid.shape)
        targets = jnp.take_along_axis(jnp.asarray(obs.tokenized_prompt), index + 1, 1)
        weight = obs.extra.get("target_weight", 1.0)
        return Entry(notes={"index": index, "valid": valid, "targets": targets, "weight": weight})

    def losses(self, model: Any, hidden: Mapping[str, Array], entry: Entry) -> dict[str, Array]:
        """{"tokens": [B]}: cross-entropy averaged over the row's targets, logits at target positions only.

        `extra["target_weight"]` [B] is how much a row counts: its share of steps within the episode, where tokens stand
        for all steps together.
        """
        index, valid, targets = (entry.notes[k] for k in ("index", "valid", "targets"))
        text = hidden["prompt"]  # [B L D]
        at = jnp.take_along_axis(text, index[..., None], 1)  # [B M D]
        nll = token_nll(
            at.reshape(-1, at.shape[-1]), model.backbone.llm.unembed().astype(at.dtype), targets.reshape(-1)
        )
        return {"tokens": entry.notes["weight"] * masked_mean(nll.reshape(valid.shape), valid)}

    def sample(self, model: Any, obs: Observation, noise: Array | None, sampling: Sampling) -> dict[str, Array]:
        """Decode until every row has its chunk: {"tokens": [B n]} text ids, 0 after the end; {"finite": [B]}.

        With `constrained`, "Action: " is given, only codec tokens compete, and a row ends when the values its tokens
        stand for are complete. Without: any token, until the one that ends an answer. Without a grammar: any token,
        `max_decode` of them. noise [B max_decode] holds one uniform number per decoded token, used at a temperature
        above 0. `finite` is False where a logit was NaN or infinite: the largest of such is any token, and the row is
        no answer.
        """
        rules = Rules(sampling.grammar, model, self.settings)
        batch, n = obs.batch, rules.max_tokens
        given = jnp.broadcast_to(jnp.array(rules.given, jnp.int32), (batch, len(rules.given)))
        ones = jnp.ones((batch, n), jnp.int32)
        prefix = (model.text(given, jnp.ones_like(given).astype(bool), jnp.ones_like(given)),) if rules.given else ()
        nothing = jnp.zeros((batch, n, 0))
        later = Tokens(("prompt", "target"), BACKBONE, nothing, ones.astype(bool), ones)
        decode = model.decoder(obs, [later], varying=("target",), prefix=prefix, hidden=True)
        decode = evolve(decode, positions=decode.positions + int(self.settings.positions == "openpi"))
        last = self._last(decode.hidden["prompt"], obs.tokenized_prompt_mask, given.shape[1])

        forced = None if sampling.prefix is None else sampling.prefix.tokens
        if forced is not None:
            forced = jnp.pad(jnp.asarray(forced), ((0, 0), (0, max(0, n - forced.shape[1]))), constant_values=-1)

        def choose(last: Array, i: Any, out: Array, progress: Progress) -> tuple[Array, Progress]:
            uniform = None if noise is None else jnp.asarray(noise)[:, i]
            token, progress = rules.choose(last, progress, i, uniform, sampling.temperature, forced)
            return lax.dynamic_update_slice_in_dim(out, token[:, None], i, 1), progress

        def unfinished(carry: tuple[Array, Array, Progress, Any]) -> Array:
            i, _, progress, _ = carry
            return (i < n) & ~rules.finished(progress)

        def step(carry: tuple[Array, Array, Progress, Any]) -> tuple[Array, Array, Progress, Any]:
            """Run the token chosen last, and choose token i."""
            i, out, progress, cache = carry
            token = lax.dynamic_slice_in_dim(out, i - 1, 1, 1)
            new = model.text(token, ones[:, :1].astype(bool), ones[:, :1])
            hidden, cache = decode.append([new], i - 1, cache)
            return i + 1, *choose(hidden["prompt"][:, 0], i, out, progress), cache

        out, progress = choose(last, 0, jnp.zeros((batch, n), jnp.int32), rules.start(batch))
        _, out, progress, _ = lax.while_loop(unfinished, step, (jnp.int32(1), out, progress, decode.cache.layers))
        return {"tokens": rules.finish(given, out), "finite": progress[2]}

    @staticmethod
    def _last(text: Array, valid: Array, given: int) -> Array:
        """The hidden state [B D] that predicts the first decoded token: of the last given or last prompt token."""
        if given:
            return text[:, -1]
        at = valid.astype(jnp.int32).sum(1) - 1
        return text[jnp.arange(len(text)), at]


class Rules:
    """Which token may come next, per row, on the device. What changes is an argument: `Progress`."""

    def __init__(self, grammar: DecodeGrammar | None, model: Any, settings: Settings):
        table = model.backbone.llm.unembed()
        self.end = None if grammar is None else grammar.end  # of an answer without constraint
        self.grammar = grammar = grammar if settings.constrained else None
        self.given: tuple[int, ...] = ()
        self.max_tokens = settings.max_decode
        if grammar is not None:
            self.given = grammar.prefix
            self.max_tokens = min(settings.max_decode, grammar.total)
            self.ids, self.lengths = jnp.asarray(grammar.action_ids, jnp.int32), jnp.asarray(grammar.lengths, jnp.int32)
            self.longest = self.lengths.max()
            table = table[self.ids]  # only these rows compete: [v D] instead of [V D]
        self.table = in_compute_dtype(table.T)

    def start(self, batch: int) -> Progress:
        """Nothing is decoded yet."""
        total = 0 if self.grammar is None else self.grammar.total
        return jnp.full(batch, total, jnp.int32), jnp.zeros(batch, bool), jnp.ones(batch, bool)

    def choose(
        self,
        hidden: Array,
        progress: Progress,
        step: Any,
        uniform: Array | None,
        temperature: float,
        forced: Array | None = None,
    ) -> tuple[Array, Progress]:
        """Hidden [B D] -> the next text id [B], 0 for rows that are done; and the progress after it.

        forced [B max_tokens]: codec ids, -1 where free.
        """
        left, done, finite = progress
        logits = matmul(hidden, self.table.astype(hidden.dtype)).astype(jnp.float32)
        finite = finite & (jnp.isfinite(logits).all(-1) | done)
        if self.grammar is not None:
            rest = (self.max_tokens - step - 1) * self.longest  # values that later tokens can still bring
            fits = (self.lengths > 0) & (self.lengths <= left[:, None]) & (left[:, None] - self.lengths <= rest)
            logits = jnp.where(fits, logits, jnp.finfo(jnp.float32).min)
        if temperature > 0 and uniform is not None:
            edges = jax.nn.softmax(logits / temperature).cumsum(-1)
            choice = jnp.minimum((edges < uniform[:, None] * edges[:, -1:]).sum(-1), logits.shape[-1] - 1)
        else:
            choice = logits.argmax(-1)
        if forced is not None and self.grammar is not None:
            choice = jnp.where(forced[:, step] >= 0, forced[:, step], choice)
        if self.grammar is None:
            ended = done if self.end is None else done | (choice == self.end)
            return jnp.where(done, 0, choice).astype(jnp.int32), (left, ended, finite)
        left = jnp.where(done, left, left - self.lengths[choice])
        return jnp.where(done, 0, self.ids[choice]), (left, left <= 0, finite)

    @staticmethod
    def finished(progress: Progress) -> Array:
        """Whether every row has its answer."""
        return progress[1].all()

    def finish(self, given: Array, out: Array) -> Array:
        """The whole answer [B n]: given prefix, decoded tokens and, where the grammar knows it, the suffix."""
        if self.grammar is None or not self.grammar.suffix:
            return jnp.concatenate([given, out], 1)
        suffix = jnp.array(self.grammar.suffix, jnp.int32)
        count = (out != 0).sum(1, keepdims=True)
        whole = jnp.pad(out, ((0, 0), (0, len(suffix))))
        where = count + jnp.arange(len(suffix))
        return jnp.concatenate([given, whole.at[jnp.arange(len(out))[:, None], where].set(suffix)], 1)
