"""Settings and layout of knowledge insulation (Driess et al. 2025, arXiv 2505.23705)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from vla.layout import Layout
from vla.settings import number


@frozen
class Settings:
    """Weights of the two losses and the insulation; the defaults are the paper's."""

    token_weight: float = number(1.0, most=1e6)  # lambda of the cross-entropy on action tokens
    action_weight: float = number(1.0, most=1e6)  # alpha of the chunk loss: it trains other weights, so 1
    insulate: bool = True  # stop gradients from the action expert at the backbone's keys and values


def layout(settings: Settings, inner: Mapping[str, Any]) -> Layout:
    """Both tables in one; the action expert never sees targets, and looks at the backbone through a stop."""
    both = inner["tokens"].join(inner["actions"])
    return both.insulated() if settings.insulate else both
