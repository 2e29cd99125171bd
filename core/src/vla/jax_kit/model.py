"""The policy model in JAX: a backbone and a head joined by the head's layout. Mirror of `torch_kit/model.py`.

The model is a pure function of its weights and of arrays of static shape: it never looks at a value on the host, so
it can be compiled, captured or batched by whoever calls it. Encoding the prefix (`VLA.decoder`) and running the head's
tokens over it (the `Decoder`) are separate steps.

What others use:

    model = build_model(variant, seed=0)          # a `VLA`, fresh weights
    model = abstract_model(variant)               # the same without memory: shapes only
    load_weights(model, variant, {torch name: array}); weights_of(model, variant)   # and back, bit for bit
    weights_of(gradients, variant)                # any tree like the model's parameters
    graph, params = split(model)                  # static and traced half; params: a pytree, all float32
    losses = merge(graph, params).loss(obs, actions, draws)     # inside your own `jax.jit`
    model.sample(obs, noise, Sampling(num_steps=10))            # compiled once per shape, kept for the process
    loss_and_gradients(graph, params, obs, actions, draws)      # the same for one training step
    with autocast("bfloat16"): ...                # inside the traced function; or dtype="bfloat16" above

Observation, Actions, Sampling and DecodeGrammar pass through `jax.jit` as they are (this module registers them); numpy
arrays in them are fine. Cameras keep their order.

Axes: B batch, T tokens, S cached and new tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from attrs import evolve, field, fields, frozen
from flax import nnx
from jax import Array, lax
from jax import numpy as jnp

from vla.compose import Variant, load_object
from vla.contracts import DEFAULT_SAMPLING, Actions, DecodeGrammar, Observation, Prefix, Sampling, Spec
from vla.jax_kit.ops import autocast
from vla.layout import BACKBONE, Layout, LayoutError, Span, attention_mask, clip, positions
from vla.params import Row, table, to_other, to_torch
from vla.rtc import guidance


@frozen
class Tokens:
    """A run of neighbouring tokens of one expert. `which` [B n] picks each token's role when there is more than one."""

    roles: tuple[str, ...]
    expert: str
    x: Array  # [B n D]
    valid: Array  # [B n] bool
    which: Array | None = None

    @property
    def span(self) -> Span:
        """The static part."""
        return Span(self.roles, self.expert, self.x.shape[1])


@frozen
class Entry:
    """What a head brings to a training pass: tokens, the condition vector of each expert, and notes for its losses."""

    tokens: tuple[Tokens, ...] = ()
    cond: Mapping[str, Array] = field(factory=dict)  # expert -> [B C]
    outputs: tuple[str, ...] = (
        BACKBONE,
    )  # experts whose hidden states the losses read; the last layer skips the others
    notes: Mapping[str, Any] = field(factory=dict)
    draws: int = 1  # tokens and cond have draws x B rows (row-major: draws of one observation are neighbours)


@frozen
class Cache:
    """Keys and values of the prefix, and what later tokens need to know about it."""

    layers: Any  # the LLM core's own; arrays [L B ...]
    roles: Array  # [B S]
    valid: Array  # [B S]
    hidden: Mapping[str, Array]  # role -> [B n D], when asked for


