"""Settings and sizes of SigLIP (big_vision `models/vit.py`; openpi `siglip.py`)."""

from __future__ import annotations

from attrs import field, frozen, validators

from vla.parts import Need, at_least, multiple
from vla.settings import size

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

    width: int = size(1152, most=16_384)
    depth: int = size(27, most=128)
    mlp_dim: int = size(4304, most=131_072)
    num_heads: int = size(16, most=256)
    patch_size: int = size(14, most=256)
    posemb: str = field(default="learn", validator=validators.in_(("learn", "sincos2d")))
    # What the LLM gets: all patches [b n width], or one token [b 1 width].
    pool: str = field(default="none", validator=validators.in_(("none", "gap", "map", "tok")))


def needs(settings: Settings) -> tuple[Need, ...]:
    """How its sizes go together."""
    s = settings
    found = [
        multiple("self", "width", s.num_heads, "every head has an equal share of the width"),
        at_least("spec", "image_side", s.patch_size, "a picture must hold a patch: larger images or smaller patches"),
    ]
    if s.posemb == "sincos2d":
        found.append(multiple("self", "width", 4, "sines and cosines of rows and columns fill the width"))
    return tuple(found)


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
