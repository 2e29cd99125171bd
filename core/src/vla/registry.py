"""Entry-point names -> parts.

Names come from package metadata alone: a plugin's code runs only when that plugin is asked for, and whatever goes
wrong in it (any exception, `sys.exit`, a wrong object, another contract) becomes one `PartError` about that plugin.
Nothing here imports an array library.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import attrs
from attrs import frozen

from vla.contracts import Sampling
from vla.errors import PartError, SettingsError, VlaError
from vla.parts import CONTRACTS, GROUPS, MODEL_TYPES_GROUP, NEWS, ModelType, Part
from vla.settings import fields_of

CORE = "vla-core"
HOOKS_GROUP = "vla.hooks"
MODEL_TYPE, HOOKS = "model_type", "hooks"
# Everything that is found by entry points: the kinds of parts, named trees, listeners.
ALL_GROUPS: dict[str, str] = {**GROUPS, MODEL_TYPE: MODEL_TYPES_GROUP, HOOKS: HOOKS_GROUP}
PLURAL = {kind: f"{kind}s" for kind in ALL_GROUPS} | {
    "vision": "vision encoders", "llm": "LLM cores", MODEL_TYPE: "model types", HOOKS: "hooks",
}  # fmt: skip


@frozen
class Listed:
    """One entry point: what is known of a part before its code runs."""

    kind: str
    name: str
    dist: str
    version: str
    value: str  # "module:attribute"
    location: str = ""  # folder that holds the metadata

    @property
    def source(self) -> str:
        """Who publishes it, as written into variant files: `vla-head-ki 0.1.0`."""
        return f"{self.dist} {self.version}"

    def load(self) -> Any:
        """The `Part` (or `ModelType`, or module of hooks): imports the plugin and checks what it publishes.

        Raises:
            PartError: the plugin cannot be imported, is not what its kind asks for, or speaks another contract.
        """
        return load(self)


@frozen
class Stray:
    """Something in the installed metadata that is not as it should be; shown by `vla doctor`."""

    dist: str
    what: str


def listed(kind: str) -> list[Listed]:
    """All installed entry points of one kind, sorted by name; no plugin code runs."""
    if kind not in ALL_GROUPS:
        raise PartError("no such kind of part", field="kind", got=kind, expected=list(ALL_GROUPS))
    return list(_scan()[0][kind])


def strays() -> list[Stray]:
    """Unreadable metadata and stale second copies of a distribution, found by the scan."""
    return list(_scan()[1])


def refresh() -> None:
    """Forget what is installed; the next look-up reads the metadata again."""
    import importlib

    importlib.invalidate_caches()
    _scan.cache_clear()
    _loaded.cache_clear()


def find(kind: str, name: str, *, path: str = "", source: str = "") -> Listed:
    """The entry point of this name.

    Args:
        kind: one of `vla.parts.GROUPS`, or "model_type".
        name: `name`, or `distribution/name` when two distributions publish one name.
        path: where the name stands (`head.tokens`), for messages.
        source: the `from` of a variant file ("vla-head-ki 0.1.0"): it decides between two of one name, and says
            what to install when there is none.

    Raises:
        PartError: unknown (lists the installed ones), or ambiguous (names both).
    """
    items = listed(kind)
    hits = _matching(items, name, source)
    if not hits:
        refresh()  # installed a moment ago, while this process was running
        items = listed(kind)
        hits = _matching(items, name, source)
    if len(hits) > 1 and (ours := [hit for hit in hits if is_ours(hit)]):
        hits = ours  # our own names are not up for grabs
    if len(hits) == 1:
        return hits[0]
    if hits:
        who = " and ".join(hit.source for hit in hits)
        raise PartError(
            f"two installed packages publish {_a(kind)} {name!r}: {who}",
            field=path or kind,
            got=name,
            fix=f"say which: {option(path or kind, f'{hits[0].dist}/{name}')}, or uninstall one of them",
        )
    raise _unknown(kind, name, items, path, source)


def shadowed(item: Listed) -> list[Listed]:
    """The other entry points of the same kind and name."""
    return [other for other in listed(item.kind) if other.name == item.name and other != item]


def ambiguous(item: Listed) -> bool:
    """Whether the bare name does not lead to this entry point."""
    return bool(shadowed(item)) and not is_ours(item)


def is_ours(item: Listed) -> bool:
    """Whether this distribution is one of ours, whose name for it stands when others publish the same."""
    return _normal(item.dist) in _our_dists()


@functools.cache
def _our_dists() -> frozenset[str]:
    return frozenset({CORE, *(dist for names in known_parts().values() for dist in names.values())})


def option(path: str, value: str) -> str:
    """The command-line option that puts `value` at `path` of the tree."""
    return f"--set {path}={value}" if "." in path else f"--{path.replace('_', '-')} {value}"


def known_parts() -> dict[str, dict[str, str]]:
    """kind -> name -> distribution, of the parts core has heard of, installed or not (`known_parts.toml`)."""
    import tomllib
    from pathlib import Path

    return tomllib.loads((Path(__file__).parent / "known_parts.toml").read_text(encoding="utf-8"))


def install_line(dist: str) -> str:
    """How to install a distribution; our own ones also from a clone of this repository."""
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,98}[A-Za-z0-9])?", dist):
        return "install the package that publishes it; the name written here is none"
    if dist not in _our_dists():
        return f"pip install {dist}   (vla does not know this package: look at who publishes it first)"
    match = re.fullmatch(r"vla-([a-z]+)-(.+)", dist)
    if match is None:
        return f"pip install {dist}"
    folder = "backbones" if match[1] in ("vision", "llm") else f"{match[1]}s"
    if match[2] == "hf" and folder == "backbones":
        return f"pip install {dist}   (in a clone of vla: pip install ./plugins/{folder}/hf_{match[1]})"
    return f"pip install {dist}   (in a clone of vla: pip install ./plugins/{folder}/{match[2].replace('-', '_')})"


def _matching(items: list[Listed], name: str, source: str) -> list[Listed]:
    wanted, _, short = name.rpartition("/")
    wanted = wanted or source.partition(" ")[0]
    return [i for i in items if i.name == short and (not wanted or _normal(i.dist) == _normal(wanted))]


def _normal(dist: str) -> str:
    return re.sub(r"[-_.]+", "-", dist).lower()


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeioul' and kind != 'llm' else 'a'} {kind.replace('_', ' ')}"


def _unknown(kind: str, name: str, items: list[Listed], path: str, source: str) -> PartError:
    dist, _, short = name.rpartition("/")
    wanted = dist or source.partition(" ")[0]
    names = sorted({item.name for item in items})
    others = [item.source for item in items if item.name == short]
    known = known_parts().get(kind, {})
    label = kind.replace("_", " ")
    if wanted and others:
        what = f"{label} {short!r} of {wanted} is not installed; the installed {short!r} is from {others[0]}"
        fix = f"{install_line(wanted)}, or take the installed one: {option(path or kind, short)}"
        if source:
            fix = f"{install_line(wanted)}, or delete the `from` line to take the installed one"
    elif wanted:
        what = f"{label} {short!r} is not installed; it comes from {source or dist}"
        fix = install_line(wanted)
    else:
        what = f"no {label} named {short!r} is installed"
        close = difflib.get_close_matches(short, [*names, *known], 1)
        if short in known:
            fix = install_line(known[short])
        elif close:
            fix = f"did you mean {close[0]!r}?" + ("" if close[0] in names else f"  {install_line(known[close[0]])}")
        else:
            fix = "install the package that publishes it; `vla list` shows what is here"
    return PartError(
        what, field=path or kind, got=name, expected=", ".join(names) or f"no {label} is installed", fix=fix
    )


@functools.cache
def _scan() -> tuple[dict[str, tuple[Listed, ...]], tuple[Stray, ...]]:
    """One pass over the metadata of all installed distributions. Unreadable metadata costs only its own package."""
    found: dict[str, list[Listed]] = {kind: [] for kind in ALL_GROUPS}
    kinds = {group: kind for kind, group in ALL_GROUPS.items()}
    odd: list[Stray] = []
    seen: dict[str, str] = {}
    for folder in _metadata_folders():
        try:
            text = _read(folder, "entry_points.txt")
            if "[vla." not in text:
                continue
            name, version = _name_and_version(_read(folder, "METADATA") or _read(folder, "PKG-INFO"))
        except (OSError, UnicodeDecodeError) as error:  # metadata is other people's files
            odd.append(Stray(folder, f"its metadata cannot be read: {_reason(error)}"))
            continue
        if not name:
            odd.append(Stray(folder, "its metadata has no name (a half-removed package?)"))
            continue
        if _normal(name) in seen:  # the first on the path is the one Python imports
            odd.append(Stray(name, f"a second copy of its metadata lies in {folder}; in use: {seen[_normal(name)]}"))
            continue
        seen[_normal(name)] = folder
        for group, entry, value in _entries(text):
            if group not in kinds:
                if group.startswith("vla."):
                    odd.append(Stray(name, f"publishes in {group!r}, which is none of {sorted(kinds)}"))
            elif not re.fullmatch(r"[\w.]+\s*(:\s*[\w.]+)?", value) or (":" not in value and group != HOOKS_GROUP):
                odd.append(Stray(name, f"entry point {entry!r} in {group} is not 'module:object': {value!r}"))
            else:
                found[kinds[group]].append(Listed(kinds[group], entry, name, version, value, folder))
    return {k: tuple(sorted(v, key=lambda i: (i.name, i.dist))) for k, v in found.items()}, tuple(odd)


# The metadata is read directly (PEP 376 folders): importlib.metadata loads an e-mail parser, 30 ms for every verb.
def _metadata_folders() -> Iterator[str]:
    for place in dict.fromkeys(sys.path):
        try:
            names = sorted(os.listdir(place or "."))
        except OSError:  # zip files, folders that are gone
            continue
        yield from (os.path.join(place, name) for name in names if name.endswith((".dist-info", ".egg-info")))


def _read(folder: str, name: str) -> str:
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _name_and_version(metadata: str) -> tuple[str, str]:
    head = dict(line.partition(":")[::2] for line in metadata.partition("\n\n")[0].splitlines())
    return head.get("Name", "").strip(), head.get("Version", "").strip()


def _entries(text: str) -> Iterator[tuple[str, str, str]]:
    group = ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            group = line[1:-1].strip()
        elif line and line[0] not in "#;":
            name, _, value = line.partition("=")
            yield group, name.strip(), value.strip().partition("[")[0].strip()


def load(item: Listed) -> Any:
    """The object behind an entry point, checked. Cached: a plugin is imported once, also one that is broken."""
    thing = _loaded(item)
    if isinstance(thing, PartError):
        raise thing
    return thing


@functools.cache
def _loaded(item: Listed) -> Any:
    try:
        return _load(item)
    except PartError as error:
        return error


def _load(item: Listed) -> Any:
    thing = load_entry(item)
    if item.kind == HOOKS:
        return thing
    wanted = ModelType if item.kind == MODEL_TYPE else Part
    if not isinstance(thing, wanted):
        raise broken(item, f"{item.value} is a {type(thing).__name__}, not a vla.{wanted.__name__}")
    if isinstance(thing, ModelType):
        faults = [f"it calls itself {thing.name!r}"] if thing.name != item.name else []
    else:
        try:
            with foreign():
                faults = list(_faults(item, thing))
        except ForeignError as error:  # a record of the plugin is no record of that kind
            raise broken(item, f"it is malformed: {error}") from error.__cause__
    if faults:
        raise broken(item, faults[0])
    return thing


def load_entry(item: Listed) -> Any:
    """Import what an entry point names. What it prints goes to stderr, so that output meant for pipes stays clean.

    Raises:
        PartError: whatever happened, in one line.
    """
    from importlib import import_module

    module, _, attribute = (part.strip() for part in item.value.partition(":"))
    try:
        with contextlib.redirect_stdout(sys.stderr), foreign():
            thing = import_module(module)
            for name in attribute.split(".") if attribute else ():
                thing = getattr(thing, name)
    except ForeignError as error:
        raise broken(item, f"cannot be imported: {error}") from error.__cause__
    return thing


class ForeignError(Exception):
    """A plugin's code raised something; the message is one line, the cause what it raised."""


