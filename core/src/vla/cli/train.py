"""`vla train`: a variant or a model directory, a dataset, and a run directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vla.cli import console
from vla.errors import SettingsError
from vla.training.config import TrainConfig


def train(
    model: str = "",
    /,
    data: str = "",
    out: Path = Path("runs/train"),
    type: str = "",
    preset: str = "",
    set: tuple[str, ...] = (),
    recipe: str = "",
    stats: Path | None = None,
    resume: bool = False,
    resume_step: int | None = None,
    overwrite: bool = False,
    allow_change: bool = False,
    config: TrainConfig = TrainConfig(),  # noqa: B008 (frozen)
) -> int:
    """Train a policy on demonstrations.

    Args:
        model: a variant file, the folder of one, or a model directory to fine-tune. Or give --type or --recipe.
        data: a dataset folder in LeRobot's format, a hub name in the local cache, or PART:PATH.
        out: the run directory: checkpoints/, metrics.jsonl and, at the end, model/.
        type: train a model type: pi0, pi05, pi0_fast, pi05_ki.
        preset: sizes for every part that has a preset of this name, and for the spec: tiny, small.
        set: path=value, any setting of the variant, e.g. spec.action_dim=7, or of the data, e.g.
            data.cameras='["base_0_rgb=top"]'; may be repeated.
        recipe: a known configuration by name, or a recipe file; options given here win over it.
        stats: a norm_stats.json to use instead of statistics of the data.
        resume: go on from the newest checkpoint in --out.
        resume_step: go on from the checkpoint of this step.
        overwrite: forget the run that is in --out.
        allow_change: resume although data or settings differ; fine-tune on data that names another robot.
        config: the run.
    """
    from vla.datasets import source_table
    from vla.settings import split_sets
    from vla.training.loop import train as run

    if not data:
        fix = "--data FOLDER, or --data tabletop; demonstrations of your own: vla record --help"
        raise SettingsError("no data is named", field="--data", fix=fix)
    given = None
    if stats is not None:
        from vla.transforms.stats import load_stats

        given = load_stats(stats)
    of_variant, of_data = split_sets(set, "data")
    result = run(
        _start(model, type, preset, of_variant, recipe), source_table(data, of_data), out=out, config=config,
        stats=given, resume=resume, resume_step=resume_step, overwrite=overwrite, allow_change=allow_change,
    )  # fmt: skip
    if result.interrupted:
        console.note(f"stopped at step {result.step}; saved: {result.checkpoint}")
        return 128 + (result.signal or 2)
    console.note(f"trained {result.step} steps; the model is in {result.model}")
    return 0


def main(argv: list[str]) -> int:
    """The verb. Exit status: 0 done, 130 or 143 stopped by a signal (and saved)."""
    import os

    # Before PyTorch starts its threads: waiting threads that sleep instead of spinning. On two cores with busy
    # neighbours a step of the tiny KI policy took 0.6 s instead of 1.5 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    named = _value_of(argv, "--recipe")
    defaults = {}
    if named:
        from vla.training.recipes import read_recipe

        defaults["config"] = read_recipe(named).config
    status = console.call(train, "train", argv, defaults)
    if status >= 128:
        console.note(f"go on with: vla train {_again(argv)}")
    return status


def _start(model: str, type: str, preset: str, set: Mapping[str, Any], recipe: str) -> Any:
    """What training starts from: a path, or a variant composed here."""
    from vla.compose import build

    if sum(map(bool, (model, type, recipe))) != 1:
        got = (
            ", ".join(filter(None, [model, type and f"--type {type}", recipe and f"--recipe {recipe}"]))
            or "none of them"
        )
        fix = "vla train --type pi05_ki --preset tiny --data DATA"
        raise SettingsError("name one thing to train: a variant, --type or --recipe", field="model", got=got, fix=fix)
    if recipe:
        from vla.training.recipes import read_recipe

        return read_recipe(recipe).build(preset=preset or None, set=set)
    if type:
        return build(type=type, preset=preset or None, set=set)
    if preset or set:
        if (Path(model) / "model.safetensors").exists():
            raise SettingsError(
                "the shapes of a trained model are fixed", field="--set", got=model, fix="leave out --preset and --set"
            )
        return build(base=model, preset=preset or None, set=set)
    return model


def _value_of(argv: list[str], option: str) -> str:
    """The value of an option before the options are parsed, whose defaults depend on it; "" without one."""
    found = ""
    for i, word in enumerate(argv):
        if word == option and i + 1 < len(argv) and not argv[i + 1].startswith("--"):
            found = argv[i + 1]
        if word.startswith(option + "="):
            found = word.partition("=")[2]
    return found


def _again(argv: list[str]) -> str:
    """The words that go on from the newest checkpoint, which is not the one that this command began with."""
    import shlex

    words: list[str] = []
    value = False  # whether the word at hand belongs to an option that is left out
    for word in argv:
        name = word.partition("=")[0].replace("_", "-")
        if not value and name not in ("--resume", "--overwrite", "--resume-step"):
            words.append(word)
        value = not value and name == "--resume-step" and "=" not in word
    return shlex.join([*words, "--resume"])
