"""Fail at every file-system call: what `test_faults.py` starts, with `fs_shim.c` between it and the file system.

    python fault_world.py PART FOLDER [EVERY]

A part is a list of operations. Each is done once as a measure, then again and again from the same beginning, in forked
processes that end, or find the disk full, at the k-th call, for every k. After each fault what was whole before must be
whole, and doing the operation again must give, byte for byte, the folder that an undisturbed one gives.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from vla import files, store
from vla.errors import StoreError
from vla.manifest import verify_folder
from vla.training import checkpoints
from vla.training.metrics import WALL_CLOCK

KILL, FULL = 0, 1
KILLED, FINISHED, REFUSED, BROKEN = 137, 0, 3, 4
shim = ctypes.CDLL(None)


def in_child(act: Callable[[], None], folder: Path, k: int, mode: int) -> int:
    """Act in a forked process whose k-th call below `folder` fails; gives how that ended."""
    sys.stdout.flush()
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = BROKEN
    try:
        shim.shim_arm(str(folder).encode(), ctypes.c_long(k), mode)
        act()
        shim.shim_off()
        status = FINISHED
    except StoreError as error:
        shim.shim_off()
        status = REFUSED if re.search("disk is full|No space left", str(error)) else BROKEN
        if status == BROKEN:
            traceback.print_exc()
    except BaseException:
        shim.shim_off()
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def tree(folder: Path) -> dict[str, str]:
    """Path -> digest of every file below, without what the clock decides and what was said about faults."""
    found = {}
    for path in sorted(folder.rglob("*")):
        data = path.read_bytes() if path.is_file() else b""
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in data.splitlines()]
            kept = [line for line in lines if line["event"] != "note"]
            data = json.dumps([{n: v for n, v in line.items() if n not in WALL_CLOCK} for line in kept]).encode()
        if path.name != ".lock":
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(data).hexdigest()
    return found


class Operation:
    """What is done to a folder, and what must hold after a fault in it.

    Args:
        begin: makes the folder as it is before.
        act: the operation; done again after a fault it ends as it would have ended.
        check: that what was whole before is whole.
        recover: what the next process begins with.
        clean: whether a full disk leaves the folder as it was, at once (a run keeps the steps it has saved).
    """

    def __init__(
        self, name: str, begin: Callable[[Path], None], act: Callable[[Path], None],
        check: Callable[[Path], None] = lambda folder: None, recover: Callable[[Path], None] = lambda folder: None,
        clean: bool = True,
    ):  # fmt: skip
        self.name, self.begin, self.act, self.check, self.recover, self.clean = name, begin, act, check, recover, clean

    def run(self, where: Path, every: int = 1) -> str:
        """All faults; gives in words how many there were."""
        start, self.place = where / "start", where / "out"
        start.mkdir(parents=True)
        self.begin(start)
        shutil.copytree(start, self.place)
        assert self.fail(-1, KILL) == FINISHED, self.name
        self.recover(self.place)
        before, whole = tree(start), tree(self.place)
        calls = counted = refused = 0
        for mode in (KILL, FULL):
            for k in range(0, 100_000 if mode == KILL else calls, every):
                shutil.rmtree(self.place)
                shutil.copytree(start, self.place)
                status = self.fail(k, mode)
                words = f"{self.name}: {'killed' if mode == KILL else 'disk full'} at call {k}"
                if mode == KILL and status == FINISHED:
                    calls = k
                    break
                assert status in (FINISHED, KILLED if mode == KILL else REFUSED), f"{words}: status {status}"
                if status == REFUSED and self.clean:
                    assert tree(self.place) == before, words
                counted, refused = counted + (mode == KILL), refused + (status == REFUSED)
                self.recover(self.place)
                self.check(self.place)
                assert self.fail(-1, KILL) == FINISHED, f"{words}: not the second time"
                self.recover(self.place)
                after = tree(self.place)
                assert after == whole, f"{words}: {sorted(set(after.items()) ^ set(whole.items()))}"
        shutil.rmtree(where)
        return f"{self.name}: {counted} kills, {refused} full disks"

    def fail(self, k: int, mode: int) -> int:
        """Act in a process of its own, with a fault."""
        return in_child(lambda: self.act(self.place), self.place, k, mode)


# ---- a training run's folder ----------------------------------------------------------------------------------------


def training_world() -> Any:
    """The module `training_world.py`."""
    path = Path(__file__).with_name("training_world.py")
    spec = importlib.util.spec_from_file_location("training_world", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_a_run(framework: str) -> list[Operation]:
    """Saving with pruning, exporting over an older model, forgetting, sweeping: with an engine's own state."""
    from vla.training import loop
    from vla.training.loader import Loader, Samples

    world = training_world()
    config = world.config(3, framework=framework)
    prepared = world.prepared(config)
    engine = loop._engine(prepared, config, 1)
    samples = Samples(prepared.dataset, prepared.group.inputs, prepared.variant.spec.action_horizon, 0)
    loader = Loader(samples, prepared.train_index, prepared.variant, config)
    states, weights = {}, {}
    for batch in loader.stream(0, 3):
        engine.step(batch.micro, 1e-3, 0.9)
        step = batch.step + 1
        states[step] = {part: {n: a.copy() for n, a in arrays.items()} for part, arrays in engine.state().items()}
        weights[step] = {name: array.copy() for name, array in engine.weights().items()}

    def save(out: Path, step: int) -> None:
        checkpoints.save_checkpoint(out, step, states[step], {"config": config.to_dict()}, prepared.write_assets)

    def prune(out: Path) -> None:
        with suppress(StoreError):  # the loop says it and goes on
            checkpoints.prune(out, 2, 0)

    def export(out: Path, step: int) -> None:
        store.save_model(out / "model", prepared.variant, weights[step], None, None, record={}, overwrite=True)

    def begin(out: Path) -> None:
        save(out, 1)
        save(out, 2)
        export(out, 1)

    def check(out: Path) -> None:
        steps = checkpoints.checkpoint_steps(out)
        assert steps[-1] >= 2, steps
        for step in steps:
            found = checkpoints.load_checkpoint(out, step)
            assert found.arrays.keys() == states[step].keys()
            for part, arrays in found.arrays.items():
                for name, array in arrays.items():
                    assert array.tobytes() == states[step][part][name].tobytes(), (step, part, name)
        verify_folder(out / "model")
        acting = store.read_weights(out / "model" / "model.safetensors")
        assert any(all(acting[n].tobytes() == w[n].tobytes() for n in w) for w in (weights[1], weights[3]))

    def save_and_prune(out: Path) -> None:
        if 3 not in checkpoints.checkpoint_steps(out):  # what a resumed run does
            save(out, 3)
        prune(out)

    def forget(out: Path) -> None:
        checkpoints.forget(out, [s for s in checkpoints.checkpoint_steps(out) if s > 1])

    def leave(out: Path) -> None:
        """What kills leave: half a checkpoint, one that was being removed, a model moved aside for none yet."""
        begin(out)
        save(out, 3)
        steps = out / "checkpoints"
        half, gone = steps / ".tmp-step-00000004-0123abcd", steps / ".gone-step-00000001-0123abcd"
        shutil.copytree(steps / "step-00000003", half)
        (half / "manifest.json").unlink()
        (steps / "step-00000001").rename(gone)
        (gone / "train_state.json").unlink()
        (out / "model").rename(out / ".old-model-0123abcd")

    sweep = checkpoints.sweep
    return [
        Operation("save and prune", begin, save_and_prune, check, sweep),
        Operation("export", begin, lambda out: export(out, 3), check, sweep),
        Operation("forget", begin, forget, lambda out: None, sweep),
        Operation("sweep", leave, sweep, lambda out: None),
    ]


