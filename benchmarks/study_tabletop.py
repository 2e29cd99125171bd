"""Policies that work: flow, ar and ki trained alike on the tabletop's easy task, and judged in closed loop.

    OMP_NUM_THREADS=1 python benchmarks/study_tabletop.py train pi05_ki [--steps 3000]      (once per model type)
    OMP_NUM_THREADS=1 python benchmarks/study_tabletop.py judge runs/study                  (all that were trained)

The same demonstrations, steps, batch and learning rate for every model type; tiny presets, one CPU thread. `judge` runs
every policy and baseline on the same scenes that no demonstration shows, and writes results/policies.json and .md.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import vla
from vla.datasets import open_dataset
from vla.evaluation import MeanAction, NearestNeighbour
from vla.evaluation.summary import name_of
from vla.policy import untrained
from vla.report.plots import line_plot, small_multiples
from vla.training.config import TrainConfig

TYPES = {"pi05": "flow", "pi0_fast": "ar (FAST)", "pi05_ki": "ki"}
TASK = {"part": "tabletop", "preset": "tiny"}
DEMONSTRATIONS = {**TASK, "episodes": 2000, "noise": 0.3}
EXECUTE = 4  # steps executed of each chunk
RESULTS = Path(__file__).parent / "results"


def variant_of(name: str) -> vla.Variant:
    """The tiny variant; several noise draws per observation where there is noise."""
    draws = {"pi05": {"head.draws": 4}, "pi05_ki": {"head.actions.draws": 4}}.get(name, {})
    return vla.build(type=name, robot="tabletop", preset="tiny", set=draws)


def train(name: str, steps: int, folder: Path) -> None:
    """One run; its curve and cost are kept beside the model."""
    curve: list[dict] = []
    config = TrainConfig(
        steps=steps, batch_size=32, lr=2e-3, precision="bfloat16", ema_decay=0.99, log_every=10, save_every=steps,
        keep_last=1, val_episodes=20, val_every=max(steps // 6, 1), device="cpu",
    )  # fmt: skip
    began, cpu = time.perf_counter(), time.process_time()
    vla.train(
        variant_of(name), open_dataset(DEMONSTRATIONS), out=folder / name, config=config, overwrite=True,
        listeners=[lambda event, record: curve.append({"event": event, **record})],
    )  # fmt: skip
    cost = {
        "steps": steps,
        "minutes": (time.perf_counter() - began) / 60,
        "cpu_minutes": (time.process_time() - cpu) / 60,
    }
    (folder / name / "study.json").write_text(json.dumps({**cost, "curve": curve}))


def judge(folder: Path, episodes: int, seed: int) -> None:
    """Closed loop: every policy, what it does without its words or eyes, and the baselines."""
    data = open_dataset(DEMONSTRATIONS)
    trained = [name for name in TYPES if (folder / name / "study.json").is_file()]
    policies = {name: vla.open(folder / name / "model", seed=seed) for name in trained}
    contestants = []
    for name, policy in policies.items():
        controls = ({}, {"instruction": "shuffled"}, {"pictures": "swapped"})
        contestants += [(name, policy, control) for control in controls]
    model = policies[trained[-1]].model
    contestants.append(("untrained", untrained(model.variant, model.stats, model.tokenizer, seed=seed), {}))
    contestants.append(("mean action", MeanAction(data, EXECUTE), {}))
    contestants.append(("nearest", NearestNeighbour(data, EXECUTE), {}))
    found = []
    for name, policy, control in contestants:
        one = vla.evaluate(policy, TASK, episodes=episodes, seed=seed, execute=EXECUTE, num_envs=10, **control)
        label = f"{TYPES[name]}: {name_of(one)}" if name in TYPES else name_of(one)
        print(label, one, flush=True)
        found.append((label, one))
    studies = {name: json.loads((folder / name / "study.json").read_text()) for name in trained}
    write(found, studies)


def write(found: list, studies: dict) -> None:
    """The tables, the curves as a figure, and every step and episode as JSON."""
    tasks = sorted({e.prompt for _, one in found for e in one.episodes})
    lines = [_row("policy", "success", "95 % interval (Wilson)", *tasks), _row(*["---"] * (3 + len(tasks)))]
    for label, one in found:
        low, high = one.interval
        outcomes = [[e.success for e in one.episodes if e.prompt == task] for task in tasks]
        per_task = [f"{sum(o)}/{len(o)}" for o in outcomes]
        lines.append(
            _row(
                label, f"{one.successes} of {len(one.episodes)}, {one.rate:.0%}", f"{low:.0%} to {high:.0%}", *per_task
            )
        )
    lines += ["", _row("model type", "steps", "CPU minutes", "minutes", "losses at the end"), _row(*["---"] * 5)]
    plots = []
    for name, study in studies.items():
        steps = [r for r in study["curve"] if r["event"] == "step"]
        losses = sorted(k for k in steps[-1] if k.startswith("loss/"))
        last = ", ".join(f"{k.removeprefix('loss/')} {steps[-1][k]:.3f}" for k in losses)
        lines.append(_row(name, study["steps"], f"{study['cpu_minutes']:.1f}", f"{study['minutes']:.1f}", last))
        curves = {k: [(r["step"], r[k]) for r in steps] for k in losses}
        plots += [line_plot({k: c}, x="step", title=f"{name}: {k}", zero=True) for k, c in curves.items()]
    print("\n".join(lines))
    (RESULTS / "policies_table.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "policies_curves.html").write_text("<meta charset=utf-8>" + small_multiples(plots, columns=2))
    record = {"evaluations": [one.to_dict() for _, one in found], "training": studies}
    (RESULTS / "policies.json").write_text(json.dumps(record) + "\n")


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("train")
    one.add_argument("name", choices=TYPES)
    one.add_argument("--steps", type=int, default=3000)
    one.add_argument("--out", type=Path, default=Path("runs/study"))
    two = verbs.add_parser("judge")
    two.add_argument("out", type=Path)
    two.add_argument("--episodes", type=int, default=100)
    two.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.verb == "train":
        train(args.name, args.steps, args.out)
    else:
        judge(args.out, args.episodes, args.seed)


if __name__ == "__main__":
    main()
