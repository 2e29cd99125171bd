"""Names -> a tree of parts -> checks -> `variant.toml`, and back.

The same recursion resolves a whole model, a composite backbone and the two halves of `ki`. No framework is imported.

A *tree* is plain data, as in a variant file: top slot -> {"part": name, "from"?, "preset"?, settings..., inner slots...};
a string stands for {"part": string}. `expand` turns any tree into one with every slot and preset spelled out.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import asdict, evolve, frozen

from vla import registry
from vla.contracts import NORMS, Spec
from vla.errors import PartError, SettingsError, StoreError, VlaError
from vla.model_types import find_type
from vla.parts import TOP_SLOTS, Expert, Need, Part
from vla.settings import fields_of, parse_sets, structure, to_toml, unknown_key

FORMAT = 1  # the `vla = 1` of a variant file
VARIANT_FILE = "variant.toml"
FRAMEWORKS = ("torch", "jax")
# Shapes that go with the presets of the parts. `tiny` learns on a CPU in minutes; `full` is the published size.
SPEC_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "cameras": ("base_0_rgb", "left_wrist_0_rgb"), "image_size": (64, 64), "state_dim": 8, "action_dim": 8,
        "action_horizon": 8, "max_token_len": 96,
    },
    "small": {
        "cameras": ("base_0_rgb", "left_wrist_0_rgb"), "image_size": (112, 112), "state_dim": 16, "action_dim": 16,
        "action_horizon": 16, "max_token_len": 160,
    },
    "full": {},
}  # fmt: skip

Tree = dict[str, Any]


@frozen
class Chosen:
    """One part, its settings, and the parts it is made of."""

    part: Part
    dist: str  # "vla-head-ki 0.1.0"; "" for a part given as an object
    settings: Any
    inner: Mapping[str, Chosen]

    @functools.cached_property
    def offers(self) -> Mapping[str, Any]:
        """What this part offers with these settings and inner parts.

        Raises:
            PartError: the plugin's own code fails.
        """
        return self._ask("offers", self.part.offers, {slot: c.offers for slot, c in self.inner.items()})

    def _ask(self, what: str, function: Any, inner: Mapping[str, Any]) -> Any:
        """Run a plugin's function of (settings, inner); a VlaError of its own passes, anything else names the plugin."""
        try:
            return function(self.settings, inner)
        except VlaError:
            raise
        except Exception as error:
            raise PartError(
                f"{self.part.kind} {self.part.name!r} ({self.dist or 'given as an object'}) fails in its {what}",
                got=f"{type(error).__name__}: {error}",
                fix="report this to its authors; `vla doctor` shows the traceback",
            ) from error

    @functools.cached_property
    def needs(self) -> tuple[Need, ...]:
        """What this part relies on, under its settings."""
        return tuple(self._ask("needs", lambda settings, _: self.part.needs_of(settings), {}))

    def layout(self) -> Any:
        """The layout of a head, with those of its inner heads joined in as it says."""
        if self.part.layout is None:
            raise PartError(f"{self.part.kind} {self.part.name!r} has no layout, so it cannot be the head of a variant", field="head")
        inner = {slot: c.layout() for slot, c in self.inner.items() if c.part.layout is not None}
        return self._ask("layout", self.part.layout, inner)

    def experts(self) -> Mapping[str, Expert]:
        """The experts a head adds beside the backbone's."""
        if self.part.experts is None:
            return {}
        return self._ask("experts", self.part.experts, {slot: c.experts() for slot, c in self.inner.items()})

    def walk(self, path: str) -> Iterator[tuple[str, Chosen]]:
        """This node and all below it, with their paths (`head`, `head.tokens`, ...)."""
        yield path, self
        for slot, chosen in self.inner.items():
            yield from chosen.walk(f"{path}.{slot}")

    def table(self) -> Tree:
        """The table of a variant file: part, from, settings, inner tables."""
        own: Tree = {"part": self.part.name}
        if self.dist:
            own["from"] = self.dist
        if self.part.settings_version != 1:
            own["settings_version"] = self.part.settings_version
        values = {name: getattr(self.settings, name) for name in fields_of(self.part.settings)}
        return {**own, **values, **{slot: c.table() for slot, c in self.inner.items()}}


