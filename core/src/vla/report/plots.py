"""Plots as SVG text: lines, small multiples, bars with intervals. Text and axes take the colour of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

# Okabe and Ito's colours, told apart by colour-blind eyes too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
FONT = 'font-family="system-ui, sans-serif" font-size="12"'
Points = Sequence[tuple[float, float]]


def line_plot(
    series: Mapping[str, Points],
    *,
    x: str = "",
    y: str = "",
    width: int = 460,
    height: int = 270,
    log: bool = False,
    zero: bool = False,
    dots: Sequence[str] = (),
    title: str = "",
    span: float = 0.0,
) -> str:
    """Lines by name.

    Args:
        series: name -> points (x, y); values that are not finite are left out.
        x, y: axis names.
        log: logarithmic y; values must be positive.
        zero: let y start at 0.
        dots: names drawn as dots instead of a line.
        title: above the plot.
        span: least range of y, so that noise around a constant looks like a constant.
    """
    clean = {
        name: [(a, b) for a, b in points if math.isfinite(a) and math.isfinite(b) and (b > 0 or not log)]
        for name, points in series.items()
    }
    every = [p for points in clean.values() for p in points]
    if not every:
        raise ValueError("nothing to plot")
    left, right, top, bottom = 58, 12, 30 if title else 12, 64 if len(clean) > 1 else 44
    x_low, x_high = _range([p[0] for p in every])
    ys = [math.log10(p[1]) if log else p[1] for p in every]
    y_low, y_high = _range(ys + ([0.0] if zero and not log else []), span)
    y_ticks = _log_ticks(y_low, y_high) if log else ticks(y_low, y_high)
    if not log:
        y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])

    def px(value: float) -> float:
        return left + (value - x_low) / (x_high - x_low) * (width - left - right)

    def py(value: float) -> float:
        v = math.log10(value) if log else value
        return height - bottom - (v - y_low) / (y_high - y_low) * (height - top - bottom)

    out = [_open(width, height, title or y)]
    if title:
        out.append(_text(left, 18, title, "start", weight=600))
    for tick in y_ticks:
        at = py(10**tick if log else tick)
        out.append(f'<line x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}" opacity=".15"/>')
        out.append(_text(left - 6, at + 4, _number(10**tick if log else tick), "end"))
    base = height - bottom
    for tick in ticks(x_low, x_high, 5):
        if x_low <= tick <= x_high:
            out.append(_text(px(tick), base + 16, _number(tick), "middle"))
    out.append(f'<line x1="{left}" x2="{width - right}" y1="{base}" y2="{base}" opacity=".5"/>')
    out.append(_text((left + width - right) / 2, base + 34, x, "middle", ".7"))
    if y:
        middle = (top + base) / 2
        out.append(f'<g transform="rotate(-90 14 {middle:.0f})">{_text(14, middle, y, "middle", ".7")}</g>')
    at = float(left)
    for i, (name, points) in enumerate(clean.items()):
        color = COLORS[i % len(COLORS)]
        if name in dots:
            look = f'r="2.6" fill="{color}" stroke="none"'
            out += [f'<circle cx="{px(a):.1f}" cy="{py(b):.1f}" {look}/>' for a, b in points]
        else:
            path = " ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in points)
            out.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        if len(clean) > 1:
            out.append(f'<rect x="{at:.0f}" y="{height - 16}" width="12" height="4" fill="{color}" stroke="none"/>')
            out.append(_text(at + 17, height - 10, name, "start"))
            at += 30 + 6.6 * len(name)
    return "".join([*out, "</svg>"])


def small_multiples(plots: Sequence[str], columns: int = 4) -> str:
    """Plots side by side, wrapping."""
    cells = "".join(f"<div>{plot}</div>" for plot in plots)
    grid = f"display:grid;grid-template-columns:repeat(auto-fill,minmax({max(160, 840 // columns)}px,1fr));gap:.5rem"
    return f'<div style="{grid}">{cells}</div>'


def interval_bars(rows: Sequence[tuple[str, float, float, float, str]], *, width: int = 640, x: str = "") -> str:
    """Shares in [0, 1] as bars with an interval: rows (name, value, low, high, note)."""
    if not rows:
        raise ValueError("nothing to plot")
    left, right, step = 12 + 7 * max(len(r[0]) for r in rows), 130, 34
    height = step * len(rows) + 40
    scale = width - left - right
    base = step * len(rows) + 8
    out = [_open(width, height, x)]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        at = left + tick * scale
        out.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="4" y2="{base}" opacity=".15"/>')
        out.append(_text(at, base + 15, f"{tick:.0%}", "middle", ".7"))
    for i, (name, value, low, high, note) in enumerate(rows):
        y = 8 + i * step
        a, b = left + low * scale, left + high * scale
        color = COLORS[0] if i == 0 else "#8b949e"
        out.append(_text(left - 8, y + 15, name, "end"))
        bar = f'x="{left}" y="{y}" width="{max(value * scale, 1):.1f}" height="20" rx="2"'
        out.append(f'<rect {bar} fill="{color}" stroke="none" opacity=".8"/>')
        middle = y + 10
        out.append(f'<line x1="{a:.1f}" x2="{b:.1f}" y1="{middle}" y2="{middle}" stroke-width="1.6"/>')
        ends = f'y1="{middle - 5}" y2="{middle + 5}" stroke-width="1.6"'
        out += [f'<line x1="{v:.1f}" x2="{v:.1f}" {ends}/>' for v in (a, b)]
        out.append(_text(left + scale + 10, y + 15, note, "start"))
    if x:
        out.append(_text(left + scale / 2, base + 30, x, "middle", ".7"))
    return "".join([*out, "</svg>"])


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover [low, high], about `count` of them."""
    span = max(high - low, 1e-12)
    raw = span / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    marks = [e + math.log10(m) for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    inside = [m for m in marks if low <= m <= high]
    return inside if len(inside) > 1 else [low, high]


def _range(values: Sequence[float], span: float = 0.0) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low < span:
        middle = (low + high) / 2
        return middle - span / 2, middle + span / 2
    if high - low < 1e-12:
        pad = abs(low) * 0.1 or 1.0
        return low - pad, high + pad
    return low, high


def _number(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.3g}"


def _text(x: float, y: float, content: str, anchor: str, opacity: str = "1", weight: int = 400) -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" opacity="{opacity}" font-weight="{weight}"'
    return f'<text {where} fill="currentColor" stroke="none">{escape(content)}</text>'


def _open(width: int, height: int, label: str) -> str:
    box = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {box} {FONT} stroke="currentColor" fill="currentColor" '
        f'role="img" aria-label="{escape(label)}">'
    )
