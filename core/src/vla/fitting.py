"""Do the parts fit? Needs against offers at every depth, and the changes after which everything fits.

Suggestions are not guessed: each was applied to the tree and checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, islice
from typing import Any

from attrs import asdict, evolve, frozen

from vla import registry
from vla.compose import Chosen, Variant, resolve, resolve_node, resolve_tree
from vla.contracts import Spec
from vla.errors import PartError, VlaError
from vla.layout import BACKBONE
from vla.parts import TOP_SLOTS, Need, Part
from vla.settings import choices, fields_of
from vla.tree import Tree, expand, find_part

MOST_SHOWN = 6
MOST_TRIES = 300  # replacements that are checked, and half the pairs: with 60 more packages under a second
CLOSED = 5  # tokens around those of a chunk: "Action: " before, "|" and the end of text after


@frozen
class Misfit:
    """A need that does not hold."""

    path: str  # of the part that needs
    part: Part
    need: Need
    at: str  # path of the part that should offer
    got: Part
    offered: Any
    elsewhere: bool = True  # other installed parts may offer it

    def __str__(self) -> str:
        value = "nothing of that name" if self.offered is None else f"{self.need.facet} = {_show(self.offered)}"
        return (
            f"  {self.path} = {self.part.name!r} needs {self.need}: {self.need.why}\n"
            f"    {self.at} = {self.got.name!r} offers {value}"
        )


@frozen
class Change:
    """One replacement: command-line words, and the `--set` paths of the user that have no meaning after it."""

    path: str
    value: Any
    words: str
    drops: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.words + (f" (and without --set {', '.join(self.drops)})" if self.drops else "")


class MisfitError(PartError):
    """Parts do not fit together.

    Attributes:
        misfits: every need that does not hold.
        swaps: each alone replaces one part so that everything fits.
        settings: each alone changes one setting (or the spec) so that everything fits.
        pairs: two parts to replace together; searched only where no single change fits.
    """

    def __init__(
        self, misfits: list[Misfit], swaps: list[Change], settings: list[Change], pairs: list[tuple[Change, Change]]
    ):
        self.misfits, self.swaps, self.settings, self.pairs = tuple(misfits), swaps, settings, pairs
        lines = ["these parts do not fit together"]
        for misfit in misfits:
            lines.append(str(misfit))
            if misfit.elsewhere:
                needs = [m.need for m in misfits if (m.path, m.at) == (misfit.path, misfit.at)]
                fitting = ", ".join(_offering(misfit.got.kind, needs)) or "none"
                lines.append(f"    installed {registry.PLURAL[misfit.got.kind]} that offer it as they come: {fitting}")
        for title, found in (("change", list(map(str, swaps))), ("setting", list(map(str, settings)))):
            if found:
                more = f"   ({len(found) - MOST_SHOWN} more)" if len(found) > MOST_SHOWN else ""
                lines.append(f"  one {title} that fits:  {'   or   '.join(found[:MOST_SHOWN])}{more}")
        if pairs:
            both = [f"{a.words} {b.words}" for a, b in pairs[:MOST_SHOWN]]
            lines.append(f"  no single change fits; two that do:  {'   or   '.join(both)}")
        if not swaps and not settings and not pairs:
            lines.append("  no one or two changes of installed parts fit; `vla fits` shows what combines")
        super().__init__("\n".join(lines))


def check(variant: Variant) -> list[Misfit]:
    """Every need of every part at any depth that does not hold, and what the layout and the spec ask for."""
    found: list[Misfit] = []
    for path, chosen in variant.walk():
        _ = chosen.offers  # a plugin that fails in its own functions fails here, not in the middle of training
        found += needs_unmet(path, chosen, variant.parts, variant.spec)
    found += [*_spec_unmet(variant.robot, variant.spec), *_room_unmet(variant.tokenizer, variant.robot, variant.spec)]
    return found or list(_layout_unmet(variant))


def needs_unmet(path: str, chosen: Chosen, tops: dict[str, Chosen], spec: Spec | None = None) -> Iterator[Misfit]:
    """The unmet needs of one part (also of a dataset or an environment, which stand beside a variant).

    A need names one of the part's own slots, a top slot, the part itself (`self`) or the shapes (`spec`).
    """
    for need in chosen.needs:
        if need.slot in chosen.inner:
            other = chosen.inner[need.slot]
            at, part, offers = f"{path}.{need.slot}", other.part, other.offers
        elif need.slot == "self":
            at, part, offers = path, chosen.part, _own(chosen)
        elif need.slot == "spec":
            if spec is None:
                continue
            at, part, offers = "spec", _as_part(spec), {**asdict(spec), "image_side": min(spec.image_size)}
        elif need.slot in tops:
            at, part, offers = need.slot, tops[need.slot].part, tops[need.slot].offers
        else:
            raise PartError(
                f"{chosen.part.name!r} needs something of a slot that is not there",
                field=path, got=need.slot, expected=", ".join([*chosen.inner, *tops]),
            )  # fmt: skip
        try:
            with registry.foreign():
                met = need.met_by(offers)
        except registry.ForeignError as error:
            who = f"{chosen.part.kind} {chosen.part.name!r} ({chosen.dist or 'given as an object'})"
            raise PartError(
                f"what {who} needs cannot be compared with what {part.kind} {part.name!r} offers", field=path,
                got=f"{need}: {error}", fix="report this to the authors of both",
            ) from error.__cause__  # fmt: skip
        if not met:
            elsewhere = need.slot not in ("self", "spec")
            yield Misfit(path, chosen.part, need, at, part, offers.get(need.facet), elsewhere)


def _own(chosen: Chosen) -> dict[str, Any]:
    """What a part says of itself: its settings, and what it offers."""
    return {name: getattr(chosen.settings, name) for name in fields_of(chosen.part.settings)} | dict(chosen.offers)


def _as_part(spec: Spec) -> Part:
    name = f"{spec.state_dim} x {spec.action_dim}, {spec.image_size[0]} x {spec.image_size[1]} pixels"
    return Part(kind="spec", name=name, summary="")


def _spec_unmet(robot: Chosen, spec: Spec) -> Iterator[Misfit]:
    """The robot must fit into the shapes of the spec, which pads but never cuts."""
    shapes = _as_part(spec)
    for facet in ("state_dim", "action_dim"):
        wide = robot.offers.get(facet) or 0
        if wide > getattr(spec, facet):
            need = Need("spec", facet, ">=", wide, "states and actions are padded to the spec, never cut")
            yield Misfit("robot", robot.part, need, "spec", shapes, getattr(spec, facet), elsewhere=False)
    cameras = tuple(robot.offers.get("cameras") or ())
    if cameras and not set(cameras) & set(spec.cameras):
        need = Need("spec", "cameras", "has", cameras[0], "else the policy would see no image of this robot")
        yield Misfit("robot", robot.part, need, "spec", shapes, spec.cameras, elsewhere=False)


def _room_unmet(tokenizer: Chosen, robot: Chosen, spec: Spec) -> Iterator[Misfit]:
    """One chunk must fit into the prompt, where the codec says how many tokens it takes whatever the data are.

    The usual width of the spec, to which every robot is padded, says nothing about the robot: one dim is certain.
    """
    offers, padded = tokenizer.offers, Spec().action_dim
    dims = robot.offers.get("action_dim") or (spec.action_dim if spec.action_dim != padded else 1)
    chunk = (offers.get("tokens_per_value") or 0) * spec.action_horizon * dims + (offers.get("tokens_per_chunk") or 0)
    if chunk and chunk + CLOSED > spec.max_token_len:
        each = f"{spec.action_horizon} steps x {dims} dims" if offers.get("tokens_per_value") else "fixed"
        why = f"a chunk is {chunk} tokens ({each}), and {CLOSED} open and close it; the instruction comes on top"
        need = Need("spec", "max_token_len", ">=", chunk + CLOSED, why)
        shapes = Part(kind="spec", name=f"{spec.action_horizon} x {dims}", summary="")
        yield Misfit("tokenizer", tokenizer.part, need, "spec", shapes, spec.max_token_len, elsewhere=False)


def _layout_unmet(variant: Variant) -> Iterator[Misfit]:
    """Every expert that the layout names must be there. Raises what the layout itself finds wrong."""
    head = variant.head.part
    if head.layout is None:
        need = Need("head", "layout", "true", True, "a layout says who sees whom; only heads with one can stand alone")
        yield Misfit("head", head, need, "head", head, None, elsewhere=False)
        return
    experts = (BACKBONE, *variant.experts())
    for name in variant.layout().experts:
        if name not in experts:
            need = Need("head", "experts", "has", name, "its layout runs tokens through this expert")
            yield Misfit("head", head, need, "head", head, experts, elsewhere=False)


def misfit_error(
    misfits: list[Misfit], tree: Tree, spec: Spec, preset: str | None, sets: tuple[str, ...]
) -> MisfitError:
    """The error with every suggestion that was found to work.

    Args:
        misfits: what `check` found.
        tree, spec: the expanded tree that does not fit, and its shapes.
        preset: sizes the user asked for; replacements get them too.
        sets: paths of the user's `--set`, to say which of them a replacement makes void.
    """
    # Another robot's adapter is no way to a shorter chunk: the robot is what it is.
    of_robot = any("robot" in (misfit.path, misfit.at) for misfit in misfits)
    places = [path for m in misfits for path in (m.at, m.path)]
    tried = list(islice(_replacements(tree, preset, places, of_robot), MOST_TRIES))
    good = [change for change, node in tried if _fits(_with(tree, change.path, node), spec)]
    settings = [*_settings_that_fit(tree, spec), *_spec_that_fits(tree, spec), *_sizes_that_fit(misfits, tree, spec)]
    pairs = []
    if not good and not settings:
        for (one, node), (two, other) in islice(combinations(tried, 2), 2 * MOST_TRIES):
            apart = not f"{two.path}.".startswith(f"{one.path}.")
            if apart and _fits(_with(_with(tree, one.path, node), two.path, other), spec):
                pairs.append((one, two))

    def marked(change: Change) -> Change:
        return evolve(change, drops=tuple(path for path in sets if path.startswith(f"{change.path}.")))

    def rank(change: Change) -> tuple[bool, bool]:  # at the place that was found wanting first
        return bool(change.drops), not any(f"{change.path}.".startswith(f"{m.at}.") for m in misfits)

    return MisfitError(misfits, sorted(map(marked, good), key=rank), sorted(settings, key=rank), pairs)


def _replacements(
    tree: Tree, preset: str | None, first: list[str], robot: bool = True
) -> Iterator[tuple[Change, Tree]]:
    """Every way to put another installed part somewhere, with its table; first at the places found wanting."""

    def nearness(place: tuple[str, str, Part]) -> bool:
        return not any(f"{where}.".startswith(f"{place[0]}.") for where in first)

    for path, kind, part in sorted(_places(tree), key=nearness):
        if path == "robot" and not robot:
            continue
        for item in registry.listed(kind):
            name = f"{item.dist}/{item.name}" if registry.ambiguous(item) else item.name
            if item.name == part.name:
                continue
            try:
                node = expand(kind, name, path, preset)
            except VlaError:  # broken, or made of parts that are not installed: no candidate
                continue
            yield Change(path, name, registry.option(path, name)), node


def _places(tree: Tree) -> Iterator[tuple[str, str, Part]]:
    def below(kind: str, node: Tree, path: str) -> Iterator[tuple[str, str, Part]]:
        part, _ = find_part(kind, node, path)
        yield path, kind, part
        for slot, (inner, _) in part.slots.items():
            yield from below(inner, node[slot], f"{path}.{slot}")

    for slot, (kind, _) in TOP_SLOTS.items():
        yield from below(kind, tree[slot], slot)


def _settings_that_fit(tree: Tree, spec: Spec) -> Iterator[Change]:
    """Single settings with a closed list of values."""
    for path, _, part in _places(tree):
        for key, field in fields_of(part.settings).items():
            for value in (True, False) if field.type is bool else choices(field):
                where = f"{path}.{key}"
                if _fits(_with(tree, where, value), spec):
                    text = str(value).lower() if isinstance(value, bool) else str(value)
                    yield Change(where, value, f"--set {where}={text}")


def _spec_that_fits(tree: Tree, spec: Spec) -> Iterator[Change]:
    """All sizes that robot and codec ask of the spec, together: one change of shape."""
    changes: dict[str, Any] = {}
    for misfit in _spec_unmet(resolve_node(tree["robot"], "robot", "robot"), spec):
        facet, wanted = misfit.need.facet, misfit.need.value
        changes[facet] = (*spec.cameras, wanted) if facet == "cameras" else wanted
    robot, tokenizer = (resolve_node(tree[slot], slot, slot) for slot in ("robot", "tokenizer"))
    for misfit in _room_unmet(tokenizer, robot, evolve(spec, **changes)):
        words = 16 + 4 * changes.get("state_dim", spec.state_dim)  # an instruction, and a state of three digits each
        changes["max_token_len"] = -(-(misfit.need.value + words) // 16) * 16
    if changes and _fits(tree, evolve(spec, **changes)):
        words = [f"--set spec.{facet}={_words(value)}" for facet, value in changes.items()]
        yield Change("spec", changes, " ".join(words))


def _sizes_that_fit(misfits: list[Misfit], tree: Tree, spec: Spec) -> Iterator[Change]:
    """The nearest sizes that go together, where two of one part, or a patch and the images, do not."""
    for m in misfits:
        if m.need.slot == "spec" and m.need.facet == "image_side":
            image = tuple(max(side, m.need.value) for side in spec.image_size)
            if _fits(tree, evolve(spec, image_size=image)):
                yield Change("spec", image, f"--set spec.image_size={_words(image)}")
        if m.need.slot != "self" or m.need.test != "multiple" or not isinstance(m.offered, int):
            continue
        node, part = _at(tree, m.path), m.part
        values = {key: node.get(key, field.default) for key, field in fields_of(part.settings).items()}
        divisors = [n for n in range(1, min(m.need.value, 4096) + 1) if m.offered % n == 0]
        tries = [(m.need.facet, m.offered // m.need.value * m.need.value or m.need.value)]
        tries += [(key, divisors[-1]) for key, value in values.items() if value == m.need.value]
        for key, value in tries:
            if key in values and _fits(_with(tree, f"{m.path}.{key}", value), spec):
                yield Change(f"{m.path}.{key}", value, f"--set {m.path}.{key}={value}")


def _at(tree: Tree, path: str) -> Tree:
    for name in path.split("."):
        tree = tree[name]
    return tree


def _words(value: Any) -> str:
    """A value as typed in a shell."""
    if isinstance(value, int):
        return str(value)
    return "'[" + ", ".join(str(v) if isinstance(v, int) else f'"{v}"' for v in value) + "]'"


def _with(tree: Tree, path: str, node: Any) -> Tree:
    head, _, rest = path.partition(".")
    return {**tree, head: _with(tree[head], rest, node) if rest else node}


def _fits(tree: Tree, spec: Spec) -> bool:
    try:
        return not check(resolve_tree(tree, spec, "candidate"))
    except (VlaError, KeyError, TypeError):  # a pair of changes may ask for a place that the other took away
        return False


def _offering(kind: str, needs: list[Need]) -> Iterator[str]:
    for item in registry.listed(kind):
        try:
            chosen = resolve(kind, f"{item.dist}/{item.name}")
            if all(need.met_by(chosen.offers) for need in needs):
                yield item.name
        except VlaError:  # broken or incomplete by itself: no candidate
            continue


def _show(value: Any) -> str:
    return "{" + ", ".join(sorted(map(repr, value))) + "}" if isinstance(value, (set, frozenset)) else repr(value)
