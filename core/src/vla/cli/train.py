"""`vla train`: a variant or a model directory, a dataset, and a run directory."""

from __future__ import annotations

import os
from pathlib import Path

from attrs import evolve

from vla.cli import console
from vla.errors import SettingsError
from vla.training.config import TrainConfig

OUT = "runs/train"


def train(
    model: str = "",
    /,
    data: tuple[str, ...] = (),
    out: Path = Path(OUT),
    head: str = "",
    tokenizer: str = "",
    backbone: str = "",
    robot: str = "",
    type: str = "",
    preset: str = "",
    set: tuple[str, ...] = (),
    recipe: str = "",
    fit_data: bool = False,
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
        model: a variant file, the folder of one, or a model directory or run to fine-tune. Or give parts (--head ki),
            --type or --recipe.
        data: a dataset folder in LeRobot's format, a hub name in the local cache, or PART:PATH. Repeated it is a
            mixture, in which every frame counts alike, or with weights: --data A:0.7 --data B:0.3.
        out: the run directory: run.json, checkpoints/, metrics.jsonl and, at the end, model/.
        head: train a variant of this head, e.g. ki, flow, ar, made for the data as with --fit-data.
        tokenizer: its prompt format and action codec, e.g. fast, binning, paligemma.
        backbone: its vision-language model, e.g. paligemma.
        robot: its adapter between the robot's data and the model, e.g. plain, droid.
        type: train a model type: pi0, pi05, pi0_fast, pi05_ki.
        preset: sizes for every part that has a preset of this name, and for the spec: tiny, small.
        set: path=value, any setting of the variant, e.g. spec.action_dim=7, or of the data, e.g.
            data.cameras='["base_0_rgb=top"]' (of a mixture: data.1.stride=2 for the second); may be repeated.
        recipe: a known configuration by name, or a recipe file; options given here win over it. On a MODEL it sets
            robot, shapes, settings and training, and no part.
        fit_data: read widths, cameras, rate and robot from the data, and set what follows from them: shapes, which
            camera is which, the length of prompts and, without weights, of chunks. What --set says wins. A MODEL keeps
            every shape that can hold the data; what cannot stay is added to --reinit.
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
    from vla.refit import names_of
    from vla.settings import split_sets
    from vla.training.asked import Asked
    from vla.training.loop import train as run
    from vla.training.saved_run import read_run

    of_variant, of_data = split_sets(set, "data")
    saved = read_run(out) if resume or resume_step is not None else None
    typed = {
        "model": model, "--type": type, "--preset": preset, "--set": set, "--recipe": recipe, "--reinit": reinit,
        "--stats": stats, "--head": head, "--tokenizer": tokenizer, "--backbone": backbone, "--robot": robot,
        "--fit-data": fit_data,
    }  # fmt: skip
    if saved is not None:
        saved.check_typed({name: value for name, value in typed.items() if name != "--stats"})
        start, source = None, mixture_table(data, of_data) if data else None
    else:
        if not data and (resume or resume_step is not None):
            what = "this folder does not say what its run is made of"
            fix = "start one: vla train MODEL --data DATA --out RUN; of a run that older versions made, name both again"
            raise SettingsError(what, field="--out", got=str(out), fix=fix)
        if not data:
            fix = "--data FOLDER, or --data tabletop; demonstrations of your own: vla record --help"
            raise SettingsError("no data is named", field="--data", fix=fix)
        source = mixture_table(data, of_data)
        parts = {"head": head, "tokenizer": tokenizer, "backbone": backbone, "robot": robot}
        asked = Asked(model, parts, type, preset, of_variant, recipe, names_of(reinit), fit_data)
        start, fit = asked.start(source, console.note)
        if fit and "spec.max_token_len" not in of_variant:
            config = evolve(config, fit_lengths=True)
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
