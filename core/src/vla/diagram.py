"""The architecture of a variant as SVG, drawn from its tree and its layout. Standard library only.

Left to right: what comes in, tokenizers and encoders, one lane per expert (the backbone's above, those of the heads
below, parallel in attention), what comes out. Grey arrows run in training and at inference, dashed ones in training
only, green ones at inference only; the thick arrow is the cache: keys and values of the prefix, computed once, read
in every round of the sampling loop. Roles that this file does not know (a third party's) are drawn as inputs of their
head.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from vla.layout import BACKBONE, Layout
from vla.pictures import INK, MADE_BY, expert_colours

if TYPE_CHECKING:
    from vla.compose import Chosen, Variant

# Left edges and widths of the columns: inputs, tokenizers and encoders, lanes, outputs.
IN, CODE, LANE, OUT = (24, 150), (230, 200), (500, 260), (850, 210)
WIDTH, ROW, BLOCK, PAD = 1130, 66, 44, 18
GREY, PALE, GREEN = "#6b6b76", "#f5f5f8", "#00795a"


@frozen
class _Canvas:
    """SVG elements: `below` (lanes), then `lines`, then `boxes`."""

    below: list[str] = field(factory=list)
    lines: list[str] = field(factory=list)
    boxes: list[str] = field(factory=list)

    def box(
        self, x: float, y: float, w: float, title: str, sub: str = "", colour: str = GREY, dashed: bool = False
    ) -> None:
        """A labelled box of the usual height, its top left corner at (x, y)."""
        style = f'stroke="{colour}" stroke-width="1.5"' + (' stroke-dasharray="5 4"' if dashed else "")
        self.boxes.append(f'<rect x="{x}" y="{y}" width="{w}" height="{BLOCK}" rx="6" fill="#ffffff" {style}/>')
        top = y + (19 if sub else 27)
        self.boxes.append(
            f'<text x="{x + w / 2}" y="{top}" text-anchor="middle" font-weight="bold">{escape(title)}</text>'
        )
        if sub:
            self.boxes.append(
                f'<text x="{x + w / 2}" y="{y + 35}" text-anchor="middle" font-size="10.5" fill="{GREY}">'
                f"{escape(sub)}</text>"
            )

    def arrow(
        self, points: Sequence[tuple[float, float]], dashed: bool = False, colour: str = GREY, thick: bool = False
    ) -> None:
        """A line through the points with a head at its end."""
        path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="6 5"' if dashed else ""
        kind = "thick" if thick else "green" if colour == GREEN else "thin"
        role = "training" if dashed else "cache" if thick else "inference" if colour == GREEN else "always"
        self.lines.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{4 if thick else 1.6}"{dash} '
            f'marker-end="url(#{kind})" class="{role}"/>'
        )

    def text(self, x: float, y: float, text: str, anchor: str = "start", size: float = 11, colour: str = GREY) -> None:
        """Free text."""
        self.boxes.append(
            f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{escape(text)}</text>'
        )


def diagram_svg(variants: Sequence[Variant]) -> str:
    """One panel per variant, each under the other, with one legend."""
    panels, height = [], 0.0
    for variant in variants:
        body, tall = _panel(variant)
        panels.append(f'<g transform="translate(0 {height:.0f})">\n{body}\n</g>')
        height += tall
    legend = _legend()
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {MADE_BY} viewBox="0 0 {WIDTH} {height + 50:.0f}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="12.5" fill="{INK}">\n'
        f'<rect width="{WIDTH}" height="{height + 50:.0f}" fill="#ffffff"/>\n'
        '<defs><marker id="thin" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{GREY}"/></marker>'
        '<marker id="green" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{GREEN}"/></marker>'
        '<marker id="thick" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="3.6" markerHeight="3.6" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>\n'
        + "\n".join(panels)
        + f'\n<g transform="translate(0 {height:.0f})">{legend}</g>\n</svg>\n'
    )


def _legend() -> str:
    c = _Canvas()
    c.arrow([(24, 20), (74, 20)])
    c.text(82, 24, "training and inference")
    c.arrow([(224, 20), (274, 20)], dashed=True)
    c.text(282, 24, "training only")
    c.arrow([(374, 20), (424, 20)], colour=GREEN)
    c.text(432, 24, "inference only")
    c.arrow([(530, 20), (580, 20)], colour=INK, thick=True)
    c.text(592, 24, "cache, inference only: keys and values of the prefix, computed once, read in every round")
    return "".join(c.lines + c.boxes)


def _panel(variant: Variant) -> tuple[str, float]:
    c = _Canvas()
    layout: Layout = variant.layout()
    colours = expert_colours(layout)
    outputs = _outputs(variant, layout)
    makers = [out for out in outputs if out.gives != "tokens"] or outputs  # what inference runs
    varying = [out.role for out in makers]
    cached = [role for role in layout.cacheable(varying) if layout.row(role).expert == BACKBONE]

    c.text(24, 30, variant.name, size=17, colour=INK)
    runs = " and ".join(variant.frameworks()) or "no framework"
    parts = "    ".join(f"{path} = {chosen.part.name}" for path, chosen in variant.walk())
    c.text(24, 50, f"{parts}    (runs in {runs})", size=10.5)
    y_of: dict[str, float] = {}
    top = 96.0
    for expert in layout.experts:
        roles = [row.role for row in layout.rows if row.expert == expert]
        tall = PAD + ROW * len(roles) + 6
        c.below.append(
            f'<rect x="{LANE[0]}" y="{top}" width="{LANE[1]}" height="{tall}" rx="10" fill="{PALE}" '
            f'stroke="{colours[expert]}" stroke-width="2"/>'
        )
        c.text(LANE[0] + 8, top - 8, _lane_title(variant, expert), size=11.5, colour=colours[expert])
        y_of |= {role: top + PAD + ROW * i for i, role in enumerate(roles)}
        top += tall + 54
    texts = [y for role, y in y_of.items() if role in ("prompt", "target")]
    if texts:  # the upstream panel: what happens to text and tokens before the model
        x, y, w = float(IN[0] - 10), min(texts) - 17, CODE[0] + CODE[1] - IN[0] + 20
        high = max(texts) + BLOCK + 6 - y
        c.below.append(f'<rect x="{x}" y="{y}" width="{w}" height="{high}" rx="8" fill="#fff7e0"/>')
        c.text(CODE[0] + CODE[1], y + 12, "tokenizers, before the model", "end", 10)
    for role, y in y_of.items():
        out = next((out for out in outputs if out.role == role), None)
        trained_only = out is not None and out not in makers
        sees = " ".join(str(look) for look in layout.row(role).sees)
        c.box(LANE[0] + 24, y, LANE[1] - 56, role, f"sees {sees}"[:36], colours[layout.row(role).expert], trained_only)
        _draw_input(c, variant, role, y, trained_only, out)
        if out is not None:
            _draw_output(c, variant, out, y, out in makers)
    _draw_cache(c, layout, y_of, cached, varying)
    return "\n".join([*c.below, *c.lines, *c.boxes]), top - 54 + 40


@frozen
class _Output:
    """A loss, its role, and how inference makes actions from that role."""

    loss: str
    role: str
    gives: str  # tokens | chunk
    rounds: int | None


def _outputs(variant: Variant, layout: Layout) -> list[_Output]:
    losses = variant.head.offers.get("losses") or {}
    found = []
    for loss, role in losses.items() if hasattr(losses, "items") else ():
        owners = [n for _, n in variant.head.walk("") if loss in (n.offers.get("losses") or ())]
        if role in layout.roles:
            steps = getattr(owners[-1].settings, "num_steps", None)
            found.append(_Output(loss, role, owners[-1].offers.get("gives", "chunk"), steps))
    return found


def _lane_title(variant: Variant, expert: str) -> str:
    offers = variant.backbone.offers
    if expert == BACKBONE:
        core = next(
            (n.part.name for _, n in variant.backbone.walk("") if n.part.kind == "llm"), variant.backbone.part.name
        )
        return f"prefix lane: {core}, width {offers.get('width')}, {offers.get('depth')} layers"
    size = variant.experts()[expert]
    return f"{expert} lane: expert of width {size.width}{', adaRMS' if size.adarms else ''}"


def _draw_input(c: _Canvas, variant: Variant, role: str, y: float, trained_only: bool, out: _Output | None) -> None:
    """What comes in for a role: raw input -> tokenizer or encoder -> the role's block."""
    spec, tokenizer = variant.spec, variant.tokenizer
    middle, lane = y + BLOCK / 2, LANE[0] + 24
    if role == "image":
        vision = next((n for _, n in variant.backbone.walk("") if n.part.kind == "vision"), None)
        raw, code = (f"{len(spec.cameras)} cameras", "{} x {} RGB".format(*spec.image_size)), ("vision encoder", "")
        if vision is not None:
            code = (vision.part.name, f"vision encoder, width {vision.offers.get('width')}")
    elif role == "prompt":
        text = _emitting(tokenizer, "text")
        state = variant.head.offers.get("state") == "tokens"
        raw = (
            "instruction, state" if state else "instruction",
            "text" + (f" and {spec.state_dim} numbers" if state else ""),
        )
        code = (f"{text.part.name} text", f"at most {spec.max_token_len} tokens in all")
    elif out is not None and out.gives == "tokens":
        raw, code = (
            ("actions", f"{spec.action_horizon} x {spec.action_dim}"),
            (f"{tokenizer.part.name} codec", "actions to tokens"),
        )
        trained_only = True
    elif role == "state":
        raw, code = ("state", f"{spec.state_dim} numbers"), ("projection", "one token")
    elif role == "action":
        raw, code = (
            ("noise", f"{spec.action_horizon} x {spec.action_dim}, and time t"),
            ("projection", "one token per step"),
        )
        c.box(IN[0], y + ROW, IN[1], "actions", "mixed into the noise", dashed=True)
        c.arrow(
            [(IN[0] + IN[1], middle + ROW), (CODE[0] + 40, middle + ROW), (CODE[0] + 40, y + BLOCK + 2)], dashed=True
        )
    else:
        raw, code = ("head", "an input of its own"), (f"{variant.head.part.name}", f"embeds {role}")
    c.box(IN[0], y, IN[1], *raw, dashed=trained_only)
    c.box(CODE[0], y, CODE[1], *code, dashed=trained_only)
    c.arrow([(IN[0] + IN[1], middle), (CODE[0] - 2, middle)], dashed=trained_only)
    c.arrow([(CODE[0] + CODE[1], middle), (lane - 2, middle)], dashed=trained_only)


