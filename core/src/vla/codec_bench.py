"""What action tokenizers cost and lose on your data: chunks from any data, one measurement per codec, one picture.

Axes: n chunks, h steps, d dims.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen

from vla.codecs import ActionCodec, check_chunks
from vla.errors import DataError, DecodeError, SettingsError
from vla.transforms.build import stats_steps
from vla.transforms.quantiles import summarise_batches
from vla.transforms.stats import _apply, stats_of, summarise

EPSILON = 1e-6  # added to the range, as openpi's quantile normalisation does


@frozen(eq=False)
class Chunks:
    """Action chunks in the data's units, and the quantiles that normalise them."""

    raw: np.ndarray  # [n h d]
    low: np.ndarray  # [d] 1st percentile, or what stands for it: `vla.transforms.stats.stats_of`
    high: np.ndarray  # [d] 99th percentile, likewise
    names: tuple[str, ...]  # [d]

    def normalised(self) -> np.ndarray:
        """1st to 99th percentile onto [-1, 1], without clipping; what policies with norm = quantile train on."""
        return ((self.raw - self.low) / (self.high - self.low + EPSILON) * 2 - 1).astype(np.float32)

    def units(self, normalised: np.ndarray) -> np.ndarray:
        """Back to the data's units."""
        return (normalised + 1) / 2 * (self.high - self.low + EPSILON) + self.low


@frozen
class Result:
    """One line of the table. Errors are in the data's units, over all dims and held-out chunks."""

    name: str
    tokens: float  # mean per chunk
    most: int  # longest chunk
    ratio: float  # values per token
    rmse: float
    worst: float  # largest error of one value
    worst_dim: str
    bound: float  # stated bound in normalised units
    broken: float  # share of chunks that do not decode when 1 % of their tokens are replaced
    encode_us: float  # per chunk, batched
    decode_us: float
    fit_s: float
    example: np.ndarray  # [h d] the decoded first held-out chunk


def load_chunks(
    data: str | Path, horizon: int, most: int = 4096, settings: Mapping[str, Any] | None = None, variant: Any = None
) -> Chunks:
    """Chunks of a dataset (anything `vla.datasets.open_dataset` reads) or of an .npz file, evenly spread over the data.

    They are normalised as `vla train` does (`vla.transforms.stats.stats_of`). Of a dataset they are what a policy sees:
    after the robot's conversions and delta actions.

    Args:
        data: the dataset, or the file.
        horizon: steps per chunk.
        most: chunks, at most.
        settings: of the dataset.
        variant: dataset -> the variant whose robot adapter converts; None: the actions as they are stored.

    An .npz holds `chunks` [n h d], or `actions` [episodes t d], or `actions` [frames d] (also `action`) with an
    optional `step_type` that is 0 where an episode begins. Past the end of an episode the last action is repeated.

    Raises:
        DataError: nothing usable is there, or values are not finite.
    """
    path = Path(data).expanduser()
    if path.suffix == ".npz":
        actions, episodes, names = _read_npz(path)
        if actions.ndim == 3:
            return _chunks(_spread(actions, most), actions.reshape(-1, actions.shape[-1]), names)
    else:
        from vla.datasets import open_dataset

        dataset = open_dataset(str(data), settings)
        actions, episodes, names = dataset.actions(), list(dataset.episodes), dataset.info.action_names
    if not len(actions) or not episodes:
        raise DataError("there are no actions in this data", field=str(data))
    if horizon < 1:
        raise DataError("the horizon must be at least one step", field="--horizon", got=horizon)
    starts = np.concatenate([np.arange(e.start, e.stop) for e in episodes])
    ends = np.concatenate([np.full(len(e), e.stop) for e in episodes])
    pick = _spread(np.arange(len(starts)), most)
    steps = np.minimum(starts[pick, None] + np.arange(horizon), ends[pick, None] - 1)
    if path.suffix == ".npz":
        return _chunks(actions[steps], actions, names)
    seen = () if variant is None else stats_steps(variant(dataset))
    stats = stats_of(summarise(dataset, seen, horizon))["actions"]
    _, chunks = _apply([placed.step for placed in seen], dataset.states()[starts[pick]], actions[steps])
    return Chunks(check_chunks(chunks), stats.q01, stats.q99, _names(names, chunks.shape[-1]))


def _read_npz(path: Path) -> tuple[np.ndarray, list[range], Sequence[str]]:
    try:
        with np.load(path, allow_pickle=False) as z:
            arrays = {k: z[k] for k in ("chunks", "actions", "action", "step_type") if k in z.files}
    except (OSError, ValueError) as error:
        raise DataError("the file cannot be read as .npz", field=str(path), got=str(error)) from error
    if "chunks" in arrays:
        return arrays["chunks"], [], ()
    actions = arrays.get("actions", arrays.get("action"))
    if actions is None or actions.ndim not in (2, 3):
        raise DataError(
            "the file holds no actions",
            field=str(path),
            got=sorted(arrays),
            expected="chunks [n h d] or actions [frames d]",
        )
    if actions.ndim == 3:
        n, t, d = actions.shape
        return actions.reshape(n * t, d), [range(i * t, (i + 1) * t) for i in range(n)], ()
    first = np.flatnonzero(arrays["step_type"] == 0).tolist() if "step_type" in arrays else [0]
    edges = [*([] if first and first[0] == 0 else [0]), *first, len(actions)]
    return actions, [range(a, b) for a, b in zip(edges, edges[1:], strict=False) if b > a], ()


