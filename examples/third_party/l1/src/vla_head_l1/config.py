"""Settings and layout of L1 regression with parallel decoding (OpenVLA-OFT, arXiv 2502.19645)."""

from __future__ import annotations

from attrs import field, frozen, validators

from vla import Layout, Spec


@frozen
class Settings:
    """Which queries there are, how the state comes in, and the MLP behind them."""

    queries: str = field(default="step", validator=validators.in_(("step", "value")))  # value: one per dim, as in OFT
    state: str = field(default="tokens", validator=validators.in_(("tokens", "continuous", "none")))
    hidden: int = field(default=2048, validator=validators.ge(1))
    blocks: int = field(default=2, validator=validators.ge(0))


PRESETS = {"tiny": {"hidden": 64}, "small": {"hidden": 256}}


def queries_per_step(settings: Settings, spec: Spec) -> int:
    """How many tokens stand for one step."""
    return spec.action_dim if settings.queries == "value" else 1


def layout(settings: Settings) -> Layout:
    """Queries see everything before them and, in both directions, each other; nobody sees them."""
    prefix = """
        image   backbone  image prompt
        prompt  backbone  image prompt
    """
    if settings.state == "continuous":
        return Layout.parse(prefix + "state backbone state\nquery backbone image prompt state query")
    return Layout.parse(prefix + "query backbone image prompt query")
