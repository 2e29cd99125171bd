"""Names -> a tree of parts -> checks -> `variant.toml`, and back.

The same recursion resolves a whole model, a composite backbone and the two halves of `ki`. No framework is imported.
`vla.tree` holds the part that is plain data, `vla.fitting` the checks.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import asdict, evolve, frozen

from vla import registry
from vla.contracts import Spec
from vla.errors import PartError, SettingsError, StoreError, VlaError
from vla.layout import Layout
from vla.model_types import find_type
from vla.parts import TESTS, TOP_SLOTS, Expert, Need, Part
from vla.reading import MOST_TOML, parse_toml, read_text
from vla.settings import fields_of, parse_sets, structure, to_toml
from vla.tree import (
    SPEC_PRESETS,
    Tree,
    apply_sets,
    check_preset,
    default_name,
    expand,
    expand_tree,
    find_part,
    make_spec,
    node_of,
    overlay,
)

MOST_NAME = 200  # characters of the name of a variant
FORMAT = 1  # the `vla = 1` of a variant file
VARIANT_FILE = "variant.toml"
FRAMEWORKS = ("torch", "jax")


@frozen(repr=False)
class Chosen:
    """One part, its settings, and the parts it is made of. Pickled as its table: a part's code stays where it is."""

    part: Part
    dist: str  # "vla-head-ki 0.1.0"; "" for a part given as an object
    settings: Any
    inner: Mapping[str, Chosen]

    def __repr__(self) -> str:
        inner = ", ".join(map(repr, self.inner.values()))
        return f"{self.part.name}({inner})" if inner else self.part.name

    def __reduce__(self) -> tuple[Any, ...]:
        return resolve, (self.part.kind, self.table(objects=True))

    @functools.cached_property
    def offers(self) -> Mapping[str, Any]:
        """What this part offers with these settings and inner parts.

        Raises:
            PartError: the plugin's own code fails.
        """
        offers = self._ask("offers", self.part.offers, {slot: c.offers for slot, c in self.inner.items()})
        if not isinstance(offers, Mapping):
            raise self._fails("offers", f"a {type(offers).__name__}, not a mapping of facets")
        if self.part.layout is None:
            return offers
        try:
            return {"backbone_sees_experts": self.layout().backbone_sees_experts, **offers}
        except VlaError:  # heads that do not go together have no layout; who asks for it says so
            return offers

    def _ask(self, what: str, function: Any, inner: Mapping[str, Any]) -> Any:
        """Run a plugin's function of (settings, inner). A `VlaError` passes; anything else names the plugin."""
        try:
            with registry.foreign():
                return function(self.settings, inner)
        except registry.ForeignError as error:
            raise self._fails(what, str(error)) from error.__cause__

    def _fails(self, what: str, reason: str) -> PartError:
        """The error about a plugin whose own code, or what it gives, is wrong."""
        return PartError(
            f"{self.part.kind} {self.part.name!r} ({self.dist or 'given as an object'}) fails in its {what}",
            got=reason,
            fix="report this to its authors; `vla doctor` shows the traceback",
        )

    @functools.cached_property
    def needs(self) -> tuple[Need, ...]:
        """What this part relies on, under its settings."""
        found = self._ask("needs", lambda settings, _: tuple(self.part.needs_of(settings)), {})
        if odd := [need for need in found if not isinstance(need, Need) or need.test not in TESTS]:
            raise self._fails("needs", f"{odd[0]!r:.120} is no need: make it with vla.at_least, equals, has or is_true")
        return found

    def layout(self) -> Any:
        """The layout of a head, with those of its inner heads joined in as it says."""
        if self.part.layout is None:
            raise PartError(
                f"{self.part.kind} {self.part.name!r} has no layout, so it cannot be the head of a variant",
                field="head",
            )
        inner = {slot: c.layout() for slot, c in self.inner.items() if c.part.layout is not None}
        layout = self._ask("layout", self.part.layout, inner)
        if not isinstance(layout, Layout):
            raise self._fails("layout", f"a {type(layout).__name__}, not a vla.Layout")
        return layout

    def experts(self) -> Mapping[str, Expert]:
        """The experts a head adds beside the backbone's."""
        if self.part.experts is None:
            return {}
        experts = self._ask("experts", self.part.experts, {slot: c.experts() for slot, c in self.inner.items()})
        if not isinstance(experts, Mapping) or not all(isinstance(e, Expert) for e in experts.values()):
            raise self._fails("experts", f"a {type(experts).__name__}, not a mapping of names to vla.Expert")
        return experts

    def walk(self, path: str) -> Iterator[tuple[str, Chosen]]:
        """This node and all below it, with their paths (`head`, `head.tokens`, ...)."""
        yield path, self
        for slot, chosen in self.inner.items():
            yield from chosen.walk(f"{path}.{slot}")

    def table(self, *, objects: bool = False) -> Tree:
        """The table of a variant file: part, from, settings, inner tables.

        With `objects`, a part that was given as an object stays one instead of becoming a name.
        """
        own: Tree = {"part": self.part if objects and not self.dist else self.part.name}
        if self.dist:
            own["from"] = self.dist
        if self.part.settings_version != 1:
            own["settings_version"] = self.part.settings_version
        values = {name: getattr(self.settings, name) for name in fields_of(self.part.settings)}
        return {**own, **values, **{slot: c.table(objects=objects) for slot, c in self.inner.items()}}