@frozen
class Variant:
    """A checked tree of parts with settings and shapes: what `vla build` writes."""

    name: str
    spec: Spec
    backbone: Chosen
    tokenizer: Chosen
    head: Chosen
    robot: Chosen

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
        return {slot: chosen.table() for slot, chosen in self.parts.items()}

    def to_toml(self) -> str:
        """The text of `variant.toml`."""
        return to_toml({"vla": FORMAT, "name": self.name, "spec": asdict(self.spec), **self.tree()})


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
        head, tokenizer, backbone, robot: a part name (`ki`, `vla-head-ki/ki`), a table as in a variant file, or a
            `Part` object; default: what `type` or `base` say, else `vla.parts.TOP_SLOTS`.
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
        raise SettingsError("give a model type or a base variant, not both", field="type", got=f"type={type!r}, base={base!r}")
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
            before = _node(tree.get(slot, TOP_SLOTS[slot][1]), slot)
            node = _node(value, slot)
            if node["part"] != before["part"] or len(node) > 1:
                tree[slot] = node
                swapped = True
    full = expand_tree(tree, preset)
    if preset is not None:
        _check_preset(preset, full)
        spec.update(SPEC_PRESETS.get(preset, {}))
    if preset is not None and type is None and base is None:
        name = name or f"{_default_name(full)}-{preset}"
    swapped |= _apply(sets, full, spec, preset)
    name = name or (type if type and not swapped else _default_name(full))
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
    parts = {slot: resolve(kind, full[slot], slot) for slot, (kind, _) in TOP_SLOTS.items()}
    return Variant(name=name, spec=spec, **parts)


def resolve(kind: str, tree: Mapping[str, Any] | str, path: str = "") -> Chosen:
    """A part with its settings and inner parts from its table. Also for datasets and environments."""
    return resolve_node(expand(kind, tree, path or kind), kind, path or kind)


def resolve_node(node: Tree, kind: str, path: str) -> Chosen:
    part, dist = find_part(kind, node, path)
    inner = {slot: resolve_node(node[slot], k, f"{path}.{slot}") for slot, (k, _) in part.slots.items()}
    values = {key: v for key, v in node.items() if key not in registry.RESERVED and key not in part.slots}
    return Chosen(part, dist, structure(part.settings, values, path), inner)


def expand_tree(tree: Mapping[str, Any], preset: str | None = None) -> Tree:
    """The whole tree with all four top slots, every inner slot and every preset spelled out."""
    if unknown := [key for key in tree if key not in TOP_SLOTS]:
        raise unknown_key(unknown[0], TOP_SLOTS)
    return {slot: expand(kind, tree.get(slot, default), slot, preset) for slot, (kind, default) in TOP_SLOTS.items()}


def expand(kind: str, tree: Mapping[str, Any] | str | Part, path: str, preset: str | None = None) -> Tree:
    """One table with its inner slots and presets spelled out.

    Settings, weakest first: defaults, the table's own `preset`, the table, `preset` (asked for by the user, so it
    beats a model type's settings), and later `--set`.
    """
    node = _node(tree, path)
    part, dist = find_part(kind, node, path)
    node = _upgraded(node, part, path)
    own = node.pop("preset", None)
    out: Tree = {"part": node.pop("part")}
    if "from" in node:
        node.pop("from")
        out["from"] = dist
    if own is not None:
        if own not in part.presets:
            have = ", ".join(part.presets) or "it has none"
            raise SettingsError(f"{part.name!r} has no preset {own!r}", field=f"{path}.preset", got=own, expected=have)
        out.update(part.presets[own])
    inner = {slot: node.pop(slot, default) for slot, (_, default) in part.slots.items()}
    out.update(node)
    if preset is not None:
        out.update(part.presets.get(preset, {}))
    for slot, (inner_kind, default) in part.slots.items():
        given = inner[slot]
        if isinstance(given, Mapping) and "part" not in given:
            given = {"part": default, **given}
        out[slot] = expand(inner_kind, given, f"{path}.{slot}", preset)
    return out


def _node(tree: Any, path: str) -> Tree:
    """A table with a `part`, from a name, a table or a Part."""
    if isinstance(tree, Chosen):
        tree = tree.table()
    node = dict(tree) if isinstance(tree, Mapping) else {"part": tree}
    if "part" not in node and path in TOP_SLOTS:
        node = {"part": TOP_SLOTS[path][1], **node}
    name = node.get("part")
    if not (isinstance(name, Part) or (isinstance(name, str) and name)):
        fix = f"name one: {registry.option(path, 'NAME')}"
        raise PartError("no part is named here, and there is no default", field=path, got=name, fix=fix)
    return node


