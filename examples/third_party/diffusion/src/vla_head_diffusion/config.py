"""Settings, layout and schedule of diffusion over action chunks.

Step k = 0 is nearly data, step k = train_steps - 1 nearly noise: x_k = sqrt(kept_k) actions + sqrt(1 - kept_k) noise.
"""

from __future__ import annotations

import math

from attrs import field, frozen, validators

from vla import Expert, Layout


@frozen
class Settings:
    """The action expert and the diffusion; the defaults are Diffusion Policy's."""

    width: int = field(default=1024, validator=validators.ge(2))
    mlp_dim: int = field(default=4096, validator=validators.ge(1))
    train_steps: int = field(default=100, validator=validators.ge(2))
    num_steps: int = field(default=10, validator=validators.ge(1))  # DDIM steps of sampling
    clip: float = field(default=1.0, validator=validators.gt(0))  # predicted actions stay in [-clip, clip]
    state: str = field(default="tokens", validator=validators.in_(("tokens", "none")))

    def __attrs_post_init__(self) -> None:
        if self.num_steps > self.train_steps:
            raise ValueError(f"num_steps {self.num_steps} is more than train_steps {self.train_steps}")


@frozen
class Options:
    """What a call may set beside what all heads share: `policy.infer(obs, sampling={"noise_scale": 0})`."""

    noise_scale: float = field(default=1.0, validator=validators.ge(0))  # of what sampling starts from; 0: no chance


PRESETS = {"tiny": {"width": 96, "mlp_dim": 256}, "small": {"width": 256, "mlp_dim": 1024}}


def layout() -> Layout:
    """The action expert sees the prefix and itself; nobody sees it."""
    return Layout.parse("""
        image   backbone  image prompt
        prompt  backbone  image prompt
        action  action    image prompt action
    """)


def experts(settings: Settings) -> dict[str, Expert]:
    """The action expert, modulated by the step."""
    return {"action": Expert(settings.width, settings.mlp_dim, adarms=True)}


def kept(train_steps: int) -> list[float]:
    """How much of the data's variance is left at each step: the squared-cosine schedule (Nichol and Dhariwal, eq. 17),
    each step's beta at most 0.999."""

    def curve(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    out, product = [], 1.0
    for k in range(train_steps):
        product *= 1 - min(1 - curve((k + 1) / train_steps) / curve(k / train_steps), 0.999)
        out.append(product)
    return out


def ddim_steps(train_steps: int, num_steps: int) -> list[tuple[int, float, float]]:
    """(step k, kept there, kept at the next): evenly spaced from noise to data; the last one ends at the data."""
    stride, left = train_steps // num_steps, kept(train_steps)
    ks = [i * stride for i in reversed(range(num_steps))]
    return [(k, left[k], left[k - stride] if k >= stride else 1.0) for k in ks]


def levels(plan: list[tuple[int, float, float]]) -> tuple[list[float], list[float]]:
    """What is left of the data, and of the noise, at every step of a plan and behind its end."""
    left = [*(here for _, here, _ in plan), plan[-1][2]]
    return [share**0.5 for share in left], [(1 - share) ** 0.5 for share in left]
