"""Policies that work: flow, ar and ki trained alike on two tasks of the tabletop, and judged in closed loop.

    export OMP_NUM_THREADS=1
    python benchmarks/study_tabletop.py train lanes pi05_ki                       (once per model type)
    python benchmarks/study_tabletop.py train anywhere pi05_ki --steps 3000 --start runs/study/lanes/pi05_ki/model
    python benchmarks/study_tabletop.py judge lanes anywhere

`lanes` is the easy scene of the demo: touch the named block; every colour has a lane and stands anywhere in it, tables
and lights differ. `anywhere`: the blocks stand anywhere, so the colour has to be found. The same demonstrations, steps,
batch and learning rate for every model type; tiny presets, one CPU thread. `judge` runs every policy and baseline on
the same scenes, which no demonstration shows, and writes results/policies.md, .json and the loss curves.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

import vla
from vla.datasets import open_dataset
from vla.evaluation import MeanAction, NearestNeighbour
from vla.evaluation.summary import name_of
from vla.policy import untrained
from vla.report.plots import line_plot
from vla.training.config import TrainConfig

TYPES = {"pi05": "flow", "pi0_fast": "ar (FAST)", "pi05_ki": "ki"}
EASY = {"part": "tabletop", "preset": "tiny"}
TASKS: dict[str, dict[str, Any]] = {"lanes": EASY, "anywhere": {**EASY, "lanes": False}}
EXECUTE = 4  # steps executed of each chunk
RUNS = Path("runs/study")
RESULTS = Path(__file__).parent / "results"


def demonstrations(task: str) -> Any:
    """Recorded on first use."""
    return open_dataset({**TASKS[task], "episodes": 2000, "noise": 0.3})


def train(task: str, name: str, steps: int, start: str) -> None:
    """One run; its curve and cost are kept beside the model."""
    draws = {"pi05": {"head.draws": 4}, "pi05_ki": {"head.actions.draws": 4}}.get(name, {})
    model = start or vla.build(type=name, robot="tabletop", preset="tiny", set=draws)
    curve: list[dict] = []
    config = TrainConfig(
        steps=steps, batch_size=32, lr=2e-3, precision="bfloat16", ema_decay=0.99, log_every=10, save_every=steps,
        keep_last=1, val_episodes=20, val_every=max(steps // 6, 1), device="cpu",
    )  # fmt: skip
    out, data = RUNS / task / name, demonstrations(task)
    began, cpu = time.perf_counter(), time.process_time()
    vla.train(
        model, data, out=out, config=config, overwrite=True,
        listeners=[lambda event, record: curve.append({"event": event, **_kept(record)})],
    )  # fmt: skip
    minutes = {"minutes": (time.perf_counter() - began) / 60, "cpu_minutes": (time.process_time() - cpu) / 60}
    (out / "study.json").write_text(json.dumps({"steps": steps, "start": start, **minutes, "curve": curve}))


def _kept(record: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k == "step" or k.startswith(("loss", "action_error"))}


def judge(task: str, episodes: int, seed: int) -> tuple[list, dict]:
    """Closed loop: every policy, what it does without its words or eyes, and the baselines."""
    data = demonstrations(task)
    trained = [name for name in TYPES if (RUNS / task / name / "study.json").is_file()]
    studies = {name: json.loads((RUNS / task / name / "study.json").read_text()) for name in trained}
    contestants: list[tuple[str, Any, dict]] = []
    for name in trained:
        policy = vla.open(RUNS / task / name / "model", seed=seed)
        contestants += [(TYPES[name], policy, c) for c in ({}, {"instruction": "shuffled"}, {"pictures": "swapped"})]
    model = policy.model
    contestants += [
        ("baseline", untrained(model.variant, model.stats, model.tokenizer, seed=seed), {}),
        ("baseline", MeanAction(data, EXECUTE), {}),
        ("baseline", NearestNeighbour(data, EXECUTE), {}),
    ]
    found = []
    for label, policy, control in contestants:
        one = vla.evaluate(policy, TASKS[task], episodes=episodes, seed=seed, execute=EXECUTE, num_envs=10, **control)
        found.append((f"{label}: {name_of(one)}", one))
        print(task, found[-1][0], one, flush=True)
    return found, studies


def tables(task: str, found: list, studies: dict) -> list[str]:
    """Lines of Markdown."""
    prompts = sorted({e.prompt for _, one in found for e in one.episodes})
    lines = [f"## {task}", "", _row("policy", "success", "95 % interval (Wilson)", *prompts)]
    lines.append(_row(*["---"] * (3 + len(prompts))))
    for label, one in found:
        low, high = one.interval
        outcomes = [[e.success for e in one.episodes if e.prompt == prompt] for prompt in prompts]
        rate = f"{one.successes} of {len(one.episodes)}, {one.rate:.0%}"
        lines.append(_row(label, rate, f"{low:.0%} to {high:.0%}", *(f"{sum(o)}/{len(o)}" for o in outcomes)))
    lines += ["", _row("model type", "started from", "steps", "CPU minutes", "minutes", "losses at the end")]
    lines.append(_row(*["---"] * 6))
    for name, study in studies.items():
        steps = [r for r in study["curve"] if r["event"] == "step"]
        losses = sorted(k for k in steps[-1] if k.startswith("loss/"))
        last = ", ".join(f"{k.removeprefix('loss/')} {steps[-1][k]:.3f}" for k in losses)
        start, cost = study["start"] or "fresh weights", (f"{study[k]:.1f}" for k in ("cpu_minutes", "minutes"))
        lines.append(_row(name, start.removeprefix("runs/study/"), study["steps"], *cost, last))
    pictures = []
    for name, study in studies.items():
        steps = [r for r in study["curve"] if r["event"] == "step"]
        for key in sorted(k for k in steps[-1] if k.startswith("loss/")):
            file = f"policies/{task}-{name}-{key.removeprefix('loss/')}.svg"
            (RESULTS / "policies").mkdir(exist_ok=True)
            plot = line_plot({key: [(r["step"], r[key]) for r in steps]}, x="step", title=f"{name}: {key}", zero=True)
            (RESULTS / file).write_text(plot + "\n")
            pictures.append(f"![{name}: {key}]({file})")
    return [*lines, "", *pictures, ""]


def outcomes(one: Any) -> dict[str, Any]:
    """An evaluation without what its seeds say already."""
    return {**one.to_dict(), "episodes": [[e.seed, e.prompt, e.success, e.steps] for e in one.episodes]}


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def report(tasks: list[str], episodes: int, seed: int) -> None:
    """Judge these tasks and write the page."""
    load = f"load {os.getloadavg()[0]:.1f}"
    lines = [
        "# Policies that work", "",
        "`benchmarks/study_tabletop.py` (what is trained and judged, and how, is said there). 2,000 demonstrations per "
        f"task, batches of 32, {episodes} episodes each, {EXECUTE} steps executed of each chunk, one CPU thread. "
        f"`minutes` is wall time on a machine shared with other work ({load} while judging).", "",
    ]  # fmt: skip
    record = {}
    for task in tasks:
        found, studies = judge(task, episodes, seed)
        lines += tables(task, found, studies)
        record[task] = {"evaluations": [outcomes(one) for _, one in found], "training": studies}
    (RESULTS / "policies.md").write_text("\n".join(lines))
    (RESULTS / "policies.json").write_text(json.dumps(record) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("train")
    one.add_argument("task", choices=TASKS)
    one.add_argument("name", choices=TYPES)
    one.add_argument("--steps", type=int, default=4000)
    one.add_argument("--start", default="", help="a model directory; default: fresh weights")
    two = verbs.add_parser("judge")
    two.add_argument("tasks", nargs="+", choices=TASKS)
    two.add_argument("--episodes", type=int, default=100)
    two.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.verb == "train":
        train(args.task, args.name, args.steps, args.start)
    else:
        report(args.tasks, args.episodes, args.seed)


if __name__ == "__main__":
    main()