def find_part(kind: str, node: Tree, path: str) -> tuple[Part, str]:
    name = node["part"]
    if isinstance(name, Part):
        if name.kind != kind:
            raise PartError(f"{name.name!r} is a {name.kind}, not a {kind}", field=path)
        if faults := list(registry.part_faults(name)):
            raise PartError(f"{kind} {name.name!r} is malformed: {faults[0]}", field=path)
        return name, ""
    source = node.get("from", "")
    if not isinstance(source, str):
        raise SettingsError("`from` names a distribution", field=f"{path}.from", got=source, expected="text")
    item = registry.find(kind, name, path=path, source=source)
    return item.load(), item.source


def _upgraded(node: Tree, part: Part, path: str) -> Tree:
    """Settings written by an older version of the part, brought up to date by the part itself."""
    version = node.pop("settings_version", 1 if "from" in node else part.settings_version)
    if version == part.settings_version:
        return node
    if not isinstance(version, int) or version > part.settings_version or part.upgrade is None:
        raise SettingsError(
            f"the settings of {part.name!r} were written for another version of it",
            field=f"{path}.settings_version", got=version, expected=part.settings_version,
            fix=f"upgrade the package of {part.name!r}, or build the variant anew",
        )  # fmt: skip
    keep = {key: node.pop(key) for key in [*registry.RESERVED, *part.slots] if key in node}
    return {**keep, **part.upgrade(dict(node), version)}


def _check_preset(preset: str, tree: Tree) -> None:
    known = dict.fromkeys(SPEC_PRESETS)
    for slot, (kind, _) in TOP_SLOTS.items():
        for _, part in _walk_tree(kind, tree[slot], slot):
            known.update(dict.fromkeys(part.presets))
    if preset not in known:
        close = difflib.get_close_matches(preset, known, 1)
        fix = f"did you mean {close[0]!r}?" if close else "take one of these"
        raise SettingsError("no part has a preset of this name", field="preset", got=preset, expected=", ".join(known), fix=fix)


def _walk_tree(kind: str, node: Tree, path: str) -> Iterator[tuple[str, Part]]:
    part, _ = find_part(kind, node, path)
    yield path, part
    for slot, (inner, _) in part.slots.items():
        yield from _walk_tree(inner, node[slot], f"{path}.{slot}")


def _apply(sets: Mapping[str, Any], tree: Tree, spec: Tree, preset: str | None) -> bool:
    """Write `--set` values into an expanded tree; whether a part was replaced. Shallow paths first: parts, then settings."""
    swapped = False
    for path in sorted(sets, key=lambda p: (p.count("."), not p.endswith(".preset"))):
        value = sets[path]
        top, *rest = path.split(".")
        if top == "spec" and len(rest) == 1:
            if rest[0] not in fields_of(Spec):
                raise unknown_key(path, [f"spec.{name}" for name in fields_of(Spec)], _known(tree))
            spec[rest[0]] = value
            continue
        if top == "spec" and not rest and isinstance(value, Mapping):
            spec.update(value)
            continue
        if top not in TOP_SLOTS or not rest:
            raise unknown_key(path, ["spec", *TOP_SLOTS], [f"spec.{n}" for n in fields_of(Spec)] + _known(tree))
        node, kind = tree[top], TOP_SLOTS[top][0]
        part, _ = find_part(kind, node, top)
        for depth, key in enumerate(rest):
            here = ".".join([top, *rest[:depth]])
            last = depth == len(rest) - 1
            if key in part.slots and last:
                kind = part.slots[key][0]
                table = value if isinstance(value, Mapping) and "part" in value else None
                if isinstance(value, Mapping) and table is None:
                    table = {**node[key], **value}
                new = _node(value if table is None else table, path)
                if new["part"] != node[key]["part"] or table is not None:
                    node[key] = expand(kind, new, path, preset)
                    swapped = True
            elif key in part.slots:
                kind = part.slots[key][0]
                node = node[key]
                part, _ = find_part(kind, node, f"{here}.{key}")
            elif last and key == "preset":
                node.update(expand(kind, {"part": node["part"], "preset": value}, here, None) | {s: node[s] for s in part.slots})
            elif last and key in fields_of(part.settings):
                node[key] = value
            else:
                known = [f"{here}.{k}" for k in [*fields_of(part.settings), *part.slots, "preset"]]
                known += [f"{here}.{p}" for p in _known({s: node[s] for s in part.slots}, part)]
                raise unknown_key(f"{here}.{key}", known, _known(tree))
    return swapped


