"""`vla train`: a variant or a model directory, a dataset, and a run directory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vla.cli import console
from vla.errors import SettingsError
from vla.training.config import TrainConfig

OUT = "runs/train"


def train(
    model: str = "",
    /,
    data: tuple[str, ...] = (),
    out: Path = Path(OUT),
    type: str = "",
    preset: str = "",
    set: tuple[str, ...] = (),
    recipe: str = "",
    reinit: tuple[str, ...] = (),
    stats: str = "",
    resume: bool = False,
    resume_step: int | None = None,
    overwrite: bool = False,
    allow_change: bool = False,
    yes_random: bool = False,
    config: TrainConfig = TrainConfig(),  # noqa: B008 (frozen)
) -> int:
    """Train a policy on demonstrations, from new weights or from those of a model.

    A model keeps its weights through any --set that is in no weight's shape: horizon, token length, cameras, image size
    where the position embedding can be resampled, normalisation, robot, prompt format, sampler. What a run is made of
    is stored in its folder before the first step: `vla train --out RUN --resume` needs nothing else.

    Args:
        model: a variant file, the folder of one, or a model directory or run to fine-tune. Or give --type or --recipe.
        data: a dataset folder in LeRobot's format, a hub name in the local cache, or PART:PATH. Repeated it is a
            mixture, in which every frame counts alike, or with weights: --data A:0.7 --data B:0.3.
        out: the run directory: run.json, checkpoints/, metrics.jsonl and, at the end, model/.
        type: train a model type: pi0, pi05, pi0_fast, pi05_ki.
        preset: sizes for every part that has a preset of this name, and for the spec: tiny, small.
        set: path=value, any setting of the variant, e.g. spec.action_dim=7, or of the data, e.g.
            data.cameras='["base_0_rgb=top"]' (of a mixture: data.1.stride=2 for the second); may be repeated.
        recipe: a known configuration by name, or a recipe file; options given here win over it. On a MODEL it sets
            robot, shapes, settings and training, and no part.
        reinit: weights of MODEL to make anew, by names or beginnings of names, e.g.
            head.action_in_proj,head.action_out_proj; may be repeated.
        stats: normalisation statistics: data (the default: computed from it), base (those of MODEL), or a
            norm_stats.json.
        resume: go on from the newest checkpoint in --out. Other options may be left out, or must agree.
        resume_step: go on from the checkpoint of this step.
        overwrite: forget the run that is in --out.
        allow_change: resume although data or settings differ; fine-tune on data that names another robot.
        yes_random: let LoRA or --freeze keep weights that were never trained.
        config: the run.
    """
    from vla.datasets import mixture_table
    from vla.settings import split_sets
    from vla.training.loop import train as run
    from vla.training.saved_run import read_run

    of_variant, of_data = split_sets(set, "data")
    saved = read_run(out) if resume or resume_step is not None else None
    typed = {
        "model": model, "--type": type, "--preset": preset, "--set": set, "--recipe": recipe, "--reinit": reinit,
        "--stats": stats,
    }  # fmt: skip
    if saved is not None:
        saved.check_typed({name: value for name, value in typed.items() if name != "--stats"})
        start, source = None, mixture_table(data, of_data) if data else None
    else:
        if not data:
            fix = "--data FOLDER, or --data tabletop; demonstrations of your own: vla record --help"
            raise SettingsError("no data is named", field="--data", fix=fix)
        start, source = _start(model, type, preset, of_variant, recipe, reinit), mixture_table(data, of_data)
    result = run(
        start, source, out=out, config=config, stats=stats or None, resume=resume, resume_step=resume_step,
        overwrite=overwrite, allow_change=allow_change, yes_random=yes_random,
        typed={} if saved is not None else {name: value for name, value in typed.items() if value},
    )  # fmt: skip
    if result.interrupted:
        if result.writes:
            console.note(f"stopped at step {result.step}; saved: {result.checkpoint or 'nothing'}")
        return 128 + (result.signal or 2)
    if result.writes:
        console.note(f"trained {result.step} steps; the model is in {result.model}")
    return 0


def main(argv: list[str]) -> int:
    """The verb. Exit status: 0 done, 128 + its number when stopped by a signal (and saved)."""
    # Before PyTorch starts its threads: waiting threads that sleep instead of spinning. On two cores with busy
    # neighbours a step of the tiny KI policy took 0.6 s instead of 1.5 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    defaults = {}
    out = _value_of(argv, "--out") or OUT
    if config := _stored_config(argv, out):
        defaults["config"] = config
    elif named := _value_of(argv, "--recipe"):
        from vla.training.recipes import read_recipe

        defaults["config"] = read_recipe(named).config
    status = console.call(train, "train", argv, defaults)
    if status >= 128:
        import shlex

        console.note(f"go on with: vla train --out {shlex.quote(out)} --resume")
    return status


def _start(model: str, type: str, preset: str, set: Mapping[str, Any], recipe: str, reinit: tuple[str, ...]) -> Any:
    """What training starts from: a path, a variant composed here, or a model with changed settings."""
    from vla.compose import build
    from vla.refit import names_of

    if (not model and not type and not recipe) or (type and (model or recipe)):
        got = (
            ", ".join(filter(None, [model, type and f"--type {type}", recipe and f"--recipe {recipe}"]))
            or "none of them"
        )
        fix = "vla train --type pi05_ki --preset tiny --data DATA"
        raise SettingsError("name one thing to train: a variant, --type or --recipe", field="model", got=got, fix=fix)
    if model:
        return _changed(model, preset, set, recipe, names_of(reinit))
    if reinit:
        fix = "leave out --reinit, or name a model to fine-tune"
        raise SettingsError("without a model all weights are new", field="--reinit", got=",".join(reinit), fix=fix)
    if recipe:
        from vla.training.recipes import read_recipe

        return read_recipe(recipe).build(preset=preset or None, set=set)
    return build(type=type, preset=preset or None, set=set)


def _changed(model: str, preset: str, set: Mapping[str, Any], recipe: str, reinit: tuple[str, ...]) -> Any:
    """A variant or a model, with a recipe and settings on top of its own."""
    if not (preset or set or recipe or reinit):
        return model
    from vla.compose import build, read_variant
    from vla.runs import find_model
    from vla.training.recipes import read_recipe
    from vla.training.start import Changed, is_trained

    base = read_variant(model)
    if recipe:
        variant = read_recipe(recipe).on(base, preset=preset or None, set=set)
    else:
        variant = build(base=base, preset=preset or None, set=set)
    if is_trained(find_model(model)):
        return Changed(model, variant, reinit)
    if reinit:
        raise SettingsError("this variant has no weights: all are new", field="--reinit", got=",".join(reinit))
    return variant


def _stored_config(argv: list[str], out: str) -> TrainConfig | None:
    """The settings of the run that goes on: what its options default to."""
    if "--resume" not in argv and not _value_of(argv, "--resume-step"):
        return None
    from vla.training.saved_run import read_run

    saved = read_run(Path(out).expanduser())
    return saved.train_config() if saved else None


def _value_of(argv: list[str], option: str) -> str:
    """The value of an option before the options are parsed, whose defaults depend on it; "" without one."""
    found = ""
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") != option:
            continue
        if equals:
            found = value
        elif i + 1 < len(argv) and not argv[i + 1].startswith("--"):
            found = argv[i + 1]
    return found
