"""The page that `vla demo` ends with: what was composed, what it learned, how it acts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen

from vla.errors import DecodeError
from vla.evaluation.results import Evaluation
from vla.evaluation.rollout import Clip
from vla.evaluation.summary import name_of, success_body, task_body, video_body
from vla.files import atomic_folder
from vla.report import html
from vla.report.plots import line_plot, small_multiples

LEARNS = 200  # steps below which nobody should expect success
KIND = "demo"  # of the folder, in its manifest
FRAMES = 3  # recorded frames whose chunks are compared


@frozen(eq=False)
class Story:
    """What the page tells.

    Attributes:
        history: records of training (`vla.training.metrics`) in order, each with its "event".
        evaluations: of the trained policy, of it with shuffled instructions, of it with the pictures of another scene,
            and of the baselines.
        unseen: demonstrations that were not trained on.
    """

    variant: Any
    data: Any
    unseen: Any
    policy: Any
    history: Sequence[dict[str, Any]]
    evaluations: Sequence[Evaluation]
    clips: Sequence[Clip]
    steps: int


def write_story(folder: Path, story: Story) -> Path:
    """Write page and figures' numbers, atomically; gives the page's path."""
    chunks = compare_chunks(story)
    with atomic_folder(folder, KIND, overwrite=True) as temp:
        curves = [r for r in story.history if r["event"] == "step"]
        results = {
            "steps": story.steps,
            "evaluations": [e.to_dict() for e in story.evaluations],
            "action_error": chunks["error"],
            "curves": curves,
        }
        (temp / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
        (temp / "index.html").write_text(story_page(story, chunks))
    return folder / "index.html"


def story_page(story: Story, chunks: dict[str, Any]) -> str:
    """The page as one HTML file."""
    first, told_otherwise, shown_otherwise, *baselines = story.evaluations
    best = max(baselines, key=lambda e: e.rate)
    low, high = first.interval
    n = len(first.episodes)
    sections = [
        html.Section("It acts", _acts(story, first, told_otherwise, shown_otherwise)),
        html.Section("Success, counted", success_body(story.evaluations) + task_body(first)),
        html.Section("What was composed", _composed(story.variant)),
        html.Section("Who sees whom", _layout(story.variant)),
        html.Section("What it learned from", _data(story)),
        html.Section("How it learned", _curves(story)),
        html.Section("Chunks: recorded, predicted, and through the FAST tokenizer", chunks["body"]),
        html.Section("Do it again", _again(story)),
    ]
    demonstrations = len(story.data.episodes)
    lede = f"{story.variant.name}: {demonstrations} demonstrations, {story.steps} training steps, {n} episodes."
    if story.steps < LEARNS:
        lede += " A quick run: enough to see that everything works, too little to learn the task."
    return html.page(
        "A policy composed by name",
        lede,
        sections,
        [
            (f"{first.rate:.0%}", f"success ({low:.0%} to {high:.0%})"),
            (f"{told_otherwise.rate:.0%}", "when told another block"),
            (f"{shown_otherwise.rate:.0%}", "when shown another scene"),
            (f"{best.rate:.0%}", f"best baseline: {best.policy}"),
        ],
    )


def _acts(story: Story, first: Evaluation, told: Evaluation, shown: Evaluation) -> str:
    width = story.policy.model.stats["state"].mean.size
    words = html.text(
        f"The policy sees {len(story.variant.spec.cameras)} cameras, {width} numbers about its arm and one sentence. "
        "No scene of these episodes occurs in a demonstration. "
        f"It executes {first.execute} steps of each predicted chunk and looks again.",
        f"With the instruction that decides success it succeeds in {first}. Told the name of another block that is on "
        f"the table, with success still judged by the first instruction, it succeeds in {told}. Shown the pictures "
        f"of another scene, it succeeds in {shown}. Where these are far less, it listens and it looks.",
    )
    return (video_body(story.clips) if story.clips else "") + words


def _composed(variant: Any) -> str:
    from rich.console import Console

    from vla.cli.show import count_parameters, parts_tree

    counts, _ = count_parameters(variant)
    terminal = Console(width=110, record=True, file=_Nowhere())
    terminal.print(parts_tree(variant, counts))
    total = f"{sum(counts.values()) / 1e6:.1f} million parameters. " if counts else ""
    return html.text(
        f"{total}Every line is a plugin with an entry point of its own; replacing one is one option of vla build."
    ) + html.code(terminal.export_text())


def _layout(variant: Any) -> str:
    from vla.pictures import mask_svg

    layout = variant.layout()
    words = html.text(
        "This table is all that knowledge insulation is: action tokens look at images and prompt through a stopped "
        "gradient, and nothing looks at the FAST targets but they themselves. Masks, positions, caches and gradient "
        "routes are derived from it."
    )
    return words + html.code(str(layout)) + html.figure(mask_svg(layout), paper=True)


def _data(story: Story) -> str:
    info = story.data.info
    cameras = ", ".join(f"{name} {h} x {w}" for name, (h, w) in info.cameras.items())
    rows = [
        ("episodes, frames", f"{len(story.data.episodes)}, {len(story.data)}"),
        ("instructions", ", ".join(info.tasks)),
        ("cameras", cameras),
        ("state, action, rate", f"{info.state_dim}, {info.action_dim} numbers at {info.hz:g} Hz"),
        ("digest", story.data.digest()[:16]),
    ]
    strip = []
    for episode in story.data.episodes[:4]:
        seen = story.data.sample(episode[0], 1)
        strip.append(np.concatenate([np.asarray(i) for i in seen["images"].values()], 1))
    return html.table(("", ""), rows) + html.image(_png(strip), "The first frame of four demonstrations, both cameras.")


def _curves(story: Story) -> str:
    steps = [r for r in story.history if r["event"] == "step"]
    names = sorted({k for r in steps for k in r if k.startswith("loss/")})
    plots = [
        line_plot({n: [(r["step"], r[n]) for r in steps if n in r]}, x="step", title=_title(n), zero=True, width=400)
        for n in names
    ]
    last = steps[-1]
    speed = f"{last['samples_per_s']:.0f} samples per second at the end" if "samples_per_s" in last else ""
    words = "Both losses in one pass: cross-entropy of the FAST tokens trains the backbone, flow matching the expert."
    return small_multiples(plots, columns=2) + html.text(f"{words} {speed}.")


def _title(name: str) -> str:
    return {"loss/tokens": "FAST tokens (nats)", "loss/actions": "flow matching"}.get(name, name.removeprefix("loss/"))


def compare_chunks(story: Story) -> dict[str, Any]:
    """Chunks of frames that were not trained on: recorded, predicted, and recorded ones sent through the tokenizer.

    Gives "body" (HTML) and "error": mean absolute error of the prediction per action dim, over all frames.
    """
    policy, data = story.policy, story.unseen
    horizon = story.variant.spec.action_horizon
    frames = [e[0] for e in data.episodes]
    rows = [data.sample(i, horizon) for i in frames]
    answers = policy.infer_batch(rows, seeds=list(range(len(rows))))
    recorded = np.stack([np.asarray(r["actions"], np.float64) for r in rows])
    predicted = np.stack([a["actions"] for a in answers])
    real = np.stack([~np.asarray(r.get("actions_is_pad", np.zeros(horizon, bool))) for r in rows])
    error = np.abs(predicted - recorded)[real].mean(0)
    names = list(data.info.action_names) or [str(d) for d in range(len(error))]
    body = html.text(
        "The first frames of demonstrations that were not trained on. Dots are what the expert did, the line is what "
        "the policy would do from there."
    )
    for i in range(min(FRAMES, len(rows))):
        through = _through_tokens(policy, rows[i])
        plots = []
        for d, name in enumerate(names):
            series = {"policy": list(enumerate(predicted[i, :, d]))}
            if through is not None:
                series["FAST"] = list(enumerate(through[:, d]))
            series["recorded"] = list(enumerate(recorded[i, :, d]))
            plots.append(line_plot(series, title=name, width=250, height=190, dots=["recorded"], span=0.4))
        body += f"<p><b>{escape(str(rows[i]['prompt']))}</b></p>" + small_multiples(plots, columns=4)
    table = [(name, f"{e:.3f}") for name, e in zip(names, error, strict=True)]
    body += html.table(("action", "mean absolute error of the policy"), table)
    return {"body": body, "error": dict(zip(names, map(float, error), strict=True))}


def _through_tokens(policy: Any, row: dict[str, Any]) -> np.ndarray | None:
    """A recorded chunk encoded and decoded again, in the robot's units; None when the answer was cut off."""
    if policy.model.tokenizer.codec is None:
        return None
    seen = policy.group.inputs(row)
    tokens = seen["tokenized_prompt"][seen["tokenized_prompt_mask"]]
    try:
        return np.asarray(policy.group.outputs({"tokens": tokens, "state": seen["state"]})["actions"])
    except DecodeError:
        return None


def _again(story: Story) -> str:
    model = story.policy.model.folder
    rates = ", ".join(f"{name_of(e)} {e}" for e in story.evaluations)
    return html.code(
        f"vla show {model}\nvla sample {model} --data tabletop\n"
        f"vla eval {model} --env tabletop --preset tiny --execute {story.evaluations[0].execute} "
        "--against shuffled --against swapped"
    ) + html.text(f"Numbers of this page, also in results.json: {rates}.")


def _png(frames: Sequence[np.ndarray], scale: int = 2) -> bytes:
    import io

    from PIL import Image

    page = np.concatenate([np.pad(f, ((2, 2), (2, 2), (0, 0)), constant_values=255) for f in frames], 1)
    big = np.repeat(np.repeat(page, scale, 0), scale, 1)
    file = io.BytesIO()
    Image.fromarray(big).save(file, "PNG")
    return file.getvalue()


class _Nowhere:
    """A file that forgets: the console only records."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass
