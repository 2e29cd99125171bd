"""Milliseconds per sample of the LeRobot reader, beside LeRobot's own on files of the same kind.

    nice python benchmarks/bench_reader.py [--write]

The same samples as in the measurement of LeRobot 0.6.1: 2 cameras of 224 x 224, random frames, with and without a chunk
of 50 actions, on files that LeRobot wrote. LeRobot's numbers were taken on another day of the same machine: compare
orders of magnitude, not digits. Where torchcodec is installed, both decoders are measured, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from vla.datasets import DatasetInfo, create_dataset, open_dataset
from vla.errors import SettingsError
from vla.frame_cache import CachedFrames

RESULTS = Path(__file__).parent / "results"
SHARED = Path(os.environ.get("VLA_SHARED", Path(__file__).parents[2] / "shared")) / "data"
# (files, chunk, decoder) -> (wall, CPU) milliseconds of LeRobot 0.6.1 on random frames.
LEROBOT = {
    ("v30_image", 1, "-"): (114.0, 40.0),
    ("v30_image", 50, "-"): (1108.0, 387.0),
    ("v30_video", 1, "pyav"): (7.2, 6.7),
    ("v30_video", 50, "pyav"): (12.7, 9.5),
    ("v30_video", 1, "torchcodec"): (6.8, 3.1),
    ("v30_video", 50, "torchcodec"): (8.7, 5.5),
}
SETS = {
    "v30_image": SHARED / "lerobot_written" / "v30_image",
    "v30_video": SHARED / "lerobot_written" / "v30_video",
    "gr00t": SHARED / "robot" / "gr00t_picknplace",
}
ABOUT = {
    "v30_image": "2 cameras 224 x 224, PNG in parquet",
    "v30_video": "2 cameras 224 x 224, AV1, every other frame a keyframe",
    "gr00t": "1 camera 256 x 256, H.264, up to 250 frames between keyframes",
    "large images": "2 cameras 224 x 224 of noise, PNG in parquet; the reader's memory holds a fifth of them",
}
HEAD = """# Reading LeRobotDataset: milliseconds per sample

`nice python benchmarks/bench_reader.py --write`. A sample is what training asks for: the frame of every camera, state,
a chunk of actions, instruction. `random`: frames drawn evenly from the whole dataset, as training draws them;
`in order`: frame after frame. One thread; wall time and, in brackets, CPU time; the best of {turns} turns of {samples}
samples.

{machine}.
Load {load:.1f} while measuring: others were at work.

LeRobot's numbers (0.6.1, its `LeRobotDataset[i]`, on the same files that it wrote itself) were taken on the same
machine on another day, under load as well: compare orders of magnitude, not digits. `times` are LeRobot's over ours.
{goal}
"""


def timed(data: Any, order: Sequence[int], horizon: int) -> tuple[float, float]:
    """(wall, CPU) milliseconds per sample."""
    wall, cpu = time.perf_counter(), time.process_time()
    for index in order:
        data.sample(int(index), horizon)
    n = len(order) / 1e3
    return (time.perf_counter() - wall) / n, (time.process_time() - cpu) / n


def compare(datas: dict[str, Any], order: Sequence[int], horizon: int, turns: int) -> dict[str, tuple[float, float]]:
    """The best of some turns of each, taken in turns so that a busy moment of the machine hits all."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in datas}
    for _ in range(turns):
        for name, data in datas.items():
            found[name].append(timed(data, order, horizon))
    return {name: (min(w for w, _ in times), min(c for _, c in times)) for name, times in found.items()}


def decoders() -> list[str]:
    """The decoders that run here."""
    from vla_dataset_lerobot.video import Videos

    try:
        Videos(30, "torchcodec")
    except SettingsError as error:
        print(f"torchcodec is not measured: {error.what}")
        return ["pyav"]
    return ["pyav", "torchcodec"]


def most_different(a: Any, b: Any, order: Iterable[int]) -> int:
    """The largest difference of a pixel between two readings of the same frames, 0 to 255."""
    worst = 0
    for index in order:
        one, other = a.sample(int(index), 1)["images"], b.sample(int(index), 1)["images"]
        worst = max(worst, *(int(np.abs(one[c].astype(int) - other[c]).max()) for c in one))
    return worst


