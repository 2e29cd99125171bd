"""How files and folders are written, so that each is either whole or not there.

Nothing is replaced or removed that we did not write: of folders only those of the same kind that hold exactly the files
of their manifest (`vla.manifest`), and of what is in them only those files.

What is being written is called `.tmp-NAME-XXXXXXXX` and lies beside its place; a folder that makes room for another is
called `.old-NAME-XXXXXXXX` until the other is in place, and `.gone-NAME-XXXXXXXX` while it is removed. A process that
is killed leaves these behind; `sweep`, with which the next write to the same place begins, puts back or removes them.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from vla.errors import StoreError
from vla.manifest import remove_listed, strange, write_manifest

# ---- folders --------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_folder(path: str | Path, kind: str, *, overwrite: bool = False) -> Iterator[Path]:
    """Write a folder all or nothing: yields an empty folder beside `path`, which takes its place when the block ends.

    Leaving the block writes the manifest, syncs every file to disk and renames. An exception inside the block, a full
    disk or Ctrl-C removes what was written and leaves an older folder at `path` untouched. After a power cut at any
    moment `path` is the old folder, the new one, or (between two renames) absent with the old one beside it as
    `.old-*`, until the next write puts it back; never a mixture. A symbolic link at `path` is followed.

    Args:
        path: where the folder shall be. An empty folder there is fine.
        kind: what the manifest says the folder is (model, report, ...); "": no manifest, and it is never replaced.
        overwrite: replace a folder that is there, if it is one of this kind (`strange`).

    Raises:
        StoreError: `path` is taken, or cannot be written.
    """
    path = _place(path)
    sweep(path.parent, re.escape(path.name))
    refuse_taken(path, kind, overwrite)
    temp, held = _beside(path, "tmp"), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temp.mkdir()
        held = _hold(temp)
    except OSError as error:
        shutil.rmtree(temp, ignore_errors=True)
        raise _write_error(error, path) from error
    try:
        try:
            yield temp
        except OSError as error:
            if not _while_writing(error, path.parent):
                raise  # the caller failed to read something
            raise _write_error(error, path) from error
        try:
            if kind:
                write_manifest(temp, kind)
            _sync_tree(temp)
            _take_place(temp, path)
        except OSError as error:
            raise _write_error(error, path) from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)
        if held is not None:
            os.close(held)


def refuse_taken(path: str | Path, kind: str, overwrite: bool) -> None:
    """Refuse a place where `atomic_folder` would not put a folder.

    Raises:
        StoreError: `path` is a file, or a folder that is not to be replaced.
    """
    path = _place(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise StoreError("a file is in the way", field=str(path), fix="choose another --out")
    if not any(path.iterdir()):
        return
    if not overwrite or not kind:
        or_so = ", or add --overwrite" if kind else ""
        raise StoreError("the folder is already there", field=str(path), fix="choose another --out" + or_so)
    if problem := strange(path, kind):
        raise StoreError(
            "this folder was not written by vla, or is not as vla wrote it, so it will not be replaced",
            field=str(path),
            got=problem,
            expected=f"a folder of kind {kind} that is as vla wrote it",
            fix=f"choose another --out, or remove the folder yourself: rm -r {path}",
        )


def remove_folder(folder: Path) -> None:
    """Remove the files of a folder's manifest, and the folder when nothing else is in it.

    It is renamed first, so that a half-removed folder never looks like a whole one.

    Raises:
        StoreError: it cannot be renamed.
    """
    folder = _place(folder)
    remove_listed(_moved(folder, _beside(folder, "gone")))


def move_aside(folder: Path) -> Path:
    """Give a folder, or a link to one, another name, which begins with `aside-`; gives where it is now.

    Raises:
        StoreError: it cannot be renamed.
    """
    return _moved(folder, folder.with_name(f"aside-{folder.name}-{uuid.uuid4().hex[:8]}"))


def sweep(folder: Path, names: str) -> None:
    """Put back or remove what killed processes left in `folder` when they wrote there.

    Args:
        names: a regular expression of the names whose leftovers are looked for.
    """
    pattern = re.compile(rf"\.(tmp|old|gone)-({names})(-[0-9a-f]{{8}})?")  # before 0.2, `.old-NAME` was being removed
    if not folder.is_dir():
        return
    for left in sorted(folder.iterdir()):
        match = pattern.fullmatch(left.name)
        if not match or left.is_symlink():
            continue
        what, name, number = match.groups()
        if number and _is_held(folder / f".tmp-{name}{number}"):
            continue  # its process lives
        with suppress(OSError):
            if what == "tmp":
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            elif what == "old" and number and not (folder / name).exists():
                os.rename(left, folder / name)
            else:
                remove_listed(left)


# ---- files ----------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: str | Path, what: str = "the file", ours: bytes | None = None) -> Iterator[Path]:
    """Write one file whole or not at all: yields an empty file beside it, which takes its place when the block ends.

    Folders above it are made; when the file cannot be written, those made for it are removed again. A symbolic link is
    followed, a device or a pipe is written to.

    Args:
        path: where the file shall be.
        what: the beginning of the message when it cannot be written.
        ours: bytes in the first 4 KiB of every file that may be replaced; None: any may.

    Raises:
        StoreError: it cannot be written, or another file is in the way.
    """
    given = Path(path).expanduser()
    if given.exists() and not given.is_file() and not given.is_dir():
        yield given
        return
    path = _place(path)
    sweep(path.parent, re.escape(path.name))
    if ours is not None and path.is_file() and (head := path.open("rb").read(4096)) and ours not in head:
        fix = f"choose another place, or remove the file yourself: rm {path}"
        raise StoreError("a file is in the way that vla did not write", field=str(path), fix=fix)
    temp, held = _beside(path, "tmp"), None
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        temp.touch()
        held = _hold(temp)
        yield temp
        _sync(temp)
        os.replace(temp, path)
        with suppress(OSError):  # it is in place; after a power cut it may be the old one, as whole as this
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
        if held is not None:
            os.close(held)


def write_text(path: str | Path, text: str, what: str = "the file", ours: bytes | None = None) -> Path:
    """Write one file whole or not at all (`atomic_file`); gives its path."""
    with atomic_file(path, what, ours) as temp:
        temp.write_text(text, encoding="utf-8")
    return Path(path).expanduser()


def open_own(path: Path) -> IO[str]:
    """Open a text file that we keep in a folder, to read and to append; made when it is not there.

    Raises:
        StoreError: it is a link, has another name besides, or is no regular file: whoever may write to the folder
            could have us write elsewhere.
        OSError: it cannot be opened.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # the latter: a pipe does not make us wait
    problem, handle = "", -1
    try:
        handle = os.open(path, flags, 0o666)
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            problem = "not a regular file"
        elif facts.st_nlink != 1:
            problem = f"a file with {facts.st_nlink} names"
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            problem = "a symbolic link"
        elif error.errno in (errno.EISDIR, errno.ENXIO, errno.ENOTDIR):
            problem = "not a regular file"
        else:
            raise
    if problem:
        if handle >= 0:
            os.close(handle)
        fix = f"choose another --out, or remove it yourself: rm {path}"
        raise StoreError("something else is in the place of a file of vla", field=str(path), got=problem, fix=fix)
    return os.fdopen(handle, "r+", encoding="utf-8")


