"""What a training run is: `TrainConfig`, read by the loop and both engines, written beside every checkpoint.

Light: standard library and attrs only, so that `vla train --help` imports no array library.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from attrs import asdict, evolve, frozen

from vla.errors import SettingsError, VlaError
from vla.settings import structure

SCHEDULES = ("cosine", "rsqrt", "constant")
# Fields that do not change what is learned: a run may be resumed with other values.
FREE = (
    *("steps", "device", "compile", "distributed", "workers", "prefetch", "cache_gb", "max_bad_steps"),
    *("log_every", "save_every", "keep_last", "keep_every", "val_every", "val_batches", "progress", "listeners"),
)
# Unset fields whose value follows from `steps`; a resumed run keeps the plan it began with.
PLANNED = ("lr_warmup", "lr_decay_steps", "lr_final")


class TrainingError(VlaError):
    """A run cannot start, go on, or be resumed."""


@frozen
class TrainConfig:
    """One training run. The defaults are openpi's: AdamW, warm-up and cosine, global-norm clip 1, EMA 0.99.

    Attributes:
        steps: optimiser updates in total (not "more": a resumed run goes on to the same number).
        batch_size: samples per update, over all devices and micro-batches.
        seed: everything random follows from it: weights, data order, noise and time draws, augmentation.
        framework: which engine trains.
        device: `auto` (an accelerator when there is one), `cpu`, `cuda`, `cuda:1`.
        precision: `bfloat16` computes in bfloat16 over float32 weights; weights, moments and EMA are float32 always.
        accumulate: micro-batches per update; memory of batch_size / accumulate samples.
        lr_schedule: `cosine`, `rsqrt` or `constant`, each after a linear warm-up (openpi / optax formulas).
        lr: the peak learning rate.
        lr_warmup: steps of warm-up, from lr / (lr_warmup + 1). Unset: min(1000, steps // 10).
        lr_decay_steps: cosine: steps until lr_final, warm-up included. Unset: steps.
        lr_final: cosine: the last learning rate. Unset: lr / 10.
        lr_timescale: rsqrt: lr / sqrt((timescale + steps since warm-up) / timescale).
        clip: largest global gradient norm; 0 turns clipping off.
        ema_decay: decay of the averaged weights that are saved for inference; 0 turns averaging off.
        ema_warmup: let the decay grow to ema_decay as (1 + step) / (10 + step), so that the average of a short run is
            not made of its first weights. False: ema_decay from the first step, as in openpi (0.99: equal from 890 on).
        freeze: parameter-name prefixes that are not trained, e.g. `backbone.vision`.
        checkpoint_activations: recompute each transformer layer in the backward pass: less memory, about 1/3 more time.
        compile: torch.compile each transformer layer (PyTorch; JAX always compiles).
        augment: random crop, rotation and colour of the images (openpi's ranges), the same in both engines.
        val_episodes: episodes held out of training for validation loss and action error.
        val_every: steps between validations; 0 validates at the end only.
        val_batches: batches per validation.
        max_bad_steps: stop after this many steps in a row whose loss or gradient is not finite.
        workers: threads that prepare batches. 0: chosen by the number of cores.
        prefetch: batches prepared ahead.
        cache_gb: memory for prepared samples; a sample in it is decoded, resized and tokenised once only.
        log_every: steps between metric records.
        save_every: steps between checkpoints.
        keep_last: newest checkpoints kept.
        keep_every: checkpoints at multiples of this are kept for good; 0: none.
        listeners: more places for the metrics: `tensorboard`, `trackio`, `wandb`.
        progress: draw a progress bar.
        distributed: `none`, `ddp` (weights on every device) or `fsdp` (weights cut over the devices). PyTorch: one
            process per device, started with `torchrun --nproc-per-node N --no-python vla train ...`. JAX: all it sees.
    """

    steps: int = 30_000
    batch_size: int = 32
    seed: int = 42
    framework: Literal["torch", "jax"] = "torch"
    device: str = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    accumulate: int = 1
    lr_schedule: Literal["cosine", "rsqrt", "constant"] = "cosine"
    lr: float = 2.5e-5
    lr_warmup: int | None = None
    lr_decay_steps: int | None = None
    lr_final: float | None = None
    lr_timescale: float = 10_000.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 1e-10
    clip: float = 1.0
    ema_decay: float = 0.99
    ema_warmup: bool = True
    freeze: tuple[str, ...] = ()
    checkpoint_activations: bool = False
    compile: bool = False
    augment: bool = False
    val_episodes: int = 0
    val_every: int = 0
    val_batches: int = 4
    max_bad_steps: int = 10
    workers: int = 0
    prefetch: int = 4
    cache_gb: float = 2.0
    log_every: int = 10
    save_every: int = 1000
    keep_last: int = 2
    keep_every: int = 0
    listeners: tuple[str, ...] = ()
    progress: bool = True
    distributed: Literal["none", "ddp", "fsdp"] = "none"

    def __attrs_post_init__(self) -> None:
        positive = (
            "steps",
            "batch_size",
            "accumulate",
            "prefetch",
            "log_every",
            "save_every",
            "keep_last",
            "max_bad_steps",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise SettingsError(
                    "must be at least 1", field=f"train.{name}", got=getattr(self, name), expected=">= 1"
                )
        for name in ("val_episodes", "val_every", "keep_every", "workers", "clip", "weight_decay", "cache_gb"):
            if getattr(self, name) < 0:
                raise SettingsError(
                    "must not be negative", field=f"train.{name}", got=getattr(self, name), expected=">= 0"
                )
        if not self.lr > 0:
            raise SettingsError("the learning rate must be positive", field="train.lr", got=self.lr, expected="> 0")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingsError(
                    "a decay lies in [0, 1)", field=f"train.{name}", got=getattr(self, name), expected="[0, 1)"
                )
        for name, known in (
            ("framework", ("torch", "jax")),
            ("precision", ("float32", "bfloat16")),
            ("lr_schedule", SCHEDULES),
            ("distributed", ("none", "ddp", "fsdp")),
        ):
            if getattr(self, name) not in known:
                raise SettingsError(
                    "unknown value", field=f"train.{name}", got=getattr(self, name), expected=list(known)
                )
        if self.batch_size % self.accumulate:
            raise SettingsError(
                "a batch splits into equal micro-batches",
                field="train.accumulate",
                got=f"batch_size {self.batch_size} over accumulate {self.accumulate}",
                expected="a divisor of batch_size",
            )

    def planned(self, record: Mapping[str, Any] | None = None) -> TrainConfig:
        """The same config with the learning-rate plan filled in: as given, else as in `record`, else from `steps`."""
        default = {"lr_warmup": min(1000, self.steps // 10), "lr_decay_steps": self.steps, "lr_final": self.lr / 10}
        values = {
            name: (record or {}).get(name, default[name]) if getattr(self, name) is None else getattr(self, name)
            for name in PLANNED
        }
        return evolve(self, **values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON stores them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def config_from(values: Mapping[str, Any], base: TrainConfig | None = None) -> TrainConfig:
    """A config from a plain table (the `[train]` table of a recipe, a run record); other fields as in `base`.

    Raises:
        SettingsError: an unknown key (the known ones are listed) or a wrong value.
    """
    return structure(TrainConfig, {**(base.to_dict() if base else {}), **values}, "train")


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What a resumed run would do otherwise than the run it resumes: `name: old -> new`, one line each."""
    names = [n for n in dict.fromkeys([*old, *new]) if n not in FREE]
    return [f"{n}: {old.get(n)!r} -> {new.get(n)!r}" for n in names if old.get(n) != new.get(n)]


@frozen
class TrainResult:
    """What a run leaves behind."""

    out: Path
    step: int  # updates made in total
    interrupted: bool  # stopped by a signal before the last step
    model: Path | None  # the model directory, None when interrupted
    checkpoint: Path | None  # the newest one
    metrics: Mapping[str, float]  # the last record
    signal: int | None = None  # which signal stopped it
