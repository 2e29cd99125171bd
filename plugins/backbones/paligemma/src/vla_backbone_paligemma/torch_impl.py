"""PaliGemma in PyTorch: images through a vision encoder and a linear projector, next to text, into one LLM core.

Axes: B batch, P image tokens, n text tokens, D width of the LLM core.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class PaliGemma(nn.Module):
    """The parts side by side; the policy model decides who sees whom."""

    def __init__(self, settings: object, vision: nn.Module, llm: nn.Module):
        super().__init__()
        self.vision = vision
        self.projector = nn.Linear(vision.width, llm.settings.width)
        self.llm = llm
        nn.init.normal_(self.projector.weight, std=vision.width**-0.5)
        nn.init.zeros_(self.projector.bias)

    def embed_images(self, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Camera -> image tokens [B P D]; all cameras go through the encoder as one batch; uint8 becomes [-1, 1]."""
        if not images:
            return {}
        stacked = torch.cat(list(images.values()))
        if stacked.dtype == torch.uint8:
            stacked = stacked.float() / 127.5 - 1
        tokens = self.projector(self.vision(stacked))
        return dict(zip(images, tokens.chunk(len(images)), strict=True))

    def embed_text(self, ids: Tensor) -> Tensor:
        """Token ids [B n] -> [B n D]."""
        return self.llm.embed(ids)