def of_a_whole_run(framework: str) -> list[Operation]:
    """Training itself: started, killed or without space, resumed to the end."""
    from vla.training import loop

    world = training_world()

    def act(out: Path) -> None:
        config = world.config(3, framework=framework, save_every=1, keep_last=1, val_episodes=1, val_every=2)
        loop.prepare = lambda *a: world.prepared(config)  # type: ignore[assignment]
        loop.train("world", "world", out=out, config=config, resume=bool(checkpoints.checkpoint_steps(out)))

    return [Operation("whole run", lambda out: None, act, clean=False)]


# ---- other folders and files ----------------------------------------------------------------------------------------


def of_data() -> list[Operation]:
    """A dataset over an older one, a fitted tokenizer, and a single file."""
    import numpy as np

    from vla.codecs import write_codec
    from vla.datasets import DatasetInfo, create_dataset

    info = DatasetInfo(cameras={"front": (8, 8)}, state_dim=2, action_dim=2, hz=10.0)

    def record(out: Path, value: int) -> None:
        with create_dataset(out / "data", info, video=False, overwrite=True) as writer:
            for episode in range(2):
                for i in range(3):
                    state = np.full(2, value + i, np.float32)
                    image = np.full((8, 8, 3), 10 * value + episode, np.uint8)
                    writer.add({"images": {"front": image}, "state": state, "action": state, "prompt": "go"})
                writer.end_episode()

    def codec(out: Path, value: int) -> None:
        with files.atomic_folder(out / "codec", "tokenizer", overwrite=True) as temp:
            write_codec(temp, "toy", {"value": value}, {"table": np.full(5, value)})

    def one(out: Path, value: int) -> None:
        files.write_text(out / "deep" / "stats.json", json.dumps({"value": value}))

    def operation(name: str, act: Callable[[Path, int], None]) -> Operation:
        return Operation(name, lambda out: act(out, 1), lambda out: act(out, 2))

    return [operation("record", record), operation("tokenizer", codec), operation("file", one)]


def main(argv: list[str]) -> None:
    """Runs a part; prints one line per operation."""
    part, where, every = argv[1], Path(argv[2]), int(argv[3]) if len(argv) > 3 else 1
    name, _, framework = part.partition("-")
    operations = {"run": of_a_run, "whole": of_a_whole_run}[name](framework) if framework else of_data()
    for operation in operations:
        print(operation.run(where / re.sub(r"\W+", "-", operation.name), every), flush=True)


if __name__ == "__main__":
    main(sys.argv)
