"""A tree of parts as plain data: expanded, changed by `--set`, before anything is resolved.

A *tree* is what a variant file holds: top slot -> {"part": name, "from"?, "preset"?, settings..., inner slots...}; a
string stands for {"part": string}. An *expanded* tree has every slot and every preset spelled out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from vla import registry
from vla.contracts import LONG_PROMPTS, MOST_CAMERAS, NORMS, Spec
from vla.errors import PartError, SettingsError
from vla.parts import TOP_SLOTS, Part
from vla.settings import fields_of, structure, unknown_key

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
MOST_INNER = 12  # parts within parts


def expand_tree(tree: Mapping[str, Any], preset: str | None = None) -> Tree:
    """The whole tree with all four top slots, every inner slot and every preset spelled out."""
    if unknown := [key for key in tree if key not in TOP_SLOTS]:
        raise unknown_key(unknown[0], TOP_SLOTS)
    return {slot: expand(kind, tree.get(slot, default), slot, preset) for slot, (kind, default) in TOP_SLOTS.items()}


def expand(
    kind: str, tree: Mapping[str, Any] | str | Part, path: str, preset: str | None = None, above: tuple[str, ...] = ()
) -> Tree:
    """One table with its inner slots and presets spelled out.

    Settings, weakest first: defaults, the table's own `preset`, the table, `preset` (asked for by the user, so it
    beats a model type's settings), and later `--set`. `above`: the parts that led here by their own defaults.

    Raises:
        PartError: besides what `find_part` raises, parts that contain themselves.
    """
    node = node_of(tree, path)
    part, dist = find_part(kind, node, path)
    here = f"{kind} {part.name} of {dist}"
    if here in above or path.count(".") > MOST_INNER:
        raise PartError(
            f"{kind} {part.name!r} contains itself" if here in above else "parts are nested without end",
            field=path, got=" > ".join([*above, here])[:300], fix=f"report this to the authors of {dist or part.name}",
        )  # fmt: skip
    node = _upgraded(node, part, path)
    own = node.pop("preset", None)
    out: Tree = {"part": node.pop("part")}
    if "from" in node:
        node.pop("from")
        out["from"] = dist
    if own is not None:
        if not isinstance(own, str) or own not in part.presets:
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
        empty = given == "" or (isinstance(given, Mapping) and given["part"] == "")  # `--set` may still say which
        by_default = given == default or (isinstance(given, Mapping) and given["part"] == default)
        chain = (*above, here) if by_default else ()
        out[slot] = node_of(given, path) if empty else expand(inner_kind, given, f"{path}.{slot}", preset, chain)
    return out


def node_of(tree: Any, path: str) -> Tree:
    """A table with a `part`, from a name, a table or a Part."""
    node = dict(tree) if isinstance(tree, Mapping) else {"part": tree}
    if "part" not in node and path in TOP_SLOTS:
        node = {"part": TOP_SLOTS[path][1], **node}
    if not isinstance(node.get("part"), (Part, str)):
        raise PartError(
            "a part is named by text", field=f"{path}.part", got=node.get("part"), expected="a name, as in `vla list`"
        )
    return node


def find_part(kind: str, node: Tree, path: str) -> tuple[Part, str]:
    """The part a table names, and its distribution ("" for a part given as an object)."""
    name = node["part"]
    if isinstance(name, Part):
        if name.kind != kind:
            raise PartError(f"{name.name!r} is a {name.kind}, not a {kind}", field=path)
        if faults := list(registry.part_faults(name)):
            raise PartError(f"{kind} {name.name!r} is malformed: {faults[0]}", field=path)
        return name, ""
    if not name:
        names = ", ".join(item.name for item in registry.listed(kind))
        fix = f"name one: {registry.option(path, 'NAME')}"
        raise PartError("no part is named here, and there is no default", field=path, expected=names, fix=fix)
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


def check_preset(preset: str, tree: Tree) -> None:
    """Refuse a preset name that neither the spec nor any part of an expanded tree has."""
    known = dict.fromkeys(SPEC_PRESETS)
    for slot, (kind, _) in TOP_SLOTS.items():
        for _, part in _walk_tree(kind, tree[slot], slot):
            known.update(dict.fromkeys(part.presets))
    if preset not in known:
        close = difflib.get_close_matches(preset, known, 1)
        fix = f"did you mean {close[0]!r}?" if close else "take one of these"
        raise SettingsError(
            "no part has a preset of this name", field="preset", got=preset, expected=", ".join(known), fix=fix
        )


def _walk_tree(kind: str, node: Tree, path: str) -> Iterator[tuple[str, Part]]:
    if not node["part"]:
        return
    part, _ = find_part(kind, node, path)
    yield path, part
    for slot, (inner, _) in part.slots.items():
        yield from _walk_tree(inner, node[slot], f"{path}.{slot}")


def apply_sets(sets: Mapping[str, Any], tree: Tree, spec: Tree, preset: str | None) -> bool:
    """Write `--set` values into an expanded tree, shallow paths first: parts, then their settings.

    Returns whether a part was replaced.
    """
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
                new = node_of(value if table is None else table, path)
                if new["part"] != node[key]["part"] or table is not None:
                    node[key] = overlay(expand(kind, new, path, preset), new)
                    swapped = True
            elif key in part.slots:
                kind = part.slots[key][0]
                node = node[key]
                part, _ = find_part(kind, node, f"{here}.{key}")
            elif last and key == "preset":
                node.update(
                    expand(kind, {"part": node["part"], "preset": value}, here, None) | {s: node[s] for s in part.slots}
                )
            elif last and key in fields_of(part.settings):
                node[key] = value
            else:
                known = [f"{here}.{k}" for k in [*fields_of(part.settings), *part.slots, "preset"]]
                known += [f"{here}.{p}" for p in _known({s: node[s] for s in part.slots}, part)]
                raise unknown_key(f"{here}.{key}", known, _known(tree))
    return swapped


def overlay(node: Tree, given: Mapping[str, Any]) -> Tree:
    """What a table says that the user gave wins over a preset that was asked for beside it, at every depth."""
    for key, value in given.items():
        if isinstance(node.get(key), dict):
            if isinstance(value, Mapping):
                overlay(node[key], value)
        elif key in node and key not in ("part", "from"):
            node[key] = value
    return node


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
    if len(spec.cameras) > MOST_CAMERAS:
        raise SettingsError(
            "too many cameras", field="spec.cameras", got=len(spec.cameras), expected=f"at most {MOST_CAMERAS}"
        )
    for name in spec.cameras:
        if len(name) > 100 or not name.isprintable() or "/" in name:  # "/" joins the keys of nested samples
            raise SettingsError(
                "a camera has a name that cannot be used", field="spec.cameras", got=repr(name[:100]),
                expected="printable, at most 100 characters, without /",
            )  # fmt: skip
    if not spec.cameras or len({*spec.cameras}) != len(spec.cameras) or not all(spec.cameras):
        raise SettingsError(
            "cameras need different names", field="spec.cameras", got=list(spec.cameras), expected="one or more names"
        )
    if spec.norm not in NORMS:
        raise SettingsError("unknown normalisation", field="spec.norm", got=spec.norm, expected=" or ".join(NORMS))
    if spec.long_prompt not in LONG_PROMPTS:
        raise SettingsError(
            "unknown value", field="spec.long_prompt", got=spec.long_prompt, expected=" or ".join(LONG_PROMPTS)
        )
    return spec


def default_name(tree: Tree) -> str:
    """`paligemma-fast-ki`."""

    def label(node: Tree) -> str:
        return node["part"].name if isinstance(node["part"], Part) else node["part"].rpartition("/")[2]

    return "-".join(label(tree[slot]) for slot in ("backbone", "tokenizer", "head"))
