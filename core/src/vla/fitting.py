"""Do the parts fit? Needs against offers at every depth, and the single changes after which everything fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attrs import evolve, frozen

from vla import registry
from vla.compose import Chosen, Tree, Variant, _find, _resolve, _resolve_all, expand
from vla.contracts import Spec
from vla.errors import PartError, VlaError
from vla.layout import BACKBONE
from vla.parts import TOP_SLOTS, Need, Part
from vla.settings import choices, fields_of


@frozen
class Misfit:
    """A need that does not hold."""

    path: str  # of the part that needs
    part: Part
    need: Need
    at: str  # path of the part that should offer
    got: Part
    offered: Any
    fitting: tuple[str, ...] = ()  # installed parts of that kind that offer it as they come

    def __str__(self) -> str:
        value = "nothing of that name" if self.offered is None else f"{self.need.facet} = {_show(self.offered)}"
        lines = [
            f"  {self.path} = {self.part.name!r} needs a {self.need}: {self.need.why}",
            f"    {self.at} = {self.got.name!r} offers {value}",
        ]
        if self.got.kind in registry.GROUPS:
            kinds = registry.PLURAL[self.got.kind]
            lines.append(f"    installed {kinds} that offer it: {', '.join(self.fitting) or 'none'}")
        return "\n".join(lines)


class MisfitError(PartError):
    """Parts do not fit together.

    Attributes:
        misfits: every need that does not hold.
        swaps: command-line options; each alone makes everything fit (each was tried).
        settings: the same, for single settings instead of parts.
    """

    def __init__(self, misfits: list[Misfit], swaps: tuple[str, ...], settings: tuple[str, ...] = ()):
        self.misfits, self.swaps, self.settings = tuple(misfits), swaps, settings
        lines = ["these parts do not fit together", *map(str, misfits)]
        if swaps:
            lines.append(f"  one change that fits:  {'   or   '.join(swaps[:MOST_SHOWN])}")
            if len(swaps) > MOST_SHOWN:
                lines.append(f"    (and {len(swaps) - MOST_SHOWN} more)")
        if settings:
            lines.append(f"  one setting that fits:  {'   or   '.join(settings[:MOST_SHOWN])}")
        if not swaps and not settings:
            lines.append("  no single change of an installed part fits; `vla fits` shows what combines")
        super().__init__("\n".join(lines))


MOST_SHOWN = 6


def check(variant: Variant) -> list[Misfit]:
    """Every need of every part at any depth that does not hold, and what the layout and the spec ask for."""
    found = [misfit for path, chosen in variant.walk() for misfit in needs_unmet(path, chosen, variant.parts)]
    return found + list(_spec_unmet(variant)) + ([] if found else list(_layout_unmet(variant)))


def needs_unmet(path: str, chosen: Chosen, tops: dict[str, Chosen]) -> Iterator[Misfit]:
    """The unmet needs of one part. A need names one of the part's own slots, or a top slot."""
    needs = chosen._ask("needs", lambda settings, _: chosen.part.needs_of(settings), {})
    for need in needs:
        if need.slot in chosen.inner:
            at, other = f"{path}.{need.slot}", chosen.inner[need.slot]
        elif need.slot in tops:
            at, other = need.slot, tops[need.slot]
        else:
            slots = [*chosen.inner, *TOP_SLOTS]
            raise PartError(f"{chosen.part.name!r} needs something of a slot that is not there", field=path, got=need.slot, expected=slots)
        if not need.met_by(other.offers):
            fitting = tuple(_offering(other.part, [n for n in needs if n.slot == need.slot]))
            yield Misfit(path, chosen.part, need, at, other.part, other.offers.get(need.facet), fitting)


def _offering(instead_of: Part, needs: list[Need]) -> Iterator[str]:
    for item in registry.listed(instead_of.kind):
        try:
            chosen = _fresh(instead_of.kind, f"{item.dist}/{item.name}")
            if all(need.met_by(chosen.offers) for need in needs):
                yield item.name
        except VlaError:  # broken or incomplete by itself: no candidate
            continue


def _fresh(kind: str, name: str) -> Chosen:
    return _resolve(expand(kind, name, kind), kind, kind)


def _spec_unmet(variant: Variant) -> Iterator[Misfit]:
    """The robot must fit into the shapes of the spec, which pads but never cuts."""
    robot, spec = variant.robot, variant.spec
    shapes = Part(kind="spec", name=f"{spec.state_dim}/{spec.action_dim}", summary="")
    for facet in ("state_dim", "action_dim"):
        wide = robot.offers.get(facet) or 0
        if wide > getattr(spec, facet):
            need = Need("spec", facet, ">=", wide, "states and actions are padded to the spec, never cut")
            yield Misfit("robot", robot.part, need, "spec", shapes, getattr(spec, facet))
    cameras = tuple(robot.offers.get("cameras") or ())
    if cameras and not set(cameras) & set(spec.cameras):
        need = Need("spec", "cameras", "has", cameras[0], "else the policy would see no image of this robot")
        yield Misfit("robot", robot.part, need, "spec", shapes, spec.cameras)