def _draw_output(c: _Canvas, variant: Variant, out: _Output, y: float, acts: bool) -> None:
    """The loss of a role, and the way to actions where inference uses that role."""
    middle, right, below = y + BLOCK / 2, LANE[0] + LANE[1] - 32, y + ROW
    c.arrow([(right, middle), (OUT[0] - 2, middle)], dashed=True)
    c.box(OUT[0], y, OUT[1], f"loss: {out.loss}", "against the demonstration", dashed=True)
    if not acts:
        return
    size = f"{variant.spec.action_horizon} x {variant.spec.action_dim}"
    sub = f"{size}, by the {variant.tokenizer.part.name} codec" if out.gives == "tokens" else size
    c.box(OUT[0], below, OUT[1], "actions", sub, GREEN)
    leave = y + BLOCK - 9
    c.arrow([(right, leave), (right + 16, leave), (right + 16, below + 14), (OUT[0] - 2, below + 14)], colour=GREEN)
    rounds = "one token per round" if out.gives == "tokens" else f"{out.rounds} rounds" if out.rounds else ""
    if rounds:
        back = below + 34
        c.arrow([(OUT[0], back), (LANE[0] + 60, back), (LANE[0] + 60, y + BLOCK + 2)], colour=GREEN)
        c.text(LANE[0] + 70, back - 4, f"sampling loop: {rounds}", size=10.5, colour=GREEN)


def _draw_cache(c: _Canvas, layout: Layout, y_of: dict[str, float], cached: list[str], varying: list[str]) -> None:
    """The thick arrow from the cached roles to each role that is recomputed in every round."""
    right = LANE[0] + LANE[1] - 32
    for n, role in enumerate(varying):
        looks = [look for look in layout.row(role).sees if look.role in cached]
        if not looks:
            continue
        x = LANE[0] + LANE[1] + 14 + 12 * n
        ys = [y_of[look.role] + BLOCK / 2 for look in looks]
        for y in ys:
            c.lines.append(f'<path d="M{right} {y} L{x} {y}" stroke="{INK}" stroke-width="4" class="cache"/>')
        end = y_of[role] + 10
        c.arrow([(x, min(ys)), (x, end), (right + 3, end)], colour=INK, thick=True)
        stopped = ", gradient stopped" if all(look.stop for look in looks) else ""
        c.text(x + 8, max(ys) + 30, f"cache{stopped}", colour=INK)


def _emitting(tokenizer: Chosen, what: str) -> Any:
    """The innermost tokenizer that emits this."""
    for _, node in reversed(list(tokenizer.walk(""))):
        if what in (node.offers.get("emits") or ()):
            return node
    return tokenizer