@contextlib.contextmanager
def foreign() -> Iterator[None]:
    """Run a plugin's code: whatever it raises, `SystemExit` and `KeyboardInterrupt` too, becomes a `ForeignError`.

    A `VlaError` passes: it is a message for the user. So does the interrupt of somebody who presses Ctrl-C meanwhile.
    """
    import signal
    import threading

    pressed: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def press(number: int, frame: Any) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    watch = threading.current_thread() is threading.main_thread() and before is signal.default_int_handler
    if watch:
        signal.signal(signal.SIGINT, press)
    try:
        yield
    except VlaError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and (pressed or not watch):
            raise
        raise ForeignError(_reason(error)) from error
    finally:
        if watch:
            signal.signal(signal.SIGINT, before)


def broken(item: Listed, reason: str) -> PartError:
    """The error about an installed part that cannot be used; `what` is one line."""
    return PartError(
        f"{item.kind.replace('_', ' ')} {item.name!r} is installed ({item.source}) but broken: {reason}",
        field=item.value,
        fix=f"repair, upgrade or uninstall {item.dist}; `vla doctor` shows the traceback",
    )


def _faults(item: Listed, part: Part) -> Iterator[str]:
    if part.kind != item.kind:
        yield f"it is a {part.kind!r}, published in {ALL_GROUPS[item.kind]} as a {item.kind!r}"
        return
    if part.name != item.name:
        yield f"it calls itself {part.name!r}, its entry point {item.name!r}"
    yield from part_faults(part, item.dist)


