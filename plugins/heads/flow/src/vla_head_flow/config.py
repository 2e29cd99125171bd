"""Settings, layout and expert of the flow-matching head (pi0: arXiv 2410.24164; pi0.5: 2504.16054; openpi `pi0.py`).

Time runs as in openpi: t = 1 is noise, t = 0 is data.
"""

from __future__ import annotations

from attrs import field, frozen, validators

from vla.contracts import MOST_STEPS
from vla.errors import SettingsError
from vla.layout import Layout
from vla.parts import Expert, Need, has, is_true, multiple
from vla.settings import number, size


@frozen
class Settings:
    """The action expert (default gemma_300m) and how it meets time, state and padding."""

    width: int = size(1024, most=65_536)
    mlp_dim: int = size(4096, most=524_288)
    time: str = field(default="adarms", validator=validators.in_(("adarms", "concat")))  # pi0.5 | pi0
    state: str = field(default="tokens", validator=validators.in_(("tokens", "continuous", "none")))
    num_steps: int = size(10, most=MOST_STEPS)  # Euler steps of sampling
    draws: int = size(1, most=256)  # (noise, time) pairs per observation in training
    mask_padding: bool = True  # leave padded steps and dims out of the loss; False reproduces openpi
    time_alpha: float = number(1.5, most=1000, above=True)  # t = Beta(alpha, beta) * scale + offset
    time_beta: float = number(1.0, most=1000, above=True)
    time_scale: float = number(0.999, most=1)
    time_offset: float = number(0.001, most=1)
    min_period: float = number(4e-3, most=1e6, above=True)  # of the sinusoidal time embedding
    max_period: float = number(4.0, most=1e6, above=True)

    def __attrs_post_init__(self) -> None:
        if self.time_scale + self.time_offset > 1 + 1e-6:
            raise SettingsError(
                "times of training lie beyond 1, which is pure noise", field="time_scale",
                got=f"scale {self.time_scale} + offset {self.time_offset}", expected="<= 1 together",
            )  # fmt: skip
        if self.min_period > self.max_period:
            raise SettingsError(
                "the shortest period is longer than the longest", field="min_period", got=self.min_period,
                expected=f"<= max_period, {self.max_period}",
            )  # fmt: skip


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


def needs(settings: Settings) -> tuple[Need, ...]:
    """What it asks of its neighbours and of its own sizes."""
    s = settings
    found = [
        is_true("backbone", "multi_expert", "the action expert runs beside the backbone in the same attention"),
        multiple("self", "width", 2, "sines and cosines of the time fill the width"),
    ]
    if s.time == "adarms":
        found.append(is_true("backbone", "adarms", "time = adarms modulates the norms of the action expert"))
    if s.state == "tokens":
        found.append(has("tokenizer", "emits", "state", "state = tokens reads the robot's state from the prompt"))
    return tuple(found)
