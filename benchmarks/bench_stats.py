"""Exact statistics: time and agreement with numpy on the whole data.

    python benchmarks/bench_stats.py [--rows 1000000] [--dims 32]

A million rows (goal: 5 s at most) against numpy's own quantile; then the actions of all chunks of 50, without and with
delta actions, where numpy would need the data 50 times over in memory.
"""

import argparse
import json
import resource
import time
from types import SimpleNamespace

import numpy as np

from vla.transforms import DeltaActions, make_bool_mask
from vla.transforms.quantiles import summarise_batches
from vla.transforms.stats import summarise

BLOCK = 65536


def timed(function):
    start = time.perf_counter()
    out = function()
    return out, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dims", type=int, default=32)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((args.rows, args.dims), dtype=np.float32)
    x[:, 0] = np.round(x[:, 0], 1)  # many ties
    x[:, 1] = x[:, 1] > 2  # two values
    x[:, 2] = 0.5  # constant
    x[:, 3] = np.exp(3 * x[:, 3])  # a long tail
    ours, seconds = timed(
        lambda: summarise_batches(lambda: ((x[i : i + BLOCK], None) for i in range(0, len(x), BLOCK)))
    )
    want, numpy_seconds = timed(lambda: np.quantile(x.astype(np.float64), [0.01, 0.99], axis=0))
    error = float(max(abs(ours.q01 - want[0]).max(), abs(ours.q99 - want[1]).max()))
    out = {
        "rows": args.rows,
        "dims": args.dims,
        "seconds": round(seconds, 3),
        "numpy_quantile_seconds": round(numpy_seconds, 3),
        "largest_difference_of_quantiles": error,
    }
    frames = args.rows // 10
    data = SimpleNamespace(
        states=lambda: x[:frames],
        actions=lambda: x[:frames],
        episodes=[range(i, min(i + 300, frames)) for i in range(0, frames, 300)],
    )
    _, out["chunks_seconds"] = timed(lambda: summarise(data, (), 50))
    delta = (DeltaActions(make_bool_mask(args.dims - 1, -1)),)
    done, out["delta_chunks_seconds"] = timed(lambda: summarise(data, delta, 50))
    out["frames"], out["actions_in_chunks"] = frames, done["actions"].count
    out["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
