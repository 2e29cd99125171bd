"""`vla stats`: normalisation statistics of a dataset, exactly, and what is odd about them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vla.cli import console


def stats(
    data: str,
    /,
    model: str = "",
    robot: str = "",
    set: tuple[str, ...] = (),
    horizon: int = 0,
    out: Path = Path("norm_stats.json"),
) -> int:
    """Mean, deviation and 1st and 99th percentile of states and actions, as a model sees them; no image is decoded.

    Actions are those of all chunks, after the robot's conversions and delta actions, without the repeated actions past
    the end of an episode. The quantiles are exact. openpi reads the file too.

    Args:
        data: a dataset folder in LeRobot's format, a hub name in the local cache, or PART:PATH.
        model: a variant file, or the folder of one, that the statistics are for.
        robot: the robot adapter; default: that of the model, else of the dataset, else plain.
        set: path=value, any setting of the variant, e.g. spec.action_horizon=16, or of the data, e.g.
            data.state_key=state; may be repeated.
        horizon: actions per chunk; default: that of the variant.
        out: the file to write, or a folder for norm_stats.json.
    """
    from vla.datasets import open_dataset
    from vla.errors import StoreError
    from vla.settings import split_sets
    from vla.transforms.stats import FILE, findings, report, save_stats, stats_of, summarise

    target = out / FILE if out.is_dir() else out
    if (target.parent / "model.safetensors").exists():
        fix = (
            "--out norm_stats.json; then fine-tune with them: "
            f"vla train {target.parent} --data {data} --stats norm_stats.json"
        )
        raise StoreError(
            "statistics are part of a trained model and stay as they are", field="--out", got=str(out), fix=fix
        )
    of_variant, of_data = split_sets(set, "data")
    dataset = open_dataset(data, of_data)
    variant = variant_of(model, robot, of_variant, dataset)
    steps = horizon or variant.spec.action_horizon
    summaries = summarise(dataset, variant, steps)
    info, adapter, norm = dataset.info, variant.parts["robot"], variant.spec.norm
    names = {"state": info.state_names, "actions": info.action_names}
    title = (
        f"{len(dataset)} frames in {len(dataset.episodes)} episodes; {summaries['actions'].count} actions in chunks of "
        f"{steps}; robot {adapter.part.name}"
    )
    columns = ("dim", "name", "min", "q01", "mean", "std", "q99", "max", "below + above")
    console.show(
        console.table(
            console.escape(title), columns, [[console.escape(c) for c in row] for row in report(summaries, names)]
        )
    )
    found = findings(summaries, norm)
    for line in found:
        console.note(f"look: {line}")
    about = {
        "source": info.source,
        "frames": len(dataset),
        "horizon": steps,
        "robot": adapter.table(),
        "counts": {key: s.count for key, s in summaries.items()},
        "min": {key: s.min.tolist() for key, s in summaries.items()},
        "max": {key: s.max.tolist() for key, s in summaries.items()},
        "findings": found,
    }
    console.note(f"wrote {save_stats(stats_of(summaries, dataset), target, about)}")
    return 0


def variant_of(model: str, robot: str, set: Mapping[str, Any], dataset: Any) -> Any:
    """The variant that the statistics are for, with the adapter that training would take."""
    from vla.compose import build
    from vla.training.prepare import for_robot_of

    variant = build(base=model or None, robot=robot or None, set=set)
    if not robot:
        variant = for_robot_of(variant, dataset, console.note)
    if not robot and not model and variant.parts["robot"].part.name == "plain":
        console.note("robot adapter: plain (the dataset names none that is installed)")
    return variant


def main(argv: list[str]) -> int:
    """The verb."""
    return console.call(stats, "stats", argv)
