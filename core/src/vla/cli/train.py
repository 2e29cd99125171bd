"""`vla train`: a variant or a model directory, a dataset, and a run directory."""

# No `from __future__ import annotations`: tyro reads the annotations of the function inside `main`.
from pathlib import Path
from typing import Any

from vla.cli import console
from vla.errors import SettingsError


def main(argv: list[str]) -> int:
    """The verb. Exit status: 0 done, 130 or 143 stopped by a signal (and saved)."""
    import os
    from typing import Annotated

    import tyro

    # Before PyTorch starts its threads: waiting threads that sleep instead of spinning. On two cores with busy
    # neighbours a step of the tiny KI policy took 0.6 s instead of 1.5 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from vla.training.config import TrainConfig
    from vla.training.recipes import read_recipe

    named = _value_of(argv, "--recipe")
    recipe_found = read_recipe(named) if named else None
    defaults = recipe_found.config if recipe_found else TrainConfig()

    def train(
        model: Annotated[str, tyro.conf.Positional] = "",
        data: str = "",
        out: Path = Path("runs/train"),
        type: str | None = None,
        preset: str | None = None,
        set: list[str] = [],  # noqa: B006 (tyro wants a plain default; never changed)
        recipe: str | None = None,
        stats: Path | None = None,
        resume: bool = False,
        resume_step: int | None = None,
        overwrite: bool = False,
        allow_change: bool = False,
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = defaults,
    ) -> int:
        """Train a policy on demonstrations.

        Args:
            model: a variant file, the folder of one, or a model directory to fine-tune. Or give --type or --recipe.
            data: a dataset folder in LeRobot's format, a hub name in the local cache, or PART:PATH.
            out: the run directory: checkpoints/, metrics.jsonl and, at the end, model/.
            type: train a model type: pi0, pi05, pi0_fast, pi05_ki.
            preset: sizes for every part that has a preset of this name, and for the spec: tiny, small.
            set: path=value, any setting of the variant, e.g. spec.action_dim=7; may be repeated.
            recipe: a known configuration by name, or a recipe file; options given here win over it.
            stats: a norm_stats.json to use instead of statistics of the data.
            resume: go on from the newest checkpoint in --out.
            resume_step: go on from the checkpoint of this step.
            overwrite: forget the run that is in --out.
            allow_change: resume although data or settings differ.
            config: the run.
        """
        from vla.training.loop import train as run

        if not data:
            raise SettingsError(
                "no data is named", field="--data", fix="--data FOLDER; demonstrations: vla record --help"
            )
        given = None
        if stats is not None:
            from vla.transforms.stats import load_stats

            given = load_stats(stats)
        result = run(
            _start(model, type, preset, set, recipe_found), data, out=out, config=config, stats=given, resume=resume,
            resume_step=resume_step, overwrite=overwrite, allow_change=allow_change,
        )  # fmt: skip
        if result.interrupted:
            console.note(f"stopped at step {result.step}; saved: {result.checkpoint}")
            console.note(f"go on with: vla train {_again(argv)}")
            return 128 + (result.signal or 2)
        console.note(f"trained {result.step} steps; the model is in {result.model}")
        return 0

    return console.call(train, "train", argv)


def _start(model: str, type: str | None, preset: str | None, set: list[str], recipe: Any) -> Any:
    """What training starts from: a path, or a variant composed here."""
    from vla.compose import build

    if sum(map(bool, (model, type, recipe))) != 1:
        got = (
            ", ".join(filter(None, [model, type and f"--type {type}", recipe and f"--recipe {recipe.name}"]))
            or "none of them"
        )
        fix = "vla train --type pi05_ki --preset tiny --data DATA"
        raise SettingsError("name one thing to train: a variant, --type or --recipe", field="model", got=got, fix=fix)
    if recipe is not None:
        return recipe.build(preset=preset, set=set)
    if type is not None:
        return build(type=type, preset=preset, set=set)
    if preset is not None or set:
        if (Path(model) / "model.safetensors").exists():
            raise SettingsError(
                "the shapes of a trained model are fixed", field="--set", got=model, fix="leave out --preset and --set"
            )
        return build(base=model, preset=preset, set=set)
    return model


def _value_of(argv: list[str], option: str) -> str | None:
    for i, word in enumerate(argv):
        if word == option and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(option + "="):
            return word.partition("=")[2]
    return None


def _again(argv: list[str]) -> str:
    import shlex

    words = [w for w in argv if w not in ("--resume", "--overwrite")]
    return shlex.join([*words, "--resume"])
