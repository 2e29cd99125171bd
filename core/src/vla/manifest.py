"""manifest.json: what kind of folder this is, and size and SHA-256 of every other file in it. It is written last.

By it a reader knows that every file is as it was saved, and whoever replaces or removes a folder knows what we wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vla.errors import StoreError
from vla.reading import check_file, parse_json, read_text, reading

MANIFEST = "manifest.json"
_COPY_AGAIN = "copy the folder again from its source"


def write_manifest(folder: Path, kind: str = "model") -> None:
    """List size and SHA-256 of every file under `folder` in its manifest.json."""
    files = {
        str(file.relative_to(folder).as_posix()): {"size": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != folder / MANIFEST
    }
    (folder / MANIFEST).write_text(_manifest_text(files, kind), encoding="utf-8")


def read_manifest(folder: Path) -> tuple[str, dict[str, tuple[int, str]]]:
    """(kind, {name: (size, SHA-256)}); the kind is "" in manifests of before there were kinds.

    Raises:
        StoreError: there is no manifest, it is damaged, or it names a file outside its folder.
    """
    place, damaged = folder / MANIFEST, "the manifest is damaged"
    text = read_text(place)
    with reading(damaged, place, fix=_COPY_AGAIN):
        content = parse_json(text, place, damaged)
        kind, files = str(content.get("kind", "")), content["files"]
        listed = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    if text != _manifest_text(files, kind):
        raise StoreError(damaged, field=str(place), fix=_COPY_AGAIN)
    for name in listed:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise StoreError("the manifest names a file outside its folder", field=str(folder / MANIFEST), got=name)
    return kind, listed


def verify_folder(folder: str | Path, read: Iterable[str] = ()) -> str:
    """Check every file that the manifest lists; gives the SHA-256 of the manifest itself.

    Args:
        read: files and folders that will be read; what is there of them must be listed.

    Raises:
        StoreError: the manifest is missing or damaged, or a file is missing, truncated, changed or not listed; it
            names the file.
    """
    folder = Path(folder)
    _, listed = read_manifest(folder)
    for name, (size, digest) in listed.items():
        file = folder / name
        if (there := check_file(file)) != size:
            raise StoreError(
                "a file was cut short or has grown",
                field=str(file),
                got=f"{there} bytes",
                expected=f"{size} bytes",
                fix=_COPY_AGAIN,
            )
        if _sha256(file) != digest:
            raise StoreError(
                "a file is not what was saved: some of its bytes changed",
                field=str(file),
                expected=f"SHA-256 {digest[:16]}...",
                fix=_COPY_AGAIN,
            )
    for name in read:
        place = folder / name
        for file in _entries(place) if place.is_dir() else [place] if os.path.lexists(place) else []:
            if file.relative_to(folder).as_posix() not in listed:
                raise StoreError(
                    "a file is not in the manifest, so nobody can say whether it is as it was saved",
                    field=str(file),
                    fix="remove this file, or copy the folder again from its source",
                )
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def strange(folder: Path, kind: str, *, damaged: bool = False) -> str:
    """Why a folder is not exactly what we wrote as one of this kind; "" when it is.

    Args:
        damaged: let files pass that are missing or changed: what is there was at least put there by us.
    """
    try:
        found, listed = read_manifest(folder)
    except StoreError as error:
        return f"no manifest of vla: {error.what}"
    if not found:
        return "a manifest that does not say of which kind the folder is: an older vla wrote it"
    if found != kind:
        return f"a folder of kind {found}"
    there = {place.relative_to(folder).as_posix() for place in _entries(folder)} - {MANIFEST}
    if more := sorted(there - listed.keys()):
        return f"a file that vla did not write: {more[0]}"
    for name, (size, digest) in listed.items() if not damaged else ():
        file = folder / name
        if name not in there:
            return f"a file is missing: {name}"
        if file.is_symlink() or file.stat().st_size != size or _sha256(file) != digest:
            return f"a file was changed since: {name}"
    return ""


def remove_listed(folder: Path) -> None:
    """Remove the files that the manifest lists, the manifest last, and every folder that is empty then."""
    with suppress(StoreError):
        for name in [*read_manifest(folder)[1], MANIFEST]:
            (folder / name).unlink(missing_ok=True)
    for inner in sorted((p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink()), reverse=True):
        with suppress(OSError):
            inner.rmdir()
    with suppress(OSError):
        folder.rmdir()


# ---- inside ---------------------------------------------------------------------------------------------------------


def _entries(folder: Path) -> Iterator[Path]:
    """Everything below that is no folder; links are not followed."""
    for where, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(where) / name).is_symlink()]
        yield from (Path(where) / name for name in [*names, *links])


def _manifest_text(files: Mapping[str, Any], kind: str = "") -> str:
    named = {"kind": kind} if kind else {}
    return json.dumps({"vla": 1, **named, "files": files}, indent=1, sort_keys=True) + "\n"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