class VLA(nnx.Module):
    """A backbone, a head, and the layout that says who sees whom."""

    def __init__(self, backbone: nnx.Module, head: nnx.Module, layout: Layout, spec: Spec):
        self.backbone, self.head, self.layout, self.spec = backbone, head, layout, spec

    def loss(self, obs: Observation, actions: Actions, draws: Mapping[str, Any]) -> dict[str, Array]:
        """Losses by name, [B] float32 each, from one fused pass over prefix and head tokens.

        Args:
            obs: the observation; images uint8 or float32 in [-1, 1].
            actions: the chunk to learn, normalised and padded.
            draws: the head's random numbers (`vla.draws.training_draws`).
        """
        entry = self.head.enter(obs, actions, draws)
        prefix = self.embed(obs)
        hidden = self._fused(prefix, entry) if entry.draws == 1 else self._shared_prefix(prefix, entry)
        return self.head.losses(self, hidden, entry)

    def _fused(self, prefix: Sequence[Tokens], entry: Entry) -> dict[str, Array]:
        """One pass over everything: role -> hidden [B n D]."""
        tokens = (*prefix, *entry.tokens)
        roles, valid = self._roles_and_valid(tokens)
        outs, _ = self.backbone.llm(
            _streams(tokens),
            attention_mask(self.layout, roles, valid),
            positions(self.layout, roles, valid),
            styles=self._styles(entry.cond),
            reads=self.layout.reads([t.span for t in tokens]),
            outputs=entry.outputs,
        )
        return _split(tokens, outs)

    def _shared_prefix(self, prefix: Sequence[Tokens], entry: Entry) -> dict[str, Array]:
        """Several draws per observation: the prefix runs once, its keys and values serve every draw (with gradient).

        Equal to `_fused` on the observation repeated, at a fraction of the cost: the prefix is most of it.
        """
        cache = self._prefill(prefix, hidden=BACKBONE in entry.outputs)
        length, k = cache.roles.shape[1], entry.draws
        repeated = Cache(
            jax.tree.map(lambda a: jnp.repeat(a, k, 1), cache.layers),
            jnp.repeat(cache.roles, k, 0),
            jnp.repeat(cache.valid, k, 0),
            {},
        )
        mask, where = self._masks_for(repeated, entry.tokens)
        reads = self.layout.reads([t.span for t in (*prefix, *entry.tokens)])
        outs, _ = self.backbone.llm(
            _streams(entry.tokens),
            mask,
            where,
            styles=self._styles(entry.cond),
            reads=clip(reads, length, mask.shape[2]),
            cache=self.backbone.llm.room(repeated.layers, mask.shape[1]),
            write_at=length,
            outputs=entry.outputs,
        )
        return {**cache.hidden, **_split(entry.tokens, outs)}

    def total(self, losses: Mapping[str, Array]) -> Array:
        """The scalar to minimise: batch means, weighted as the head says."""
        return sum(weight * losses[name].mean() for name, weight in self.head.weights().items())  # type: ignore[return-value]

    def sample(
        self, obs: Observation, noise: Any | None, sampling: Sampling = DEFAULT_SAMPLING, *, dtype: str | None = None
    ) -> dict[str, Array]:
        """One chunk per row: {"actions": [B t d]}, or {"tokens": [B n]} from a token head. Compiled once per shape.

        Args:
            obs: the observation, without targets.
            noise: what `vla.draws.sampling_noise` drew.
            sampling: the options.
            dtype: of matrix products (`autocast`); None: float32.
        """
        graph, params = split(self)
        return sample(graph, params, obs, noise, sampling, dtype=dtype)

    def embed(self, obs: Observation) -> tuple[Tokens, ...]:
        """The prefix: image tokens camera by camera, then the prompt (and its targets, where the layout has them)."""
        tokens = []
        for name, x in self.backbone.embed_images(obs.images).items():
            valid = jnp.broadcast_to(jnp.asarray(obs.image_masks[name])[:, None], x.shape[:2])
            tokens.append(Tokens(("image",), BACKBONE, x, valid))
        if obs.tokenized_prompt is not None:
            tokens.append(self.text(obs.tokenized_prompt, obs.tokenized_prompt_mask, obs.token_ar_mask))
        return tuple(tokens)

    def text(self, ids: Array, valid: Array, is_target: Array | None) -> Tokens:
        """Text tokens; without a role `target` in the layout, targets are left out."""
        x = self.backbone.embed_text(ids)
        if is_target is None:
            return Tokens(("prompt",), BACKBONE, x, valid)
        if "target" not in self.layout.roles:
            return Tokens(("prompt",), BACKBONE, x, valid & (is_target == 0))
        return Tokens(("prompt", "target"), BACKBONE, x, valid, which=is_target)

    def decoder(
        self,
        obs: Observation,
        suffix: Sequence[Tokens],
        cond: Mapping[str, Array] | None = None,
        varying: Iterable[str] | None = None,
        *,
        prefix: Sequence[Tokens] = (),
        hidden: bool = False,
    ) -> Decoder:
        """Encode the prefix once: what that is, the layout decides, namely all that sees nothing which steps change.

        Args:
            obs: the observation, without targets.
            suffix: the head's tokens as they are at the first step; those that no step changes join the prefix.
            cond: expert -> the condition of every step [R C]. Under one, all roles of the expert change.
            varying: roles that change from step to step; default all of the suffix.
            prefix: more tokens behind images and prompt.
            hidden: keep the hidden states of the prefix, as `Decoder.hidden`.

        Raises:
            LayoutError: images or prompt see what changes, so that they cannot be encoded once.
        """
        cond = cond or {}
        given = (*self.embed(obs), *prefix)
        changing = {r for t in suffix for r in t.roles} if varying is None else set(varying)
        changing |= {row.role for row in self.layout.rows if row.expert in cond}
        fixed = self.layout.cacheable(changing)
        if ahead := {role for t in given for role in t.roles} - {*fixed, *changing}:
            raise LayoutError(
                "the prefix sees what sampling changes, so that it cannot be encoded once",
                field=sorted(ahead)[0], got=sorted(changing), fix="let images and prompt see each other alone",
            )  # fmt: skip
        still, moving = [], []
        for t in suffix:
            (still if set(t.roles) <= set(fixed) else moving).append(t)
        cache = self._prefill((*given, *still), hidden=hidden)
        mask, where = self._masks_for(cache, moving)
        layers = self.backbone.llm.room(cache.layers, mask.shape[1])
        return Decoder(self, evolve(cache, layers=layers), fixed, mask, where, self._styles(cond))

    def _prefill(self, tokens: Sequence[Tokens], *, hidden: bool) -> Cache:
        """Encode what later tokens only read. Without `hidden` the last layer stops after its keys and values."""
        roles, valid = self._roles_and_valid(tokens)
        outs, layers = self.backbone.llm(
            _streams(tokens),
            attention_mask(self.layout, roles, valid),
            positions(self.layout, roles, valid),
            reads=self.layout.reads([t.span for t in tokens]),
            outputs=(BACKBONE,) if hidden else (),
        )
        return Cache(layers, roles, valid, _split(tokens, outs))

    def _masks_for(self, cache: Cache, tokens: Sequence[Tokens]) -> tuple[Array, Array]:
        """Mask [B n S+n] and positions [B n] of new tokens behind a cache; no value changes them: compute once."""
        roles, valid = self._roles_and_valid(tokens)
        n = roles.shape[1]
        roles, valid = jnp.concatenate([cache.roles, roles], 1), jnp.concatenate([cache.valid, valid], 1)
        return attention_mask(self.layout, roles, valid, n), positions(self.layout, roles, valid, n)

    def _styles(self, cond: Mapping[str, Array]) -> dict[str, Any]:
        return {expert: self.backbone.llm.styles(expert, c) for expert, c in cond.items()}

    def _roles_and_valid(self, tokens: Sequence[Tokens]) -> tuple[Array, Array]:
        roles = []
        for t in tokens:
            role = jnp.full(t.valid.shape, self.layout.role_id(t.roles[0]), jnp.int32)
            for i, name in enumerate(t.roles[1:], start=1):
                role = jnp.where(t.which == i, self.layout.role_id(name), role)
            roles.append(role)
        return jnp.concatenate(roles, 1), jnp.concatenate([t.valid for t in tokens], 1)


