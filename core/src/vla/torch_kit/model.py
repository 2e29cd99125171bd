"""The policy model in PyTorch: a backbone and a head joined by the head's layout.

The model is a pure function of its weights and of arrays of static shape: it never looks at a value on the host, so
it can be compiled, captured or batched by whoever calls it. Encoding the prefix (`VLA.decoder`) and running the head's
tokens over it (the `Decoder`) are separate steps.

Axes: B batch, T tokens, S cached and new tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from attrs import evolve, field, frozen
from torch import Tensor, nn

from vla.compose import Variant, load_object
from vla.contracts import DEFAULT_SAMPLING, Actions, Observation, Prefix, Sampling, Spec
from vla.layout import BACKBONE, Layout, LayoutError, Span, attention_mask, clip, positions
from vla.params import cover
from vla.rtc import guidance


@frozen
class Tokens:
    """A run of neighbouring tokens of one expert. `which` [B n] picks each token's role when there is more than one."""

    roles: tuple[str, ...]
    expert: str
    x: Tensor  # [B n D]
    valid: Tensor  # [B n] bool
    which: Tensor | None = None

    @property
    def span(self) -> Span:
        """The static part."""
        return Span(self.roles, self.expert, self.x.shape[1])


@frozen
class Entry:
    """What a head brings to a training pass: tokens, the condition vector of each expert, and notes for its losses."""

    tokens: tuple[Tokens, ...] = ()
    cond: Mapping[str, Tensor] = field(factory=dict)  # expert -> [B C]
    outputs: tuple[str, ...] = (BACKBONE,)  # experts that the losses read; the last layer skips the others
    notes: Mapping[str, Any] = field(factory=dict)
    draws: int = 1  # tokens and cond have draws x B rows (row-major: draws of one observation are neighbours)


@frozen
class Cache:
    """Keys and values of the prefix, and what later tokens need to know about it."""

    layers: Any  # the LLM core's own
    roles: Tensor  # [B S]
    valid: Tensor  # [B S]
    hidden: Mapping[str, Tensor]  # role -> [B n D], when asked for


