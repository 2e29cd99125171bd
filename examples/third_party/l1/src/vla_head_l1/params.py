"""Names of the l1 head's weights.

Axes: q queries, d backbone width, e width per step, s state dims, w x hidden, a action dims.
"""

from __future__ import annotations

from collections.abc import Iterator

from vla.params import Row, Site, bind
from vla_head_l1.config import queries_per_step


def _linear(name: str, into: str, out: str) -> tuple[Row, Row]:
    weight = Row(f"{name}.weight", f"{name}/kernel", f"{out} {into} -> {into} {out}")
    return weight, Row(f"{name}.bias", f"{name}/bias", out)


def _norm(name: str, axis: str) -> tuple[Row, Row]:
    return Row(f"{name}.weight", f"{name}/scale", axis), Row(f"{name}.bias", f"{name}/bias", axis)


ROWS = (
    Row("queries", "queries", "q d"),
    *_norm("norm_in", "e"),
    *_linear("fc_in", "e", "w"),
    *_norm("norm_out", "w"),
    *_linear("fc_out", "w", "a"),
)
BLOCKS = (
    Row("blocks.{l}.norm.weight", "blocks/{l}/norm/scale", "w"),
    Row("blocks.{l}.norm.bias", "blocks/{l}/norm/bias", "w"),
    Row("blocks.{l}.fc.weight", "blocks/{l}/fc/kernel", "x w -> w x"),
    Row("blocks.{l}.fc.bias", "blocks/{l}/fc/bias", "w"),
)
STATE = _linear("state_proj", "s", "d")


def rows(site: Site) -> Iterator[Row]:
    """Our names and JAX paths."""
    s, spec, width = site.settings, site.spec, site.backbone["width"]
    per_step = queries_per_step(s, spec)
    table = (*ROWS, *(BLOCKS if s.blocks else ()), *(STATE if s.state == "continuous" else ()))
    sizes = {
        "q": spec.action_horizon * per_step, "d": width, "e": per_step * width, "s": spec.state_dim,
        "w": s.hidden, "x": s.hidden, "a": spec.action_dim, "l": s.blocks,
    }  # fmt: skip
    yield from bind(table, sizes)
