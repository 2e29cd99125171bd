"""PyTorch eager, PyTorch compiled and JAX jit side by side: a loss+gradient step, and sampling with 10 Euler steps.

    OMP_NUM_THREADS=1 python benchmarks/bench_frameworks.py [--type pi05_ki] [--preset small] [--repeats 7]

The three run the same weights on the same batch, interleaved, each in one thread; process CPU time is counted, because
the machine may be shared. "Compiled" is what `vla train --compile` does: torch.compile of every transformer layer.
Prints Markdown; the losses and actions of all three are checked against each other first.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen=false {os.environ.get('XLA_FLAGS', '')}".strip()

import argparse  # noqa: E402
import platform  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from vla.compose import build  # noqa: E402
from vla.contracts import Actions, Sampling, pack  # noqa: E402
from vla.jax_kit import model as jax_model  # noqa: E402
from vla.testing.batches import random_batch  # noqa: E402
from vla.testing.frameworks import prompt_only, start_weights  # noqa: E402
from vla.torch_kit import model as torch_model  # noqa: E402
from vla.training.torch_engine import compile_layers  # noqa: E402


def torch_cases(variant, weights, train, infer, compiled):
    """The functions to time: a training step and sampling, in PyTorch."""
    model = torch_model.build_model(variant)
    torch_model.load_weights(model, variant, weights)
    obs, actions, draws, _ = train
    obs, draws = torch_model.observation_to(obs, "cpu"), torch_model.tree_to(draws, "cpu")
    chunk = Actions(torch.as_tensor(actions.values), torch.as_tensor(actions.mask))
    small, noise = torch_model.observation_to(infer[0], "cpu"), torch.as_tensor(infer[3])
    if compiled:
        compile_layers(model)

    def step():
        model.zero_grad(set_to_none=True)
        total = model.total(model.loss(obs, chunk, draws))
        total.backward()
        return total.detach().numpy()

    return {"step": step, "sample": lambda: model.sample(small, noise, Sampling(num_steps=10))["actions"].numpy()}


def jax_cases(variant, weights, train, infer):
    """The same in JAX."""
    model = jax_model.abstract_model(variant)
    jax_model.load_weights(model, variant, weights)
    graph, params = jax_model.split(model)
    train, infer = jax.device_put(train), jax.device_put(infer)

    def step():
        total, _, gradients = jax_model.loss_and_gradients(graph, params, *train[:3])
        jax.block_until_ready(gradients)
        return np.asarray(total)

    sampling = Sampling(num_steps=10)
    return {
        "step": step,
        "sample": lambda: np.asarray(jax_model.sample(graph, params, infer[0], infer[3], sampling)["actions"]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", default="pi05_ki")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    variant = build(type=args.type, preset=args.preset)
    weights = start_weights(variant)
    obs, *rest = random_batch(variant, batch=args.batch)
    train = (pack(obs), *rest)
    obs, *rest = random_batch(variant, batch=1)
    infer = (pack(prompt_only(obs)), *rest)
    rivals = {
        "PyTorch eager": torch_cases(variant, weights, train, infer, False),
        "PyTorch compiled": torch_cases(variant, weights, train, infer, True),
        "JAX jit": jax_cases(variant, weights, train, infer),
    }
    first, answers, times = {}, {}, {}
    for name, cases in rivals.items():
        for case, function in cases.items():
            start = time.process_time()
            answers[name, case] = function()
            first[name, case] = time.process_time() - start
            want = answers["PyTorch eager", case]
            assert np.abs(answers[name, case] - want).max() <= 1e-4 * np.abs(want).max(), (name, case)
    for _ in range(args.repeats):
        for name, cases in rivals.items():
            for case, function in cases.items():
                start = time.process_time()
                function()
                times.setdefault((name, case), []).append(time.process_time() - start)
    size = sum(w.size for w in weights.values()) / 1e6
    print(f"{args.type}, preset {args.preset} ({size:.1f} M parameters), float32, one thread, {args.repeats} repeats;")
    print(f"torch {torch.__version__}, jax {jax.__version__}, {platform.machine()}, {os.cpu_count()} shared CPUs.\n")
    labels = {"step": f"loss + gradients, batch {args.batch}", "sample": "sampling, 10 steps, batch 1"}
    columns = ("case", "framework", "CPU ms, median", "min", "speed against eager", "first call, CPU s")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for case, label in labels.items():
        base = statistics.median(times["PyTorch eager", case])
        for name in rivals:
            t = times[name, case]
            numbers = (statistics.median(t) * 1e3, min(t) * 1e3, base / statistics.median(t), first[name, case])
            print("| {} | {} | {:.1f} | {:.1f} | {:.2f} | {:.1f} |".format(label, name, *numbers))


if __name__ == "__main__":
    main()
