"""Hostile inputs, one in a forked child each: what it did, how long it computed, how much memory it took.

A child inherits what its parent has imported, so that a case costs milliseconds; an audit hook notes what it touches.
Outcomes: `refused` (one `VlaError`), `accepted`, `traceback`, `hang`, `memory`, `crash`, `outside` (it wrote, started or
connected to something that is not its own), `escape` (control characters reached the terminal), `long` (a message
beyond any screen).
"""

import contextlib
import gc
import io
import json
import os
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import attrs
import numpy as np

import vla
from vla.cli import main

# Computing, and waiting for something that never comes. Promised are 5 s; a CPU second of a busy machine is worth less.
CPU_SECONDS, WALL_SECONDS = 10, 60
MEMORY = 500 << 20
BAD = ("traceback", "hang", "memory", "crash", "outside", "escape", "long")
FOREIGN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "pickle.find_class",
    "socket.connect",
    "os.fork",
)
CHANGES = ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.symlink", "os.truncate")


@attrs.frozen
class Case:
    """One input: bend a copy of `base` in the lab, then do something with it."""

    kind: str
    name: str
    base: str  # a folder of the lab
    bend: Callable[[Path], None]
    act: Callable[[Path], object]


@attrs.frozen
class Result:
    """What came of a case."""

    case: Case
    outcome: str
    said: str
    seconds: float
    peak: int

    def __str__(self) -> str:
        said = " / ".join(self.said.split("\n"))[:300]
        return f"{self.outcome} {self.seconds:.1f}s {self.peak >> 20}MB [{self.case.kind}] {self.case.name}: {said}"


def run(case: Case, lab: Path, room: Path) -> Result:
    """The case in a forked child, in an empty folder `room`."""
    place = room / "it"
    shutil.copytree(lab / case.base, place, symlinks=True)
    note = room / "note.json"
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(case, place, room, note)
    outcome = None
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() - began > WALL_SECONDS:
            outcome = "hang"
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.002)
    found = json.loads(note.read_text()) if note.is_file() and note.stat().st_size else {}
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    outcome = outcome or found.get("outcome") or ("hang" if found.get("began") else "crash")
    return Result(case, outcome, found.get("said", ""), found.get("seconds", 0.0), found.get("peak", 0))


def _child(case: Case, place: Path, room: Path, note: Path) -> None:
    """Never returns."""
    touched: list[str] = []
    try:
        os.setsid()
        gc.freeze()  # what the parent has made is not this case's to look through
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        size, here = (int(word) * 4096 for word in Path("/proc/self/statm").read_text().split()[:2])
        resource.setrlimit(resource.RLIMIT_AS, (size + 4 * MEMORY, size + 4 * MEMORY))
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        note.write_text('{"began": true}')
        case.bend(place)
        began = _cpu()
        resource.setrlimit(resource.RLIMIT_CPU, (int(began) + 3 * CPU_SECONDS,) * 2)
        _watch(touched, room)
        outcome, said = _act(case, place)
        seconds = _cpu() - began
        peak = max(0, _peak() - here)
        if touched:
            outcome, said = "outside", "; ".join(touched[:3])
        elif outcome in ("refused", "accepted"):
            if seconds > CPU_SECONDS:
                outcome = "hang"
            if peak > MEMORY:
                outcome = "memory"
        note.write_text(json.dumps({"outcome": outcome, "said": said[:2000], "seconds": seconds, "peak": peak}))
    except BaseException as error:
        with contextlib.suppress(Exception):
            note.write_text(json.dumps({"outcome": "crash", "said": repr(error)[:2000]}))
    finally:
        os._exit(0)


def _act(case: Case, place: Path) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    outcome, said = "accepted", ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = case.act(place)
            outcome = "refused" if status == 2 else "accepted"
        except vla.VlaError as error:
            outcome, said = "refused", str(error)
        except MemoryError as error:
            outcome, said = "memory", repr(error)
        except BaseException as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "vla" in f.filename]
            where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
            outcome, said = "traceback", f"{type(error).__name__}: {str(error)[:300]} @ {where}"
    shown = out.getvalue() + err.getvalue()
    if outcome in ("refused", "accepted"):
        if any(ord(c) < 32 and c not in "\n\t" or c == "\x7f" or "\x80" <= c < "\xa0" for c in shown):
            outcome, said = "escape", repr(shown[-500:])
        elif len(shown) > 50_000 or len(said) > 50_000:
            outcome = "long"
    return outcome, said or shown[-2000:]


