"""Names of the flow head's own weights; those of its expert are the LLM core's.

Axes: a action_dim, s state_dim, w and y width of the expert, z twice the width (action then time).
"""

from __future__ import annotations

from collections.abc import Iterator

from vla.params import Row, Site, bind


def _linear(name: str, into: str, out: str) -> tuple[Row, Row]:
    return Row(f"{name}.weight", f"{name}/kernel", f"{out} {into} -> {into} {out}"), Row(
        f"{name}.bias", f"{name}/bias", out
    )


ROWS = (*_linear("action_in_proj", "a", "w"), *_linear("action_out_proj", "w", "a"))
STATE = _linear("state_proj", "s", "w")
CONCAT = (*_linear("action_time_mlp_in", "z", "w"), *_linear("action_time_mlp_out", "w", "y"))
ADARMS = (*_linear("time_mlp_in", "w", "y"), *_linear("time_mlp_out", "w", "y"))


def rows(site: Site) -> Iterator[Row]:
    """Our names and JAX paths."""
    s = site.settings
    table = (*ROWS, *(STATE if s.state == "continuous" else ()), *(ADARMS if s.time == "adarms" else CONCAT))
    sizes = {"a": site.spec.action_dim, "s": site.spec.state_dim, "w": s.width, "y": s.width, "z": 2 * s.width}
    yield from bind(table, sizes)


def openpi(site: Site) -> Iterator[Row]:
    """Openpi's tree: the same names, at its top."""
    yield from rows(site)


def hf(site: Site) -> Iterator[Row]:
    """Openpi's PyTorch port and LeRobot: our own names."""
    for row in rows(site):
        yield Row(row.torch, row.torch, row.axes.partition("->")[0], row.sizes)
