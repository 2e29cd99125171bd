"""The model directory, and how a folder is written so that it is either whole or not there.

    variant.toml         the tree of parts and the shapes
    model.safetensors    weights under their torch names, whichever framework trained them
    norm_stats.json      normalisation statistics, openpi's format (absent: the policy does not normalise)
    assets/              what the tokenizer learned (`assets/tokenizer/...`)
    record.json          plain facts of the run that made it: cameras seen, digest of the data, steps
    manifest.json        size and SHA-256 of every other file, written last

safetensors has no checksum: of single flipped bits in a weight file, 99 % load as silently wrong weights. So every file
is checked against the manifest before it is used. Nothing here is executable: no pickle, no code in a config.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from vla.errors import StoreError

if TYPE_CHECKING:
    import numpy as np

VARIANT, WEIGHTS, STATS, RECORD, MANIFEST, ASSETS = (
    "variant.toml",
    "model.safetensors",
    "norm_stats.json",
    "record.json",
    "manifest.json",
    "assets",
)
# A folder with one of these was written by us and may be replaced when the user says so; any other may not.
OURS = (MANIFEST, VARIANT)


@frozen
class ModelDir:
    """An opened model directory; its files were checked, its weights are not read yet."""

    folder: Path
    variant: Any  # vla.compose.Variant
    weights: Path
    stats: Any | None  # {"state": Stats, "actions": Stats}
    tokenizer: Any  # vla.tokenizer.Tokenizer
    record: Mapping[str, Any] = field(factory=dict)
    digest: str = ""  # SHA-256 of the manifest: the identity of this model


# ---- folders that are whole or absent -------------------------------------------------------------------------------


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
    text = _read_text(folder / MANIFEST)
    try:
        files = json.loads(text)["files"]
        listed = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        files, listed = None, {}
    if files is None or text != _manifest_text(files):
        raise StoreError(
            "the manifest is damaged", field=str(folder / MANIFEST), fix="copy the folder again from its source"
        )
    for name, (size, digest) in listed.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise StoreError("the manifest names a file outside its folder", field=str(folder / MANIFEST), got=name)
        if not file.is_file():
            raise StoreError("a file is missing", field=str(file), fix="copy the folder again from its source")
        if file.stat().st_size != size:
            raise StoreError(
                "a file was cut short or has grown",
                field=str(file),
                got=f"{file.stat().st_size} bytes",
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


def write_text(path: str | Path, text: str) -> None:
    """Write one file whole or not at all."""
    path = Path(path).expanduser().absolute()
    temp = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temp.write_text(text)
        _sync(temp)
        os.replace(temp, path)
    except OSError as error:
        raise _write_error(error, path) from error
    finally:
        temp.unlink(missing_ok=True)


# ---- the model directory --------------------------------------------------------------------------------------------


def save_model(
    folder: str | Path,
    variant: Any,
    weights: Mapping[str, np.ndarray],
    stats: Any | None,
    tokenizer: Any,
    *,
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model directory, atomically; gives its path.

    Args:
        folder: where.
        variant: a `vla.compose.Variant`.
        weights: torch name -> array.
        stats: what `vla.transforms.stats.compute_stats` gave, or None.
        tokenizer: the variant's `vla.tokenizer.Tokenizer`; None when it has nothing learned.
        record: plain values (JSON) about the run.
        overwrite: replace a model directory that is there.
    """
    with atomic_folder(folder, overwrite=overwrite) as temp:
        write_model(temp, variant, weights, stats, tokenizer, record=record)
    return Path(folder)


