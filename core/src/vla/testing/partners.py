"""Stand-in partners: a small variant around the part under test, made of the reference parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from vla import registry
from vla.compose import Chosen, Variant, build, resolve
from vla.errors import PartError, VlaError
from vla.parts import Part
from vla.settings import choices, fields_of

# Two frames of 16 x 16 pixels, 4 tokens each; 32 prompt tokens; chunks of 4 steps with 6 dims.
SPEC = (
    'spec.cameras=["base_0_rgb", "left_wrist_0_rgb"]',
    "spec.image_size=[16, 16]",
    "spec.max_token_len=32",
    "spec.action_horizon=4",
    "spec.action_dim=6",
    "spec.state_dim=5",
)
# Smaller than the presets "tiny": what is tested here is not what they learn.
SIZES: dict[str, dict[str, int]] = {
    "siglip": {"width": 32, "depth": 1, "mlp_dim": 48, "num_heads": 2, "patch_size": 8},
    "gemma": {"width": 32, "depth": 2, "mlp_dim": 48, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16},
    "flow": {"width": 24, "mlp_dim": 40},
}
SIZES["gemma_fast"] = SIZES["gemma"]
INSTALL = "pip install 'vla-core[testing]'"
# Partners that are tried in turn, until everything fits. {kind under test: choices of the other top slots}
PARTNERS: dict[str, tuple[dict[str, str], ...]] = {
    "head": ({"tokenizer": "paligemma"}, {"tokenizer": "binning"}),
    "tokenizer": ({"head": "flow"}, {"head": "ar"}),
    "backbone": (
        {"head": "flow", "tokenizer": "paligemma"},
        {"head": "flow", "tokenizer": "paligemma", "head.time": "concat"},
        {"head": "ar", "tokenizer": "binning"},
    ),
}
PARTNERS["llm"] = PARTNERS["vision"] = PARTNERS["backbone"]
PLACES = {"llm": "backbone.llm", "vision": "backbone.vision"}


def stand_in(kind: str, name: str, settings: Iterable[str] = (), partners: Mapping[str, str] | None = None) -> Variant:
    """The smallest variant that holds this part: the first of `PARTNERS` that fits, or the partners asked for.

    Args:
        kind, name: the part under test.
        settings: `path=value`, applied last.
        partners: slot or setting -> value, instead of the search.

    Raises:
        PartError: nothing fits (the first attempt's message), or a stand-in is not installed.
    """
    here = PLACES.get(kind, kind)
    if kind == "vision":  # several patches, whatever the part's patch size: 32 x 32 pixels
        settings = ("spec.image_size=[32, 32]", *settings)
    first: VlaError | None = None
    for choice in (partners,) if partners else PARTNERS[kind]:
        try:
            return _small(here, name, choice, tuple(settings))
        except PartError as error:
            first = first or error
    assert first is not None
    raise first


def _small(here: str, name: str, choice: Mapping[str, str], settings: tuple[str, ...]) -> Variant:
    tops = {slot: value for slot, value in {**choice, here: name}.items() if "." not in slot}
    deep = tuple(f"{slot}={value}" for slot, value in {**choice, here: name}.items() if "." in slot)
    variant = build(**tops, preset="tiny", set=(*SPEC, *deep, *settings))  # type: ignore[arg-type]
    sizes = [
        f"{path}.{key}={value}"
        for path, chosen in variant.walk()
        if not path.startswith(here) or chosen.part.name != name
        for key, value in SIZES.get(chosen.part.name, {}).items()
    ]
    return build(base=variant, set=(*sizes, *settings))


def variations(kind: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What parts of one kind can offer: (description, offers).

    Of every installed one: at its defaults, with every preset, with every value of a setting that has a closed list,
    and with every other part in an inner slot.
    """
    for item in registry.listed(kind):
        try:
            part: Part = item.load()
        except PartError:  # a broken neighbour says nothing about the part under test
            continue
        name = f"{item.dist}/{item.name}"
        trees: list[dict[str, Any]] = [{}, *({"preset": preset} for preset in part.presets)]
        for key, field in fields_of(part.settings).items():
            trees += [{key: value} for value in ((True, False) if field.type is bool else choices(field))]
        for slot, (inner, _) in part.slots.items():
            trees += [{slot: f"{other.dist}/{other.name}"} for other in registry.listed(inner)]
        for tree in trees:
            try:
                chosen = resolve(kind, {"part": name, **tree}, kind)
                yield f"{item.name} {tree or ''}".strip(), chosen.offers
            except (VlaError, KeyError):  # incomplete by itself, or made of parts that do not go together
                continue


def needs_everywhere(chosen: Chosen) -> Sequence[Any]:
    """The needs of a part under its settings and under every value of a setting that has a closed list."""
    found = dict.fromkeys(chosen.part.needs_of(chosen.settings))
    for key, field in fields_of(chosen.part.settings).items():
        for value in (True, False) if field.type is bool else choices(field):
            try:
                other = resolve(chosen.part.kind, {"part": chosen.part, key: value}, chosen.part.kind)
            except VlaError:
                continue
            found |= dict.fromkeys(other.needs)
    return tuple(found)
