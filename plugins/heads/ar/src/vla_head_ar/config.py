"""Settings and layout of the autoregressive head (pi0-FAST: arXiv 2501.09747; openpi `pi0_fast.py`)."""

from __future__ import annotations

from attrs import field, frozen, validators

from vla.layout import Layout
from vla.settings import size


@frozen
class Settings:
    """How action tokens are predicted and decoded."""

    max_decode: int = size(256, most=65_536)  # most action tokens of one answer
    constrained: bool = True  # only token sequences that stand for a chunk can be decoded
    # Position of the n-th decoded token: as in training, or one more, as openpi's decode loop has it (openpi #705).
    positions: str = field(default="training", validator=validators.in_(("training", "openpi")))


LAYOUT = Layout.parse("""
    role    expert    sees
    image   backbone  image prompt
    prompt  backbone  image prompt
    target  backbone  image prompt target:causal
""")
