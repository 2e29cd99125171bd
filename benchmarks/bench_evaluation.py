"""What worker processes bring to an evaluation on the tabletop, and that the episodes are the same.

python benchmarks/bench_evaluation.py [repeats]

The policy answers at once, so this is the environments' side alone. Ways take turns and the best of the repeats counts,
because other work on the machine only ever makes a run slower. CPU time hardly depends on it: `main` is spent in the
process that runs the policy, `workers` in the others, starting them included.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import numpy as np

from vla import evaluate

EPISODES, ENVS = 48, 8
SCENES = {
    "64 x 64, touch": {"part": "tabletop", "preset": "tiny"},
    "224 x 224, touch": {"part": "tabletop", "preset": "tiny", "image_size": 224},
}


class Wave:
    """A wave of the hand that follows from the seed."""

    name = "wave"

    def infer_batch(self, rows, *, seeds=None):
        return [
            {"actions": np.random.default_rng(s).uniform(-1, 1, (4, 7)) * (0.3, 0.3, 0.1, 0, 0, 0, 1)} for s in seeds
        ]

    def reset(self):
        pass


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    found = []
    for scene, table in SCENES.items():
        best: dict[int, dict[str, float]] = {}
        reference = None
        for _ in range(repeats):
            for workers in (0, 1, 2):
                before = cpu()
                run = evaluate(Wave(), table, episodes=EPISODES, num_envs=ENVS, num_workers=workers)
                main_cpu, worker_cpu = (b - a for a, b in zip(before, cpu(), strict=True))
                reference = reference or run.episodes
                assert run.episodes == reference, "episodes depend on the number of processes"
                steps = sum(e.steps for e in run.episodes)
                row = {
                    "wall_ms_per_step": 1e3 * run.seconds / steps,
                    "main_cpu_ms_per_step": 1e3 * main_cpu / steps,
                    "workers_cpu_ms_per_step": 1e3 * worker_cpu / steps,
                }
                best[workers] = {k: min(v, best.get(workers, row)[k]) for k, v in row.items()}
        for workers, row in best.items():
            found.append({"scene": scene, "workers": workers, "steps": steps, "load": os.getloadavg()[0], **row})
            print(json.dumps(found[-1]), flush=True)
    facts = {"cores": os.cpu_count(), "episodes": EPISODES, "envs": ENVS, "repeats": repeats}
    file = Path(__file__).parent / "results" / "evaluation.json"
    file.write_text(json.dumps({**facts, "rows": found}, indent=1) + "\n")


def cpu() -> tuple[float, float]:
    """CPU seconds of this process, and of its processes that have ended."""
    mine, theirs = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return mine.ru_utime + mine.ru_stime, theirs.ru_utime + theirs.ru_stime


if __name__ == "__main__":
    main()
