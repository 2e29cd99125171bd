"""`vla sample`: what a model would do at recorded frames."""

from __future__ import annotations

from typing import Any

from vla.cli import console
from vla.contracts import GUARD


def sample(
    model: str,
    /,
    data: str = "",
    episode: int = 0,
    frame: int = 0,
    prompt: str = "",
    seed: int = 0,
    framework: str = "torch",
    device: str = "",
    num_steps: int = 0,
    temperature: float = 0.0,
    guard: float | None = GUARD,
    set: tuple[str, ...] = (),
    json: bool = False,
) -> int:
    """The chunk of actions of a model for a recorded observation, beside the recorded actions.

    Args:
        model: a model directory.
        data: a dataset: a folder in LeRobot's format, a name, or PART:PATH; default: what the model was trained on.
        episode: which episode.
        frame: which frame of it.
        prompt: another instruction than the recorded one.
        seed: of the noise that sampling starts from.
        framework: torch or jax.
        device: cpu, cuda, ...; default: an accelerator when there is one.
        num_steps: denoising steps of chunk heads; 0: the model's setting.
        temperature: of token heads; 0 is greedy.
        guard: actions further beyond what was recorded than this many times its range are refused; none: none are.
        set: path=value: a setting of the data, e.g. data.cameras='["base_0_rgb=top"]', of the robot adapter
            (robot.NAME=VALUE), or of the head's sampler, e.g. sampling.temperature=1.0; may be repeated.
        json: print JSON.
    """
    import json as text

    import numpy as np

    from vla.datasets import open_dataset, open_recorded
    from vla.errors import DataError
    from vla.policy import open as open_policy
    from vla.settings import grouped_sets

    sets = grouped_sets(set, ("data", "robot", "sampling"))
    policy = open_policy(
        model, framework, device=device or None, num_steps=num_steps or None, temperature=temperature,
        sampling=sets["sampling"], robot=sets["robot"], guard=guard,
    )  # fmt: skip
    dataset = open_dataset(data, sets["data"]) if data else open_recorded(policy.model.record, sets["data"])
    if not 0 <= episode < len(dataset.episodes):
        raise DataError("no such episode", field="--episode", got=episode, expected=f"0 to {len(dataset.episodes) - 1}")
    frames = dataset.episodes[episode]
    if not 0 <= frame < len(frames):
        raise DataError("no such frame", field="--frame", got=frame, expected=f"0 to {len(frames) - 1}")
    seen = dataset.sample(frames[frame], policy.variant.spec.action_horizon)
    if prompt:
        seen = {**seen, "prompt": prompt}
    answer = policy.infer(seen, seed=seed)
    actions, recorded = answer["actions"], np.asarray(seen["actions"], np.float64)
    real = ~np.asarray(seen.get("actions_is_pad", np.zeros(len(recorded), bool)))
    names = list(dataset.info.action_names) or [str(d) for d in range(actions.shape[1])]
    error = np.abs(actions - recorded)[real].mean(0)
    if json:
        record: dict[str, Any] = {
            "prompt": seen["prompt"], "names": names, "actions": actions.tolist(), "recorded": recorded.tolist(),
            "mean_absolute_error": dict(zip(names, error.tolist(), strict=True)), **answer["policy_timing"],
        }  # fmt: skip
        print(text.dumps(record, indent=1))
        return 0
    rows = [
        (str(t), *(f"{a:+.3f} [dim]({r:+.3f})[/]" if real[t] else f"{a:+.3f}" for a, r in zip(*pair, strict=True)))
        for t, pair in enumerate(zip(actions, recorded, strict=True))
    ]
    rows.append(("error", *(f"{e:.3f}" for e in error)))
    title = console.escape(f'"{seen["prompt"]}": actions (recorded)')
    console.show(*console.tables(title, ("step", *map(console.escape, names)), rows))
    console.note(f"{answer['policy_timing']['infer_ms']:.0f} ms in the model")
    return 0


def main(argv: list[str]) -> int:
    """The verb."""
    return console.call(sample, "sample", argv)
