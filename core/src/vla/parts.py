"""What a plugin publishes: one light `Part` per entry point, and `ModelType`, a named tree of parts.

A part says what it is made of (`slots`), which settings it has, what it offers, what it needs and why, and, as
strings, where its code is. Importing a plugin's `__init__` must import no array library: that is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attrs import field, frozen

# kind -> entry-point group. `robot` and `env` joined the plan of the house: an adapter is needed at inference, when
# no dataset is, and an environment is not a dataset.
GROUPS: dict[str, str] = {
    "vision": "vla.vision",
    "llm": "vla.llms",
    "backbone": "vla.backbones",
    "tokenizer": "vla.tokenizers",
    "head": "vla.heads",
    "robot": "vla.robots",
    "dataset": "vla.datasets",
    "env": "vla.envs",
    "protocol": "vla.protocols",
}
MODEL_TYPES_GROUP = "vla.model_types"
# The parts at the top of every variant, in this order, with their default.
TOP_SLOTS: dict[str, tuple[str, str]] = {
    "backbone": ("backbone", "paligemma"),
    "tokenizer": ("tokenizer", "paligemma"),
    "head": ("head", "flow"),
    "robot": ("robot", "plain"),
}
# kind -> the contract versions this core speaks, lowest and highest.
CONTRACTS: dict[str, tuple[int, int]] = {kind: (1, 1) for kind in GROUPS} | {"head": (2, 2), "llm": (2, 2)}
# (kind, contract) -> what an author does to speak it.
NEWS: dict[tuple[str, int], str] = {
    ("head", 2): "`sample(model, obs, noise, sampling)` takes one `Sampling` record (num_steps, temperature, grammar, "
    "action_dim_mask, extra), and `decode = model.decoder(obs, suffix, cond, varying)` with `decode(suffix, step)` "
    "stands in place of prefill, look, room and extend; see docs/parts/head.md",
    ("llm", 2): "in PyTorch the call takes `fused` and `in_place`; a cache is always written where `room` made space, "
    "and comes back whole; see docs/parts/llm.md",
}


TESTS = (">=", "==", "has", "multiple", "true")


@frozen
class Need:
    """One fact a part relies on, and the sentence shown when it does not hold.

    `slot` is one of the part's own slots, a top slot (`backbone`, `tokenizer`, `head`, `robot`), `self` (the part's own
    settings and offers) or `spec` (the shapes, and `image_side`, the shorter side of an image).
    `test` is `>=`, `==`, `has` (value in the offered collection), `multiple` (of value) or `true`.
    """

    slot: str
    facet: str
    test: str
    value: Any
    why: str

    def met_by(self, offers: Mapping[str, Any]) -> bool:
        """Whether the offers of the part in `slot` satisfy this need."""
        got = offers.get(self.facet)
        if self.test == ">=":
            return got is not None and got >= self.value
        if self.test == "==":
            return got == self.value
        if self.test == "multiple":
            return got is not None and got % self.value == 0
        if self.test == "has":
            return got is not None and self.value in got
        return bool(got)

    def __str__(self) -> str:
        want = {
            ">=": f"{self.facet} >= {self.value}",
            "==": f"{self.facet} = {self.value!r}",
            "has": f"{self.facet} containing {self.value!r}",
            "multiple": f"{self.facet} a multiple of {self.value}",
            "true": self.facet,
        }
        return want[self.test] if self.slot == "self" else f"{self.slot} with {want[self.test]}"


def at_least(slot: str, facet: str, value: Any, why: str) -> Need:
    """The part in `slot` must offer `facet` >= value."""
    return Need(slot, facet, ">=", value, why)


def equals(slot: str, facet: str, value: Any, why: str) -> Need:
    """The part in `slot` must offer exactly this value."""
    return Need(slot, facet, "==", value, why)


def multiple(slot: str, facet: str, value: int, why: str) -> Need:
    """What the part in `slot` offers as `facet` must be a multiple of value."""
    return Need(slot, facet, "multiple", value, why)


def has(slot: str, facet: str, value: Any, why: str) -> Need:
    """The collection that the part in `slot` offers as `facet` must contain value."""
    return Need(slot, facet, "has", value, why)


def is_true(slot: str, facet: str, why: str) -> Need:
    """The part in `slot` must offer a true `facet`."""
    return Need(slot, facet, "true", True, why)


@frozen
class NoSettings:
    """The settings of a part that has none."""


def _nothing(settings: Any, inner: Mapping[str, Any]) -> Mapping[str, Any]:
    return {}


@frozen
class Part:
    """One named thing behind one entry point.

    Attributes:
        kind: one of `GROUPS`.
        name: the entry-point name.
        summary: one line for `vla list`.
        settings: a frozen attrs class of plain values (int, float, bool, str, tuples of them), all with defaults.
        slots: own slot -> (kind, default part), e.g. {"llm": ("llm", "gemma")}. A default "" means: say which.
        presets: name -> settings (plain values for own fields). `--preset tiny` applies to every part that has it.
        offers: (settings, {slot: offers of the inner part}) -> {facet: value}. Facets are documented in
            docs/architecture.md; a third party's own facets are dotted.
        needs: the needs, or a function of the settings that gives them.
        layout: heads only: (settings, {slot: inner layout}) -> `vla.layout.Layout`.
        experts: heads only: (settings, {slot: inner experts}) -> {expert name: `Expert`} beside "backbone".
        torch, jax: "module:Class" of the code in that framework, imported only when weights are made.
        numpy: "module:Class" of framework-neutral code (tokenizers, datasets, robots, environments).
        transforms: "module:function", (settings, `vla.transforms.Context`) -> list of (stage, step).
        draws: heads only: "module" with two numpy functions, so that both frameworks get the same random numbers:
            `draws(chosen, spec, batch, rng)` -> (nested) dict of arrays for one training step, and
            `noise(chosen, spec, batch, rng)` -> the array that sampling starts from.
        sampling: heads only: a frozen attrs class of the options that its sampler adds, as `settings`; callers set them
            by name (`policy.infer(obs, sampling={...})`) and the head reads them (`sampling.read(cls)`).
        params: "module" with the name tables (`vla.params`): `rows(site)`, and `openpi(site)`, `hf(site)` where they
            exist. A part without one has no weights of its own.
        settings_version, upgrade: (old settings dict, old version) -> new settings dict.
        contract: the version of the contract of this kind that the part speaks.
    """

    kind: str
    name: str
    summary: str
    settings: type = NoSettings
    slots: Mapping[str, tuple[str, str]] = field(factory=dict)
    presets: Mapping[str, Mapping[str, Any]] = field(factory=dict)
    offers: Callable[[Any, Mapping[str, Any]], Mapping[str, Any]] = _nothing
    needs: tuple[Need, ...] | Callable[[Any], tuple[Need, ...]] = ()
    layout: Callable[[Any, Mapping[str, Any]], Any] | None = None
    experts: Callable[[Any, Mapping[str, Any]], Mapping[str, Any]] | None = None
    torch: str | None = None
    jax: str | None = None
    numpy: str | None = None
    transforms: str | None = None
    draws: str | None = None
    sampling: type | None = None
    params: str | None = None
    settings_version: int = 1
    upgrade: Callable[[dict[str, Any], int], dict[str, Any]] | None = None
    contract: int = 1

    def needs_of(self, settings: Any) -> tuple[Need, ...]:
        """The needs under these settings."""
        return self.needs(settings) if callable(self.needs) else self.needs

    def frameworks(self) -> tuple[str, ...]:
        """The frameworks this part runs in; framework-neutral parts run in both."""
        named = tuple(f for f in ("torch", "jax") if getattr(self, f))
        return named or (("torch", "jax") if self.numpy or self.transforms else ())


@frozen
class Expert:
    """One set of transformer weights that a head adds beside the backbone's. Depth and heads are the LLM core's."""

    width: int
    mlp_dim: int
    adarms: bool = False  # RMSNorm modulated by a condition vector [b width] (pi0.5), instead of a learned scale


@frozen
class ModelType:
    """A named tree: data, never code. `tree` holds part names and settings as a variant file, `spec` the shapes."""

    name: str
    summary: str
    tree: Mapping[str, Any]
    spec: Mapping[str, Any] = field(factory=dict)
