"""The run directory before the first step: what is refused, and what an earlier run leaves that has to go.

run.json          see `vla.training.saved_run`
checkpoints/      see `vla.training.checkpoints`
metrics.jsonl     see `vla.training.metrics`
model/            at the end: the model directory; with LoRA also adapter/
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vla import store
from vla.compose import variant_from_toml
from vla.files import open_own, refuse_taken, remove_folder
from vla.manifest import strange
from vla.refit import differences
from vla.runs import MODEL, RUN
from vla.training import checkpoints, lora
from vla.training.config import TrainConfig, TrainingError, changes
from vla.training.metrics import FILE, check_metrics
from vla.training.prepare import Prepared
from vla.training.saved_run import read_run


def check_folder(out: Path, resume: bool, overwrite: bool, config: TrainConfig, base: str = "") -> None:
    """Refuse to mix runs, to forget the model that training starts from, and what would stand in the way at the end."""
    steps = checkpoints.checkpoint_steps(out)
    refuse_taken(out / MODEL, store.KIND, True)
    check_metrics(out / FILE)
    if os.path.lexists(out / RUN):
        open_own(out / RUN).close()  # through a link we would write elsewhere
    read_run(out)  # refuses a file of that name that is not ours
    if config.lora.rank:
        refuse_taken(out / lora.FOLDER, lora.KIND, True)
    if resume or not (steps or (out / MODEL).exists()):
        return
    if not overwrite:
        got = f"checkpoints at steps {steps}" if steps else "a trained model"
        fix = (
            "go on with --resume, start again with --overwrite, or choose another --out"
            if steps
            else "add --overwrite, or choose another --out"
        )
        raise TrainingError("this folder holds a run already", field=str(out), got=got, fix=fix)
    if base and Path(base).resolve().is_relative_to(out.resolve()):
        raise TrainingError(
            "--overwrite would remove the model that training starts from",
            field="--out",
            got=str(out),
            expected=f"a folder without {base}",
            fix="choose another --out",
        )


def clear(out: Path, found: checkpoints.Checkpoint | None) -> list[str]:
    """Forget what a killed run left half-written, and every step beyond the one we start from.

    Returns:
        What was moved aside because not all of it is ours, in words.
    """
    checkpoints.sweep(out)
    steps = checkpoints.checkpoint_steps(out)
    moved = checkpoints.forget(out, [s for s in steps if found is None or s > found.step])
    if found is None:
        for folder, kind in ((out / MODEL, store.KIND), (out / lora.FOLDER, lora.KIND)):
            if folder.is_dir() and not strange(folder, kind):
                remove_folder(folder)
        if (out / FILE).exists():
            (out / FILE).unlink()  # `check_folder` has seen that it is ours
    return moved


def check_same_run(found: checkpoints.Checkpoint, config: TrainConfig, prepared: Prepared, allow_change: bool) -> None:
    """Refuse to resume with other data, another variant or other settings, unless that is asked for."""
    _check_same_weights(found.state["config"], config)
    different = changes(found.state["config"], config.to_dict())
    now = prepared.facts()
    different += [f"{k}: {found.state.get(k)!r} -> {now[k]!r}" for k in now if found.state.get(k) != now[k]]
    # Read again, so that a setting that a newer package has added, with its default, is no difference.
    before = variant_from_toml(found.state["variant"], str(found.folder))
    for path, (old, new) in differences(before, prepared.variant).items():
        different.append(f"{path}: {old!r} -> {new!r}")
    if found.step > config.steps:
        raise TrainingError(
            "the checkpoint is beyond the last step", field="train.steps", got=config.steps, expected=f">= {found.step}"
        )
    if different and not allow_change:
        raise TrainingError(
            "this is not the run that wrote the checkpoint",
            field=str(found.folder),
            got="; ".join(different),
            fix="give the same options, or add --allow-change to go on all the same",
        )


def _check_same_weights(before: Mapping[str, Any], config: TrainConfig) -> None:
    """Refuse what a checkpoint cannot be taken up with, whatever is allowed: it has no moments of other weights."""
    now = config.to_dict()
    for name, what in (("lora", "the adapters of a run cannot change"), ("freeze", "what a run freezes cannot change")):
        if (before.get(name) or None) != (now[name] or None):
            raise TrainingError(
                what, field=f"train.{name}", got=now[name], expected=before.get(name),
                fix=f"give the same --{name} options, or start another run from a finished model",
            )  # fmt: skip
    if config.ema_decay and not before["ema_decay"]:
        raise TrainingError(
            "a run without an average cannot begin one", field="train.ema_decay", got=config.ema_decay, expected=0,
            fix="add --ema-decay 0, or start another run from a finished model",
        )  # fmt: skip
