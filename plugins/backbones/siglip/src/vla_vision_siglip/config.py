"""Settings and sizes of SigLIP (big_vision `models/vit.py`; openpi `siglip.py`)."""

from __future__ import annotations

from attrs import frozen

# name -> width, depth, mlp_dim, num_heads (facts of big_vision; openpi uses So400m/14)
VARIANTS: dict[str, tuple[int, int, int, int]] = {
    "mu": (32, 1, 128, 2),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "g-opt": (1536, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
    "G-opt": (1536, 48, 8192, 16),
    "e": (1792, 56, 15360, 16),
}
PATCH_SIZES = (14, 16, 32)


@frozen
class Settings:
    """A SigLIP encoder; the defaults are So400m/14, as in PaliGemma."""

    width: int = 1152
    depth: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16
    patch_size: int = 14
    posemb: str = "learn"  # learn | sincos2d
    pool: str = "none"  # none (all patches) | gap | map | tok: what the LLM gets, [b n width] or [b 1 width]


def presets() -> dict[str, dict[str, object]]:
    """Every variant at every usual patch size, e.g. "B/16", and the sizes for CPU work."""
    named: dict[str, dict[str, object]] = {
        f"{name}/{patch}": dict(
            zip(("width", "depth", "mlp_dim", "num_heads", "patch_size"), (*sizes, patch), strict=True)
        )
        for name, sizes in VARIANTS.items()
        for patch in PATCH_SIZES
    }
    # Trained from scratch in minutes: fixed positions halve the steps until a small model finds things in a picture.
    named["tiny"] = {"width": 96, "depth": 4, "mlp_dim": 256, "num_heads": 4, "patch_size": 16, "posemb": "sincos2d"}
    named["small"] = {"width": 256, "depth": 6, "mlp_dim": 1024, "num_heads": 4, "patch_size": 16}
    return named
