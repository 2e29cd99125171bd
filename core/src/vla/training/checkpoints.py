"""Training checkpoints: `OUT/checkpoints/step-00001000/`, each either whole or not there.

    params.safetensors       the weights being trained, float32, under their torch names in both frameworks
    ema.safetensors          their average (absent without averaging)
    optimizer.safetensors    `m/NAME`, `v/NAME`: AdamW's moments; `updates`: how many updates they have seen
    train_state.json         step, planned config, variant, digest of the data
    norm_stats.json, assets/ the statistics and the tokenizer that the run uses
    manifest.json            size and SHA-256 of every other file, written last

There is no pointer to "the latest": that is the highest step whose folder exists, and `vla.files.atomic_folder` lets a
folder appear only when it is complete. Random states are not saved because there are none (`vla.training.order`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from vla.errors import StoreError
from vla.files import MANIFEST, atomic_folder, verify_folder
from vla.reading import read_json
from vla.store import read_weights, write_weights
from vla.training.config import TrainingError

if TYPE_CHECKING:
    import numpy as np

FOLDER, STATE = "checkpoints", "train_state.json"
# Part of the training state -> its file.
FILES = {"params": "params.safetensors", "ema": "ema.safetensors", "optimizer": "optimizer.safetensors"}


@frozen
class Checkpoint:
    """One checkpoint, verified and read."""

    folder: Path
    step: int
    arrays: Mapping[str, Mapping[str, np.ndarray]]  # params, ema, optimizer -> name -> array
    state: Mapping[str, Any]


def checkpoint_steps(out: Path) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    folder = out / FOLDER
    if not folder.is_dir():
        return []
    names = [p.name.removeprefix("step-") for p in folder.iterdir() if p.name.startswith("step-") and p.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())


def checkpoint_folder(out: Path, step: int) -> Path:
    """Where the checkpoint of `step` is or would be."""
    return out / FOLDER / f"step-{step:08d}"


def save_checkpoint(
    out: Path,
    step: int,
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    state: Mapping[str, Any],
    extra: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint, atomically. `extra` may write more files into the folder (statistics, tokenizer).

    Raises:
        StoreError: it cannot be written (disk full, ...); nothing is left behind and older checkpoints are untouched.
    """
    folder = checkpoint_folder(out, step)
    with atomic_folder(folder, overwrite=True, marker=MANIFEST) as temp:
        for part, file in FILES.items():
            if part in arrays:
                write_weights(temp / file, arrays[part])
        if extra is not None:
            extra(temp)
        (temp / STATE).write_text(json.dumps({"step": step, **state}, indent=1, sort_keys=True, allow_nan=False) + "\n")
    return folder


def load_checkpoint(out: Path, step: int | None = None) -> Checkpoint:
    """Verify and read a checkpoint, by default the newest.

    Raises:
        StoreError: there is none, or a file of it is missing, truncated or changed; the message names the file.
    """
    steps = checkpoint_steps(out)
    if not steps or (step is not None and step not in steps):
        raise StoreError(
            "there is no such checkpoint" if steps else "there is no checkpoint to resume from",
            field=str(out / FOLDER),
            got=f"steps {steps}" if steps else "no checkpoint",
            fix=f"choose one of {steps}" if steps else "train without --resume",
        )
    step = steps[-1] if step is None else step
    folder = checkpoint_folder(out, step)
    try:
        verify_folder(folder)
    except StoreError as error:
        older = [s for s in steps if s < step]
        way = (
            f"resume from an older one: --resume-step {older[-1]}"
            if older
            else "no older checkpoint is left; train again"
        )
        raise StoreError(f"checkpoint {folder.name} is damaged: {error.what}", field=error.field, fix=way) from error
    state = read_json(folder / STATE, "the state of a checkpoint is damaged")
    arrays = {part: read_weights(folder / file) for part, file in FILES.items() if (folder / file).is_file()}
    return Checkpoint(folder, step, arrays, state)


def prune(out: Path, keep_last: int, keep_every: int) -> list[int]:
    """Remove old checkpoints: all but the newest `keep_last` and the multiples of `keep_every`; gives their steps.

    Call it only after the newest one is on disk. A folder is renamed before its files go, so that a half-removed one
    never looks like a checkpoint.
    """
    steps = checkpoint_steps(out)
    gone = [s for s in steps[:-keep_last] if not (keep_every and s % keep_every == 0)]
    remove(out, gone)
    return gone


def remove(out: Path, steps: Iterable[int]) -> None:
    """Remove the checkpoints of these steps."""
    for step in steps:
        folder = checkpoint_folder(out, step)
        dying = folder.with_name(f".old-{folder.name}")
        os.rename(folder, dying)
        shutil.rmtree(dying, ignore_errors=True)


def sweep(out: Path) -> None:
    """Remove what a killed run left half-written. Only the holder of the run's lock may call this.

    A folder that was moved aside for a new one which never took its place (`atomic_folder`) is put back.
    """
    for folder in (out, out / FOLDER):
        for left in [*folder.glob(".tmp-*"), *folder.glob(".old-*")] if folder.is_dir() else []:
            place = folder / left.name.removeprefix(".old-").rpartition("-")[0]
            if left.name.startswith(".old-") and not place.exists():
                left.rename(place)
            elif left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


@contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Hold the run directory: a second process that trains into it is refused. The lock dies with its process."""
    try:
        import fcntl
    except ImportError:  # a system without it: go unguarded
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("a+")
    except OSError as error:
        raise StoreError(
            "the run folder cannot be written", field=str(out), got=error.strerror, fix="choose another --out"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise TrainingError(
                "another process is training into this folder",
                field=str(out),
                got=f"process {file.read().strip() or 'unknown'}",
                fix="wait for it or stop it, or choose another --out",
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
