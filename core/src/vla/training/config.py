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

MOST_RANK = 65_536
# Ceilings of what a run allocates or starts.
MOST = {
    "steps": 10**9, "batch_size": 1 << 20, "accumulate": 1 << 16, "prefetch": 4096, "workers": 256,
    "val_batches": 10**6,
}  # fmt: skip
SCHEDULES = ("cosine", "rsqrt", "constant")
# Fields that do not change what is learned: a run may be resumed with other values.
FREE = (
    *("steps", "device", "compile", "distributed", "workers", "prefetch", "cache_gb", "max_bad_steps", "skip_bad"),
    *("fit_lengths", "max_cut", "log_every", "save_every", "keep_last", "keep_every"),
    *("val_every", "val_batches", "progress", "listeners"),
)
# Unset fields whose value follows from `steps`; a resumed run keeps the plan it began with.
PLANNED = ("lr_warmup", "lr_decay_steps", "lr_final")


class TrainingError(VlaError):
    """A run cannot start, go on, or be resumed."""


@frozen
class Lora:
    """Low-rank adapters: y = W x + scale B A x, in which A and B are trained and W is not (arXiv 2106.09685).

    The linears that have one are frozen, and so is the rest of their expert in the LLM core (norms, embedding), as in
    openpi; other parts train unless `freeze` names them. Weights saved for inference have the adapters merged in.

    Attributes:
        rank: of every adapter; unset: no LoRA.
        alpha: scale = alpha / rank. Unset: the rank, so scale 1 (openpi: 16 and 16 in gemma_2b_lora).
        rslora: scale = alpha / sqrt(rank) (arXiv 2312.03732).
        on: which linears: names or their beginnings, as in `freeze`, or patterns in which * stands for anything.
            Unset: attention and MLP of every expert of the LLM core.
        ranks: PATTERN=RANK, another rank for some of them, e.g. `*.action.*=32`; the last that matches counts.
    """

    rank: int | None = None
    alpha: float | None = None
    rslora: bool = False
    on: tuple[str, ...] = ()
    ranks: tuple[str, ...] = ()

    def __attrs_post_init__(self) -> None:
        if self.rank is None:
            if (self.alpha, self.rslora, self.on, self.ranks) != (None, False, (), ()):
                given = [n for n in ("alpha", "on", "ranks") if getattr(self, n) not in (None, ())]
                away = [*(f"--lora.{name} none" for name in given), *(["--no-lora.rslora"] if self.rslora else [])]
                fix = f"add --lora.rank 16, or take the others away: {' '.join(away)}"
                raise SettingsError("LoRA settings without a rank", field="train.lora.rank", fix=fix)
            return
        if not 1 <= self.rank <= MOST_RANK:
            fix = "for no LoRA leave it out"
            raise SettingsError(
                "a rank is at least 1", field="train.lora.rank", got=self.rank, expected=f"1 to {MOST_RANK:,}", fix=fix
            )
        if self.alpha is not None and not self.alpha > 0:
            raise SettingsError("alpha is positive", field="train.lora.alpha", got=self.alpha, expected="> 0")
        for text in self.ranks:
            pattern, _, number = text.rpartition("=")
            if not pattern or not number.isdigit() or int(number) < 1:
                raise SettingsError(
                    "another rank is written PATTERN=RANK", field="train.lora.ranks", got=text, expected="*.action.*=32"
                )

    def exceptions(self) -> list[tuple[str, int]]:
        """`ranks` as (pattern, rank)."""
        return [(text.rpartition("=")[0], int(text.rpartition("=")[2])) for text in self.ranks]

    def scale(self, rank: int) -> float:
        """What the product of an adapter of this rank is multiplied with."""
        alpha = rank if self.alpha is None else self.alpha
        return alpha / (rank**0.5 if self.rslora else rank)


