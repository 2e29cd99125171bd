"""Settings of a Gemma-1 decoder (openpi `gemma.py`; facts: RMSNorm (1 + scale), GeGLU, RoPE, tied embedding)."""

from __future__ import annotations

from attrs import frozen

from vla.parts import Need, multiple
from vla.settings import size


@frozen
class Settings:
    """Sizes of the backbone's expert; the defaults are gemma_2b. Other experts share depth, heads and head_dim."""

    width: int = size(2048, most=65_536)
    depth: int = size(18, most=256)
    mlp_dim: int = size(16_384, most=524_288)
    num_heads: int = size(8, most=512)
    num_kv_heads: int = size(1, most=512)
    head_dim: int = size(256, most=2048, least=2)
    vocab_size: int = size(257_152, most=4_194_304)


PRESETS: dict[str, dict[str, object]] = {
    "gemma_2b": {"width": 2048, "depth": 18, "mlp_dim": 16_384, "num_heads": 8, "num_kv_heads": 1, "head_dim": 256},
    "gemma_300m": {"width": 1024, "depth": 18, "mlp_dim": 4096, "num_heads": 8, "num_kv_heads": 1, "head_dim": 256},
    "tiny": {
        "width": 128, "depth": 4, "mlp_dim": 512, "num_heads": 4, "num_kv_heads": 1, "head_dim": 32, "vocab_size": 4096
    },
    "small": {
        "width": 512, "depth": 6, "mlp_dim": 2048, "num_heads": 8, "num_kv_heads": 1, "head_dim": 64, "vocab_size": 4096
    },
}  # fmt: skip


def needs(settings: Settings) -> tuple[Need, ...]:
    """How its sizes go together."""
    return (
        multiple("self", "num_heads", settings.num_kv_heads, "every key and value head serves as many query heads"),
        multiple("self", "head_dim", 2, "the rotary embedding turns pairs"),
    )


def offers(settings: Settings) -> dict[str, object]:
    """The facts about a Gemma core that do not depend on how it is written."""
    s = settings
    return {
        "width": s.width, "depth": s.depth, "num_heads": s.num_heads, "num_kv_heads": s.num_kv_heads,
        "head_dim": s.head_dim, "vocab_size": s.vocab_size, "decodes": True, "prefix_cache": True,
    }  # fmt: skip
