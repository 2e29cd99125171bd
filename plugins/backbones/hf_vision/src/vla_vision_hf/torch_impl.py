"""An image encoder of `transformers`, in PyTorch: pixels in [-1, 1] to the tokens that its last layer gives.

What a policy does not use has no weights here: pooling heads, mask tokens, and norms that only a pooled output has.
Where the image has another size than the encoder's, transformers resamples the position embedding.

Axes: B batch, P patches (row-major), D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from vla.errors import SettingsError
from vla_vision_hf.config import Settings


class HuggingFace(nn.Module):
    """Images to tokens."""

    def __init__(self, settings: Settings, image_size: tuple[int, int]):
        super().__init__()
        self.settings, self._recomputes = settings, False
        self.encoder = make_encoder(settings)
        config = self.encoder.config
        self.width = int(config.hidden_size)
        self._check_size(image_size, int(config.patch_size))
        self._leading = leading_tokens(config)
        native = config.image_size if isinstance(config.image_size, (list, tuple)) else (config.image_size,) * 2
        resamples = tuple(native) != tuple(image_size) and config.model_type in _ASKED
        self._options = {"interpolate_pos_encoding": True} if resamples else {}
        mean, std = settings.normalisation
        self.register_buffer("mean", torch.tensor(mean) * 2 - 1, persistent=False)  # of pixels in [-1, 1]
        self.register_buffer("std", torch.tensor(std) * 2, persistent=False)

    @staticmethod
    def _check_size(image_size: tuple[int, int], patch: int) -> None:
        if any(side < patch for side in image_size):
            raise SettingsError(
                "images are smaller than one patch of the encoder", field="spec.image_size", got=list(image_size),
                expected=f">= {patch}",
            )  # fmt: skip

    @property
    def checkpointing(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return self._recomputes

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        # transformers renamed the switch in 5.24
        name = (
            "activation_checkpointing"
            if hasattr(self.encoder, "activation_checkpointing_enable")
            else "gradient_checkpointing"
        )
        if on:
            getattr(self.encoder, f"{name}_enable")({"use_reentrant": False})
        else:
            getattr(self.encoder, f"{name}_disable")()
        self._recomputes = on

    def forward(self, images: Tensor) -> Tensor:
        """Images [B h w 3] float32 in [-1, 1] -> [B P D], or [B 1 D] of the class token."""
        pixels = ((images - self.mean) / self.std).permute(0, 3, 1, 2)
        out = self.encoder(pixel_values=pixels, **self._options).last_hidden_state
        return out[:, :1] if self.settings.tokens == "class" else out[:, self._leading :]


# Families that resample their positions only when asked; the others always do, or rotate.
_ASKED = ("siglip_vision_model", "clip_vision_model", "vit")


def leading_tokens(config: Any) -> int:
    """Class and register tokens in front of the patches."""
    if config.model_type == "siglip_vision_model":
        return 0
    return 1 + int(getattr(config, "num_register_tokens", 0) or 0)


def make_encoder(settings: Settings) -> Any:
    """The model of transformers with fresh weights, without what a policy does not use."""
    values = dict(settings.values)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False
    for name in ("attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
        if getattr(config, name, 0):
            setattr(config, name, 0.0)
    options = {"add_pooling_layer": False} if config.model_type == "vit" else {}
    model = AutoModel.from_config(config, attn_implementation="sdpa", **options)
    if config.model_type == "clip_vision_model":  # it norms the pooled token alone
        model.post_layernorm = nn.Identity()
    if isinstance(getattr(model.embeddings, "mask_token", None), nn.Parameter):
        mask = model.embeddings.mask_token.detach()
        del model.embeddings.mask_token
        model.embeddings.register_buffer("mask_token", mask, persistent=False)
    return model
