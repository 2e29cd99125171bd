"""A small convolutional encoder in PyTorch. `jax_impl.py` mirrors this file.

Axes: B batch, P tokens (row-major), D width, h w pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla.posemb import sincos_2d
from vla_vision_convnet.config import GROUPS, Settings


class Layer(nn.Module):
    """3 x 3 convolution, group norm, GELU; added to its input unless it halves the image."""

    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.norm = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.residual = stride == 1
        nn.init.normal_(self.conv.weight, std=(9 * before) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[B c h w] -> [B d h w] or [B d h/2 w/2]."""
        y = F.gelu(self.norm(self.conv(x)))
        return x + y if self.residual else y


class ConvNet(nn.Module):
    """Images to tokens."""

    def __init__(self, settings: Settings, image_size: tuple[int, int]):
        super().__init__()
        self.width = settings.widths[-1]
        self.layers = nn.ModuleList(Layer(*layer) for layer in settings.layers())
        position = torch.as_tensor(sincos_2d(*settings.grid(image_size), self.width))
        self.register_buffer("position", position, persistent=False)
        self.norm = nn.LayerNorm(self.width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B h w 3] float32 in [-1, 1] -> [B P D]."""
        x = images.permute(0, 3, 1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x.flatten(2).transpose(1, 2) + self.position)
