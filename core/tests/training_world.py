"""A very small world for training tests: a dataset in memory, a model of a few thousand weights, no files.

Also a script: `python training_world.py OUT STEPS torch|jax [--resume]` trains in it (the kill test starts it as a process).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from vla.compose import build
from vla.training.config import TrainConfig
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


def collate(rows: Any) -> dict[str, Any]:
    def stack(values: Any) -> Any:
        if isinstance(values[0], dict):
            return {k: stack([v[k] for v in values]) for k in values[0]}
        return np.stack([np.asarray(v) for v in values])

    return {k: stack([r[k] for r in rows]) for k in rows[0]}


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
    return WorldPrepared(variant, world, None, tokenizer, Group, collate, None, *frames, world.digest())


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


def main(argv: list[str]) -> None:
    """Saves often and trains slowly, so that a kill is likely to fall into either; says so when it begins."""
    from vla.training import loop

    out, steps, framework = Path(argv[1]), int(argv[2]), argv[3]
    mode = next((word for word in argv if word in ("ddp", "fsdp")), "none")
    made = config(steps, framework=framework, save_every=2, distributed=mode)
    loop.prepare = lambda *a: prepared(made)  # type: ignore[assignment]

    def listen(event: str, record: Any) -> None:
        if event == "start":
            print("training", flush=True)
        if event == "step":
            time.sleep(0.02)

    loop.train("world", "world", out=out, config=made, resume="--resume" in argv, listeners=[listen])


if __name__ == "__main__":
    main(sys.argv)
