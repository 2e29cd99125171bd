"""Pictures of a layout: who sees whom as text and as SVG, and gradient routes. Standard library only.

Both pictures are drawn from the layout table itself, with a symbolic number of tokens per role.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from vla.layout import BACKBONE, Layout, gradient_routes

# One colour per expert, in order of appearance; readable for colour-blind eyes (Okabe-Ito).
MADE_BY = 'data-made-by="vla"'  # in every picture of ours, so that no other is replaced
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, FAINT = "#222222", "#e9e9ee"
SIZES = {"image": 6, "prompt": 4, "target": 5, "state": 1, "action": 5}


def expert_colours(layout: Layout) -> dict[str, str]:
    """expert -> colour."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(layout.experts)}


def mask_text(layout: Layout) -> str:
    """Who sees whom, one cell per pair of roles: rows look, columns are seen.

    `##` sees all, `#.` sees itself and what came before, `~~` and `~.` the same without gradient.
    """
    roles = layout.roles
    wide = [max(len(role), 2) for role in roles]
    left = max(map(len, roles))
    lines = [f"{'':<{left}}  " + "  ".join(f"{role:^{w}}" for role, w in zip(roles, wide, strict=True))]
    used: set[str] = set()
    for row in layout.rows:
        cells = []
        for role, w in zip(roles, wide, strict=True):
            look = row.look(role)
            glyph = "" if look is None else ("░" if look.stop else "█")
            if look is not None:
                used.add("stop" if look.stop else "see")
            if look is not None and look.causal:
                used.add("causal")
                glyph = "▒▙"[not look.stop]
                cells.append(f"{glyph:^{w}}")
            else:
                cells.append(f"{glyph * w if glyph else '·':^{w}}")
        lines.append(f"{row.role:<{left}}  " + "  ".join(cells))
    legend = {"see": "█ sees", "causal": "▙ sees itself and what came before", "stop": "░ sees, gradient stopped"}
    return "\n".join([*lines, "   ".join([text for key, text in legend.items() if key in used] + ["· does not see"])])


def mask_svg(layout: Layout, sizes: Mapping[str, int] | None = None, title: str = "") -> str:
    """The attention mask as a self-contained SVG: a row per looking token, a column per seen one.

    Args:
        layout: the table.
        sizes: role -> tokens to draw; default a symbolic few.
        title: above the picture.
    """
    counts = {role: (sizes or {}).get(role, SIZES.get(role, 3)) for role in layout.roles}
    cell, gap, left, top = 13, 5, 92, 74 if title else 50
    tokens = [(row, i) for row in layout.rows for i in range(counts[row.role])]
    at, place = [], 0.0
    for n, (row, _) in enumerate(tokens):
        if n and tokens[n - 1][0].role != row.role:
            place += gap
        at.append(place)
        place += cell
    colours = expert_colours(layout)
    legend = [(colours[e], False, f"weights of {e}") for e in layout.experts]
    if any(look.stop for row in layout.rows for look in row.sees):
        legend.append(("#888888", True, "seen, gradient stopped"))
    width, height = left + place + 24, top + place + 26 + 18 * len(legend)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {MADE_BY} viewBox="0 0 {max(width, 330):.0f} {height:.0f}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{max(width, 330):.0f}" height="{height:.0f}" fill="#ffffff"/>',
        '<defs><pattern id="stop" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="2.4" height="5" fill="#ffffff"/></pattern></defs>',
    ]
    if title:
        out.append(f'<text x="14" y="24" font-size="14" font-weight="bold">{escape(title)}</text>')
    for role in layout.roles:
        mine = [at[n] for n, (row, _) in enumerate(tokens) if row.role == role]
        middle = (mine[0] + mine[-1] + cell) / 2
        out.append(f'<text x="{left - 8}" y="{top + middle + 4:.1f}" text-anchor="end">{escape(role)}</text>')
        out.append(
            f'<text x="{left + middle:.1f}" y="{top - 8}" transform="rotate(-30 {left + middle:.1f} {top - 8})">'
            f"{escape(role)}</text>"
        )
    for q, (row, i) in enumerate(tokens):
        for k, (other, j) in enumerate(tokens):
            look = row.look(other.role)
            sees = look is not None and (not look.causal or (k <= q if row.role != other.role else j <= i))
            box = f'x="{left + at[k]:.1f}" y="{top + at[q]:.1f}" width="{cell - 1}" height="{cell - 1}"'
            out.append(f'<rect {box} fill="{colours[row.expert] if sees else FAINT}"/>')
            if sees and look is not None and look.stop:
                out.append(f'<rect {box} fill="url(#stop)"/>')
    y = top + place + 20
    for colour, hatched, text in legend:
        out.append(f'<rect x="14" y="{y:.1f}" width="12" height="12" fill="{colour}"/>')
        if hatched:
            out.append(f'<rect x="14" y="{y:.1f}" width="12" height="12" fill="url(#stop)"/>')
        out.append(f'<text x="32" y="{y + 10:.1f}">{escape(text)}</text>')
        y += 18
    return "\n".join([*out, "</svg>\n"])


def routes(layout: Layout, losses: Mapping[str, str]) -> tuple[list[str], dict[str, dict[str, bool]]]:
    """(weight groups in reading order, loss -> group -> whether its gradient arrives). `losses`: loss -> its role."""
    table = gradient_routes(layout, {name: role for name, role in losses.items() if role in layout.roles})
    groups = ["vision", BACKBONE, *(e for e in layout.experts if e != BACKBONE)]
    return groups, table
