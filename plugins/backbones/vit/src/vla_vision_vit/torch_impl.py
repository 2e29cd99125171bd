"""A plain ViT in PyTorch (Dosovitskiy et al. 2020). `jax_impl.py` mirrors this file.

Axes: B batch, P patches (row-major), D width, N heads, H head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla.torch_kit.ops import attend
from vla_vision_vit.config import Settings


class Block(nn.Module):
    """Pre-norm block: LayerNorm eps 1e-6, fused query-key-value projection, exact GELU."""

    def __init__(self, s: Settings):
        super().__init__()
        self.heads = s.num_heads
        self.norm_attn = nn.LayerNorm(s.width, eps=1e-6)
        self.qkv = nn.Linear(s.width, 3 * s.width)
        self.o = nn.Linear(s.width, s.width)
        self.norm_mlp = nn.LayerNorm(s.width, eps=1e-6)
        self.fc1 = nn.Linear(s.width, s.mlp_dim)
        self.fc2 = nn.Linear(s.mlp_dim, s.width)

    def forward(self, x: Tensor) -> Tensor:
        """[B P D] -> [B P D]."""
        qkv = self.qkv(self.norm_attn(x)).unflatten(-1, (3, self.heads, -1))  # [B P 3 N H]
        q, k, v = qkv.unbind(2)
        x = x + self.o(attend(q, k, v, None, fused=not self.training))
        return x + self.fc2(F.gelu(self.fc1(self.norm_mlp(x))))


class ViT(nn.Module):
    """Images to patch tokens, the class token first."""

    def __init__(self, settings: Settings, image_size: tuple[int, int]):
        super().__init__()
        s = self.settings = settings
        self.width = s.width
        patches = (image_size[0] // s.patch_size) * (image_size[1] // s.patch_size)
        self.patch = nn.Conv2d(3, s.width, s.patch_size, s.patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, s.width))
        self.position = nn.Parameter(torch.zeros(1, patches + 1, s.width))
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.depth))
        self.norm = nn.LayerNorm(s.width, eps=1e-6)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal of 0.02 for matrices and positions, zero biases, unit norms."""
        for name, p in self.named_parameters():
            if "norm" in name:
                nn.init.constant_(p, float(name.endswith("weight")))
            elif p.ndim == 1:
                nn.init.zeros_(p)
            else:
                nn.init.trunc_normal_(p, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B h w 3] float32 in [-1, 1] -> [B 1+P D], [B P D] (pool patches) or [B 1 D] (cls, mean)."""
        x = self.patch(images.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        pools = {"none": x, "patches": x[:, 1:], "cls": x[:, :1], "mean": x[:, 1:].mean(1, keepdim=True)}
        return pools[self.settings.pool]
