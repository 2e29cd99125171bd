"""Names of the plain ViT's weights: ours and JAX.

Axes: d width, q query-key-value (3), n heads, h head width, f mlp width, t the class token and the patches in y rows
and x columns, c colours, i j rows and columns of a patch; {l} block.
"""

from __future__ import annotations

from collections.abc import Iterator

from vla.params import Row, Site, bind

ROWS = (
    Row("patch.weight", "patch/kernel", "d c i j -> i j c d"),
    Row("patch.bias", "patch/bias", "d"),
    Row("class_token", "class_token", "1 1 d"),
    Row("position", "position", "1 t d", grid=("t", "y", "x")),
    Row("blocks.{l}.norm_attn.weight", "blocks/norm_attn/scale", "d"),
    Row("blocks.{l}.norm_attn.bias", "blocks/norm_attn/bias", "d"),
    Row("blocks.{l}.qkv.weight", "blocks/qkv/kernel", "(q n h) d -> d q n h"),
    Row("blocks.{l}.qkv.bias", "blocks/qkv/bias", "(q n h) -> q n h"),
    Row("blocks.{l}.o.weight", "blocks/o/kernel", "d (n h) -> n h d"),
    Row("blocks.{l}.o.bias", "blocks/o/bias", "d"),
    Row("blocks.{l}.norm_mlp.weight", "blocks/norm_mlp/scale", "d"),
    Row("blocks.{l}.norm_mlp.bias", "blocks/norm_mlp/bias", "d"),
    Row("blocks.{l}.fc1.weight", "blocks/fc1/kernel", "f d -> d f"),
    Row("blocks.{l}.fc1.bias", "blocks/fc1/bias", "f"),
    Row("blocks.{l}.fc2.weight", "blocks/fc2/kernel", "d f -> f d"),
    Row("blocks.{l}.fc2.bias", "blocks/fc2/bias", "d"),
    Row("norm.weight", "norm/scale", "d"),
    Row("norm.bias", "norm/bias", "d"),
)


def rows(site: Site) -> Iterator[Row]:
    """Our names and JAX paths."""
    s = site.settings
    high, wide = (side // s.patch_size for side in site.spec.image_size)
    sizes = {
        "l": s.depth, "d": s.width, "q": 3, "n": s.num_heads, "h": s.width // s.num_heads, "f": s.mlp_dim,
        "t": high * wide + 1, "y": high, "x": wide, "c": 3, "i": s.patch_size, "j": s.patch_size,
    }  # fmt: skip
    yield from bind(ROWS, sizes)
