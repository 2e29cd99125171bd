"""The model directory.

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
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from vla.errors import NotFiniteError, StoreError
from vla.files import atomic_folder
from vla.manifest import verify_folder, write_manifest  # noqa: F401 - of a model directory too
from vla.reading import read_json, safetensors_header

if TYPE_CHECKING:
    import numpy as np

VARIANT, WEIGHTS, STATS = "variant.toml", "model.safetensors", "norm_stats.json"
RECORD, ASSETS = "record.json", "assets"
KIND = "model"  # of the folder, in its manifest


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
    reader: Callable[[], dict[str, np.ndarray]] | None = None  # of weights that are in several files (a checkpoint)

    def read(self) -> dict[str, np.ndarray]:
        """Torch name -> array."""
        return self.reader() if self.reader else read_weights(self.weights)


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
    with atomic_folder(folder, KIND, overwrite=overwrite) as temp:
        write_model(temp, variant, weights, stats, tokenizer, record=record)
    return Path(folder).expanduser()


def write_model(
    folder: Path,
    variant: Any,
    weights: Mapping[str, np.ndarray],
    stats: Any | None,
    tokenizer: Any,
    *,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Write the files of a model directory into a folder that the caller makes whole (a training checkpoint).

    Raises:
        NotFiniteError: the weights have NaN or infinite values.
    """
    (folder / VARIANT).write_text(variant.to_toml())
    check_finite(weights, folder / WEIGHTS)
    write_weights(folder / WEIGHTS, weights)
    if stats is not None:
        from vla.transforms.stats import save_stats

        save_stats(stats, folder / STATS)
    if tokenizer is not None:
        (folder / ASSETS).mkdir(exist_ok=True)
        tokenizer.save(folder / ASSETS)
    if record is not None:
        (folder / RECORD).write_text(json.dumps(dict(record), indent=1, sort_keys=True, allow_nan=False) + "\n")


def open_model(folder: str | Path, *, verify: bool = True, tokenizer: bool = True) -> ModelDir:
    """Open a model directory: check its files, resolve its parts, read statistics and tokenizer. No weight is read.

    The folder of a training run stands for its model, `RUN@STEP` for one of its checkpoints (`vla.runs`). With
    `tokenizer=False` it is left unopened (None), for who takes another.

    Raises:
        StoreError: it is not a model directory, a file is missing or damaged.
        PartError: a part is not installed; the message names the distribution to install.
    """
    from vla.runs import find_model, is_checkpoint, open_checkpoint

    folder = find_model(folder)
    if is_checkpoint(folder):
        return open_checkpoint(folder, verify=verify, tokenizer=tokenizer)
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
    digest = verify_folder(folder, (VARIANT, WEIGHTS, STATS, RECORD, ASSETS)) if verify else ""

    from vla.compose import read_variant
    from vla.tokenizer import open_tokenizer

    variant = read_variant(folder / VARIANT)
    stats = None
    if (folder / STATS).is_file():
        from vla.transforms.stats import load_stats

        stats = load_stats(folder / STATS)
    opened, assets = None, folder / ASSETS
    if tokenizer:
        opened = open_tokenizer(variant.parts["tokenizer"], variant.spec, assets if assets.is_dir() else None)
    return ModelDir(folder, variant, folder / WEIGHTS, stats, opened, read_record(folder), digest)


def read_record(folder: Path) -> dict[str, Any]:
    """The facts of the run that made a model; {} where there are none.

    Raises:
        StoreError: the file is damaged.
    """
    if not os.path.lexists(folder / RECORD):
        return {}
    record: dict[str, Any] = read_json(folder / RECORD, "the record of a model is damaged")
    cameras = record.get("cameras", [])
    if not isinstance(cameras, list) or not all(isinstance(name, str) for name in cameras):
        got = f"cameras = {str(cameras)[:80]}"
        raise StoreError("the record of a model is damaged", field=str(folder / RECORD), got=got, expected="names")
    return record


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
    path.touch()
    mode = path.stat().st_mode  # what the umask says; the library would choose 0600
    try:
        save_file(dense, path)
        path.chmod(mode)
    except SafetensorError as error:  # it wraps the operating system's error in a text
        number = next((n for n in (errno.ENOSPC, errno.EFBIG, errno.EROFS) if f"os error {n})" in str(error)), None)
        if number is None:
            raise StoreError("the weights cannot be saved", field=str(path), got=str(error)) from error
        raise OSError(number, os.strerror(number), str(path)) from error


def check_finite(weights: Mapping[str, np.ndarray], source: str | Path) -> None:
    """Refuse weights that stand for no model.

    Raises:
        NotFiniteError: naming the first array with NaN or infinite values, and how many have some.
    """
    if bad := not_finite(weights):
        raise NotFiniteError(
            "weights are not finite",
            field=f"{source}: {bad[0]}",
            got=f"NaN or infinite values in {len(bad)} of {len(weights)} arrays",
            fix="take an earlier checkpoint (vla train ... --resume-step N), or train with a lower --lr",
        )


def not_finite(weights: Mapping[str, np.ndarray]) -> list[str]:
    """The arrays that have NaN or infinite values."""
    import numpy as np

    return [name for name, array in weights.items() if array.dtype.kind not in "iub" and not np.isfinite(array).all()]


def read_header(path: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype as safetensors writes it, shape) of every array in the file; no array is read."""
    return {name: (dtype, shape) for name, (dtype, shape, _) in safetensors_header(path)[0].items()}


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Name -> array. The arrays are copy-on-write views of the file: writable, and paged in when touched."""
    import numpy as np

    path = Path(path).expanduser()
    table, start = safetensors_header(path)
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
