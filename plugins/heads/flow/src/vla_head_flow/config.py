"""Settings, layout and expert of the flow-matching head (pi0: arXiv 2410.24164; pi0.5: 2504.16054; openpi `pi0.py`).

Time runs as in openpi: t = 1 is noise, t = 0 is data.
"""

from __future__ import annotations

from attrs import field, frozen, validators

from vla.layout import Layout
from vla.parts import Expert


@frozen
class Settings:
    """The action expert (default gemma_300m) and how it meets time, state and padding."""

    width: int = 1024
    mlp_dim: int = 4096
    time: str = field(default="adarms", validator=validators.in_(("adarms", "concat")))  # pi0.5 | pi0
    state: str = field(default="tokens", validator=validators.in_(("tokens", "continuous", "none")))
    num_steps: int = field(default=10, validator=validators.ge(1))  # Euler steps of sampling
    draws: int = field(default=1, validator=validators.ge(1))  # (noise, time) pairs per observation in training
    mask_padding: bool = True  # leave padded steps and dims out of the loss; False reproduces openpi
    time_alpha: float = 1.5  # t = Beta(alpha, beta) * scale + offset
    time_beta: float = 1.0
    time_scale: float = 0.999
    time_offset: float = 0.001
    min_period: float = 4e-3  # of the sinusoidal time embedding
    max_period: float = 4.0


PRESETS: dict[str, dict[str, object]] = {
    "gemma_300m": {"width": 1024, "mlp_dim": 4096},
    "tiny": {"width": 96, "mlp_dim": 256},
    "small": {"width": 256, "mlp_dim": 1024},
}

PREFIX = """
    image   backbone  image prompt
    prompt  backbone  image prompt
"""


def layout(settings: Settings) -> Layout:
    """pi0's blocks: {images, prompt} <- {state} <- {actions}; the prefix never sees the expert."""
    if settings.state == "continuous":
        return Layout.parse(
            PREFIX
            + """
            state   action  image prompt state
            action  action  image prompt state action
            """
        )
    return Layout.parse(PREFIX + "action  action  image prompt action")


def experts(settings: Settings) -> dict[str, Expert]:
    """The action expert."""
    return {"action": Expert(settings.width, settings.mlp_dim, adarms=settings.time == "adarms")}