def _known(tree: Tree, owner: Part | None = None) -> list[str]:
    """Every settings path of an expanded tree (or of the inner slots of `owner`)."""
    slots = TOP_SLOTS if owner is None else owner.slots
    return [
        f"{path}.{key}"
        for slot, node in tree.items()
        for path, part in _walk_tree(slots[slot][0], node, slot)
        for key in fields_of(part.settings)
    ]


def make_spec(values: Mapping[str, Any]) -> Spec:
    """The record from plain values, with sizes checked."""
    spec: Spec = structure(Spec, values, "spec")
    for name in ("state_dim", "action_dim", "action_horizon", "max_token_len"):
        if getattr(spec, name) < 1:
            raise SettingsError("a size must be at least 1", field=f"spec.{name}", got=getattr(spec, name))
    if min(spec.image_size) < 1:
        raise SettingsError("a size must be at least 1", field="spec.image_size", got=list(spec.image_size))
    if not spec.cameras or len({*spec.cameras}) != len(spec.cameras) or not all(spec.cameras):
        raise SettingsError("cameras need different names", field="spec.cameras", got=list(spec.cameras), expected="one or more names")
    if spec.norm not in NORMS:
        raise SettingsError("unknown normalisation", field="spec.norm", got=spec.norm, expected=" or ".join(NORMS))
    return spec


def _default_name(tree: Tree) -> str:
    def label(node: Tree) -> str:
        return node["part"].name if isinstance(node["part"], Part) else node["part"].rpartition("/")[2]

    return "-".join(label(tree[slot]) for slot in ("backbone", "tokenizer", "head"))


def read_variant(path: str | Path) -> Variant:
    """The variant in a TOML file or in a model directory.

    Raises:
        StoreError: there is no such file, or it is not a variant file.
        PartError: a part it names is not installed (says which distribution to install).
    """
    file = Path(path)
    if file.is_dir():
        file = file / VARIANT_FILE
        if not file.exists():
            raise StoreError(f"this folder is no model directory: it has no {VARIANT_FILE}", field=str(path))
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError("a variant file cannot be read", field=str(file), got=str(error)) from error
    return variant_from_toml(text, str(file))


def variant_from_toml(text: str, source: str = "the text") -> Variant:
    """The variant from the text of a variant file; `source` is for messages."""
    import tomllib

    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise StoreError("a variant file is not valid TOML", field=source, got=str(error)) from error
    version = table.pop("vla", None)
    if version != FORMAT:
        newer = isinstance(version, int) and version > FORMAT
        fix = "upgrade vla-core" if newer else f"a variant file starts with `vla = {FORMAT}`; `vla build --out DIR` writes one"
        raise StoreError("not a variant file that this vla-core reads", field=f"{source}: vla", got=version, expected=FORMAT, fix=fix)
    name, spec = table.pop("name", ""), table.pop("spec", {})
    for slot, value in [("spec", spec), *table.items()]:
        if slot in ("spec", *TOP_SLOTS) and not isinstance(value, dict):
            raise StoreError("a table is expected here", field=f"{source}: {slot}", got=value, expected=f"[{slot}]")
    return compose(table, spec, str(name) or _default_name(expand_tree(table)))


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
            raise PartError(f"the code{owner} is not where the part says", field=where, got=f"no module {missing!r}") from error
        fix = f"pip install {missing.partition('.')[0]}"
        raise PartError(f"the code{owner} needs {missing!r}, which is not installed", field=where, fix=fix) from error
    for name in attribute.split(".") if attribute else ():
        if not hasattr(thing, name):
            raise PartError(f"the code{owner} is not where the part says", field=where, got=f"{module} has no {name!r}")
        thing = getattr(thing, name)
    return thing


def renamed(variant: Variant, name: str) -> Variant:
    """The same variant under another name."""
    return evolve(variant, name=name)