def _layout_unmet(variant: Variant) -> Iterator[Misfit]:
    """Every expert that the layout names must be there. Raises what the layout itself finds wrong."""
    if variant.head.part.layout is None:
        need = Need("head", "layout", "true", True, "a layout says who sees whom; only heads with one can stand alone")
        yield Misfit("head", variant.head.part, need, "head", variant.head.part, None)
        return
    experts = {BACKBONE, *variant.experts()}
    for name in variant.layout().experts:
        if name not in experts:
            need = Need("head", "experts", "has", name, "its layout runs tokens through this expert")
            yield Misfit("head", variant.head.part, need, "head", variant.head.part, tuple(sorted(experts)))


def swaps(tree: Tree, spec: Spec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Single replacements of a part, at any depth, after which everything fits: found by trying each.

    Returns the command-line options for parts, and for settings with a closed list of values (or spec sizes).
    """
    parts, settings = [], []
    places = [place for slot, (kind, _) in TOP_SLOTS.items() for place in _places(kind, tree[slot], slot)]
    for path, kind, part in places:
        for item in registry.listed(kind):
            name = f"{item.dist}/{item.name}" if registry.ambiguous(item) else item.name
            if item.name != part.name and _fits_with_part(tree, path, kind, name, spec):
                parts.append(registry.option(path, name))
    for path, _, part in places:
        for key, field in fields_of(part.settings).items():
            for value in (True, False) if field.type is bool else choices(field):
                if _fits(_with(tree, f"{path}.{key}", value), spec):
                    text = str(value).lower() if isinstance(value, bool) else str(value)
                    settings.append(f"--set {path}.{key}={text}")
    settings += _spec_swaps(tree, spec)
    return tuple(dict.fromkeys(parts)), tuple(dict.fromkeys(settings))


def _places(kind: str, node: Tree, path: str) -> Iterator[tuple[str, str, Part]]:
    part, _ = _find(kind, node, path)
    yield path, kind, part
    for slot, (inner, _) in part.slots.items():
        yield from _places(inner, node[slot], f"{path}.{slot}")


def _fits_with_part(tree: Tree, path: str, kind: str, name: str, spec: Spec) -> bool:
    try:
        node = expand(kind, name, path)
    except VlaError:  # broken, or made of parts that are not installed: no candidate
        return False
    return _fits(_with(tree, path, node), spec)


def _fits(tree: Tree, spec: Spec) -> bool:
    try:
        return not check_quietly(_resolve_all(tree, spec, "candidate"))
    except VlaError:
        return False


def check_quietly(variant: Variant) -> bool:
    """Whether anything does not fit; like `check`, without searching what would."""
    for _, chosen in variant.walk():
        needs = chosen._ask("needs", lambda settings, _, part=chosen.part: part.needs_of(settings), {})
        for need in needs:
            other = chosen.inner.get(need.slot) or variant.parts.get(need.slot)
            if other is None or not need.met_by(other.offers):
                return True
    return any(_spec_unmet(variant)) or any(_layout_unmet(variant))


def _with(tree: Tree, path: str, node: Any) -> Tree:
    head, _, rest = path.partition(".")
    return {**tree, head: _with(tree[head], rest, node) if rest else node}


def _spec_swaps(tree: Tree, spec: Spec) -> list[str]:
    robot = _resolve(tree["robot"], "robot", "robot").offers
    changes: dict[str, Any] = {}
    for facet in ("state_dim", "action_dim"):
        if (robot.get(facet) or 0) > getattr(spec, facet):
            changes[facet] = robot[facet]
    cameras = tuple(robot.get("cameras") or ())
    if cameras and not set(cameras) & set(spec.cameras):
        changes["cameras"] = cameras
    if not changes or not _fits(tree, evolve(spec, **changes)):
        return []
    return [" ".join(f"--set spec.{key}={_option_value(value)}" for key, value in changes.items())]


def _option_value(value: Any) -> str:
    return str(value) if isinstance(value, int) else "'[" + ", ".join(f'"{v}"' for v in value) + "]'"


def _show(value: Any) -> str:
    return "{" + ", ".join(sorted(map(repr, value))) + "}" if isinstance(value, (set, frozenset)) else repr(value)
