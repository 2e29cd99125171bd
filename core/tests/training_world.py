"""A very small world for training tests: a dataset in memory, a model of a few thousand weights, no files.

Also a script: `python training_world.py OUT STEPS torch|jax [--resume]` trains in it (the kill test starts it as a process). More words: `ddp` or `fsdp`, `accumulate`, `validate`.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from vla.compose import build
from vla.training.checkpoints import checkpoint_steps
from vla.training.config import TrainConfig
from vla.training.loader import Loader
from vla.training.metrics import FILE
from vla.training.order import split_episodes
from vla.training.prepare import Prepared, _frames

SHAPES = {
    "spec.image_size": [16, 16], "spec.cameras": ["base_0_rgb"], "spec.action_horizon": 3, "spec.action_dim": 4, "spec.state_dim": 4,
    "spec.max_token_len": 16, "backbone.vision.depth": 1, "backbone.vision.width": 16, "backbone.vision.mlp_dim": 16,
    "backbone.vision.num_heads": 2, "backbone.llm.depth": 1, "backbone.llm.width": 16, "backbone.llm.mlp_dim": 16,
    "backbone.llm.num_heads": 2, "backbone.llm.head_dim": 8, "head.width": 16, "head.mlp_dim": 16,
}  # fmt: skip


class World:
    """Five episodes of nine frames; the action is a function of the state."""

    info = SimpleNamespace(
        robot="", state_dim=4, action_dim=4, action_names=("x", "y", "z", "g"), cameras={"base_0_rgb": (16, 16)}
    )

    def __init__(self, seed: int = 0, bad: dict[int, str] | None = None):
        rng = np.random.default_rng(seed)
        self.episodes = [range(9 * e, 9 * e + 9) for e in range(5)]
        self.images = rng.integers(0, 255, (45, 16, 16, 3), dtype=np.uint8)
        self.state = rng.normal(size=(45, 4)).astype(np.float32)
        self.bad = bad or {}
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 45

    def sample(self, index: int, horizon: int, cameras: Any = None, images: bool = True) -> dict[str, Any]:
        self.asked.append(index)
        actions = np.tile(np.tanh(self.state[index]), (horizon, 1))
        if index in self.bad:
            actions[0, 1] = np.nan
        return {
            "images": {"base_0_rgb": self.images[index]},
            "state": self.state[index],
            "actions": actions,
            "prompt": "go",
        }

    def digest(self) -> str:
        return "world"


class Group:
    """As `vla.transforms.Group`, with nothing to do."""

    codec_dim = 0  # not known: as in the spec

    @staticmethod
    def inputs(sample: dict[str, Any]) -> dict[str, Any]:
        return {
            "images": sample["images"],
            "image_masks": {c: True for c in sample["images"]},
            "state": sample["state"],
            "tokenized_prompt": np.array([5, 6, 7, 0], np.int32),
            "tokenized_prompt_mask": np.array([True, True, True, False]),
            "token_ar_mask": np.zeros(4, np.int32),
            "token_loss_mask": np.zeros(4, bool),
            "actions": sample["actions"],
            "actions_mask": np.ones(sample["actions"].shape, bool),
        }

    @staticmethod
    def outputs(sample: dict[str, Any]) -> dict[str, Any]:
        return {"actions": np.asarray(sample["actions"]) * 10}  # the robot's units are ten times ours


class WorldPrepared(Prepared):
    """Has no statistics and no tokenizer to write."""

    def write_assets(self, folder: Path) -> None:
        (folder / "norm_stats.json").write_text("{}")


def small_variant(type: str = "pi0", **sets: Any) -> Any:
    """A pi0 of about 80,000 weights, almost all in the embedding."""
    return build(type=type, preset="tiny", set={**SHAPES, **sets})


def prepared(config: TrainConfig, world: World | None = None, variant: Any = None) -> Prepared:
    """What `vla.training.prepare.prepare` gives, for the world."""
    world = world or World()
    train, val = split_episodes(config.seed, 5, config.val_episodes)
    variant = variant or small_variant()
    tokenizer = SimpleNamespace(codec=None, save=lambda folder: None)
    frames = _frames(world, train), _frames(world, val)
    return WorldPrepared(variant, world, None, tokenizer, Group, None, *frames, world.digest())


def config(steps: int, **values: Any) -> TrainConfig:
    """Small and quick."""
    base = {
        "steps": steps,
        "batch_size": 4,
        "lr": 1e-3,
        "lr_warmup": 2,
        "save_every": 5,
        "log_every": 1,
        "progress": False,
    }
    return TrainConfig(**{**base, **values})


def survive(folder: Path, framework: str, kills: int, env: dict[str, str], check: Callable[[Path], None]) -> str:
    """Train 20 steps in processes that are killed, `kills` times in all: up to 4 steps after they began and 0.1 s more.

    The wait is counted in steps, so that the kills fall everywhere on a busy machine too. A run that was done before its
    kill is checked and another begins. `check(out)` looks at every finished run.

    Returns:
        What happened, in words.
    """
    rng, landed, finished, cut, places = random.Random(0), 0, 0, 0, set()

    def start(out: Path) -> subprocess.Popen[str]:
        again = ["--resume"] if checkpoint_steps(out) else []
        command = [sys.executable, __file__, str(out), "20", framework, *again]
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout and process.stderr
        assert process.stdout.readline() == "training\n", process.stderr.read()
        return process

    def steps(out: Path) -> int:
        return (out / FILE).read_text().count('"event": "step"')

    while landed < kills:
        out = folder / f"run{finished}"
        process = start(out)
        until = steps(out) + rng.randrange(5)
        while steps(out) < until and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.communicate()
        if process.returncode == -signal.SIGKILL:
            landed += 1
            cut += any((*out.rglob(".tmp-*"), *out.rglob(".old-*")))
            places.add(steps(out))
        else:  # it was done before the kill
            check(out)
            finished += 1
    process = start(folder / f"run{finished}")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    check(folder / f"run{finished}")
    words = f"after {len(places)} different numbers of steps; {cut} left a half-written folder"
    return f"{framework}: {landed} kills in {finished + 1} runs, {words}; every run ended as an uninterrupted one"


def ids_seen(out: Path) -> list[list[int]]:
    """The samples that each step was made with, by step; whoever made a step again must have seen the same."""
    seen: dict[int, list[int]] = {}
    for line in (out / "ids.jsonl").read_text().splitlines(keepends=True):
        if line.endswith("\n"):  # else cut short by a kill
            step, ids = json.loads(line)
            assert seen.setdefault(step, ids) == ids, f"step {step} was made with other samples after a resume"
    return [seen[k] for k in range(len(seen))]


class Witness(Loader):
    """Writes down which samples the engine gets."""

    out: Path

    def stream(self, start: int, stop: int) -> Any:
        with (self.out / "ids.jsonl").open("a") as file:
            for batch in super().stream(start, stop):
                file.write(json.dumps([batch.step, batch.ids.tolist()]) + "\n")
                file.flush()
                yield batch


def main(argv: list[str]) -> None:
    """Saves often and trains slowly, so that a kill is likely to fall into either; says so when it begins."""
    from vla.training import loop

    out, steps, framework = Path(argv[1]), int(argv[2]), argv[3]
    mode = next((word for word in argv if word in ("ddp", "fsdp")), "none")
    more: dict[str, Any] = {"accumulate": 2} if "accumulate" in argv else {}
    more |= {"val_episodes": 1, "val_every": 3, "lr_decay_steps": 6} if "validate" in argv else {}
    made = config(steps, framework=framework, save_every=2, distributed=mode, **more)
    loop.prepare = lambda *a: prepared(made)  # type: ignore[assignment]
    if mode == "none":
        Witness.out = out
        loop.Loader = Witness  # type: ignore[misc]

    def listen(event: str, record: Any) -> None:
        if event == "start":
            print("training", flush=True)
        if event == "step":
            time.sleep(0.02)

    loop.train("world", "world", out=out, config=made, resume="--resume" in argv, listeners=[listen])


if __name__ == "__main__":
    main(sys.argv)