@frozen(repr=False)
class Variant:
    """A checked tree of parts with settings and shapes: what `vla build` writes. Pickled as that."""

    name: str
    spec: Spec
    backbone: Chosen
    tokenizer: Chosen
    head: Chosen
    robot: Chosen

    def __repr__(self) -> str:
        return f"<Variant {self.name!r}: {', '.join(map(repr, self.parts.values()))}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return compose, (self.tree(), self.spec, self.name)

    @property
    def parts(self) -> dict[str, Chosen]:
        """Top slot -> what stands there."""
        return {slot: getattr(self, slot) for slot in TOP_SLOTS}

    def walk(self) -> Iterator[tuple[str, Chosen]]:
        """Every part at every depth, with its path."""
        for slot, chosen in self.parts.items():
            yield from chosen.walk(slot)

    def at(self, path: str) -> Chosen:
        """The part at a path such as `head.tokens`."""
        for here, chosen in self.walk():
            if here == path:
                return chosen
        raise PartError("this variant has no part there", field=path, expected=", ".join(p for p, _ in self.walk()))

    def layout(self) -> Any:
        """Who sees whom: a `vla.layout.Layout`."""
        return self.head.layout()

    def experts(self) -> dict[str, Expert]:
        """Experts beside the backbone, by name."""
        return dict(self.head.experts())

    def frameworks(self) -> tuple[str, ...]:
        """The frameworks in which every part of the tree runs. A part that names no code runs in both."""
        sets = [set(c.part.frameworks() or FRAMEWORKS) for _, c in self.walk()]
        return tuple(f for f in FRAMEWORKS if all(f in s for s in sets))

    def tree(self) -> Tree:
        """Plain data that `compose` turns into an equal variant."""
        return {slot: chosen.table(objects=True) for slot, chosen in self.parts.items()}

    def to_toml(self) -> str:
        """The text of `variant.toml`."""
        tables = {slot: chosen.table() for slot, chosen in self.parts.items()}
        return to_toml({"vla": FORMAT, "name": self.name, "spec": asdict(self.spec), **tables})


