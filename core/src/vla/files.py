"""How files and folders are written so that each is either whole or not there, and how they are checked.

A folder that we write holds manifest.json: size and SHA-256 of every other file, written last.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vla.errors import StoreError
from vla.reading import check_file, parse_json, read_text, reading

MANIFEST = "manifest.json"
# A folder with one of these was written by us and may be replaced when the user says so; any other may not.
OURS = (MANIFEST, "variant.toml")

# ---- folders -------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_folder(
    path: str | Path, *, overwrite: bool = False, marker: str | tuple[str, ...] = OURS, manifest: bool = True
) -> Iterator[Path]:
    """Write a folder all or nothing: yields an empty folder beside `path`, which takes its place when the block ends.

    Leaving the block writes the manifest, syncs every file to disk and renames. An exception inside the block, a full
    disk or Ctrl-C removes what was written and leaves an older folder at `path` untouched. After a power cut at any
    moment `path` is the old folder, the new one, or (between two renames) absent with the old one beside it as
    `.old-*`; never a mixture.

    Args:
        path: where the folder shall be. An empty folder there is fine.
        overwrite: replace a folder that is there, if it has a file named in `marker`.
        marker: file names by which a folder is known to be one of these.
        manifest: write manifest.json.

    Raises:
        StoreError: `path` is taken, or cannot be written.
    """
    path = Path(path).expanduser().absolute()
    refuse_taken(path, overwrite, (marker,) if isinstance(marker, str) else marker)
    temp = path.parent / f".tmp-{path.name}-{uuid.uuid4().hex[:8]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temp.mkdir()
        yield temp
        if manifest:
            write_manifest(temp)
        _sync_tree(temp)
        _take_place(temp, path)
    except OSError as error:
        if not _while_writing(error, path.parent):
            raise  # the caller failed to read something
        raise _write_error(error, path) from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def refuse_taken(path: Path, overwrite: bool, marker: tuple[str, ...] = OURS) -> None:
    """Refuse a place where `atomic_folder` would not put a folder.

    Raises:
        StoreError: `path` is a file, or a folder that is not to be replaced.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise StoreError("a file is in the way", field=str(path), fix="choose another --out")
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise StoreError("the folder is already there", field=str(path), fix="choose another --out, or add --overwrite")
    if not any((path / name).exists() for name in marker):
        raise StoreError(
            "this folder was not written by vla, so it will not be replaced",
            field=str(path),
            expected=f"a folder with {' or '.join(marker)}",
            fix="choose another --out, or remove the folder yourself",
        )


def write_manifest(folder: Path) -> None:
    """List size and SHA-256 of every file under `folder` in its manifest.json."""
    files = {
        str(file.relative_to(folder).as_posix()): {"size": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != folder / MANIFEST
    }
    (folder / MANIFEST).write_text(_manifest_text(files))


def verify_folder(folder: str | Path) -> str:
    """Check every file that the manifest lists; gives the SHA-256 of the manifest itself.

    Raises:
        StoreError: the manifest is missing or damaged, or a file is missing, truncated or changed; it names the file.
    """
    folder = Path(folder)
    text = read_text(folder / MANIFEST)
    with reading("the manifest is damaged", folder / MANIFEST):
        files = parse_json(text, folder / MANIFEST, "the manifest is damaged")["files"]
        listed = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    if text != _manifest_text(files):
        raise StoreError(
            "the manifest is damaged", field=str(folder / MANIFEST), fix="copy the folder again from its source"
        )
    for name, (size, digest) in listed.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise StoreError("the manifest names a file outside its folder", field=str(folder / MANIFEST), got=name)
        if (there := check_file(file)) != size:
            raise StoreError(
                "a file was cut short or has grown",
                field=str(file),
                got=f"{there} bytes",
                expected=f"{size} bytes",
                fix="copy the folder again from its source",
            )
        if _sha256(file) != digest:
            raise StoreError(
                "a file is not what was saved: some of its bytes changed",
                field=str(file),
                expected=f"SHA-256 {digest[:16]}...",
                fix="copy the folder again from its source",
            )
    return hashlib.sha256(text.encode()).hexdigest()


# ---- files ---------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: str | Path, what: str = "the file") -> Iterator[Path]:
    """Write one file whole or not at all: yields a path beside it, whose file takes its place when the block ends.

    Folders above it are made; when the file cannot be written, those made for it are removed again.

    Args:
        path: where the file shall be.
        what: the beginning of the message when it cannot be written.

    Raises:
        StoreError: it cannot be written.
    """
    path = Path(path).expanduser().absolute()
    temp = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temp
        _sync(temp)
        os.replace(temp, path)
        _sync(path.parent)
    except OSError as error:
        _discard(temp)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if not _while_writing(error, path.parent):
            raise  # the caller failed to read something
        raise _write_error(error, path, what) from error
    finally:
        _discard(temp)


def write_text(path: str | Path, text: str, what: str = "the file") -> Path:
    """Write one file whole or not at all; gives its path."""
    with atomic_file(path, what) as temp:
        temp.write_text(text, encoding="utf-8")
    return Path(path)


# ---- inside ---------------------------------------------------------------------------------------------------------


def _take_place(temp: Path, path: Path) -> None:
    old = None
    if path.exists() and any(path.iterdir()):
        old = path.parent / f".old-{path.name}-{uuid.uuid4().hex[:8]}"
        os.rename(path, old)
    try:
        os.rename(temp, path)  # an empty folder at `path` is replaced
    except OSError:
        if old is not None:
            os.rename(old, path)
        raise
    _sync(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _while_writing(error: OSError, parent: Path) -> bool:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return True
    if error.filename is None:
        return False
    file = Path(os.fsdecode(error.filename))
    return file == parent or parent in file.parents


def _write_error(error: OSError, path: Path, what: str = "the folder") -> StoreError:
    fixes = {
        errno.ENOSPC: "the disk is full: free some space, or choose an --out on another disk",
        errno.EDQUOT: "your disk quota is used up: free some space, or choose an --out on another disk",
        errno.EFBIG: "files may not grow so large here: raise the limit (ulimit -f), or choose another --out",
        errno.EROFS: "this file system is read-only: choose another --out",
        errno.EACCES: "you may not write there: choose another --out, or change the permissions",
        errno.EPERM: "you may not write there: choose another --out, or change the permissions",
        errno.ENOTDIR: "a file is in the way: choose another --out",
        errno.EEXIST: "a file is in the way: choose another --out",
    }
    return StoreError(
        f"{what} could not be written; nothing was left behind",
        field=str(path),
        got=error.strerror or str(error),
        fix=fixes.get(error.errno or 0, "choose another --out"),
    )


def _manifest_text(files: Mapping[str, Any]) -> str:
    return json.dumps({"vla": 1, "files": files}, indent=1, sort_keys=True) + "\n"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _discard(temp: Path) -> None:
    with suppress(OSError):  # most often it is not there; what happened to it is said already
        os.unlink(temp)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for entry in sorted(folder.rglob("*")):
        _sync(entry)
    _sync(folder)
