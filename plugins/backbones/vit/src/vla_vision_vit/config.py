"""Settings of the plain ViT (Dosovitskiy et al. 2020, arXiv 2010.11929), with a class token."""

from __future__ import annotations

from attrs import field, frozen, validators

from vla.parts import Need, at_least, multiple
from vla.settings import size


@frozen
class Settings:
    """A ViT; the defaults are ViT-B/16."""

    width: int = size(768, most=16_384)
    depth: int = size(12, most=128)
    mlp_dim: int = size(3072, most=131_072)
    num_heads: int = size(12, most=256)
    patch_size: int = size(16, most=256)
    # What the LLM gets: class token and all patches, the patches alone, or one token.
    pool: str = field(default="none", validator=validators.in_(("none", "patches", "cls", "mean")))


def needs(settings: Settings) -> tuple[Need, ...]:
    """How its sizes go together."""
    s = settings
    return (
        multiple("self", "width", s.num_heads, "every head has an equal share of the width"),
        at_least("spec", "image_side", s.patch_size, "a picture must hold a patch: larger images or smaller patches"),
    )


PRESETS: dict[str, dict[str, object]] = {
    "S/16": {"width": 384, "depth": 12, "mlp_dim": 1536, "num_heads": 6, "patch_size": 16},
    "B/16": {"width": 768, "depth": 12, "mlp_dim": 3072, "num_heads": 12, "patch_size": 16},
    "L/16": {"width": 1024, "depth": 24, "mlp_dim": 4096, "num_heads": 16, "patch_size": 16},
    "tiny": {"width": 96, "depth": 4, "mlp_dim": 256, "num_heads": 4, "patch_size": 8},
    "small": {"width": 256, "depth": 6, "mlp_dim": 1024, "num_heads": 4, "patch_size": 16},
}