Step = Callable[["Decoder", Array, Any], tuple[Array, Array]]


@frozen(eq=False)
class Decoder:
    """An encoded prefix, and all that running a head's tokens over it needs; `VLA.decoder` makes one per answer."""

    model: VLA
    cache: Cache
    fixed: tuple[str, ...]  # roles that are in the cache; the suffix may name them
    mask: Array  # [B n S+n], of all the tokens that are to come
    positions: Array  # [B n]
    styles: Mapping[str, Any]  # expert -> its modulation at every row of the condition, computed at once

    @property
    def hidden(self) -> Mapping[str, Array]:
        """Role -> hidden [B n D] of the prefix, when asked for."""
        return self.cache.hidden

    def __call__(self, suffix: Sequence[Tokens], step: Any = 0) -> dict[str, Array]:
        """Role -> hidden [B n D] of the suffix, at row `step` of the condition, or at a row for every token [B n]."""
        tokens = [t for t in suffix if not set(t.roles) <= set(self.fixed)]
        llm = self.model.backbone.llm
        styles = {expert: llm.style_at(s, step) for expert, s in self.styles.items()}
        outs, _ = llm(
            _streams(tokens), self.mask, self.positions, styles=styles, cache=self.cache.layers,
            write_at=self.cache.roles.shape[1],
        )  # fmt: skip
        return _split(tokens, outs)

    def denoise(
        self, step: Step, signal: Sequence[float], noise: Sequence[float], x: Array, prefix: Prefix | None
    ) -> Array:
        """x [B H A], pure noise, through all levels to the chunk; with a prefix, so that the chunk goes on from it.

        Args:
            step: (decode, x, i) -> (x at the next level, the clean chunk that the network sees in it). i is the level,
                or one for every step [B H]: the last, which is clean, where a step is given (mode `trained`).
            signal, noise: [n + 1], from the first level to the clean one: x_i = signal_i * chunk + noise_i * noise.
            x: what it starts from.
            prefix: see `Prefix`.
        """
        levels, start = len(signal) - 1, jnp.asarray(x)
        if prefix is None:
            return lax.fori_loop(0, levels, lambda i, x: step(self, x, i)[0], start)
        if prefix.mode == "guided":
            gains = jnp.asarray(guidance(signal, noise, prefix.limit), jnp.float32)
            return lax.fori_loop(0, levels, lambda i, x: _guided(step, self, x, i, gains[i], prefix), start)
        given = jnp.arange(x.shape[1]) < jnp.asarray(prefix.delay)[:, None]  # [B H]
        signal, noise = (jnp.asarray(a, jnp.float32) for a in (signal, noise))

        def body(i: Array, x: Array) -> Array:
            known = prefix.values if prefix.mode == "trained" else signal[i] * prefix.values + noise[i] * start
            x = jnp.where(given[..., None], known, x)
            return step(self, x, jnp.where(given, levels, i) if prefix.mode == "trained" else i)[0]

        return jnp.where(given[..., None], prefix.values, lax.fori_loop(0, levels, body, start))

    def append(self, tokens: Sequence[Tokens], at: Any, cache: Any) -> tuple[dict[str, Array], Any]:
        """Run tokens in places `at` and following behind the prefix, after all before: (hidden by role, the cache).

        `cache` is what the call before gave, at first `Decoder.cache.layers`. Nothing is modulated.
        """
        n = sum(t.x.shape[1] for t in tokens)
        mask, where = (lax.dynamic_slice_in_dim(a, at, n, 1) for a in (self.mask, self.positions))
        outs, layers = self.model.backbone.llm(
            _streams(tokens), mask, where, cache=cache, write_at=self.cache.roles.shape[1] + at
        )
        return _split(tokens, outs), layers