class VLA(nn.Module):
    """A backbone, a head, and the layout that says who sees whom."""

    def __init__(self, backbone: nn.Module, head: nn.Module, layout: Layout, spec: Spec):
        super().__init__()
        self.backbone, self.head, self.layout, self.spec = backbone, head, layout, spec

    def loss(self, obs: Observation, actions: Actions, draws: Mapping[str, Any]) -> dict[str, Tensor]:
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

    def _fused(self, prefix: Sequence[Tokens], entry: Entry) -> dict[str, Tensor]:
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
            fused=not self.training,
        )
        return _split(tokens, outs)

    def _shared_prefix(self, prefix: Sequence[Tokens], entry: Entry) -> dict[str, Tensor]:
        """Several draws per observation: the prefix runs once, its keys and values serve every draw (with gradient).

        Equal to `_fused` on the observation repeated, at a fraction of the cost: the prefix is most of it.
        """
        cache = self._prefill(prefix, hidden=BACKBONE in entry.outputs, fused=not self.training)
        length, k = cache.roles.shape[1], entry.draws
        repeated = Cache(
            [tuple(a.repeat_interleave(k, 0) for a in layer) for layer in cache.layers],
            cache.roles.repeat_interleave(k, 0),
            cache.valid.repeat_interleave(k, 0),
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
            fused=not self.training,
        )
        return {**cache.hidden, **_split(entry.tokens, outs)}

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The scalar to minimise: batch means, weighted as the head says."""
        return sum(weight * losses[name].mean() for name, weight in self.head.weights().items())  # type: ignore[return-value]

    @torch.no_grad()
    def sample(
        self, obs: Observation, noise: Tensor | None, sampling: Sampling = DEFAULT_SAMPLING
    ) -> dict[str, Tensor]:
        """One chunk per row: {"actions": [B t d]}, or {"tokens": [B n]} from a token head.

        Args:
            obs: the observation, without targets.
            noise: what `vla.draws.sampling_noise` drew.
            sampling: the options, `action_dim_mask` on the model's device.
        """
        return self.head.sample(self, obs, noise, sampling)

    def embed(self, obs: Observation) -> tuple[Tokens, ...]:
        """The prefix: image tokens camera by camera, then the prompt (and its targets, where the layout has them)."""
        tokens = []
        for name, x in self.backbone.embed_images(obs.images).items():
            valid = obs.image_masks[name][:, None].expand(x.shape[:2])
            tokens.append(Tokens(("image",), BACKBONE, x, valid))
        if obs.tokenized_prompt is not None:
            tokens.append(self.text(obs.tokenized_prompt, obs.tokenized_prompt_mask, obs.token_ar_mask))
        return tuple(tokens)

    def text(self, ids: Tensor, valid: Tensor, is_target: Tensor | None) -> Tokens:
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
        cond: Mapping[str, Tensor] | None = None,
        varying: Iterable[str] | None = None,
        *,
        prefix: Sequence[Tokens] = (),
        hidden: bool = False,
        in_place: bool = True,
    ) -> Decoder:
        """Encode the prefix once: what that is, the layout decides, namely all that sees nothing which steps change.

        Args:
            obs: the observation, without targets.
            suffix: the head's tokens as they are at the first step; those that no step changes join the prefix.
            cond: expert -> the condition of every step [R C]. Under one, all roles of the expert change.
            varying: roles that change from step to step; default all of the suffix.
            prefix: more tokens behind images and prompt.
            hidden: keep the hidden states of the prefix, as `Decoder.hidden`.
            in_place: steps write keys and values where those of the step before were. False keeps them, for gradients.

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
        cache = self._prefill((*given, *still), hidden=hidden, fused=True)
        mask, where = self._masks_for(cache, moving)
        layers = self.backbone.llm.room(cache.layers, mask.shape[1])
        return Decoder(self, evolve(cache, layers=layers), fixed, mask, where, self._styles(cond), in_place)

    def _prefill(self, tokens: Sequence[Tokens], *, hidden: bool, fused: bool) -> Cache:
        """Encode what later tokens only read. Without `hidden` the last layer stops after its keys and values."""
        roles, valid = self._roles_and_valid(tokens)
        outs, layers = self.backbone.llm(
            _streams(tokens),
            attention_mask(self.layout, roles, valid),
            positions(self.layout, roles, valid),
            reads=self.layout.reads([t.span for t in tokens]),
            outputs=(BACKBONE,) if hidden else (),
            fused=fused,
        )
        return Cache(layers, roles, valid, _split(tokens, outs))

    def _masks_for(self, cache: Cache, tokens: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
        """Mask [B n S+n] and positions [B n] of new tokens behind a cache; no value changes them: compute once."""
        roles, valid = self._roles_and_valid(tokens)
        n = roles.shape[1]
        roles, valid = torch.cat([cache.roles, roles], 1), torch.cat([cache.valid, valid], 1)
        return attention_mask(self.layout, roles, valid, n), positions(self.layout, roles, valid, n)

    def _styles(self, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        return {expert: self.backbone.llm.styles(expert, c) for expert, c in cond.items()}

    def _roles_and_valid(self, tokens: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
        roles = []
        for t in tokens:
            role = torch.full_like(t.valid, self.layout.role_id(t.roles[0]), dtype=torch.long)
            for i, name in enumerate(t.roles[1:], start=1):
                role = torch.where(t.which == i, self.layout.role_id(name), role)
            roles.append(role)
        return torch.cat(roles, 1), torch.cat([t.valid for t in tokens], 1)


Step = Callable[["Decoder", Tensor, Any], tuple[Tensor, Tensor]]


@frozen(eq=False)
class Decoder:
    """An encoded prefix, and all that running a head's tokens over it needs; `VLA.decoder` makes one per answer."""

    model: VLA
    cache: Cache
    fixed: tuple[str, ...]  # roles that are in the cache; the suffix may name them
    mask: Tensor  # [B n S+n], of all the tokens that are to come
    positions: Tensor  # [B n]
    styles: Mapping[str, Any]  # expert -> its modulation at every row of the condition, computed at once
    in_place: bool = True

    @property
    def hidden(self) -> Mapping[str, Tensor]:
        """Role -> hidden [B n D] of the prefix, when asked for."""
        return self.cache.hidden

    def __call__(self, suffix: Sequence[Tokens], step: int | Tensor = 0) -> dict[str, Tensor]:
        """Role -> hidden [B n D] of the suffix, at row `step` of the condition, or at a row for every token [B n]."""
        tokens = [t for t in suffix if not set(t.roles) <= set(self.fixed)]
        llm = self.model.backbone.llm
        styles = {expert: llm.style_at(s, step) for expert, s in self.styles.items()}
        outs, _ = llm(
            _streams(tokens), self.mask, self.positions, styles=styles, cache=self.cache.layers,
            write_at=self.cache.roles.shape[1], fused=True, in_place=self.in_place,
        )  # fmt: skip
        return _split(tokens, outs)

    def denoise(
        self, step: Step, signal: Sequence[float], noise: Sequence[float], x: Tensor, prefix: Prefix | None
    ) -> Tensor:
        """x [B H A], pure noise, through all levels to the chunk; with a prefix, so that the chunk goes on from it.

        Args:
            step: (decode, x, i) -> (x at the next level, the clean chunk that the network sees in it). i is the level,
                or one for every step [B H]: the last, which is clean, where a step is given (mode `trained`).
            signal, noise: [n + 1], from the first level to the clean one: x_i = signal_i * chunk + noise_i * noise.
            x: what it starts from.
            prefix: see `Prefix`.
        """
        levels, start = len(signal) - 1, x
        if prefix is None:
            for i in range(levels):
                x, _ = step(self, x, i)
            return x
        if prefix.mode == "guided":
            free = evolve(self, in_place=False)  # a gradient goes through
            for i, gain in enumerate(guidance(signal, noise, prefix.limit)):
                x = _guided(step, free, x, i, gain, prefix)
            return x
        given = torch.arange(x.shape[1], device=x.device) < prefix.delay[:, None]  # [B H]
        for i in range(levels):
            known = prefix.values if prefix.mode == "trained" else signal[i] * prefix.values + noise[i] * start
            x = torch.where(given[..., None], known, x)
            x, _ = step(self, x, torch.where(given, levels, i) if prefix.mode == "trained" else i)
        return torch.where(given[..., None], prefix.values, x)

    def append(self, tokens: Sequence[Tokens], at: int, cache: Any) -> tuple[dict[str, Tensor], Any]:
        """Run tokens in places `at` and following behind the prefix, after all before: (hidden by role, the cache).

        `cache` is what the call before gave, at first `Decoder.cache.layers`. Nothing is modulated.
        """
        here = slice(at, at + sum(t.x.shape[1] for t in tokens))
        outs, layers = self.model.backbone.llm(
            _streams(tokens), self.mask[:, here], self.positions[:, here], cache=cache,
            write_at=self.cache.roles.shape[1] + at, fused=True, in_place=self.in_place,
        )  # fmt: skip
        return _split(tokens, outs), layers


def _guided(step: Step, decode: Decoder, x: Tensor, i: int, gain: float, prefix: Prefix) -> Tensor:
    """One step, and a pull of the clean chunk towards the prefix, through the network's Jacobian (2506.07339 eq. 2)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        after, clean = step(decode, x, i)
    error = (prefix.values - clean.detach()) * prefix.weights[..., None]
    (pull,) = torch.autograd.grad(clean, x, error)
    return after.detach() + gain * pull


def _streams(tokens: Sequence[Tokens]) -> dict[str, Tensor]:
    """Expert -> [B T D]; tokens of one expert are neighbours."""
    runs: dict[str, list[Tensor]] = {}
    for t in tokens:
        runs.setdefault(t.expert, []).append(t.x)
    return {expert: torch.cat(xs, 1) if len(xs) > 1 else xs[0] for expert, xs in runs.items()}


def _split(tokens: Sequence[Tokens], outs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """First role of each run -> its hidden states [B n D]; runs of one role (cameras) are joined."""
    at = dict.fromkeys(outs, 0)
    hidden: dict[str, list[Tensor]] = {}
    for t in tokens:
        if t.expert not in outs:
            continue
        start, n = at[t.expert], t.x.shape[1]
        hidden.setdefault(t.roles[0], []).append(outs[t.expert][:, start : start + n])
        at[t.expert] = start + n
    return {role: torch.cat(xs, 1) if len(xs) > 1 else xs[0] for role, xs in hidden.items()}


def build_model(variant: Variant) -> VLA:
    """The model of a variant with fresh weights (PyTorch's global seed). Under `torch.device("meta")`: shapes only."""

    def part(chosen: Any) -> Any:
        return load_object(chosen.part.torch)

    backbone, head = variant.parts["backbone"], variant.parts["head"]
    vision, llm = backbone.inner["vision"], backbone.inner["llm"]
    body = part(backbone)(
        backbone.settings,
        part(vision)(vision.settings, variant.spec.image_size),
        part(llm)(llm.settings, variant.experts()),
    )

    def build_head(chosen: Any) -> nn.Module:
        inner = {slot: build_head(c) for slot, c in chosen.inner.items()}
        return part(chosen)(chosen.settings, variant.spec, backbone.offers, inner)

    return VLA(body, build_head(head), variant.layout(), variant.spec)


def load_weights(model: VLA, variant: Variant, weights: Mapping[str, Any]) -> None:
    """Fill a model from torch names; float32 whatever the arrays are.

    Raises:
        StoreError: a name is missing or unknown, or a shape is wrong; all of them are listed.
    """
    parameters = dict(model.named_parameters())
    cover({name: tuple(p.shape) for name, p in parameters.items()}, weights, "weights do not match the model")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(torch.from_numpy(np.asarray(weights[name], np.float32)))


def weights_of(model: VLA, variant: Variant) -> dict[str, np.ndarray]:
    """Torch name -> float32 array."""
    return {name: p.detach().float().cpu().numpy() for name, p in model.named_parameters()}


def observation_to(obs: Observation, device: torch.device | str) -> Observation:
    """A host observation (numpy) as tensors on a device."""

    def move(a: Any) -> Any:
        return None if a is None else torch.as_tensor(a, device=device)

    return evolve(
        obs,
        images={k: move(v) for k, v in obs.images.items()},
        image_masks={k: move(v) for k, v in obs.image_masks.items()},
        extra={k: move(v) for k, v in obs.extra.items()},
        **{
            k: move(getattr(obs, k))
            for k in ("state", "tokenized_prompt", "tokenized_prompt_mask", "token_ar_mask", "token_loss_mask")
        },
    )


def sampling_to(sampling: Sampling, device: torch.device | str) -> Sampling:
    """Options whose arrays are tensors on a device. The grammar stays on the host: heads make tables of it."""

    def move(a: Any) -> Any:
        return torch.as_tensor(a, device=device) if hasattr(a, "shape") else a

    extra = {name: move(value) for name, value in sampling.extra.items()}
    prefix = sampling.prefix
    if prefix is not None:
        prefix = evolve(prefix, **{k: move(getattr(prefix, k)) for k in ("values", "weights", "delay", "tokens")})
    return evolve(sampling, action_dim_mask=move(sampling.action_dim_mask), prefix=prefix, extra=extra)


def tree_to(tree: Any, device: torch.device | str) -> Any:
    """Nested dicts of numpy arrays as tensors on a device."""
    if isinstance(tree, Mapping):
        return {k: tree_to(v, device) for k, v in tree.items()}
    return torch.as_tensor(tree, device=device)
