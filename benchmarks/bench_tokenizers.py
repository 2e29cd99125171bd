"""Action tokenizers against the original FAST processor's method, side by side in one run on one core.

    OMP_NUM_THREADS=1 RAYON_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false python benchmarks/bench_tokenizers.py [--write]

The original method is the public processor's, chunk by chunk: an orthonormal DCT of [h, d], rounding, one character per
coefficient, a byte-level BPE of the `tokenizers` package; back: text, ord, inverse DCT. It is written here from its
description; nothing of the processor's code is used. CPU seconds of this process are counted, rounds alternate between
methods, so that a busy neighbour hits all alike, and the best round of each counts. The own-fit count uses real
actions under VLA_SHARED when they are there.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import platform
import pstats
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from vla_tokenizer_fast.codec import FastCodec, dct_matrix
from vla_tokenizer_fast.config import Fast

from vla.codec_bench import load_chunks

H, D, CODES = 50, 14, 1024
SHARED = Path(os.environ.get("VLA_SHARED", Path(__file__).parents[2] / "shared"))
RESULTS = Path(__file__).parent / "results" / "tokenizers.md"


def made_chunks(n: int, seed: int = 0) -> np.ndarray:
    """Smooth chunks [n H D] in [-1, 1] with a little jitter, and grippers that switch once."""
    r = np.random.default_rng(seed)
    t = np.linspace(0, 1, H)[None, :, None]
    x = sum(
        r.normal(0, 0.5 / k, (n, 1, D)) * np.sin(2 * np.pi * (k * 0.5 * t + r.random((n, 1, D)))) for k in range(1, 5)
    )
    x += r.normal(0, 0.02, (n, H, D)) * (r.random((n, 1, D)) < 0.15)
    x[..., [6, 13]] = np.where(t > r.random((n, 1, 2)), 1, -1)
    return np.clip(x, -1, 1).astype(np.float32)


class Original:
    """The method of the public processor, one chunk at a time."""

    def __init__(self, chunks: np.ndarray, codes: int):
        from tokenizers import ByteLevelBPETokenizer, trainers

        rows = [self.coefficients(chunk) for chunk in chunks]
        self.low = int(min(row.min() for row in rows))
        alphabet = [chr(i) for i in range(int(max(row.max() for row in rows)) - self.low + 1)]
        self.bpe = ByteLevelBPETokenizer()
        trainer = trainers.BpeTrainer(
            vocab_size=codes,
            min_frequency=2,
            show_progress=False,
            special_tokens=[],
            initial_alphabet=alphabet,
            max_token_length=10000,
        )
        self.bpe._tokenizer.train_from_iterator((self.text(row) for row in rows), trainer=trainer)

    @staticmethod
    def coefficients(chunk: np.ndarray) -> np.ndarray:
        return np.around(transform(chunk) * 10).astype(int).flatten()

    def text(self, row: np.ndarray) -> str:
        return "".join(map(chr, np.maximum(row - self.low, 0)))

    def encode(self, chunk: np.ndarray) -> list[int]:
        return self.bpe.encode(self.text(self.coefficients(chunk))).ids

    def decode(self, ids: list[int]) -> np.ndarray:
        text = self.bpe.decode(ids)
        values = np.asarray([ord(c) for c in text]) + self.low
        return inverse(values.reshape(H, D) / 10)

    def files(self, folder: Path) -> Path:
        """The processor's files."""
        (folder / "tokenizer.json").write_text(self.bpe._tokenizer.to_str())
        (folder / "processor_config.json").write_text(
            json.dumps({"scale": 10, "min_token": self.low, "vocab_size": CODES})
        )
        return folder


try:
    from scipy.fft import dct, idct

    def transform(x: np.ndarray) -> np.ndarray:
        """DCT over time with scipy, as the processor does."""
        return dct(x, axis=0, norm="ortho")

    def inverse(x: np.ndarray) -> np.ndarray:
        """Inverse DCT over time with scipy."""
        return idct(x, axis=0, norm="ortho")

    DCT = "scipy"
except ImportError:

    def transform(x: np.ndarray) -> np.ndarray:
        """DCT over time as a matrix product (scipy is not installed; its own takes longer)."""
        return dct_matrix(len(x)) @ x

    def inverse(x: np.ndarray) -> np.ndarray:
        """Inverse DCT over time as a matrix product."""
        return dct_matrix(len(x)).T @ x

    DCT = "matrix product"