def build(
    *,
    head: Any = None,
    tokenizer: Any = None,
    backbone: Any = None,
    robot: Any = None,
    type: str | None = None,
    base: Variant | str | Path | None = None,
    preset: str | None = None,
    set: Mapping[str, Any] | Iterable[str] = (),
    name: str | None = None,
) -> Variant:
    """Compose a variant from names.

    Args:
        head, tokenizer, backbone, robot: a part name (`ki`, `vla-head-ki/ki`), a table as in a variant file, a
            `Part`, or a `Chosen` of another variant; default: what `type` or `base` say, else `vla.parts.TOP_SLOTS`.
        type: a model type to start from, e.g. "pi05_ki".
        base: a variant, or the path of one, to start from instead.
        preset: sizes for every part that has a preset of that name, and for the spec ("tiny").
        set: `{"head.tokens": "ar", "spec.action_dim": 7}` or `["head.tokens=ar", ...]`; applied last.
        name: the name in the file; default: of the type, or made of the parts' names.

    Raises:
        PartError: a part is unknown, broken or ambiguous, or the parts do not fit (`vla.fitting.MisfitError`).
        SettingsError: an unknown setting or a wrong value.
    """
    if type is not None and base is not None:
        raise SettingsError(
            "give a model type or a base variant, not both", field="type", got=f"type={type!r}, base={base!r}"
        )
    tree: Tree = {}
    spec: Tree = {}
    if type is not None:
        known = find_type(type)
        tree, spec = dict(known.tree), dict(known.spec)
    elif base is not None:
        start = base if isinstance(base, Variant) else read_variant(base)
        tree, spec = start.tree(), asdict(start.spec)
        name = name or start.name
    named = {"backbone": backbone, "tokenizer": tokenizer, "head": head, "robot": robot}
    sets = parse_sets(set)
    for slot in TOP_SLOTS:
        if slot in sets:
            named[slot] = sets.pop(slot)
    swapped = False
    for slot, value in named.items():
        if value is not None:
            value = value.table(objects=True) if isinstance(value, Chosen) else value
            before = node_of(tree.get(slot, TOP_SLOTS[slot][1]), slot)
            node = node_of(value, slot)
            if node["part"] != before["part"] or len(node) > 1:
                tree[slot] = node
                swapped |= slot != "robot"  # pi05 on another arm is still pi05
    full = expand_tree(tree, preset)
    for slot, value in named.items():
        if isinstance(value, Mapping):
            overlay(full[slot], value)
    if preset is not None:
        check_preset(preset, full)
        spec.update(SPEC_PRESETS.get(preset, {}))
    if preset is not None and type is None and base is None:
        name = name or f"{default_name(full)}-{preset}"
    swapped |= apply_sets(sets, full, spec, preset)
    name = name or (type if type and not swapped else default_name(full))
    return _checked(full, make_spec(spec), name, preset, sets)


def compose(tree: Mapping[str, Any], spec: Mapping[str, Any] | Spec, name: str) -> Variant:
    """Resolve a tree and check every need at every depth.

    Raises:
        PartError, SettingsError: as `build`.
    """
    return _checked(expand_tree(tree), spec if isinstance(spec, Spec) else make_spec(spec), name)


def _checked(full: Tree, spec: Spec, name: str, preset: str | None = None, sets: Iterable[str] = ()) -> Variant:
    from vla.fitting import check, misfit_error

    variant = resolve_tree(full, spec, name)
    if found := check(variant):
        raise misfit_error(found, full, spec, preset, tuple(sets))
    return variant


def resolve_tree(full: Tree, spec: Spec, name: str) -> Variant:
    """The four top slots of an expanded tree, resolved but not checked."""
    parts = {slot: resolve_node(full[slot], kind, slot) for slot, (kind, _) in TOP_SLOTS.items()}
    return Variant(name=name, spec=spec, **parts)


def resolve(kind: str, tree: Mapping[str, Any] | str, path: str = "") -> Chosen:
    """A part with its settings and inner parts from its table. Also for datasets and environments."""
    return resolve_node(expand(kind, tree, path or kind), kind, path or kind)


def resolve_node(node: Tree, kind: str, path: str) -> Chosen:
    """A part from an expanded table."""
    part, dist = find_part(kind, node, path)
    inner = {slot: resolve_node(node[slot], k, f"{path}.{slot}") for slot, (k, _) in part.slots.items()}
    values = {key: v for key, v in node.items() if key not in registry.RESERVED and key not in part.slots}
    return Chosen(part, dist, structure(part.settings, values, path), inner)


