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

from vla.contracts import Actions, DecodeGrammar, Observation, Spec
from vla.jax_kit.model import Cache, Entry, Tokens
from vla.jax_kit.ops import in_compute_dtype, matmul, token_nll
from vla.layout import BACKBONE
from vla_head_ar.config import Settings

EOS = 1  # PaliGemma's end of text
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
        nll = nll.reshape(valid.shape) * valid
        return {"tokens": entry.notes["weight"] * nll.sum(1) / jnp.maximum(valid.sum(1), 1)}

    def sample(
        self,
        model: Any,
        obs: Observation,
        noise: Array | None,
        *,
        num_steps: int | None = None,
        grammar: DecodeGrammar | None = None,
        temperature: float = 0.0,
        real_dims: Array | None = None,
    ) -> dict[str, Array]:
        """Decode until every row has its chunk: {"tokens": [B n]} text ids, 0 after the end; {"finite": [B]}.

        With a grammar (and `constrained`), "Action: " is given, only codec tokens compete, and a row ends when the
        values its tokens stand for are complete. Without: any token, until the end of text. noise [B max_decode]
        holds one uniform number per decoded token, used at a temperature above 0. `finite` is False where a logit was
        NaN or infinite: the largest of such is any token, and the row is no answer.
        """
        rules = Rules(grammar if self.settings.constrained else None, model, self.settings.max_decode)
        shift = int(self.settings.positions == "openpi")
        batch = obs.batch
        given = jnp.broadcast_to(jnp.array(rules.given, jnp.int32), (batch, len(rules.given)))
        prefix = model.embed(obs)
        if given.shape[1]:
            ones = jnp.ones_like(given)
            prefix = (*prefix, model.text(given, ones.astype(bool), ones))
        cache = model.prefill(prefix, hidden=True)
        last = self._last(cache.hidden["prompt"], obs.tokenized_prompt_mask, given.shape[1])
        n = rules.max_tokens
        ones = jnp.ones((batch, n), jnp.int32)
        nothing = jnp.zeros((batch, n, 0), last.dtype)
        mask, where = model.look(cache, [Tokens(("prompt", "target"), BACKBONE, nothing, ones.astype(bool), ones)])
        cache = evolve(model.room(cache, n), hidden={})

        def choose(last: Array, i: Any, out: Array, progress: Progress) -> tuple[Array, Progress]:
            uniform = None if noise is None else jnp.asarray(noise)[:, i]
            token, progress = rules.choose(last, progress, i, uniform, temperature)
            return lax.dynamic_update_slice_in_dim(out, token[:, None], i, 1), progress

        def unfinished(carry: tuple[Array, Array, Progress, Cache]) -> Array:
            i, _, progress, _ = carry
            return (i < n) & ~rules.finished(progress)

        def step(carry: tuple[Array, Array, Progress, Cache]) -> tuple[Array, Array, Progress, Cache]:
            """Run the token chosen last, and choose token i."""
            i, out, progress, cache = carry

            def at(a: Array) -> Array:
                return lax.dynamic_slice_in_dim(a, i - 1, 1, 1)

            new = model.text(at(out), ones[:, :1].astype(bool), ones[:, :1])
            hidden, cache = model.extend(cache, [new], (at(mask), at(where) + shift), {}, offset=i - 1)
            return i + 1, *choose(hidden["prompt"][:, 0], i, out, progress), cache

        out, progress = choose(last, 0, jnp.zeros((batch, n), jnp.int32), rules.start(batch))
        _, out, progress, _ = lax.while_loop(unfinished, step, (jnp.int32(1), out, progress, cache))
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

    def __init__(self, grammar: DecodeGrammar | None, model: Any, max_decode: int):
        table = model.backbone.llm.unembed()
        self.grammar = grammar
        self.given: tuple[int, ...] = ()
        self.max_tokens = max_decode
        if grammar is not None:
            self.given = grammar.prefix
            self.max_tokens = min(max_decode, grammar.total)
            self.ids, self.lengths = jnp.asarray(grammar.action_ids, jnp.int32), jnp.asarray(grammar.lengths, jnp.int32)
            self.longest = self.lengths.max()
            table = table[self.ids]  # only these rows compete: [v D] instead of [V D]
        self.table = in_compute_dtype(table.T)

    def start(self, batch: int) -> Progress:
        """Nothing is decoded yet."""
        total = 0 if self.grammar is None else self.grammar.total
        return jnp.full(batch, total, jnp.int32), jnp.zeros(batch, bool), jnp.ones(batch, bool)

    def choose(
        self, hidden: Array, progress: Progress, step: Any, uniform: Array | None, temperature: float
    ) -> tuple[Array, Progress]:
        """Hidden [B D] -> the next text id [B], 0 for rows that are done; and the progress after it."""
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
        if self.grammar is None:
            return jnp.where(done, 0, choice).astype(jnp.int32), (left, done | (choice == EOS), finite)
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
