"""The loop: one for both engines.

A step: take the batch of step k (a pure function of seed and k), ask the schedule for the rate, let the engine make
one update. Everything else hangs on the step number: records, validation, checkpoints, the end. A step whose loss or
gradient is not finite is not applied by the engine; the loop reports its samples, and gives up after too many in a row.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import evolve

from vla.errors import DataError, NotFiniteError, StoreError, VlaError
from vla.reading import reading
from vla.store import check_finite
from vla.training import checkpoints, lora
from vla.training.bad_frames import allowed, over_budget
from vla.training.config import TrainConfig, TrainingError, TrainResult
from vla.training.cuts import Cuts
from vla.training.loader import Loader, Samples
from vla.training.metrics import (
    FILE,
    WALL_CLOCK,
    Jsonl,
    Listener,
    Progress,
    check_listeners,
    open_listeners,
    plain,
    say,
)
from vla.training.prepare import Prepared, prepare
from vla.training.run_folder import MODEL, check_folder, check_same_run, clear
from vla.training.saved_run import SavedRun, read_run, save_run
from vla.training.schedules import ema_decay, learning_rate
from vla.training.start import base_of
from vla.training.statistics import words_of
from vla.training.validation import Validator


def train(
    model: Any = None,
    data: Any = None,
    *,
    out: str | Path,
    config: TrainConfig | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    stats: Any | None = None,
    resume: bool = False,
    resume_step: int | None = None,
    overwrite: bool = False,
    allow_change: bool = False,
    yes_random: bool = False,
    typed: Mapping[str, Any] | None = None,
    listeners: Sequence[Listener] = (),
) -> TrainResult:
    """Train a model on demonstrations.

    Args:
        model: a `Variant`, the path of a variant file, or of a model directory (its weights and tokenizer are where
            training starts); `vla.training.start.Changed` for a model with other settings.
        data: an opened dataset, or where one is: a folder, or a dataset name.
        out: the run directory: `run.json` (what the run is made of), `checkpoints/`, `metrics.jsonl`, and at the end
            `model/` (with LoRA also `adapter/`).
        config: the run; `steps` and `batch_size` given here win over it.
        stats: normalisation statistics: "data" (the default), "base" (those of the model), a path, or statistics.
        resume: go on from the newest checkpoint in `out`; model, data, config and stats are then those of the run, and
            those given must agree.
        resume_step: go on from the checkpoint of this step instead.
        overwrite: forget what is in `out`.
        allow_change: resume although data or settings differ from the run that wrote the checkpoint; fine-tune a model
            on data that names another robot than its own did.
        yes_random: let LoRA or `freeze` keep weights that were never trained.
        typed: options of a command line, to be kept in `run.json`.
        listeners: callables `(event, record)` that hear every record (see `vla.training.metrics`).

    Raises:
        DataError, SettingsError, PartError: model, data and config do not fit; before the first step.
        TrainingError: the run folder is in use or not empty, weights that were never trained would be frozen, or too
            many steps in a row were not finite.
        NotFiniteError: the weights are not finite, at the start, at a checkpoint or at the end; or no step was.
        StoreError: a checkpoint is damaged, or the model cannot be written.
    """
    out = Path(out).expanduser()
    resume = resume or resume_step is not None
    saved = read_run(out) if resume else None
    if saved is not None:
        model, data = saved.model() if model is None else model, saved.data if data is None else data
        config, typed = config or saved.train_config(), {**saved.typed, **(typed or {})}
        yes_random = yes_random or saved.yes_random
    if model is None or not data:
        lacking = "model" if model is None else "data"
        fix = "the run in this folder does not store it: give it again" if resume else "give it"
        raise TrainingError(f"no {lacking} is named", field=lacking, fix=fix)
    config = config or TrainConfig()
    if steps is not None or batch_size is not None:
        config = evolve(config, steps=steps or config.steps, batch_size=batch_size or config.batch_size)
    rank, world = _place(config)
    if config.batch_size % (world * config.accumulate):
        raise TrainingError(
            "a batch splits evenly over devices and micro-batches",
            field="train.batch_size",
            got=config.batch_size,
            expected=f"a multiple of {world * config.accumulate}",
        )
    # Everything that can be refused is refused before the run folder is touched.
    check_listeners(config.listeners)
    check_folder(out, resume, overwrite, config, base_of(model))
    notes: list[str] = []
    found = None
    if saved is not None and resume_step is None and not checkpoints.checkpoint_steps(out):
        notes.append("the run has no checkpoint yet: from its beginning")
        stats = saved.given(stats)
    elif resume:
        found = checkpoints.load_checkpoint(out, resume_step)
    config = config.planned(found.state["config"] if found else None)
    where = found.folder if found else None
    # That the robot may differ is allowed once; that a run goes on otherwise than it began, each time anew.
    other_robot = allow_change or (saved is not None and saved.allow_change)
    prepared = prepare(model, data, config, stats, notes.append, where, other_robot, yes_random)
    if found is not None:
        check_same_run(found, config, prepared, allow_change)
    engine = _engine(prepared, config, world)
    if engine.adapters:
        notes.append(lora.summary(engine.adapters, prepared.variant, config))
    if found is not None:
        engine.load_state(found.arrays, str(found.folder))
    with checkpoints.run_lock(out) if rank == 0 else _nothing():
        if rank == 0:
            notes += clear(out, found)
            save_run(out, _saved(model, prepared, config, stats, saved, yes_random, other_robot, typed))
        result = _Run(out, config, prepared, engine, found, listeners, notes, rank, world).go()
    engine.close()
    return result


def _saved(
    model: Any, prepared: Prepared, config: TrainConfig, stats: Any, before: SavedRun | None, yes_random: bool,
    allow_change: bool, typed: Mapping[str, Any] | None,
) -> SavedRun:  # fmt: skip
    """What `run.json` keeps; of a run that goes on, where it began."""
    start = before or SavedRun("", {}, base=base_of(model), reinit=getattr(model, "reinit", ()), stats=words_of(stats))
    return evolve(
        start, variant=prepared.variant.to_toml(), config=config.to_dict(), data=prepared.source, yes_random=yes_random,
        allow_change=allow_change, typed=dict(typed or {}),
    )  # fmt: skip


class _Run:
    """One training run: the state of the loop between its parts."""

    def __init__(
        self,
        out: Path,
        config: TrainConfig,
        prepared: Prepared,
        engine: Any,
        found: checkpoints.Checkpoint | None,
        listeners: Sequence[Listener],
        notes: Sequence[str],
        rank: int,
        world: int,
    ):
        self.out, self.config, self.prepared, self.rank, self.world = out, config, prepared, rank, world
        self.start = found.step if found else 0
        self.engine = engine
        samples = Samples(
            prepared.dataset, prepared.group.inputs, prepared.variant.spec.action_horizon, config.cache_gb * 1e9
        )
        share = config.batch_size // world
        rows = slice(rank * share, (rank + 1) * share)
        self.loader = Loader(samples, prepared.train_index, prepared.variant, config, rows, prepared.shares)
        self.validator = Validator(self.loader, prepared, config) if len(prepared.val_index) else None
        self.metrics: Jsonl | None = None
        self.listeners: list[Listener] = []
        self.progress: Progress | None = None
        if rank == 0:
            self.metrics = Jsonl(out / FILE, self.start)
            self.listeners = [*open_listeners(config.listeners, out, config.to_dict()), *listeners]
            if config.progress:
                self.progress = Progress(config.steps, self.start, prepared.variant.name)
            self.listeners.append(self.progress or say)
        self.saved: Path | None = found.folder if found else None
        self.tried = -1  # the step of the last try to save
        self.save_failure: VlaError | OSError | None = None
        self.left: set[str] = set()  # old checkpoints that stay because not all of them is ours
        self.last: dict[str, Any] = {}
        self.bad_in_a_row = self.skipped = 0
        self.bad_frames: set[int] = set(found.state.get("bad_frames", [])) if found else set()
        self.cuts = Cuts(config)
        if found is not None:
            with reading("the state of a checkpoint is damaged", found.folder / checkpoints.STATE):
                before = found.state.get("loop", {})
                self.last, self.bad_in_a_row = dict(before.get("last", [])), int(before.get("bad_in_a_row", 0))
                self.cuts.load(before.get("cuts", {}))
        for text in notes:
            self.tell("note", {"step": self.start, "text": text})

    def tell(self, event: str, record: Mapping[str, Any]) -> None:
        """Tell all listeners. One that fails is reported and told no more; training goes on."""
        problems = [self.metrics(event, record)] if self.metrics else []
        for listener in list(self.listeners):
            try:
                listener(event, record)
            except Exception as error:
                self.listeners.remove(listener)
                if listener is self.progress:
                    self.progress = None
                    self.listeners.append(say)
                name = getattr(listener, "__qualname__", None) or type(listener).__qualname__
                problems.append(f"a listener failed and is told no more: {name}: {type(error).__name__}: {error}")
        for problem in filter(None, problems):
            self.warn(record["step"], problem)

    def warn(self, step: int, text: str) -> None:
        """Say what a person has to know."""
        if self.rank:  # the listeners are with the first process
            say("note", {"text": text})
        self.tell("note", {"step": step, "text": text})

    def go(self) -> TrainResult:
        c = self.config
        self.tell("start", {"step": self.start, "config": c.to_dict(), **self.prepared.facts()})
        if self.saved and (self.start % c.save_every == 0 or self.start == c.steps):
            self.tell("checkpoint", {"step": self.start, "folder": str(self.saved)})
        step = self.start
        pending: list[tuple[int, Mapping[str, Any]]] = []
        since, began, waited = step, time.perf_counter(), self.loader.waited
        try:
            with _stop_requests() as stop:
                for batch in self.loader.stream(self.start, c.steps):
                    self._skip(step, batch.bad)
                    self.cuts.add(step, len(batch.ids), batch.cut, batch.empty)
                    pending.append((step, self.engine.step(batch.micro, learning_rate(c, step), ema_decay(c, step))))
                    step += 1
                    log = step % c.log_every == 0 or step == c.steps
                    save = step % c.save_every == 0 or step == c.steps
                    if log or save or stop or not self.engine.reads_late:
                        self._read(pending)
                    if log and self.config.skip_bad:
                        self.last["bad_frames"] = len(self.bad_frames)
                    if log:
                        now, wait = time.perf_counter(), self.loader.waited
                        seconds = max(now - began, 1e-9)
                        rate = (step - since) / seconds
                        self.last |= {
                            "lr": learning_rate(c, step - 1),
                            "samples_per_s": rate * c.batch_size,
                            "data_wait": (wait - waited) / seconds,
                            "seconds_left": (c.steps - step) / rate,
                            **self.cuts.record(),
                        }
                        self.tell("step", {"step": step, **self.last})
                        since, began, waited = step, now, wait
                    if self.progress:
                        self.progress.advance(step)
                    if self.validator and c.val_every and step % c.val_every == 0 and step < c.steps:
                        self._validate(step)
                    # Processes must stop at the same step, so they ask each other; seldom, as it waits for the device.
                    halt = self.engine.agree(bool(stop)) if self.world == 1 or log or save else False
                    if halt:
                        self._read(pending)
                    if save or halt:
                        self._save(step)
                    if halt:
                        break
                if self.validator and step == c.steps:
                    self._validate(step)
                interrupted = step < c.steps
                if not interrupted and self.start == 0 and self.skipped == step:
                    raise NotFiniteError(
                        "no step of this run could be applied, and no model is written: no loss or gradient was finite",
                        field="train.steps", got=step, fix="look at the data and the first weights, or lower --lr",
                    )  # fmt: skip
                model = None if interrupted else self._export(step)
        except BaseException as error:
            self._rescue(step, error)
            raise
        self.tell("end", {"step": step, "interrupted": interrupted})
        if self.save_failure is not None:
            way = getattr(self.save_failure, "fix", "") or str(self.save_failure)
            raise StoreError(
                "the last checkpoint could not be written, and the newest is older",
                field=str(checkpoints.checkpoint_folder(self.out, step)),
                got=f"newest: {self.saved or 'none'}" + (f"; the model is in {model}" if model else ""),
                fix=f"{way}; then go on with --resume" if self.saved else way,
            ) from self.save_failure
        number = stop[0] if stop else None
        return TrainResult(self.out, step, interrupted, model, self.saved, dict(self.last), number, self.rank == 0)

    def _read(self, pending: list[tuple[int, Mapping[str, Any]]]) -> None:
        """Fetch results from the device; report and count steps that were not applied."""
        for (step, _), values in zip(pending, self.engine.read([r for _, r in pending]), strict=True):
            bad = values.pop("bad") > 0
            self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
            self.skipped += bad
            if not bad:
                self.last = {**self.last, **values}
                continue
            ids = [int(i) for i in self.loader.ids(step)]
            self.tell("bad_step", {"step": step, "sample_ids": ids, **values})
            if self.bad_in_a_row >= self.config.max_bad_steps:
                raise TrainingError(
                    f"the loss or gradient of {self.bad_in_a_row} steps in a row was not finite; training stops",
                    field=f"step {step}",
                    got=f"loss {values['loss']}, gradient norm {values['grad_norm']}, frames {ids[:8]}",
                    fix=f"look at these frames, or lower --lr; last good checkpoint: {self.saved or 'none'}",
                )
        pending.clear()

    def _skip(self, step: int, bad: Mapping[int, DataError]) -> None:
        """Report and count frames that others stood in for; end the run when they are more than the budget."""
        frames = len(self.prepared.train_index) + len(self.prepared.val_index)
        for index, error in bad.items():
            if index in self.bad_frames:
                continue
            self.bad_frames.add(index)
            text = f"step {step}: others stand in for a frame: {error.what}: {error.field}: {error.got}"
            self.tell("bad_frame", {"step": step, "frame": index, "text": text})
            if self.rank:
                say("note", {"text": text})
            if len(self.bad_frames) > allowed(self.config.skip_bad, frames):
                raise over_budget(self.bad_frames, error, self.config.skip_bad, frames)

    def _validate(self, step: int) -> None:
        assert self.validator is not None
        record = self.validator.run(self.engine)
        self._skip(step, self.validator.bad)
        self.last |= {f"val_{k}": v for k, v in record.items() if isinstance(v, float)}
        self.tell("validation", {"step": step, **record})

    def _save(self, step: int) -> None:
        """Write a checkpoint. A failure is said and training goes on: the older checkpoint is intact."""
        if checkpoints.checkpoint_folder(self.out, step) == self.saved or step == self.tried:
            return
        self.tried = step
        arrays = self.engine.state()
        if self.rank != 0:
            return
        for part in ("params", "ema"):  # such a checkpoint would push out the last good one
            check_finite(arrays.get(part, {}), f"{part} at step {step}")
        state = {**self._record(), "variant": self.prepared.variant.to_toml(), "bad_frames": sorted(self.bad_frames)}
        last = [[name, value] for name, value in self.last.items() if name not in WALL_CLOCK]  # JSON would sort a table
        state["loop"] = {"last": plain(last), "bad_in_a_row": self.bad_in_a_row, "cuts": self.cuts.state()}
        if self.metrics:
            self.metrics.sync()
        try:
            self.saved = checkpoints.save_checkpoint(self.out, step, arrays, state, self.prepared.write_assets)
        except (VlaError, OSError) as error:
            self.save_failure = error
            self.warn(step, f"no checkpoint at step {step}; training goes on\n{error}")
            return
        self.save_failure = None
        self.tell("checkpoint", {"step": step, "folder": str(self.saved)})
        try:
            left = checkpoints.prune(self.out, self.config.keep_last, self.config.keep_every)
        except StoreError as error:
            left = {error.field: str(error)}
        for path, why in left.items():
            if path not in self.left:
                self.warn(step, f"an old checkpoint stays: {path}: {why}")
        self.left |= left.keys()

    def _record(self) -> dict[str, Any]:
        """Plain facts of the run, for checkpoints and for the model."""
        p = self.prepared
        where = {"source": p.source, "embodiment": p.embodiment, **p.made_of}
        return {"config": self.config.to_dict(), **p.facts(), **where}

    def _rescue(self, step: int, error: BaseException) -> None:
        """Before an error leaves the loop: keep the steps made so far, unless they are the problem."""
        alone = self.world == 1  # other processes would wait for a step that we do not make
        theirs = isinstance(error, Exception) and not isinstance(error, TrainingError | NotFiniteError)
        if alone and theirs and step > self.start:
            try:
                self._save(step)
            except Exception as second:  # it may be the device that failed; the first error is the one to show
                self.warn(step, f"no checkpoint at step {step}: {type(second).__name__}: {second}")
        self.tell(
            "end",
            {
                "step": step,
                "interrupted": True,
                "error": str(error).splitlines()[0] if str(error) else type(error).__name__,
            },
        )

    def _export(self, step: int) -> Path | None:
        """The model directory, with adapters merged in; what LoRA trained is kept apart too."""
        weights = self.engine.weights()
        if self.rank != 0:
            return None
        from vla.files import atomic_folder
        from vla.store import save_model

        p = self.prepared
        record = {"steps": step, **self._record()}
        if self.engine.adapters:
            with atomic_folder(self.out / lora.FOLDER, lora.KIND, overwrite=True) as temp:
                lora.write_adapter(temp, p.variant, self.engine.adapters, weights, self.config, record)
                p.write_assets(temp)
            weights = lora.merged(weights, self.engine.adapters)
        return save_model(self.out / MODEL, p.variant, weights, p.stats, p.tokenizer, record=record, overwrite=True)


def _engine(prepared: Prepared, config: TrainConfig, world: int) -> Any:
    if config.framework not in prepared.variant.frameworks():
        lacking = [
            path
            for path, c in prepared.variant.walk()
            if c.part.frameworks() and config.framework not in c.part.frameworks()
        ]
        raise TrainingError(
            f"not every part of this variant runs in {config.framework}", field="train.framework", got=lacking
        )
    if config.framework == "jax":
        from vla.training.jax_engine import JaxEngine

        return JaxEngine(prepared.variant, config, prepared.weights)
    from vla.training.torch_engine import TorchEngine

    return TorchEngine(prepared.variant, config, prepared.weights)


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that gets the number of a signal that asks to stop.

    Ctrl-C, SIGTERM, SIGHUP (the terminal is gone), SIGUSR1 (Slurm: the time is almost up). The same one a second time
    acts at once; another may follow meanwhile, as SIGTERM does when the time is up.
    """
    asked: list[int] = []
    before: dict[int, Any] = {}

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, before[number])

    try:
        for number in (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")):
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup's stays
                before[number] = signal.getsignal(number)
                signal.signal(number, ask)
    except ValueError:  # not the main thread: whoever runs us handles signals
        before.clear()
    try:
        yield asked
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def _place(config: TrainConfig) -> tuple[int, int]:
    """(rank, number of processes).

    Raises:
        TrainingError: one of several processes, started to train together, that would each train alone.
    """
    if config.distributed == "none":
        name = "WORLD_SIZE" if config.framework == "torch" else "JAX_NUM_PROCESSES"
        if os.environ.get(name, "1") != "1":
            raise TrainingError(
                "this is one of several processes, and each would train alone", field="train.distributed",
                got=f"none, {name}={os.environ[name]}", expected="ddp or fsdp",
                fix=f"add --distributed ddp or fsdp, or unset {name}",
            )  # fmt: skip
        return 0, 1
    if config.framework == "jax":
        from vla.training.jax_devices import join

        return join(config)
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def _nothing() -> Iterator[None]:
    yield