def race(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Best CPU seconds of each, alternating."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    return best


def speed(n: int, rounds: int) -> list[str]:
    """The table of times, and the profile of the own fit."""
    chunks = made_chunks(n)
    original = Original(chunks[:2500], CODES)
    with tempfile.TemporaryDirectory() as folder:
        same = FastCodec(Fast(source=str(original.files(Path(folder))), codes=CODES))
    start = time.process_time()
    own = FastCodec(Fast(codes=CODES)).fit(chunks[:2500])
    fit_s = time.process_time() - start
    start = time.process_time()
    own.encode(chunks)
    first_s = time.process_time() - start
    ids = {"original": [original.encode(c) for c in chunks], "same": same.encode(chunks), "own": own.encode(chunks)}
    equal = sum(a == b.tolist() for a, b in zip(ids["original"], ids["same"], strict=True))
    encode = race(
        {
            "original": lambda: [original.encode(c) for c in chunks],
            "original, BPE batched": lambda: original.bpe._tokenizer.encode_batch_fast(
                [original.text(original.coefficients(c)) for c in chunks]
            ),
            "ours, its files": lambda: same.encode(chunks),
            "ours, own fit": lambda: own.encode(chunks),
            "ours, its files, one by one": lambda: [same.encode(c[None]) for c in chunks[: n // 10]],
            "ours, own fit, one by one": lambda: [own.encode(c[None]) for c in chunks[: n // 10]],
        },
        rounds,
    )
    few = n // 5
    decode = race(
        {
            "original": lambda: [original.decode(i) for i in ids["original"][:few]],
            "ours, its files": lambda: [same.decode(i, H, D) for i in ids["same"][:few]],
            "ours, own fit": lambda: [own.decode(i, H, D) for i in ids["own"][:few]],
        },
        rounds,
    )
    far = max(
        np.abs(original.decode(a) - same.decode(b, H, D)).max()
        for a, b in zip(ids["original"][:200], ids["same"][:200], strict=True)
    )
    lines = [
        f"{n:,} chunks [{H}, {D}], {CODES} ids; own fit on 2,500 chunks took {fit_s:.1f} s, "
        f"its first encode (tables are built) {first_s:.2f} s.",
        f"Ids equal to the original's: {equal:,} of {n:,}. Largest difference of decoded actions: {far:.1e}.",
        f"Tokens per chunk: original {np.mean([len(i) for i in ids['original']]):.1f}, "
        f"own fit {np.mean([len(i) for i in ids['own']]):.1f}.",
        "",
        "| encode | us per chunk | times the original |",
        "|---|---|---|",
    ]
    for name, seconds in encode.items():
        us = seconds / (n // 10 if "one by one" in name else n) * 1e6
        lines.append(f"| {name} | {us:.1f} | {encode['original'] / n * 1e6 / us:.1f} |")
    lines += ["", "| decode, one by one | us per chunk | times the original |", "|---|---|---|"]
    lines += [f"| {name} | {s / few * 1e6:.1f} | {decode['original'] / s:.1f} |" for name, s in decode.items()]
    return lines + [""] + profile(own, chunks) + [""] + profile(same, chunks, "ours, its files")


def profile(codec: FastCodec, chunks: np.ndarray, name: str = "ours, own fit") -> list[str]:
    """Where the time of a batched encode goes."""
    profiler = cProfile.Profile(time.process_time)
    profiler.runcall(codec.encode, chunks)
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    total = sum(row[2] for row in stats.values())
    top = sorted(stats.items(), key=lambda item: -item[1][2])[:6]
    lines = [
        f"Where the time of encode goes ({name}; profiling slows many small calls):",
        "",
        "| share | where |",
        "|---|---|",
    ]
    return lines + [
        f"| {100 * row[2] / total:.0f} % | `{Path(file).name}: {function}` |" for (file, _, function), row in top
    ]


def counts() -> list[str]:
    """Tokens per chunk on real actions: original recipe and own fit, same data, same number of ids."""
    lines = ["| data | chunk | ids | naive | original recipe | own fit | fewer |", "|---|---|---|---|---|---|---|"]
    for name, horizon in (("franka_close_box_actions", 30), ("pen-human-v0", 25), ("door-human-v0", 25)):
        file = SHARED / "data" / "actions" / f"{name}.npz"
        if not file.is_file():
            continue
        chunks = np.clip(load_chunks(file, horizon, 2000).normalised(), -1.5, 1.5)
        for codes in (1024, 2048):
            theirs, ours = Original(chunks, codes), FastCodec(Fast(codes=codes)).fit(chunks)
            a = np.mean([len(theirs.encode(c)) for c in chunks])
            b = np.mean([len(i) for i in ours.encode(chunks)])
            h, d = chunks.shape[1:]
            lines.append(f"| {name} | [{h}, {d}] | {codes} | {h * d} | {a:.1f} | {b:.1f} | {100 * (1 - b / a):.0f} % |")
    return lines


def main() -> None:
    """Run, print, and with --write keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    args = parser.parse_args()
    import tokenizers

    text = "\n".join(
        [
            "# Action tokenizers: speed and length",
            "",
            "Written by `benchmarks/bench_tokenizers.py --write`, which says what is compared. One core "
            f"({platform.machine()}), Python {platform.python_version()}, numpy {np.__version__}, "
            f"tokenizers {tokenizers.__version__}; DCT of the original with: {DCT}. CPU seconds, best of {args.rounds} "
            "alternating rounds.",
            "",
            "## Speed",
            "",
            *speed(args.chunks, args.rounds),
            "",
            "## Length on real actions (fitted and counted on the same chunks, up to 2,000)",
            "",
            *counts(),
            "",
        ]
    )
    print(text)
    if args.write:
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
