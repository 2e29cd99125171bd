"""Milliseconds per item of the LeRobot reader, beside LeRobot's own on files of the same kind.

    python benchmarks/bench_reader.py [--json benchmarks/results/bench_reader.json]

The same items as in the measurement of LeRobot 0.6.1 (2 cameras 224 x 224, random frames, with and without a chunk of
50 actions, on files that LeRobot wrote): image-typed 114 ms without and 1108 ms with a chunk, video 7.2 and 12.7 ms
with its PyAV backend, 6.8 and 8.7 ms with torchcodec. Measured on another day of the same machine: compare orders of
magnitude, not digits.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from vla.datasets import DatasetInfo, create_dataset, open_dataset
from vla.frame_cache import CachedFrames

SHARED = Path(os.environ.get("VLA_SHARED", Path(__file__).parents[2] / "shared")) / "data"
LEROBOT = {("v30_image", 1): 114.0, ("v30_image", 50): 1108.0, ("v30_video", 1): 7.2, ("v30_video", 50): 12.7}


def timed(data, order, horizon: int) -> tuple[float, float]:
    """(wall, CPU) milliseconds per item."""
    wall, cpu = time.perf_counter(), time.process_time()
    for index in order:
        data.sample(int(index), horizon)
    n = len(order) / 1e3
    return (time.perf_counter() - wall) / n, (time.process_time() - cpu) / n


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []

    def row(name: str, data, horizon: int, order, how: str) -> None:
        wall, cpu = timed(data, order, horizon)
        theirs = LEROBOT.get((name, horizon)) if how == "random" else None
        times = f"{theirs / wall:7.0f}x" if theirs else ""
        rows.append({"data": name, "chunk": horizon, "order": how, "ms": wall, "cpu_ms": cpu, "lerobot_ms": theirs})
        ours = f"{wall:8.3f} ms  cpu {cpu:8.3f} ms"
        print(f"{name:<22} chunk {horizon:<3} {how:<11} {ours}  lerobot {theirs or '':>6} {times}")

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temp:
        sets = {name: SHARED / "lerobot_written" / name for name in ("v30_image", "v30_video")}
        sets["gr00t (h264, long gop)"] = SHARED / "robot" / "gr00t_picknplace"
        for name, path in sets.items():
            if not path.is_dir():
                print(f"{name}: not here, set VLA_SHARED")
                continue
            started = time.perf_counter()
            data = open_dataset(path)
            print(f"{name}: {len(data)} frames opened in {(time.perf_counter() - started) * 1e3:.0f} ms")
            for horizon in (1, 50):
                row(name, open_dataset(path), horizon, rng.integers(0, len(data), 300), "random")
                row(name, open_dataset(path), horizon, range(min(300, len(data))), "in order")
            started = time.perf_counter()
            cached = CachedFrames(data, list(data.info.cameras), (224, 224), temp)
            print(f"{name}: frame cache built in {time.perf_counter() - started:.1f} s")
            row(name + " cached", cached, 50, rng.integers(0, len(data), 300), "random")

        # Many more encoded images than the reader keeps in memory: the worst case of image-typed random access.
        info = DatasetInfo({"a": (224, 224), "b": (224, 224)}, 8, 7, 30)
        with create_dataset(Path(temp) / "large", info) as writer:
            noise = rng.integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
            for _ in range(8):
                for step in range(150):
                    images = {"a": np.roll(noise[0], step, 1), "b": np.roll(noise[1], step, 0)}
                    writer.add({"images": images, "state": np.zeros(8), "action": np.zeros(7), "prompt": "go"})
                writer.end_episode()
        large = open_dataset(Path(temp) / "large", {"cache_mb": 64})
        row("images, cache of 1/5", large, 50, rng.integers(0, len(large), 200), "random")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"load": os.getloadavg(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