# ---- inside ---------------------------------------------------------------------------------------------------------


def _place(path: str | Path) -> Path:
    """Where a path leads: `~` and symbolic links are followed."""
    try:
        return Path(os.path.realpath(Path(path).expanduser()))
    except (RuntimeError, ValueError) as error:  # ~nobody; a null byte
        raise StoreError("this is no path", field=str(path), got=str(error)) from error


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{what}-{path.name}-{uuid.uuid4().hex[:8]}")


def _hold(temp: Path) -> int | None:
    """A lock on what is being written, which dies with its process, so that `sweep` knows leftovers from work."""
    try:
        import fcntl
    except ImportError:  # a system without it: nothing is swept
        return None
    handle = os.open(temp, os.O_RDONLY)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_SH)
    return handle


def _is_held(temp: Path) -> bool:
    try:
        import fcntl
    except ImportError:
        return True
    try:
        handle = os.open(temp, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _take_place(temp: Path, path: Path) -> None:
    old = None
    if path.exists() and any(path.iterdir()):
        old = path.with_name(temp.name.replace(".tmp-", ".old-", 1))
        os.rename(path, old)
    placed = False
    try:
        os.rename(temp, path)  # an empty folder at `path` is replaced
        placed = True
        _sync(path.parent)
    except OSError:
        if placed:
            os.rename(path, temp)
        if old is not None:
            os.rename(old, path)
        raise
    if old is not None:
        with suppress(OSError):  # the new folder is in place; a next write sweeps what is left of the old one
            gone = path.with_name(temp.name.replace(".tmp-", ".gone-", 1))
            os.rename(old, gone)
            remove_listed(gone)


def _while_writing(error: OSError, parent: Path) -> bool:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return True
    if error.filename is None:
        return False
    file = Path(os.fsdecode(error.filename))
    return file == parent or parent in file.parents


_WAYS = {
    errno.ENOSPC: "the disk is full: free some space, or choose an --out on another disk",
    errno.EDQUOT: "your disk quota is used up: free some space, or choose an --out on another disk",
    errno.EFBIG: "files may not grow so large here: raise the limit (ulimit -f), or choose another --out",
    errno.EROFS: "this file system is read-only: choose another --out",
    errno.EACCES: "you may not write there: choose another --out, or change the permissions",
    errno.EPERM: "you may not write there: choose another --out, or change the permissions",
    errno.ENOTDIR: "a file is in the way: choose another --out",
    errno.EEXIST: "a file is in the way: choose another --out",
    errno.EISDIR: "a folder is in the way: choose another name",
}


def _write_error(
    error: OSError, path: Path, what: str = "the folder", done: str = "written; nothing was left behind"
) -> StoreError:
    return StoreError(
        f"{what} could not be {done}",
        field=str(path),
        got=error.strerror or str(error),
        fix=_WAYS.get(error.errno or 0, "choose another --out"),
    )


def _moved(folder: Path, to: Path) -> Path:
    try:
        os.rename(folder, to)
    except OSError as error:
        raise _write_error(error, folder, "an old folder", "moved out of the way") from error
    return to


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