def measure(samples: int, turns: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows of the table, and the largest difference between the decoders per dataset."""
    rows: list[dict[str, Any]] = []
    differences: dict[str, int] = {}
    rng = np.random.default_rng(0)

    def add(name: str, datas: dict[str, Any], horizon: int, how: str) -> None:
        n = len(next(iter(datas.values())))
        order = rng.integers(0, n, samples) if how == "random" else range(min(samples, n))
        for decoder, (wall, cpu) in compare(datas, order, horizon, turns).items():
            theirs = LEROBOT.get((name, horizon, decoder)) if how == "random" else None
            rows.append({
                "data": name, "decoder": decoder, "chunk": horizon, "order": how, "ms": wall, "cpu_ms": cpu,
                "lerobot_ms": theirs and theirs[0], "lerobot_cpu_ms": theirs and theirs[1],
            })  # fmt: skip
            print(f"{name:<18} {decoder:<16} chunk {horizon:<3} {how:<9} {wall:8.3f} ms  cpu {cpu:8.3f} ms", flush=True)

    with tempfile.TemporaryDirectory() as temp:
        for name, path in SETS.items():
            if not path.is_dir():
                print(f"{name}: not here, set VLA_SHARED")
                continue
            video = name != "v30_image"
            datas = {d: open_dataset(path, {"decoder": d}) for d in decoders()} if video else {"-": open_dataset(path)}
            if len(datas) > 1:
                differences[name] = most_different(*datas.values(), rng.integers(0, len(datas["pyav"]), 100))
            for horizon in (1, 50):
                for how in ("random", "in order"):
                    add(name, datas, horizon, how)
            first = next(iter(datas.values()))
            started = time.process_time()
            cached = CachedFrames(first, list(first.info.cameras), (224, 224), temp)
            print(f"{name}: frame cache built in {time.process_time() - started:.1f} s of CPU time")
            add(name, {"frame cache": cached}, 50, "random")

        # Many more encoded images than the reader keeps in memory: the worst case of image-typed random access.
        info = DatasetInfo({"a": (224, 224), "b": (224, 224)}, 8, 7, 30)
        with create_dataset(Path(temp) / "large", info) as writer:
            noise = rng.integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
            for _ in range(8):
                for step in range(150):
                    images = {"a": np.roll(noise[0], step, 1), "b": np.roll(noise[1], step, 0)}
                    writer.add({"images": images, "state": np.zeros(8), "action": np.zeros(7), "prompt": "go"})
                writer.end_episode()
        add("large images", {"-": open_dataset(Path(temp) / "large", {"cache_mb": 64})}, 50, "random")
    return rows, differences


def page(rows: list[dict[str, Any]], differences: dict[str, int], about: dict[str, Any]) -> str:
    """The table as Markdown."""
    machine = f"CPython {about['python']}, {about['machine']}, {about['cpus']} CPUs, " + ", ".join(
        f"{name} {v}" for name, v in about["packages"].items()
    )
    ratios = [
        min(r["lerobot_ms"] / r["ms"], r["lerobot_cpu_ms"] / r["cpu_ms"])
        for r in rows if r["data"] == "v30_image" and r["lerobot_ms"]
    ]  # fmt: skip
    goal = f"The goal for image-typed cameras is 5 times; the least found is {min(ratios):.0f} times." if ratios else ""
    named = {key: about[key] for key in ("load", "turns", "samples")}
    lines = [HEAD.format(machine=machine, goal=goal, **named)]
    lines += ["| files | decoder | chunk | order | ms (CPU) | LeRobot ms (CPU) | times (CPU) |", "|---" * 7 + "|"]
    for r in rows:
        ours, theirs, times = f"{r['ms']:.2f} ({r['cpu_ms']:.2f})", "", ""
        if r["lerobot_ms"]:
            theirs = f"{r['lerobot_ms']:g} ({r['lerobot_cpu_ms']:g})"
            times = f"{r['lerobot_ms'] / r['ms']:.1f} ({r['lerobot_cpu_ms'] / r['cpu_ms']:.1f})"
        words = (r["data"], r["decoder"], str(r["chunk"]), r["order"], ours, theirs, times)
        lines.append(f"| {' | '.join(words)} |")
    lines += ["", *(f"- `{name}`: {text}" for name, text in ABOUT.items() if any(r["data"] == name for r in rows))]
    lines += ["- `frame cache`: `vla.frame_cache`, images decoded and resized once into one memory-mapped file", ""]
    if differences:
        lines += ["## PyAV or torchcodec", "", "| files | order | torchcodec's CPU time over PyAV's |", "|---|---|---|"]
        cpu = {(r["data"], r["order"], r["chunk"], r["decoder"]): r["cpu_ms"] for r in rows}
        for (name, how, chunk, decoder), ms in cpu.items():
            if decoder == "torchcodec" and chunk == 50:
                lines.append(f"| {name} | {how} | {ms / cpu[name, how, chunk, 'pyav']:.2f} |")
        worst = ", ".join(f"{name} {value}" for name, value in differences.items())
        lines += ["", f"Largest difference of a pixel between the two, over 100 random frames of each: {worst}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and with --write keep the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true", help="replace results/reader.json and results/reader.md")
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    packages = {}
    for name in ("numpy", "pyarrow", "av", "pillow", "torchcodec"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    rows, differences = measure(args.samples, args.turns)
    about = {
        "python": platform.python_version(), "machine": platform.machine(), "cpus": os.cpu_count(),
        "load": os.getloadavg()[1], "samples": args.samples, "turns": args.turns, "packages": packages,
    }  # fmt: skip
    text = page(rows, differences, about)
    if args.write:
        RESULTS.mkdir(exist_ok=True)
        results = {"about": about, "rows": rows, "largest_pixel_difference": differences}
        (RESULTS / "reader.json").write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "reader.md").write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