@frozen
class Rtc:
    """Real-time chunking learned in training (arXiv 2512.05964): a chunk that goes on from a given beginning.

    In every row the first d steps are shown clean, each action with a flow time of its own; the loss is on the rest.
    Sampling in the mode `trained` then costs no more than sampling without.

    Attributes:
        max_delay: d is drawn evenly from 0 to this many steps. 0: no such training.
    """

    max_delay: int = 0

    def __attrs_post_init__(self) -> None:
        if self.max_delay < 0:
            raise SettingsError(
                "a delay is not negative", field="train.rtc.max_delay", got=self.max_delay, expected=">= 0"
            )


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
        lora: low-rank adapters on linears, in place of training them whole.
        rtc: learn chunks that go on from a given beginning, for real-time chunking.
        checkpoint_activations: recompute each transformer layer in the backward pass: less memory, about 1/3 more time.
        compile: torch.compile each transformer layer (PyTorch; JAX always compiles).
        augment: random crop, rotation and colour of the images (openpi's ranges), the same in both engines.
        fit_lengths: set spec.max_token_len to what the data needs where it is too small for it.
        max_cut: share of the samples that may lose tokens because they are longer than spec.max_token_len. More in the
            data are refused before the first step, more during the run stop it; each record counts them.
        val_episodes: episodes held out of training for validation loss and action error.
        val_every: steps between validations; 0 validates at the end only.
        val_batches: batches per validation.
        max_bad_steps: stop after this many steps in a row whose loss or gradient is not finite.
        skip_bad: share of the frames, and one at least, that may turn out unreadable: they are reported, counted and
            left out, and others stand in, the same whenever a step is made again. 0: the first one ends the run.
        workers: threads that prepare batches. 0: chosen by the number of cores.
        prefetch: batches prepared ahead.
        cache_gb: memory for prepared samples; a sample in it is decoded, resized and tokenised once only.
        log_every: steps between metric records.
        save_every: steps between checkpoints.
        keep_last: newest checkpoints kept.
        keep_every: checkpoints at multiples of this are kept for good; 0: none.
        listeners: more places for the metrics: `tensorboard`, `trackio`, `wandb`.
        progress: draw a progress bar. Notes, bad steps and frames, and checkpoints that failed are said without it too.
        distributed: `none`, `ddp` (weights on every device) or `fsdp` (weights cut over the devices). PyTorch: one
            process per device, started with `torchrun --nproc-per-node N --no-python vla train ...`. JAX: all devices
            of the machine; of several machines with one process on each, started with JAX_COORDINATOR_ADDRESS=HOST:PORT
            and JAX_NUM_PROCESSES and JAX_PROCESS_ID set, or by Slurm, Open MPI or on a TPU pod. All processes must see
            the run directory.
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
    lora: Lora = Lora()
    rtc: Rtc = Rtc()
    checkpoint_activations: bool = False
    compile: bool = False
    augment: bool = False
    fit_lengths: bool = False
    max_cut: float = 0.001
    val_episodes: int = 0
    val_every: int = 0
    val_batches: int = 4
    max_bad_steps: int = 10
    skip_bad: float = 0.0
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
            "val_batches",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise SettingsError(
                    "must be at least 1", field=f"train.{name}", got=getattr(self, name), expected=">= 1"
                )
        for name, most in MOST.items():  # a recipe comes from anybody
            if getattr(self, name) > most:
                raise SettingsError(
                    "larger than any run", field=f"train.{name}", got=getattr(self, name), expected=f"<= {most:,}"
                )
        not_negative = (
            *("val_episodes", "val_every", "keep_every", "workers", "clip", "weight_decay", "eps", "cache_gb"),
            *("lr_warmup", "lr_final", "max_cut"),
        )
        for name in not_negative:
            if not (getattr(self, name) or 0) >= 0:
                raise SettingsError(
                    "must not be negative", field=f"train.{name}", got=getattr(self, name), expected=">= 0"
                )
        for name in ("lr", "lr_timescale"):
            if not getattr(self, name) > 0:
                raise SettingsError("must be positive", field=f"train.{name}", got=getattr(self, name), expected="> 0")
        for name, what in (
            *((name, "a decay") for name in ("beta1", "beta2", "ema_decay")),
            ("skip_bad", "a share of the frames"),
        ):
            if not 0 <= getattr(self, name) < 1:
                raise SettingsError(
                    f"{what} lies in [0, 1)", field=f"train.{name}", got=getattr(self, name), expected="[0, 1)"
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
        """Plain values, as JSON stores them; no LoRA and no real-time chunking are None."""
        lora = _plain(asdict(self.lora)) if self.lora.rank else None
        return {**_plain(asdict(self)), "lora": lora, "rtc": asdict(self.rtc) if self.rtc.max_delay else None}


def config_from(values: Mapping[str, Any], base: TrainConfig | None = None) -> TrainConfig:
    """A config from a plain table (the `[train]` table of a recipe, a run record); other fields as in `base`.

    Raises:
        SettingsError: an unknown key (the known ones are listed) or a wrong value.
    """
    table = {**(base.to_dict() if base else {}), **values}
    inner = {}
    for name, cls in (("lora", Lora), ("rtc", Rtc)):
        values = table.pop(name, None) or {}
        if not isinstance(values, Mapping):
            raise SettingsError(f"{name} is a table of settings", field=f"train.{name}", got=values,
                                expected=f"[train.{name}]")  # fmt: skip
        inner[name] = structure(cls, values, f"train.{name}")
    return evolve(structure(TrainConfig, table, "train"), **inner)


def _plain(table: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in table.items()}


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
    writes: bool = True  # whether this process writes the run: the first of several does