def part_faults(part: Part, dist: str = "it") -> Iterator[str]:
    """What is malformed in a part, one line each; `dist` is who must mend it."""
    low, high = CONTRACTS.get(part.kind, (1, 1))
    if not isinstance(part.contract, int) or not low <= part.contract <= high:
        speaks = f"{low}" if low == high else f"{low} to {high}"
        newer = isinstance(part.contract, int) and part.contract > high
        news = "" if newer or (part.kind, high) not in NEWS else f". Since then: {NEWS[part.kind, high]}"
        yield (
            f"it speaks {part.kind} contract {part.contract}, this vla-core speaks {speaks}: "
            f"upgrade {CORE if newer else dist}{news}"
        )
    if not attrs.has(part.settings):
        yield f"its settings ({part.settings!r}) are not an attrs class"
        return
    try:
        fields = fields_of(part.settings)
    except SettingsError as error:
        yield error.what
        return
    if missing := [name for name, a in fields.items() if a.default is attrs.NOTHING]:
        yield f"its setting {missing[0]!r} has no default"
    if part.sampling is not None:
        yield from _sampling_faults(part.sampling)
    for slot, value in part.slots.items():
        if not (isinstance(value, tuple) and len(value) == 2 and value[0] in GROUPS and isinstance(value[1], str)):
            yield f"its slot {slot!r} is {value!r}, not (kind, default name)"
        if slot in fields or slot in RESERVED:
            yield f"its slot {slot!r} has the name of a setting"
    if taken := [name for name in fields if name in RESERVED]:
        yield f"its setting {taken[0]!r} has a reserved name"
    for name, preset in part.presets.items():
        if unknown := [key for key in preset if key not in fields]:
            yield f"its preset {name!r} sets {unknown[0]!r}, which is no setting of it"


def _sampling_faults(declared: Any) -> Iterator[str]:
    if not attrs.has(declared):
        yield f"its options of sampling ({declared!r}) are not an attrs class"
        return
    known = attrs.fields_dict(Sampling)
    for name, option in attrs.fields_dict(declared).items():
        if option.default is attrs.NOTHING:
            yield f"its option of sampling {name!r} has no default"
        if name in known:
            yield f"its option of sampling {name!r} has the name of one that all heads share"


# Keys of a part's table in a variant file that are not settings.
RESERVED = ("part", "from", "preset", "settings_version")


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:300]}"