_WAYS = f"give a {VARIANT_FILE} or the folder of one; to make one: vla build ... --out DIR"


def read_variant(path: str | Path) -> Variant:
    """The variant in a TOML file, in a model directory, or of a training run (`vla.runs`).

    Raises:
        StoreError: there is no such file, or it is not a variant file.
        PartError: a part it names is not installed (says which distribution to install).
    """
    from vla.runs import checkpoint_variant, find_model, is_checkpoint

    file = find_model(path)
    if is_checkpoint(file):
        return checkpoint_variant(file)
    if file.is_dir():
        file = file / VARIANT_FILE
        if not file.exists():
            raise StoreError(f"this folder is no model directory: it has no {VARIANT_FILE}", field=str(path), fix=_WAYS)
    if not os.path.exists(file):
        raise StoreError("there is no such variant file", field=str(file), fix=_WAYS)
    return variant_from_toml(read_text(file, MOST_TOML), str(file))


def variant_from_toml(text: str, source: str = "the text") -> Variant:
    """The variant from the text of a variant file; `source` is for messages."""
    table = parse_toml(text, source, what="a variant file is not valid TOML")
    version = table.pop("vla", None)
    if version != FORMAT:
        newer = isinstance(version, int) and version > FORMAT
        fix = (
            "upgrade vla-core"
            if newer
            else f"a variant file starts with `vla = {FORMAT}`; `vla build --out DIR` writes one"
        )
        raise StoreError(
            "not a variant file that this vla-core reads", field=f"{source}: vla", got=version, expected=FORMAT, fix=fix
        )
    name, spec = table.pop("name", ""), table.pop("spec", {})
    if not isinstance(name, str) or len(name) > MOST_NAME or not name.isprintable():
        raise StoreError(
            "a variant has a name that cannot be used", field=f"{source}: name", got=repr(name)[:80],
            expected=f"printable text, at most {MOST_NAME} characters",
        )  # fmt: skip
    for slot, value in [("spec", spec), *table.items()]:
        if slot in ("spec", *TOP_SLOTS) and not isinstance(value, dict):
            raise StoreError("a table is expected here", field=f"{source}: {slot}", got=value, expected=f"[{slot}]")
    return compose(table, spec, name or default_name(expand_tree(table)))


def load_object(where: str, what: str = "") -> Any:
    """The object that a part names as "module:attribute" ("module" alone: the module). `what` is for messages.

    Raises:
        PartError: the module is not there, needs something that is not installed, or lacks the attribute.
    """
    from importlib import import_module

    module, _, attribute = where.partition(":")
    owner = f" of {what}" if what else ""
    try:
        thing = import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if f"{module}.".startswith(f"{missing}."):
            raise PartError(
                f"the code{owner} is not where the part says", field=where, got=f"no module {missing!r}"
            ) from error
        fix = _install(missing.partition(".")[0], what)
        raise PartError(f"the code{owner} needs {missing!r}, which is not installed", field=where, fix=fix) from error
    for name in attribute.split(".") if attribute else ():
        if not hasattr(thing, name):
            raise PartError(f"the code{owner} is not where the part says", field=where, got=f"{module} has no {name!r}")
        thing = getattr(thing, name)
    return thing


def _install(module: str, what: str) -> str:
    """How to get a module; only distributions that vla knows are named."""
    known = {"torch": "torch", "jax": "jax", "flax": "flax", "optax": "optax", "transformers": "transformers"}
    known |= {"av": "av", "pyarrow": "pyarrow", "PIL": "pillow", "mujoco": "mujoco", "gymnasium": "gymnasium"}
    if module in known:
        return f"pip install {known[module]}"
    ours = module.replace("_", "-")
    if ours in {dist for names in registry.known_parts().values() for dist in names.values()}:
        return registry.install_line(ours)
    return f"vla does not know which package brings {module!r}: see the documentation of {what or 'the plugin'}"


def renamed(variant: Variant, name: str) -> Variant:
    """The same variant under another name."""
    return evolve(variant, name=name)
