"""Settings of the convolutional encoder."""

from __future__ import annotations

from attrs import field, frozen

from vla.errors import SettingsError
from vla.settings import Between

GROUPS = 8  # of the group norms
MOST_STAGES = 11  # of an image of 2048 pixels these leave one token


@frozen
class Settings:
    """Stages of 3 x 3 convolutions; each begins by halving the image.

    From scratch it finds things in a picture in about half the steps of a ViT of its size (benchmarks/results/demo.md):
    convolutions need not learn what is next to what. Published weights are ViTs, so fine-tuning takes those.

    Attributes:
        widths: channels of each stage; the last is the width of the tokens. n stages make tokens of 2^n x 2^n pixels.
        residual: residual convolutions of each stage, behind the halving one.
    """

    widths: tuple[int, ...] = field(default=(64, 128, 256, 512), converter=tuple, validator=Between(GROUPS, 16_384))
    residual: tuple[int, ...] = field(default=(1, 1, 2, 2), converter=tuple, validator=Between(0, 64))

    def __attrs_post_init__(self) -> None:
        if not 1 <= len(self.widths) <= MOST_STAGES or any(w % GROUPS for w in self.widths):
            raise SettingsError(
                "a stage cannot be this wide", field="widths", got=self.widths,
                expected=f"1 to {MOST_STAGES} multiples of {GROUPS}",
            )  # fmt: skip
        if len(self.residual) != len(self.widths):
            raise SettingsError(
                "every stage needs its number of residual convolutions", field="residual", got=self.residual,
                expected=f"{len(self.widths)} numbers from 0",
            )  # fmt: skip

    def layers(self) -> list[tuple[int, int, int]]:
        """(channels in, channels out, stride) of every convolution; those of stride 1 are residual."""
        plan, before = [], 3
        for width, more in zip(self.widths, self.residual, strict=True):
            plan += [(before, width, 2), *[(width, width, 1)] * more]
            before = width
        return plan

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens; each stage halves, rounding up."""
        part = 2 ** len(self.widths)
        high, wide = (-(-side // part) for side in image_size)
        return high, wide


PRESETS = {
    "tiny": {"widths": (32, 64, 96, 96), "residual": (0, 0, 1, 1)},
    "small": {"widths": (64, 128, 192, 256), "residual": (0, 1, 1, 1)},
}
