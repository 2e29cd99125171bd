"""Names of the diffusion head's own weights; those of its expert are the LLM core's. Axes: a action dims, w y width."""

from __future__ import annotations

from collections.abc import Iterator

from vla.params import Row, Site, bind


def _linear(name: str, into: str, out: str) -> tuple[Row, Row]:
    weight = Row(f"{name}.weight", f"{name}/kernel", f"{out} {into} -> {into} {out}")
    return weight, Row(f"{name}.bias", f"{name}/bias", out)


ROWS = (
    *_linear("noisy_proj", "a", "w"),
    *_linear("noise_proj", "w", "a"),
    *_linear("step_mlp_in", "w", "y"),
    *_linear("step_mlp_out", "w", "y"),
)


def rows(site: Site) -> Iterator[Row]:
    """Our names and JAX paths."""
    width = site.settings.width
    yield from bind(ROWS, {"a": site.spec.action_dim, "w": width, "y": width})
