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
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from vla.errors import StoreError
from vla.files import atomic_folder, move_aside, open_own, remove_folder
from vla.files import sweep as sweep_places
from vla.manifest import strange, verify_folder
from vla.reading import read_json
from vla.store import ASSETS, STATS, check_finite, read_weights, write_weights
from vla.training.config import TrainingError

if TYPE_CHECKING:
    import numpy as np

FOLDER, STATE = "checkpoints", "train_state.json"
LOCK = ".lock"
KIND = "checkpoint"  # of each folder, in its manifest
# Part of the training state -> its file.
FILES = {"params": "params.safetensors", "ema": "ema.safetensors", "optimizer": "optimizer.safetensors"}
CONTENT = (STATE, *FILES.values(), STATS, ASSETS)  # what is read of a checkpoint
_NAME = re.compile(r"step-([0-9]{8,})")


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
    found = [_NAME.fullmatch(p.name) for p in folder.iterdir() if p.is_dir()]
    steps = {int(match[1]) for match in found if match}
    return sorted(step for step in steps if checkpoint_folder(out, step).is_dir())


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
    with atomic_folder(folder, KIND, overwrite=True) as temp:
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
        NotFiniteError: its weights have NaN or infinite values.
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
        verify_folder(folder, CONTENT)
        state = read_json(folder / STATE, "the state of a checkpoint is damaged")
        if state.get("step") != step:
            got = f"step {state.get('step')} in {STATE}"
            raise StoreError("its name and what is in it do not agree", field=str(folder), got=got)
    except StoreError as error:
        older = [s for s in steps if s < step]
        way = (
            f"resume from an older one: --resume-step {older[-1]}"
            if older
            else "no older checkpoint is left; train again"
        )
        raise StoreError(f"checkpoint {folder.name} is damaged: {error.what}", field=error.field, fix=way) from error
    arrays = {part: read_weights(folder / file) for part, file in FILES.items() if (folder / file).is_file()}
    for part in ("params", "ema"):
        check_finite(arrays.get(part, {}), folder / FILES[part])
    return Checkpoint(folder, step, arrays, state)


def prune(out: Path, keep_last: int, keep_every: int) -> dict[str, str]:
    """Remove old checkpoints: all but the newest `keep_last` and the multiples of `keep_every`.

    Call it only after the newest one is on disk.

    Returns:
        What was left alone because not all of it is ours: path -> why.
    """
    steps = checkpoint_steps(out)
    left = {}
    for folder in (checkpoint_folder(out, s) for s in steps[:-keep_last] if not (keep_every and s % keep_every == 0)):
        if why := strange(folder, KIND, damaged=True) or ("a symbolic link" if folder.is_symlink() else ""):
            left[str(folder)] = why
        else:
            remove_folder(folder)
    return left


def forget(out: Path, steps: Iterable[int]) -> list[str]:
    """Remove the checkpoints of these steps; one that is not all ours, or has no whole manifest, is moved aside.

    Returns:
        What was moved, in words.
    """
    said = []
    for step in steps:
        folder = checkpoint_folder(out, step)
        if folder.is_symlink() or (why := strange(folder, KIND, damaged=True)):
            aside = move_aside(folder)
            said.append(f"{folder} was moved to {aside.name}: {'a symbolic link' if aside.is_symlink() else why}")
        else:
            remove_folder(folder)
    return said


def sweep(out: Path) -> None:
    """Put back or remove what a killed run left half-written. Only the holder of the run's lock may call this."""
    sweep_places(out, r"model|adapter|[a-z]+\.jsonl?")
    sweep_places(out / FOLDER, _NAME.pattern.replace("(", "(?:"))


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
        file = open_own(out / LOCK)
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
                got=f"process {file.read(32).strip() or 'unknown'}",
                fix="wait for it or stop it, or choose another --out",
            ) from error
        file.seek(0)
        if not re.fullmatch(r"[0-9]*", content := file.read(32)):
            fix = f"choose another --out, or remove it yourself: rm {out / LOCK}"
            what = "a file is in the way that vla did not write"
            raise StoreError(what, field=str(out / LOCK), got=repr(content), fix=fix)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
