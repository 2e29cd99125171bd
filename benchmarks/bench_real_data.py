"""The four model types on recorded robot demonstrations, in PyTorch and in JAX: do the losses agree, and do they fall?

    OMP_NUM_THREADS=1 python benchmarks/bench_real_data.py [--steps 50] [--out benchmarks/results]

Data: the five demonstrations of NVIDIA Isaac-GR00T's `robot_sim.PickNPlace` under VLA_SHARED (GR1 humanoid, 44 joint
values, one camera, five instructions). Both engines start from the same weights and see the same samples, noise and
times, as `vla train` would give them: statistics and the action tokenizer come from the data. Tiny preset, float32.
Writes real_data.md, and every curve to real_data.json.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np

import vla
from vla.datasets import open_dataset
from vla.frame_cache import CachedFrames
from vla.training.config import TrainConfig
from vla.training.loader import Loader, Samples
from vla.training.prepare import prepare
from vla.training.schedules import ema_decay, learning_rate

DATA = Path(os.environ.get("VLA_SHARED", Path(__file__).parents[2] / "shared")) / "data/robot/gr00t_picknplace"
TYPES = ("pi0", "pi05", "pi0_fast", "pi05_ki")
SPEC = {
    "spec.cameras": ["ego_view"], "spec.image_size": [32, 32], "spec.state_dim": 44, "spec.action_dim": 44,
    "spec.action_horizon": 8, "spec.max_token_len": 320,
}  # fmt: skip
# Largest relative difference of a loss, at any step; of a gradient norm.
LOSS_BOUND, NORM_BOUND = 1e-5, 1e-4


def open_data(folder):
    """The demonstrations, every frame decoded once."""
    return CachedFrames(open_dataset(str(DATA)), SPEC["spec.cameras"], tuple(SPEC["spec.image_size"]), folder)


def run_config(steps, **values):
    """AdamW with warm-up and cosine as in openpi; a learning rate for small models."""
    base = {"steps": steps, "batch_size": 4, "lr": 1e-3, "lr_warmup": 5, "workers": 1, "progress": False}
    return TrainConfig(**{**base, **values}).planned()


def train_in_both(type, data, config, frameworks=("torch", "jax"), torch_steps=0, sets=None):
    """The records of every step by framework, from the same weights, batches and random numbers.

    PyTorch alone goes on to `torch_steps`.
    """
    from vla.training.torch_engine import TorchEngine

    variant = vla.build(type=type, preset="tiny", set={**SPEC, **(sets or {})})
    made = prepare(variant, data, config, note=lambda text: None)
    samples = Samples(made.dataset, made.group.inputs, variant.spec.action_horizon, 1e9)
    loader = Loader(samples, made.train_index, made.variant, config)
    engines = {"torch": TorchEngine(made.variant, config)}
    if "jax" in frameworks:
        from vla.training.jax_engine import JaxEngine

        weights = {k: v.copy() for k, v in engines["torch"].weights().items()}
        engines["jax"] = JaxEngine(made.variant, config, weights)
    records, seconds = {name: [] for name in engines}, {name: 0.0 for name in engines}
    for batch in loader.stream(0, max(config.steps, torch_steps)):
        k = batch.step
        for name, engine in engines.items():
            if k >= config.steps and name != "torch":
                continue
            start = time.process_time()
            result = engine.step(batch.micro, learning_rate(config, k), ema_decay(config, k))
            records[name] += engine.read([result])
            seconds[name] += time.process_time() - start
    size = sum(w.size for w in engines["torch"].weights().values())
    return records, seconds, size


def difference(ours, theirs, key="loss"):
    """Largest relative difference over the steps both made."""
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(ours, theirs, strict=False))


def fall(records, key="loss", last=10):
    """(mean of the first 5 steps, mean of the last 10)."""
    values = [r[key] for r in records]
    return float(np.mean(values[:5])), float(np.mean(values[-last:]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="steps in both frameworks")
    parser.add_argument("--torch-steps", type=int, default=200, help="steps PyTorch goes on to")
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    import jax
    import torch

    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        data = open_data(folder)
        for type in args.types:
            # The schedule is that of the long run, so that the first steps are the same in both.
            config = run_config(args.steps, lr_decay_steps=max(args.steps, args.torch_steps))
            records, seconds, size = train_in_both(type, data, config, torch_steps=args.torch_steps)
            found[type] = {"parameters": size, "records": records, "cpu_seconds": seconds}
            first = records["torch"][: args.steps]
            apart = difference(records["jax"], first), difference(records["jax"], first, "grad_norm")
            print(type, apart, fall(first), fall(records["torch"]), seconds, flush=True)
            assert apart[0] <= LOSS_BOUND and apart[1] <= NORM_BOUND, (type, apart)
    (args.out / "real_data.json").write_text(json.dumps(found, indent=None) + "\n")
    versions = f"torch {torch.__version__}, jax {jax.__version__}, {platform.machine()}"
    (args.out / "real_data.md").write_text(page(found, args.steps, config, versions))


def page(found, steps, config, versions):
    """The results as Markdown."""
    sets = ", ".join(f"{k.removeprefix('spec.')} {v}" for k, v in SPEC.items())
    lines = [
        "# Recorded robot data, both frameworks",
        "",
        "`python benchmarks/bench_real_data.py`: the five demonstrations of Isaac-GR00T's `robot_sim.PickNPlace` "
        "(2,096 frames, GR1 humanoid, 44 joint values, one camera, five instructions), the tiny preset, float32, "
        f"batch {config.batch_size}, AdamW at {config.lr:g} ({sets}).",
        "PyTorch and JAX start from the same weights and see the same samples, noise and times. "
        f"{versions}. All curves: `real_data.json`.",
        "",
        f"## Step by step: {steps} steps in both frameworks",
        "",
        f"Bounds, asserted by the script: losses within {LOSS_BOUND:g} of each other at every step (relative), "
        f"gradient norms within {NORM_BOUND:g}.",
        "",
        "| type | parameters | largest difference: loss | gradient norm | CPU s, PyTorch | JAX, with compiling |",
        "|---|---|---|---|---|---|",
    ]
    for type, f in found.items():
        r, s = f["records"], f["cpu_seconds"]
        apart = difference(r["jax"], r["torch"]), difference(r["jax"], r["torch"], "grad_norm")
        share = s["torch"] * steps / len(r["torch"])
        lines.append(
            f"| {type} | {f['parameters'] / 1e6:.2f} M | {apart[0]:.1e} | {apart[1]:.1e} "
            f"| {share:.0f} | {s['jax']:.0f} |"
        )
    lines += ["", "## The losses fall", "", "Mean of the first 5 steps and of the last 10.", ""]
    lines += ["| type | loss | steps | PyTorch: first | last | JAX: first | last |", "|---|---|---|---|---|---|---|"]
    for type, f in found.items():
        r = f["records"]
        for key in [k for k in r["torch"][0] if k.startswith("loss/")]:
            for n in dict.fromkeys([steps, len(r["torch"])]):
                cells = [*fall(r["torch"][:n], key), *(fall(r["jax"], key) if n == steps else ())]
                row = [f"{c:.4f}" for c in cells] + ["-"] * (4 - len(cells))
                lines.append(f"| {type} | {key.removeprefix('loss/')} | {n} | {' | '.join(row)} |")
    lines += ["", f"## Loss at each of the {steps} steps (PyTorch / JAX)", ""]
    lines += [f"| step | {' | '.join(found)} |", "|---|" + "---|" * len(found)]
    for k in range(steps):
        both = [[f["records"][name][k]["loss"] for name in ("torch", "jax")] for f in found.values()]
        pairs = [f"{ours:.6f} / {theirs:.6f}" for ours, theirs in both]
        lines.append(f"| {k + 1} | {' | '.join(pairs)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
