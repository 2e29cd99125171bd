"""`vla new`: write a complete plugin package that works at once."""

from __future__ import annotations

import keyword
import re
import string
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from vla.cli import console

KINDS = ("head", "tokenizer", "vision", "llm", "backbone", "dataset")
KIT = {kind: f"{kind.capitalize()}Conformance" for kind in KINDS}
SUFFIX = ".tmpl"  # so that no tool takes a template for code


class Template(string.Template):
    """`%%{word}`: a spelling that occurs in neither Python, TOML, YAML nor Markdown."""

    delimiter = "%%"


def new(kind: str, name: str, /, dir: str = "", author: str = "") -> int:
    """Write a plugin package: part, settings, code in PyTorch and JAX, tests, README, CI. It works at once.

    Args:
        kind: head, tokenizer, vision, llm, backbone or dataset.
        name: the name people will use, as in `vla build --head NAME`: lower-case letters, digits, "-" or "_".
        dir: where to put the folder `vla-KIND-NAME`; default: here.
        author: goes into pyproject.toml.
    """
    folder = write(kind, name, Path(dir or "."), author)
    console.note(
        f"wrote {folder}\n\n"
        f"  pip install -e '{folder}[test]'      (in this environment: add --no-deps)\n"
        f"  pytest {folder}\n"
        f"  vla list {kind}\n"
    )
    print(folder)
    return 0


def write(kind: str, name: str, where: Path, author: str = "") -> Path:
    """Write the package below `where`; gives its folder.

    Raises:
        SettingsError: there is no such kind, or the name will not do (says why).
        StoreError: the folder is there already, or cannot be written.
    """
    from vla import __version__, registry
    from vla.errors import SettingsError
    from vla.files import atomic_folder
    from vla.parts import CONTRACTS, GROUPS

    if kind not in KINDS:
        raise SettingsError(
            "there is no template for this kind of part", field="kind", got=kind, expected=", ".join(KINDS)
        )
    if problem := problem_of(kind, name):
        raise SettingsError(f"this name will not do: {problem}", field="name", got=name, fix="for example my-head")
    taken = [item for item in registry.listed(kind) if item.name == name]
    known = registry.known_parts().get(kind, {}).get(name)
    if taken or known:
        raise SettingsError(
            f"there is a {kind} of this name already, published by {taken[0].source if taken else known}",
            field="name", got=name, fix="choose another: two packages with one name cannot be told apart by it",
        )  # fmt: skip
    title = "".join(word.capitalize() for word in re.split(r"[-_]", name))
    words = {
        "kind": kind,
        "name": name,
        "title": title if title[0].isalpha() else f"N{title}",
        "dist": f"vla-{kind}-{name.replace('_', '-')}",
        "module": f"vla_{kind}_{name.replace('-', '_')}",
        "group": GROUPS[kind],
        "kit": KIT[kind],
        "contract": str(CONTRACTS[kind][1]),
        "core": ".".join(__version__.split(".")[:2]),
        "authors": f'authors = [{{ name = "{author}" }}]\n' if re.fullmatch(r"[^\"\\\n]+", author) else "",
    }
    folder = where.expanduser() / words["dist"]
    with atomic_folder(folder, "") as temp:
        for path, text in rendered(kind, words):
            (temp / path).parent.mkdir(parents=True, exist_ok=True)
            (temp / path).write_text(text, encoding="utf-8")
    return folder


def problem_of(kind: str, name: str) -> str:
    """Why a name cannot be that of a part; "" when it can."""
    if not name:
        return "it is empty"
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name):
        return "use lower-case letters and digits, starting with a letter, with single '-' or '_' between words"
    if len(name) > 40:
        return "it is longer than 40 characters"
    if keyword.iskeyword(name):
        return "it is a word of Python"
    if name.startswith(("vla-", "vla_")) or name in (kind, "vla", "test"):
        return f"the package will be called vla-{kind}-NAME; give NAME alone"
    return ""


def rendered(kind: str, words: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(path, text) of every file of a new package."""
    root = files("vla") / "templates"
    for top in ("common", kind):
        for path, file in _walk(root / top):
            target = path.removesuffix(SUFFIX).replace("MODULE", words["module"]).replace("dot_", ".")
            yield target, Template(file.read_text(encoding="utf-8")).substitute(words)


def _walk(folder: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(SUFFIX):
            yield f"{prefix}{entry.name}", entry


def main(argv: list[str]) -> int:
    """The verb."""
    return console.call(new, "new", argv)
