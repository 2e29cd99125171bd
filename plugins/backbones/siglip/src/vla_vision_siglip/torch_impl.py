"""SigLIP in PyTorch. `jax_impl.py` mirrors this file.

Formulas: big_vision `models/vit.py` (pre-norm, LayerNorm eps 1e-6, GELU tanh, patch embedding without padding).

Axes: B batch, P patches (row-major), D width, N heads, H head width, F mlp width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla.posemb import sincos_2d
from vla.torch_kit.ops import attend
from vla_vision_siglip.config import Settings


class Attention(nn.Module):
    """Multi-head attention with biases."""

    def __init__(self, s: Settings):
        super().__init__()
        self.heads = s.num_heads
        self.q = nn.Linear(s.width, s.width)
        self.k = nn.Linear(s.width, s.width)
        self.v = nn.Linear(s.width, s.width)
        self.o = nn.Linear(s.width, s.width)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """Queries of x [B T D], keys and values of source [B S D] -> [B T D]."""
        q, k, v = (
            y.unflatten(-1, (self.heads, -1))
            for y in (self.q(x), self.k(source), self.v(source))  # [B T N H]
        )
        return self.o(attend(q, k, v, None, fused=not self.training))


class Mlp(nn.Module):
    """Two layers with a GELU between."""

    def __init__(self, s: Settings):
        super().__init__()
        self.fc1 = nn.Linear(s.width, s.mlp_dim)
        self.fc2 = nn.Linear(s.mlp_dim, s.width)

    def forward(self, x: Tensor) -> Tensor:
        """[B T D] -> [B T D]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, s: Settings):
        super().__init__()
        self.norm_attn = nn.LayerNorm(s.width, eps=1e-6)
        self.attn = Attention(s)
        self.norm_mlp = nn.LayerNorm(s.width, eps=1e-6)
        self.mlp = Mlp(s)

    def forward(self, x: Tensor) -> Tensor:
        """[B P D] -> [B P D]."""
        y = self.norm_attn(x)
        x = x + self.attn(y, y)
        return x + self.mlp(self.norm_mlp(x))


class MapPool(nn.Module):
    """Multi-head attention pooling: one learned query looks at all patches."""

    def __init__(self, s: Settings):
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, s.width))
        self.attn = Attention(s)
        self.norm = nn.LayerNorm(s.width, eps=1e-6)
        self.mlp = Mlp(s)

    def forward(self, x: Tensor) -> Tensor:
        """[B P D] -> [B 1 D]."""
        x = self.attn(self.probe.expand(x.shape[0], -1, -1), x)
        return x + self.mlp(self.norm(x))


class SigLIP(nn.Module):
    """Images to patch tokens."""

    def __init__(self, settings: Settings, image_size: tuple[int, int]):
        super().__init__()
        s = self.settings = settings
        self.width = s.width
        grid = [side // s.patch_size for side in image_size]
        self.patch = nn.Conv2d(3, s.width, s.patch_size, s.patch_size)
        if s.posemb == "learn":
            self.position = nn.Parameter(torch.zeros(1, grid[0] * grid[1], s.width))
        else:
            self.register_buffer("position", torch.as_tensor(sincos_2d(*grid, s.width)), persistent=False)
        if s.pool == "tok":
            self.class_token = nn.Parameter(torch.zeros(1, 1, s.width))
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.depth))
        self.norm = nn.LayerNorm(s.width, eps=1e-6)
        if s.pool == "map":
            self.pool = MapPool(s)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier matrices, zero biases, unit norms (big_vision)."""
        for name, p in self.named_parameters():
            if "norm" in name:
                nn.init.constant_(p, float(name.endswith("weight")))
            elif name == "position":
                nn.init.normal_(p, std=self.width**-0.5)
            elif name == "patch.weight":
                nn.init.normal_(p, std=(3 * self.settings.patch_size**2) ** -0.5)
            elif p.ndim == 1 or name == "class_token":
                nn.init.zeros_(p)
            else:
                nn.init.xavier_uniform_(p.view(-1, p.shape[-1]))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B h w 3] float32 in [-1, 1] -> [B P D] (pool none) or [B 1 D]."""
        x = self.patch(images.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2) + self.position
        if self.settings.pool == "tok":
            x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.settings.pool == "gap":
            return x.mean(1, keepdim=True)
        if self.settings.pool == "map":
            return self.pool(x)
        return x[:, :1] if self.settings.pool == "tok" else x