def _watch(touched: list[str], room: Path) -> None:
    import sys

    fine = (str(room), "/dev/null", "/proc/self", "/dev/shm")

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = any(c in str(mode or "") for c in "wax+") or (
                isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            if writes and isinstance(path, (str, bytes)) and not os.path.abspath(os.fsdecode(path)).startswith(fine):
                touched.append(f"wrote {os.fsdecode(path)}")
        elif event in FOREIGN:
            touched.append(f"{event} {str(arguments)[:100]}")
        elif event in CHANGES and isinstance(arguments[0], (str, bytes)):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            touched.extend([f"{event} {path}"] if not path.startswith(fine) else [])

    sys.addaudithook(hook)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# ---- the lab: whole and honest folders, to be bent ------------------------------------------------------------------

SMALL = {
    "spec.image_size": [32, 32], "spec.cameras": ["base_0_rgb"], "spec.action_horizon": 4, "spec.action_dim": 4,
    "spec.state_dim": 4, "backbone.llm.depth": 1, "backbone.llm.width": 16, "backbone.llm.mlp_dim": 16,
    "backbone.llm.num_heads": 2, "backbone.llm.head_dim": 8, "backbone.vision.depth": 1, "backbone.vision.width": 16,
    "backbone.vision.mlp_dim": 16, "backbone.vision.num_heads": 2,
}  # fmt: skip
MODELS = {
    "flow": ({"type": "pi05"}, {"head.width": 16, "head.mlp_dim": 16}),
    "ar": ({"type": "pi0_fast"}, {}),
    "ki": ({"type": "pi05_ki"}, {"head.actions.width": 16, "head.actions.mlp_dim": 16}),
    "binning": ({"type": "pi0_fast", "tokenizer": "binning"}, {}),
}
OBSERVATION = {
    "images": {"base_0_rgb": np.zeros((32, 32, 3), np.uint8)},
    "state": np.zeros(4, np.float32),
    "prompt": "touch the red block",
}


def build_lab(lab: Path) -> Path:
    """Tiny models, datasets in three layouts, codecs, statistics, a recipe, weights of others."""
    from vla.datasets import DatasetInfo, create_dataset
    from vla.policy import untrained
    from vla.store import save_model
    from vla.tokenizer import open_tokenizer
    from vla.transforms.stats import Stats

    half = np.full(4, 0.5)
    stats = {key: Stats(mean=half * 0, std=half, q01=-half, q99=half) for key in ("state", "actions")}
    time = np.linspace(0, 3, 4)[None, :, None]
    chunks = np.sin(time + np.random.default_rng(1).uniform(0, 6, (64, 1, 4)))
    for name, (parts, sets) in MODELS.items():
        variant = vla.build(**parts, preset="tiny", set={**SMALL, **sets})
        policy = untrained(variant, stats, open_tokenizer(variant.parts["tokenizer"], variant.spec).fit(chunks), seed=3)
        record = {"cameras": ["base_0_rgb"], "steps": 3, "source": "nowhere", "data": "0" * 64}
        weights = policy.runner.weights()
        save_model(lab / name, variant, weights, policy.model.stats, policy.model.tokenizer, record=record)
    info = DatasetInfo(cameras={"base_0_rgb": (32, 32)}, state_dim=4, action_dim=4, hz=10.0)
    for name, video in (("pictures", False), ("films", True)):
        with create_dataset(lab / name, info, video=video) as writer:
            for step in range(12):
                image = np.full((32, 32, 3), 10 * step, np.uint8)
                sample = {"images": {"base_0_rgb": image}, "state": half * step, "action": half, "prompt": "push"}
                writer.add(sample)
                if step % 6 == 5:
                    writer.end_episode()
    (lab / "nothing").mkdir()
    return lab


def warm(lab: Path) -> None:
    """Import, in the parent, what the children would otherwise each import."""
    import vla.interop.openpi
    import vla.interop.orbax
    import vla.interop.paligemma
    import vla.training.recipes
    from vla.datasets import open_dataset

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for name in MODELS:
            vla.open(lab / name).infer(OBSERVATION)
            main(["show", str(lab / name)])
        for name in ("pictures", "films"):
            open_dataset(lab / name).sample(0, 4)
        main(["list"])
        main(["build", "--type", "nothing"])