def write_model(
    folder: Path,
    variant: Any,
    weights: Mapping[str, np.ndarray],
    stats: Any | None,
    tokenizer: Any,
    *,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Write the files of a model directory into a folder that the caller makes whole (a training checkpoint)."""
    (folder / VARIANT).write_text(variant.to_toml())
    write_weights(folder / WEIGHTS, weights)
    if stats is not None:
        from vla.transforms.stats import save_stats

        save_stats(stats, folder / STATS)
    if tokenizer is not None:
        (folder / ASSETS).mkdir(exist_ok=True)
        tokenizer.save(folder / ASSETS)
    if record is not None:
        (folder / RECORD).write_text(json.dumps(dict(record), indent=1, sort_keys=True, allow_nan=False) + "\n")


def open_model(folder: str | Path, *, verify: bool = True) -> ModelDir:
    """Open a model directory: check its files, resolve its parts, read statistics and tokenizer. No weight is read.

    Raises:
        StoreError: it is not a model directory, a file is missing or damaged.
        PartError: a part is not installed; the message names the distribution to install.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise StoreError("no such model directory", field=str(folder), fix="train one (vla train) or run vla demo")
    if not (folder / VARIANT).is_file():
        raise StoreError(
            "not a model directory",
            field=str(folder / VARIANT),
            got=sorted(p.name for p in folder.iterdir())[:8],
            fix="give the folder that holds variant.toml and model.safetensors",
        )
    if not (folder / WEIGHTS).is_file():
        raise StoreError(
            "this variant has no weights yet",
            field=str(folder / WEIGHTS),
            fix=f"train it: vla train {folder} --data DATA",
        )
    digest = verify_folder(folder) if verify else ""

    from vla.compose import read_variant
    from vla.tokenizer import open_tokenizer

    variant = read_variant(folder / VARIANT)
    stats = None
    if (folder / STATS).is_file():
        from vla.transforms.stats import load_stats

        stats = load_stats(folder / STATS)
    assets = folder / ASSETS
    tokenizer = open_tokenizer(variant.parts["tokenizer"], variant.spec, assets if assets.is_dir() else None)
    record = json.loads(_read_text(folder / RECORD)) if (folder / RECORD).is_file() else {}
    return ModelDir(folder, variant, folder / WEIGHTS, stats, tokenizer, record, digest)


# ---- weights --------------------------------------------------------------------------------------------------------


def write_weights(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Write arrays as safetensors (sorted names, so that equal weights give equal bytes)."""
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    for name, array in weights.items():
        if array.dtype == object:
            raise StoreError("an array of objects cannot be saved", field=name)
    # reshape: ascontiguousarray makes a 0-d array 1-d
    dense = {name: np.ascontiguousarray(weights[name]).reshape(weights[name].shape) for name in sorted(weights)}
    try:
        save_file(dense, path)
    except SafetensorError as error:  # it wraps the operating system's error in a text
        number = next((n for n in (errno.ENOSPC, errno.EFBIG, errno.EROFS) if f"os error {n})" in str(error)), None)
        if number is None:
            raise StoreError("the weights cannot be saved", field=str(path), got=str(error)) from error
        raise OSError(number, os.strerror(number), str(path)) from error


def read_header(path: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype as safetensors writes it, shape) of every array in the file; no array is read."""
    return {name: (dtype, shape) for name, (dtype, shape, _) in _header(Path(path))[0].items()}


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Name -> array. The arrays are copy-on-write views of the file: writable, and paged in when touched."""
    import numpy as np

    path = Path(path)
    table, start = _header(path)
    data = np.memmap(path, dtype=np.uint8, mode="c", offset=start) if path.stat().st_size > start else np.zeros(0, "u1")
    return {
        name: data[begin:end].view(_numpy_dtype(dtype, name, path)).reshape(shape)
        for name, (dtype, shape, (begin, end)) in table.items()
    }


def check_names(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: str | Path
) -> None:
    """Refuse weights that are not exactly those of the model: every missing, unknown or misshapen name is listed.

    Args:
        expected: name -> shape that the model has.
        found: name -> shape that the file has.
        source: where the weights are, for the message.
    """
    both = [name for name in expected if name in found]
    wrong = [f"{n} {tuple(found[n])} != {tuple(expected[n])}" for n in both if tuple(found[n]) != tuple(expected[n])]
    missing = sorted(set(expected) - set(found))
    unknown = sorted(set(found) - set(expected))
    if not (wrong or missing or unknown):
        return
    lines = ["the weights do not fit this variant"]
    for title, names in (("missing", missing), ("unknown", unknown), ("wrong shape", wrong)):
        if names:
            lines.append(f"  {title} ({len(names)}): " + ", ".join(names[:6]) + (", ..." if len(names) > 6 else ""))
    raise StoreError(
        "\n".join(lines), field=str(source), fix="variant.toml and model.safetensors must come from the same model"
    )


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


def _write_error(error: OSError, path: Path) -> StoreError:
    fixes = {
        errno.ENOSPC: "the disk is full: free some space, or choose an --out on another disk",
        errno.EDQUOT: "your disk quota is used up: free some space, or choose an --out on another disk",
        errno.EFBIG: "files may not grow so large here: raise the limit (ulimit -f), or choose another --out",
        errno.EROFS: "this file system is read-only: choose another --out",
        errno.EACCES: "you may not write there: choose another --out, or change the permissions",
        errno.EPERM: "you may not write there: choose another --out, or change the permissions",
        errno.ENOTDIR: "a file is in the way: choose another --out",
    }
    return StoreError(
        "the folder could not be written; nothing was left behind",
        field=str(path),
        got=error.strerror or str(error),
        fix=fixes.get(error.errno or 0, "choose another --out"),
    )


def _manifest_text(files: Mapping[str, Any]) -> str:
    return json.dumps({"vla": 1, "files": files}, indent=1, sort_keys=True) + "\n"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError as error:
        raise StoreError(
            "a file is missing",
            field=str(path),
            fix="the folder is incomplete: save it again, or copy it again from its source",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError("a file cannot be read", field=str(path), got=str(error)) from error


def _header(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...], tuple[int, int]]], int]:
    """({name: (dtype, shape, (begin, end))}, offset of the first byte of data)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):  # the library checks the header: sizes, overlaps, gaps, length
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            table = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise StoreError("no such weight file", field=str(path)) from error
    except (SafetensorError, OSError) as error:
        raise StoreError(
            "the weight file is damaged or is not safetensors", field=str(path), got=str(error), fix="copy it again"
        ) from error
    table.pop("__metadata__", None)
    rows = {name: (t["dtype"], tuple(t["shape"]), tuple(t["data_offsets"])) for name, t in table.items()}
    return rows, 8 + length


def _numpy_dtype(name: str, tensor: str, path: Path) -> np.dtype:
    import numpy as np

    kinds = {"F": "float", "I": "int", "U": "uint"}
    if name in ("BF16", "F8_E4M3", "F8_E5M2"):
        import ml_dtypes

        short = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
        return np.dtype(getattr(ml_dtypes, short[name]))
    if name == "BOOL":
        return np.dtype(bool)
    if name[0] in kinds and name[1:] in ("8", "16", "32", "64"):
        return np.dtype(kinds[name[0]] + name[1:])
    raise StoreError("a weight has a dtype that vla does not read", field=f"{path}: {tensor}", got=name)