def _guided(step: Step, decode: Decoder, x: Array, i: Array, gain: Array, prefix: Prefix) -> Array:
    """One step, and a pull of the clean chunk towards the prefix, through the network's Jacobian (2506.07339 eq. 2)."""

    def sees(x: Array) -> tuple[Array, Array]:
        after, clean = step(decode, x, i)
        return clean, after

    clean, pull, after = jax.vjp(sees, x, has_aux=True)
    return after + gain * pull((prefix.values - clean) * jnp.asarray(prefix.weights)[..., None])[0]


def _streams(tokens: Sequence[Tokens]) -> dict[str, Array]:
    """Expert -> [B T D]; tokens of one expert are neighbours."""
    runs: dict[str, list[Array]] = {}
    for t in tokens:
        runs.setdefault(t.expert, []).append(t.x)
    return {expert: jnp.concatenate(xs, 1) if len(xs) > 1 else xs[0] for expert, xs in runs.items()}


def _split(tokens: Sequence[Tokens], outs: Mapping[str, Array]) -> dict[str, Array]:
    """First role of each run -> its hidden states [B n D]; runs of one role (cameras) are joined."""
    at = dict.fromkeys(outs, 0)
    hidden: dict[str, list[Array]] = {}
    for t in tokens:
        if t.expert not in outs:
            continue
        start, n = at[t.expert], t.x.shape[1]
        hidden.setdefault(t.roles[0], []).append(outs[t.expert][:, start : start + n])
        at[t.expert] = start + n
    return {role: jnp.concatenate(xs, 1) if len(xs) > 1 else xs[0] for role, xs in hidden.items()}


