"""Names of the convolutional encoder's weights: ours and JAX.

Axes: c channels before, d channels behind, i j rows and columns of a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

from vla.params import Row, Site, bind


def rows(site: Site) -> Iterator[Row]:
    """Our names and JAX paths."""
    for n, (before, width, _) in enumerate(site.settings.layers()):
        layer = (
            Row(f"layers.{n}.conv.weight", f"layers/{n}/kernel", "d c i j -> i j c d"),
            Row(f"layers.{n}.norm.weight", f"layers/{n}/norm/scale", "d"),
            Row(f"layers.{n}.norm.bias", f"layers/{n}/norm/bias", "d"),
        )
        yield from bind(layer, {"c": before, "d": width, "i": 3, "j": 3})
    end = (Row("norm.weight", "norm/scale", "d"), Row("norm.bias", "norm/bias", "d"))
    yield from bind(end, {"d": site.settings.widths[-1]})