def _spread(rows: np.ndarray, most: int) -> np.ndarray:
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]


def _chunks(raw: np.ndarray, actions: np.ndarray, names: Sequence[str]) -> Chunks:
    raw = check_chunks(raw)
    stats = stats_of({"actions": summarise_batches(lambda: [(actions, None)], "actions")})["actions"]
    return Chunks(raw, stats.q01, stats.q99, _names(names, raw.shape[-1]))


def _names(names: Sequence[str], dims: int) -> tuple[str, ...]:
    return tuple(names) if len(names) == dims else tuple(f"dim {i}" for i in range(dims))


def split(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices to fit on (80 %) and to measure on (the rest), in data order."""
    order = np.random.default_rng(seed).permutation(n)
    held = max(1, n // 5)
    return np.sort(order[held:]) if n > 1 else order, np.sort(order[:held])


def measure(name: str, codec: ActionCodec, chunks: Chunks, seed: int = 0) -> Result:
    """Fit on 80 % of the chunks if the codec is not fitted, measure on the rest."""
    fit_on, held = split(len(chunks.raw), seed)
    normal = chunks.normalised()
    start = time.perf_counter()
    if not codec.fitted:
        codec = codec.fit(normal[fit_on])
    fit_s = time.perf_counter() - start
    h, d = normal.shape[1:]
    codec.encode(normal[held])  # warm
    start = time.perf_counter()
    ids = codec.encode(normal[held])
    encode_us = (time.perf_counter() - start) / len(held) * 1e6
    start = time.perf_counter()
    decoded = np.stack([codec.decode(row, h, d) for row in ids])
    decode_us = (time.perf_counter() - start) / len(held) * 1e6
    error = np.abs(chunks.units(decoded) - chunks.raw[held])
    count = np.asarray([len(row) for row in ids])
    return Result(
        name=name,
        tokens=float(count.mean()),
        most=int(count.max()),
        ratio=h * d / float(count.mean()),
        rmse=float(np.sqrt(np.mean(error**2))),
        worst=float(error.max()),
        worst_dim=chunks.names[int(error.max((0, 1)).argmax())],
        bound=codec.error_bound(h, d),
        broken=broken_share(codec, ids, h, d, seed),
        encode_us=encode_us,
        decode_us=decode_us,
        fit_s=fit_s,
        example=chunks.units(decoded[0]),
    )


def broken_share(
    codec: ActionCodec, ids: Sequence[np.ndarray], h: int, d: int, seed: int = 0, share: float = 0.01
) -> float:
    """Share of chunks that raise DecodeError when each token becomes a random action id with probability `share`."""
    rng = np.random.default_rng(seed)
    broken = 0
    for row in ids:
        hit = rng.random(len(row)) < share
        damaged = np.where(hit, rng.integers(0, codec.vocab_size, len(row)), row)
        try:
            codec.decode(damaged, h, d)
        except DecodeError:
            broken += 1
    return broken / len(ids)


def picture(path: Path, chunks: Chunks, results: Sequence[Result], seed: int = 0) -> None:
    """Original against decoded, one panel per dim, for the first held-out chunk."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise SettingsError(
            "pictures are drawn with matplotlib, which is not installed", fix="pip install 'vla-core[plots]'"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    original = chunks.raw[split(len(chunks.raw), seed)[1][0]]
    d = original.shape[1]
    columns = min(4, d)
    rows = -(-d // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.0 * rows), squeeze=False, sharex=True)
    for i, axis in enumerate(axes.flat):
        if i >= d:
            axis.set_visible(False)
            continue
        axis.plot(original[:, i], color="black", linewidth=2.2, alpha=0.35, label="original")
        for result in results:
            axis.plot(result.example[:, i], linewidth=1, label=f"{result.name} ({result.tokens:.0f} tokens)")
        axis.set_title(chunks.names[i], fontsize=8)
        axis.tick_params(labelsize=7)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=min(4, len(labels)), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.5 / (2.0 * rows)))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Cells of the table, under `COLUMNS`."""
    return [
        (
            r.name,
            f"{r.tokens:.1f}",
            f"{r.most}",
            f"{r.ratio:.1f}",
            f"{r.rmse:.3g}",
            f"{r.worst:.3g}",
            f"{r.bound:.3g}",
            f"{100 * r.broken:.0f} %",
            f"{r.encode_us:.0f}",
            f"{r.decode_us:.0f}",
            f"{r.fit_s:.1f}",
        )
        for r in results
    ]


COLUMNS = ("tokenizer", "tokens", "most", "ratio", "RMSE", "max err", "bound", "fail", "enc us", "dec us", "fit s")
LEGEND = (
    "tokens: mean per chunk; most: longest chunk; ratio: values per token; RMSE, max err: in the data's units;\n"
    "bound: of the error, stated by the codec, in normalised units; fail: share of chunks that do not decode when\n"
    "1 % of the tokens are replaced (the others decode to something else); us: microseconds per chunk"
)


def plain(result: Result) -> Mapping[str, Any]:
    """The result without arrays, for JSON."""
    from attrs import asdict

    return {k: v for k, v in asdict(result).items() if k != "example"}