def build_model(variant: Variant, seed: int = 0) -> VLA:
    """The model of a variant with fresh weights."""
    rngs = nnx.Rngs(seed)

    def part(chosen: Any) -> Any:
        return load_object(chosen.part.jax)

    backbone, head = variant.parts["backbone"], variant.parts["head"]
    vision, llm = backbone.inner["vision"], backbone.inner["llm"]
    body = part(backbone)(
        backbone.settings,
        part(vision)(vision.settings, variant.spec.image_size, rngs=rngs),
        part(llm)(llm.settings, variant.experts(), rngs=rngs),
        rngs=rngs,
    )

    def build_head(chosen: Any) -> nnx.Module:
        inner = {slot: build_head(c) for slot, c in chosen.inner.items()}
        return part(chosen)(chosen.settings, variant.spec, backbone.offers, inner, rngs=rngs)

    return VLA(body, build_head(head), variant.layout(), variant.spec)


def abstract_model(variant: Variant) -> VLA:
    """The model with shapes instead of weights; `load_weights` fills it."""
    return nnx.eval_shape(lambda: build_model(variant))


# ---- weights and compiled entry points -------------------------------------------------------------------------------


def split(model: VLA) -> tuple[Any, Any]:
    """The model as (graph, params): what is static, and its parameters as a pytree. `merge` is the way back."""
    return nnx.split(model)


def merge(graph: Any, params: Any) -> VLA:
    """The inverse of `split`, also inside a traced function."""
    return nnx.merge(graph, params)


def load_weights(model: VLA, variant: Variant, weights: Mapping[str, Any]) -> None:
    """Fill a model, also an abstract one, from torch names; float32 whatever the arrays are.

    Raises:
        StoreError: a name is missing or unknown, or a shape is wrong; all of them are listed.
    """
    fill(model, table(variant), weights)


def weights_of(model_or_params: Any, variant: Variant) -> dict[str, np.ndarray]:
    """Torch name -> array, of a model or of any tree like its parameters (gradients, averages, moments)."""
    return named(model_or_params, table(variant))


def fill(module: nnx.Module, rows: Sequence[Row], weights: Mapping[str, Any]) -> None:
    """`load_weights` for any module with a name table."""
    found = to_other(rows, weights)
    flat = [
        (path, leaf.replace(jnp.asarray(found[key], jnp.float32))) for key, path, leaf in _leaves(nnx.state(module))
    ]
    nnx.update(module, nnx.from_flat_state(flat))


