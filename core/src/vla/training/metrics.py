"""Where the numbers of a run go: a JSONL file always, a progress line, and listeners asked for by name.

A listener is a callable `(event: str, record: dict) -> None`. Events: `start`, `step`, `validation`, `bad_step`,
`bad_frame`, `checkpoint`, `note`, `end`. Records hold plain values; numbers that are not finite become null in the
file.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vla import hooks, registry
from vla.errors import PartError, SettingsError, StoreError
from vla.files import open_own, write_text
from vla.reading import MB, parse_json, read_text

Listener = Callable[[str, Mapping[str, Any]], None]
FILE = "metrics.jsonl"
MOST_METRICS = 1024 * MB
WALL_CLOCK = ("samples_per_s", "data_wait", "seconds_left")  # what two runs of the same steps need not agree on


def check_metrics(path: Path) -> None:
    """Refuse a file in the place of ours that another program wrote.

    Raises:
        StoreError: it is a link, no regular file, or does not hold records of ours.
    """
    if not os.path.lexists(path):
        return
    with open_own(path) as file:
        file.seek(0)
        head = file.readline(1 << 16)
    if head and not head.startswith('{"event": "'):
        fix = f"choose another --out, or move it away: mv {path} {path}.mine"
        raise StoreError("a file is in the way that vla did not write", field=str(path), got=head[:60], fix=fix)


class Jsonl:
    """One JSON object a line. The file of a resumed run becomes that of a run which nobody interrupted.

    Apart from that one's are then only the fields in `WALL_CLOCK`, the path in `checkpoint` when the run has moved, and
    a `start` or `note` that says something new. A full disk costs no record while the process lives: what could not be
    written waits in memory and goes with the next one.
    """

    def __init__(self, path: Path, resume_step: int):
        self.path = path
        lines = _until(path, resume_step) if resume_step and path.exists() else []
        self.said = {_words(json.loads(line)) for line in lines}
        write_text(path, "".join(line + "\n" for line in lines), "the records of the run")
        self.file = open_own(path)
        self.waiting: deque[str] = deque(maxlen=100_000)
        self.failing = False

    def __call__(self, event: str, record: Mapping[str, Any]) -> str:
        """Append one record; gives what to tell a person when that fails and did not before, else ""."""
        if self.file.closed:  # after `end`
            return ""
        line = {"event": event, **plain(record)}
        if event not in ("start", "note") or _words(line) not in self.said:
            self.waiting.append(json.dumps(line, allow_nan=False) + "\n")
        problem = self._write()
        last = event == "end"
        if last:
            self.file.close()
        if not problem or (self.failing and not last):
            self.failing = bool(problem)
            return ""
        self.failing = True
        rest = f"{len(self.waiting)} records are lost" if last else "records wait in memory until they can"
        return f"{self.path} cannot be written ({problem}); {rest}"

    def sync(self) -> None:
        """Bring what was written to the disk: a checkpoint is about to say that its step was made."""
        with suppress(OSError):  # said by the next record, which cannot be written either
            os.fsync(self.file.fileno())

    def _write(self) -> str:
        handle, whole = self.file.fileno(), 0
        try:
            whole = os.fstat(handle).st_size
            data = "".join(self.waiting).encode()
            while data:
                data = data[os.write(handle, data) :]
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(handle, whole)  # no half line
            return error.strerror or str(error)
        self.waiting.clear()
        return ""


def _until(path: Path, step: int) -> list[str]:
    """The lines that were written before the checkpoint of `step`; its own is written again."""
    lines: list[str] = []
    for line in read_text(path, MOST_METRICS).splitlines():
        try:
            record = json.loads(line)
            event, at = record["event"], int(record["step"])
        except (ValueError, TypeError, LookupError):
            continue  # a line cut short by a kill
        if (event, at) == ("checkpoint", step):
            break
        # `bad_step` counts from 0, and is of the step that was being made
        if at < step or (at == step and event not in ("bad_step", "end")):
            lines.append(line)
    return [line for line in lines if not line.startswith('{"event": "end"')]


def _words(line: Mapping[str, Any]) -> str:
    """A record without its step."""
    return json.dumps({name: value for name, value in line.items() if name != "step"}, sort_keys=True)


def notice(event: str, record: Mapping[str, Any]) -> str:
    """What a person is told of a record whether or not there is a progress line; "": nothing."""
    if event == "bad_step":
        return f"step {record['step']} was not applied (loss or gradient not finite): {record['sample_ids']}"
    return str(record["text"]) if event in ("note", "bad_frame") else ""


def say(event: str, record: Mapping[str, Any]) -> None:
    """The listener in the place of `Progress` when there is no progress line."""
    if text := notice(event, record):
        with suppress(OSError, ValueError):  # a terminal that is gone
            print(text, file=sys.stderr, flush=True)


class Progress:
    """One line on the console: step, losses, learning rate, samples/s, waiting for data, time left."""

    def __init__(self, steps: int, start: int, label: str):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.console = Console(stderr=True)
        columns = (TextColumn(label), BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
        self.bar = Bar(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self.console)
        self.live = self.console.is_terminal
        self.task = self.bar.add_task(label, total=steps, completed=start, text="")
        self.last = time.monotonic()
        if self.live:
            self.bar.start()

    def advance(self, step: int) -> None:
        """Move the bar; cheap."""
        if self.live:
            self.bar.update(self.task, completed=step)

    def __call__(self, event: str, record: Mapping[str, Any]) -> None:
        """Show a record. Without a terminal: a plain line at most every 10 s."""
        if event == "step":
            text = _line(record)
            if self.live:
                self.bar.update(self.task, completed=record["step"], text=text)
            elif time.monotonic() - self.last > 10:
                self.last = time.monotonic()
                left = record.get("seconds_left")
                rest = f", {left:.0f} s left" if left is not None else ""
                self.console.print(
                    f"step {record['step']}: {text}{rest}", highlight=False, markup=False, soft_wrap=True
                )
        elif event == "validation":
            self._say(f"validation at step {record['step']}: " + _line(record))
        elif text := notice(event, record):
            self._say(text)
        elif event == "end" and self.live:
            self.bar.stop()

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def check_listeners(names: tuple[str, ...]) -> None:
    """Refuse a listener that cannot be opened, before the run touches anything.

    Raises:
        SettingsError: an unknown name, or a package that is not installed.
    """
    for name in names:
        if name not in LISTENERS:
            raise SettingsError("no such listener", field="train.listeners", got=name, expected=", ".join(LISTENERS))
        packages = LISTENERS[name][1]
        if not any(find_spec(package) for package in packages):
            fix = f'pip install "vla-core[{name}]"'
            raise SettingsError(
                "this listener needs a package that is not installed", field="train.listeners", got=name, fix=fix
            )


def open_listeners(names: tuple[str, ...], out: Path, config: Mapping[str, Any]) -> list[Listener]:
    """The listeners asked for by name, and the installed hooks (`vla.hooks.vla_training`), if there are any."""
    found: list[Listener] = [LISTENERS[name][0](out, config) for name in names]
    return found + [partial(_to_hook, item) for item in registry.listed(registry.HOOKS)]


def _to_hook(item: Any, event: str, record: Mapping[str, Any]) -> None:
    for answer in hooks.ask_one(item, "vla_training", event=event, record=record):
        if answer.problem:
            raise PartError(answer.problem)


def read_metrics(out: str | Path, event: str = "step") -> list[dict[str, Any]]:
    """The records of one kind of a run, in order (for plots and tests)."""
    path = Path(out).expanduser() / FILE
    if not path.exists():
        return []
    records = [parse_json(line, path) for line in read_text(path, MOST_METRICS).splitlines() if line.endswith("}")]
    return [r for r in records if r.get("event") == event]


def _tensorboard(out: Path, config: Mapping[str, Any]) -> Listener:
    """Either package writes without PyTorch and TensorFlow."""
    if find_spec("tensorboardX"):
        from tensorboardX import SummaryWriter as Writer
    else:
        from tensorboard.summary import Writer
    writer = Writer(str(out / "tensorboard"))

    def listen(event: str, record: Mapping[str, Any]) -> None:
        for name, value in _numbers(event, record).items():
            writer.add_scalar(name, value, record["step"])
        if event == "end":
            writer.close()

    return listen


def _trackio(out: Path, config: Mapping[str, Any]) -> Listener:
    import trackio

    trackio.init(project=os.environ.get("TRACKIO_PROJECT", "vla"), name=out.name, config=dict(config))
    return _log_to(trackio)


def _wandb(out: Path, config: Mapping[str, Any]) -> Listener:
    import wandb

    wandb.init(
        project=os.environ.get("WANDB_PROJECT", "vla"), name=out.name, config=dict(config), dir=str(out), resume="allow"
    )
    return _log_to(wandb)


def _log_to(module: Any) -> Listener:
    def listen(event: str, record: Mapping[str, Any]) -> None:
        if numbers := _numbers(event, record):
            module.log(numbers, step=record["step"])
        if event == "end":
            module.finish()

    return listen


# name -> (opens it, packages of which one must be there)
LISTENERS: dict[str, tuple[Callable[[Path, Mapping[str, Any]], Listener], tuple[str, ...]]] = {
    "tensorboard": (_tensorboard, ("tensorboard", "tensorboardX")),
    "trackio": (_trackio, ("trackio",)),
    "wandb": (_wandb, ("wandb",)),
}


def _numbers(event: str, record: Mapping[str, Any]) -> dict[str, float]:
    if event not in ("step", "validation"):
        return {}
    prefix = "train" if event == "step" else "validation"
    return {f"{prefix}/{k}": v for k, v in record.items() if k != "step" and isinstance(v, int | float)}


def _line(record: Mapping[str, Any]) -> str:
    words = []
    for name, value in record.items():
        if name.startswith("loss") or name.startswith("action_error_mean"):
            words.append(f"{name.removeprefix('loss/')} {value:.4f}" if value is not None else f"{name} ?")
    for name, form in (("lr", "lr {:.1e}"), ("samples_per_s", "{:.0f} samples/s"), ("data_wait", "data wait {:.0%}")):
        if name in record:
            words.append(form.format(record[name]))
    for name, form in (("samples_cut", "{} samples cut"), ("batches_without_targets", "{} batches without targets")):
        if record.get(name):
            words.append(form.format(record[name]))
    return "  ".join(words)


def plain(value: Any) -> Any:
    """A value as JSON can hold it: arrays as lists, numbers that are not finite as None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
