"""Exact mean, deviation, quantiles and extremes of long streams of rows, in bounded memory.

Quantiles are exact order statistics, found by radix selection: a float32 has an unsigned key with the same order, so
one pass counts the upper 16 bits of all keys and a second pass counts the lower 16 bits of those that share the upper
bits of a wanted rank. That takes a few tables of 65,536 counters per dim, whatever the data are, and no sort. Between
two order statistics values are interpolated as numpy's default does.

Bound: for float32 data (and integers up to 2**24) the quantiles are numpy's on the whole data, up to one rounding of
float64. Other data are rounded to float32 first: the quantile is off by at most 6e-8 of its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from attrs import frozen

from vla.errors import DataError

Batch = tuple[np.ndarray, np.ndarray | None]  # rows [n d], and how often each counts [n] (None: once)
LEVELS = (0.01, 0.99)
_HALF = 1 << 16


@frozen(eq=False)
class Summary:
    """float64 [d] each; `below` and `above` are the shares of values outside [q01, q99]."""

    count: int
    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray
    q99: np.ndarray
    min: np.ndarray
    max: np.ndarray
    below: np.ndarray
    above: np.ndarray


def summarise_batches(batches: Callable[[], Iterable[Batch]], name: str = "rows") -> Summary:
    """Statistics of all rows.

    Args:
        batches: starts a new pass over (rows [n d], counts [n] or None); called twice, both passes must be equal.
        name: for messages.

    Raises:
        DataError: no rows, rows of different widths, or values that are not finite in float32.
    """
    moments, upper = _first_pass(batches, name)
    count = int(upper[0].sum())
    ranks, parts = _ranks(count)
    d = len(upper)
    # per dim: rank -> upper half of its key, and how many values lie before that half
    sums = np.cumsum(upper, axis=1)
    halves = np.array([np.searchsorted(sums[j], ranks, side="right") for j in range(d)])
    lower = _second_pass(batches, halves)
    out = {name: np.empty(d) for name in ("q01", "q99", "below", "above")}
    for j in range(d):
        before = {h: int(sums[j, h - 1]) if h else 0 for h in lower[j]}
        values = []
        for rank, h in zip(ranks, halves[j]):
            inside = np.cumsum(lower[j][h])
            values.append(_value(h, int(np.searchsorted(inside, rank - before[h], side="right"))))
        for (i, part), label in zip(parts, ("q01", "q99")):
            out[label][j] = _between(values[i], values[i + 1], part)
        out["below"][j] = _share_below(out["q01"][j], lower[j], before, values, count)
        out["above"][j] = 1 - _share_below(out["q99"][j], lower[j], before, values, count, up_to=True)
    return Summary(count=count, **moments, **out)


def quantiles(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(q01, q99) [d] of rows [n d]."""
    s = summarise_batches(lambda: [(rows, None)])
    return s.q01, s.q99