def named(module_or_params: Any, rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """`weights_of` for any module with a name table."""
    state = nnx.state(module_or_params) if isinstance(module_or_params, nnx.Module) else module_or_params
    return to_torch(rows, {key: np.asarray(leaf.get_value()) for key, _, leaf in _leaves(state)})


def _leaves(state: Any) -> list[tuple[str, Any, Any]]:
    """Every parameter: its path joined by "/", its path, the variable."""
    return [("/".join(map(str, path)), path, leaf) for path, leaf in nnx.to_flat_state(state)]


@partial(jax.jit, static_argnames=("graph", "dtype"))
def sample(
    graph: Any,
    params: Any,
    obs: Observation,
    noise: Array | None,
    sampling: Sampling = DEFAULT_SAMPLING,
    *,
    dtype: str | None = None,
) -> dict[str, Array]:
    """`VLA.sample` for a model that was split once (see there)."""
    model = merge(graph, params)
    with autocast(dtype):
        return model.head.sample(model, obs, noise, sampling)


@partial(jax.jit, static_argnames=("graph", "dtype"))
def losses(
    graph: Any, params: Any, obs: Observation, actions: Actions, draws: Mapping[str, Any], *, dtype: str | None = None
) -> dict[str, Array]:
    """`VLA.loss` for a model that was split once: {name: [B]} float32."""
    with autocast(dtype):
        return merge(graph, params).loss(obs, actions, draws)


@partial(jax.jit, static_argnames=("graph", "dtype"))
def loss_and_gradients(
    graph: Any, params: Any, obs: Observation, actions: Actions, draws: Mapping[str, Any], *, dtype: str | None = None
) -> tuple[Array, dict[str, Array], Any]:
    """The scalar to minimise, the losses {name: [B]}, and the gradients, a tree like `params`, float32."""

    def total(params: Any) -> tuple[Array, dict[str, Array]]:
        model = merge(graph, params)
        with autocast(dtype):
            found = model.loss(obs, actions, draws)
        return model.total(found), found

    (value, found), gradients = jax.value_and_grad(total, has_aux=True)(params)
    return value, found, gradients


# ---- records as pytrees ----------------------------------------------------------------------------------------------


def _register(cls: Any, static: Sequence[str] = ()) -> None:
    """Make an attrs record a pytree. Its dicts keep their order: JAX would sort the cameras."""
    names = [f.name for f in fields(cls) if f.name not in static]

    def flatten(record: Any) -> tuple[list[Any], Any]:
        values = [getattr(record, name) for name in names]
        keys = tuple(tuple(v) if isinstance(v, Mapping) else None for v in values)
        children = [v if k is None else tuple(v.values()) for v, k in zip(values, keys, strict=True)]
        return children, (keys, tuple(getattr(record, name) for name in static))

    def unflatten(aux: Any, children: Sequence[Any]) -> Any:
        keys, fixed = aux
        record = object.__new__(cls)  # children may be anything while JAX works on trees
        for name, key, child in zip(names, keys, children, strict=True):
            object.__setattr__(record, name, child if key is None else dict(zip(key, child, strict=True)))
        for name, value in zip(static, fixed, strict=True):
            object.__setattr__(record, name, value)
        return record

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)


_register(Observation)
_register(Actions)
_register(DecodeGrammar, static=("prefix", "total", "suffix"))
_register(Tokens, static=("roles", "expert"))
_register(Cache)
_register(Prefix, static=("mode", "limit"))


def _sampling_leaves(record: Sampling) -> tuple[list[Any], Any]:
    """Arrays are traced; plain values are static, so that a head may branch on them."""
    arrays = {k: v for k, v in record.extra.items() if hasattr(v, "shape")}
    plain = tuple((k, v) for k, v in record.extra.items() if k not in arrays)
    children = [record.grammar, record.action_dim_mask, record.prefix, tuple(arrays.values())]
    return children, (record.num_steps, record.temperature, tuple(arrays), plain)


def _sampling_record(aux: Any, children: Sequence[Any]) -> Sampling:
    steps, temperature, names, plain = aux
    grammar, dims, prefix, arrays = children
    return Sampling(steps, temperature, grammar, dims, prefix, {**dict(plain), **dict(zip(names, arrays, strict=True))})


jax.tree_util.register_pytree_node(Sampling, _sampling_leaves, _sampling_record)
