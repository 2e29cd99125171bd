"""Settings of the plain ViT (Dosovitskiy et al. 2020, arXiv 2010.11929), with a class token."""

from __future__ import annotations

from attrs import frozen


@frozen
class Settings:
    """A ViT; the defaults are ViT-B/16."""

    width: int = 768
    depth: int = 12
    mlp_dim: int = 3072
    num_heads: int = 12
    patch_size: int = 16
    pool: str = "none"  # none (class token and all patches) | patches (no class token) | cls | mean


PRESETS: dict[str, dict[str, object]] = {
    "S/16": {"width": 384, "depth": 12, "mlp_dim": 1536, "num_heads": 6, "patch_size": 16},
    "B/16": {"width": 768, "depth": 12, "mlp_dim": 3072, "num_heads": 12, "patch_size": 16},
    "L/16": {"width": 1024, "depth": 24, "mlp_dim": 4096, "num_heads": 16, "patch_size": 16},
    "tiny": {"width": 96, "depth": 4, "mlp_dim": 256, "num_heads": 4, "patch_size": 8},
    "small": {"width": 256, "depth": 6, "mlp_dim": 1024, "num_heads": 4, "patch_size": 16},
}