def _first_pass(batches: Callable[[], Iterable[Batch]], name: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Moments by Chan's merge, extremes, and the counts of upper halves [d 65536]."""
    total, done = 0.0, 0
    mean = m2 = low = high = upper = None
    for rows, counts in batches():
        rows = np.asarray(rows)
        if rows.ndim != 2 or rows.shape[1] == 0 or (upper is not None and rows.shape[1] != len(upper)):
            want = "[rows dims]" if upper is None else f"[rows {len(upper)}]"
            raise DataError("rows of numbers expected", field=name, got=rows.shape, expected=want)
        if not len(rows):
            continue
        d = rows.shape[1]
        if upper is None:
            mean, m2 = np.zeros(d), np.zeros(d)
            low, high = np.full(d, np.inf), np.full(d, -np.inf)
            upper = np.zeros((d, _HALF), np.int64)
        n = float(len(rows) if counts is None else counts.sum())
        for j in range(d):
            column = np.ascontiguousarray(rows[:, j])
            lo, hi = float(column.min()), float(column.max())  # NaN spreads to both
            if not (abs(lo) < 3.4e38 and abs(hi) < 3.4e38):
                bad = int(np.argmax(~(np.abs(column) < 3.4e38)))
                raise DataError(
                    "a value is NaN, infinite or too large",
                    field=f"{name}, row {done + bad}, dim {j}",
                    got=float(column[bad]),
                    fix="repair or drop that episode",
                )
            x = column.astype(np.float64)
            m = float(x.mean() if counts is None else np.dot(x, counts) / n)
            x -= m
            square = float(np.dot(x, x) if counts is None else np.dot(x * x, counts))
            delta = m - mean[j]
            mean[j] += delta * n / (total + n)
            m2[j] += square + delta * delta * total * n / (total + n)
            low[j], high[j] = min(low[j], lo), max(high[j], hi)
            upper[j] += _count(_keys(column) >> 16, counts)
        total += n
        done += len(rows)
    if upper is None:
        raise DataError("no rows to take statistics of", field=name, got=0)
    return {"mean": mean, "std": np.sqrt(m2 / total), "min": low, "max": high}, upper


def _second_pass(batches: Callable[[], Iterable[Batch]], halves: np.ndarray) -> list[dict[int, np.ndarray]]:
    """Per dim: upper half -> counts of the lower halves [65536] of the values in it."""
    out = [{int(h): np.zeros(_HALF, np.int64) for h in set(row.tolist())} for row in halves]
    for rows, counts in batches():
        rows = np.asarray(rows)
        for j, tables in enumerate(out):
            keys = _keys(np.ascontiguousarray(rows[:, j]))
            top = keys >> 16
            for h, table in tables.items():
                chosen = top == h
                table += _count(keys[chosen] & 0xFFFF, None if counts is None else counts[chosen])
    return out


def _keys(column: np.ndarray) -> np.ndarray:
    """uint32 keys in the order of the values as float32."""
    bits = (column.astype(np.float32) + np.float32(0)).view(np.uint32)  # + 0: minus zero is zero
    negative = (bits.view(np.int32) >> 31).view(np.uint32)  # all ones, or zero
    return bits ^ (negative | np.uint32(0x80000000))


def _value(upper: int, lower: int) -> float:
    """The float of a key."""
    key = np.uint32((int(upper) << 16) | int(lower))
    bits = key ^ np.uint32(0x80000000) if key & np.uint32(0x80000000) else ~key
    return float(np.array(bits, np.uint32).view(np.float32))


def _count(keys: np.ndarray, counts: np.ndarray | None) -> Any:
    if counts is None:
        return np.bincount(keys, minlength=_HALF)
    return np.bincount(keys, weights=counts, minlength=_HALF).astype(np.int64)  # exact below 2**53


def _ranks(count: int) -> tuple[np.ndarray, list[tuple[int, float]]]:
    """Ranks whose values are needed, and per level (place in that list, weight of the next)."""
    ranks: list[int] = []
    parts = []
    for level in LEVELS:
        at = level * (count - 1)
        first = int(np.floor(at))
        parts.append((len(ranks), at - first))
        ranks += [first, min(first + 1, count - 1)]
    return np.array(ranks), parts


def _between(a: float, b: float, part: float) -> float:
    """Numpy's interpolation, from the nearer end."""
    return a + (b - a) * part if part < 0.5 else b - (b - a) * (1 - part)


def _share_below(
    level: float,
    tables: dict[int, np.ndarray],
    before: dict[int, int],
    values: list[float],
    count: int,
    up_to: bool = False,
) -> float:
    """Share of values below `level` (up_to: or equal). The level lies at or between two of `values`."""
    key = int(_keys(np.array([level], np.float32))[0])
    exact = float(np.float32(level)) == level and level in values
    if not exact:  # between two neighbours in order: all up to the lower one
        level = max(v for v in values if v < level)
        key = int(_keys(np.array([level], np.float32))[0])
        up_to = True
    half, low = key >> 16, key & 0xFFFF
    inside = int(tables[half][: low + 1 if up_to else low].sum())
    return (before[half] + inside) / count
