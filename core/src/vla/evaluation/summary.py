"""Evaluations as a folder: results.json, a self-contained report.html, and videos of successes and failures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vla.evaluation import video
from vla.evaluation.results import Evaluation, compare
from vla.evaluation.rollout import Clip
from vla.files import atomic_folder
from vla.report import html
from vla.report.plots import interval_bars

REPORT, RESULTS, VIDEOS = "report.html", "results.json", "videos"
KIND = "report"  # of the folder, in its manifest


def save_report(
    folder: str | Path, evaluations: Sequence[Evaluation], clips: Sequence[Clip] = (), *, overwrite: bool = False
) -> Path:
    """Write the folder, atomically; gives the path of the report. The first evaluation is the policy in question.

    Raises:
        StoreError: the folder is taken or cannot be written.
    """
    with atomic_folder(folder, KIND, overwrite=overwrite) as temp:
        results = {"evaluations": [e.to_dict() for e in evaluations]}
        (temp / RESULTS).write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
        if clips:
            (temp / VIDEOS).mkdir()
        for clip in clips:
            outcome = "success" if clip.episode.success else "failure"
            name = f"episode-{clip.episode.index:03d}-{outcome}.mp4"
            (temp / VIDEOS / name).write_bytes(video.encode(video.clip_frames(clip), clip.hz))
        (temp / REPORT).write_text(report_page(evaluations, clips))
    return Path(folder).expanduser() / REPORT


def report_page(evaluations: Sequence[Evaluation], clips: Sequence[Clip] = ()) -> str:
    """The report as one HTML file."""
    first = evaluations[0]
    sections = [html.Section("Success", success_body(evaluations)), html.Section("Per task", task_body(first))]
    if clips:
        sections.append(html.Section("Episodes", video_body(clips)))
    sections.append(html.Section("Every episode", episode_body(evaluations)))
    low, high = first.interval
    return html.page(
        f"{first.policy} in {first.env}",
        f"{len(first.episodes)} episodes, closed loop, {_execution(first)}. Model {first.digest[:12] or 'unnamed'}.",
        sections,
        [(f"{first.rate:.0%}", "success"), (f"{low:.0%} to {high:.0%}", "95 % Wilson interval")],
    )


def success_body(evaluations: Sequence[Evaluation]) -> str:
    """Bars with intervals, and paired comparisons with the first evaluation."""
    rows = [(name_of(e), e.rate, *e.interval, f"{e.successes} of {len(e.episodes)}") for e in evaluations]
    body = html.figure(interval_bars(rows, x="successful episodes, with 95 % Wilson interval"))
    first = evaluations[0]
    lines = []
    for other in evaluations[1:]:
        found = compare(first, other)
        p = f"{found.p:.2g}" if found.p >= 1e-4 else "below 0.0001"
        lines.append((name_of(other), found.better, found.worse, p))
    if lines:
        body += html.text("The same episodes for all, so they can be compared one by one (exact McNemar test):")
        columns = ("against", f"only {name_of(first)} succeeds", "only the other succeeds", "p")
        body += html.table(columns, lines)
    return body


def name_of(evaluation: Evaluation) -> str:
    """The policy's name, and what it was told and shown if not as usual."""
    shuffled, swapped = evaluation.instruction == "shuffled", evaluation.pictures == "swapped"
    notes = ["instruction shuffled"] * shuffled + ["pictures of another scene"] * swapped
    return f"{evaluation.policy} ({', '.join(notes)})" if notes else evaluation.policy


def task_body(evaluation: Evaluation) -> str:
    """The table per task."""
    rows = [(t, f"{k} of {n}", f"{k / n:.0%}", f"{lo:.0%} to {hi:.0%}") for t, k, n, (lo, hi) in evaluation.tasks()]
    return html.table(("task", "successes", "rate", "95 % interval"), rows)


def video_body(clips: Sequence[Clip], columns: int = 2) -> str:
    """All clips in one film, failures marked."""
    frames = video.montage(clips, columns)
    text = "All cameras, and the instruction the policy was given. The edge turns green on success, red on failure."
    return html.video(video.encode(frames, clips[0].hz), text)


def episode_body(evaluations: Sequence[Evaluation]) -> str:
    """Seeds and outcomes of every episode of every evaluation."""
    first = evaluations[0]
    columns = ["seed", "task", "instruction", *(name_of(e) for e in evaluations)]
    rows = []
    for i, episode in enumerate(first.episodes):
        outcomes = [f"{'yes' if e.episodes[i].success else 'no'}, {e.episodes[i].steps} steps" for e in evaluations]
        rows.append((episode.seed, episode.task, episode.prompt, *outcomes))
    return html.table(columns, rows)


def _execution(evaluation: Evaluation) -> str:
    return f"{evaluation.execute} steps of each chunk executed" if evaluation.execute else "whole chunks executed"
