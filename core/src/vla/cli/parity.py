"""`vla parity`: PyTorch and JAX on the same weights and the same input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vla.cli import console


def parity(
    model: str,
    /,
    data: str = "",
    set: tuple[str, ...] = (),
    batch: int = 2,
    seed: int = 0,
    tolerance: float = 1e-5,
    gradient_tolerance: float = 1e-4,
    all: bool = False,
) -> int:
    """Run both frameworks in float32 on the same input and noise, and name the first part that differs.

    Every part is compared in the order of the pass (vision, projector, embedder, layers, final norm), then losses,
    gradients of every weight, and the sampled actions or tokens. Exit status 1 when anything differs.

    Args:
        model: a model directory, or a variant (file or folder), which then gets random weights.
        data: a dataset to take observations from; default: random ones.
        set: path=value: a setting of the data, e.g. data.cameras='["base_0_rgb=top"]', or of the robot adapter, e.g.
            robot.cameras='["base_0_rgb=top"]'; may be repeated.
        batch: observations.
        seed: of noise, of the choice of frames, and of random weights.
        tolerance: largest difference of an output, as a share of its largest magnitude.
        gradient_tolerance: the same for the gradient of a weight.
        all: list every comparison, not the worst of each kind.
    """
    import time

    from vla.errors import SettingsError
    from vla.policy import with_robot
    from vla.settings import grouped_sets
    from vla.testing.frameworks import NEEDS, installed, start_weights
    from vla.testing.parity import compare, run
    from vla.training.start import open_start

    if batch < 1:
        raise SettingsError("at least one observation is compared", field="--batch", got=batch)
    sets = grouped_sets(set, ("data", "robot"))
    if sets["data"] and not data:
        raise SettingsError("settings of data that is not named", field="--set", fix="add --data DATA")
    start = open_start(model)
    variant, weights, stats, tokenizer = start.variant, start.weights, start.stats, start.tokenizer
    variant = with_robot(variant, sets["robot"])
    for framework in NEEDS:
        if not installed(framework):
            raise SettingsError(
                "both frameworks are needed",
                field=framework,
                got="not installed",
                fix=f"pip install 'vla-core[{framework}]'",
            )
        if framework not in variant.frameworks():
            lacking = [p for p, c in variant.walk() if c.part.frameworks() and framework not in c.part.frameworks()]
            raise SettingsError(f"not every part of this variant runs in {framework}", field=model, got=lacking)
    inputs, grammar = _inputs(variant, stats, tokenizer, data, batch, seed, sets["data"])
    if weights is None:
        console.note("no weights here: random ones")
        weights = start_weights(variant, seed)
    runs = []
    for framework in NEEDS:
        began = time.perf_counter()
        runs.append(run(framework, variant, weights, inputs, grammar=grammar))
        console.note(f"{framework}: {time.perf_counter() - began:.1f} s")
    torch, jax = runs
    found = compare(jax, torch, outputs=tolerance, gradients=gradient_tolerance)
    console.show(_table(variant, found, all))
    for name, value in torch.losses.items():
        print(f"loss {name}: torch {value.mean():.7g}, jax {jax.losses[name].mean():.7g}")
    if wrong := [row for row in found if not row.fine]:
        first = wrong[0]
        print(f"the frameworks differ; first in: {first.what} {first.name} (by {first.error:.2e}, {len(wrong)} in all)")
        return 1
    print(f"the frameworks agree in all {len(found)} comparisons")
    return 0


def _inputs(
    variant: Any, stats: Any, tokenizer: Any, data: str, batch: int, seed: int, settings: Mapping[str, Any]
) -> tuple[Any, Any]:
    """(observation, actions, draws, noise) for both, and the grammar of a token head with a tokenizer."""
    import numpy as np

    from vla.testing.batches import random_batch

    if not data:
        return random_batch(variant, batch=batch, seed=seed), None
    from vla.datasets import open_dataset
    from vla.draws import sampling_noise, training_draws
    from vla.errors import SettingsError
    from vla.tokenizer import open_tokenizer
    from vla.transforms import batch as batched
    from vla.transforms import build_group

    if stats is None:
        raise SettingsError(
            "a variant without statistics cannot read data",
            field="--data",
            got=data,
            fix="give a trained model directory",
        )
    dataset, spec, head = open_dataset(data, settings), variant.spec, variant.parts["head"]
    tokenizer = tokenizer or open_tokenizer(variant.parts["tokenizer"], spec, None)
    group = build_group(variant, stats=stats, tokenizer=tokenizer)
    rng = np.random.default_rng(seed)
    frames = rng.choice(len(dataset), min(batch, len(dataset)), replace=False)
    rows = [group.inputs(dataset.sample(int(i), spec.action_horizon)) for i in frames]
    obs, actions = batched(rows, spec, variant.parts["backbone"].offers.get("vocab_size"))
    draws, noise = (draw(head, spec, len(frames), rng) for draw in (training_draws, sampling_noise))
    grammar = tokenizer.grammar(spec.action_horizon, group.codec_dim) if head.offers.get("gives") == "tokens" else None
    return (obs, actions, draws, noise), grammar


def _table(variant: Any, found: list[Any], every: bool) -> Any:
    """The comparisons: all, or every part and the worst of each other kind (and whatever is wrong)."""
    worst = {row.what: row for row in sorted(found, key=lambda row: row.error / (row.bound or 1e-30))}
    rows = [row for row in found if every or row.what != "gradient" or row is worst["gradient"] or not row.fine]
    cells = [
        (
            row.what,
            console.escape(row.name),
            f"{row.error:.1e}",
            f"{row.bound:.0e}",
            "" if row.fine else "[red]differs[/]",
        )
        for row in rows
    ]
    columns = ("", "", "difference", "bound", "")
    return console.table(f"{console.escape(variant.name)}: JAX against PyTorch, float32", columns, cells)


def main(argv: list[str]) -> int:
    """The verb."""
    return console.call(parity, "parity", argv)
