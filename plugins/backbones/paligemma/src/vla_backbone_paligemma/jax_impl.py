"""PaliGemma in JAX: images through a vision encoder and a linear projector, next to text, into one LLM core.

Mirror of `torch_impl.py`. Axes: B batch, P image tokens, n text tokens, D width of the LLM core.
"""

from __future__ import annotations

from collections.abc import Mapping

from flax import nnx
from jax import Array
from jax import numpy as jnp

from vla.jax_kit.ops import Linear


class PaliGemma(nnx.Module):
    """The parts side by side; the policy model decides who sees whom."""

    def __init__(self, settings: object, vision: nnx.Module, llm: nnx.Module, *, rngs: nnx.Rngs):
        self.vision = vision
        self.projector = Linear(vision.width, llm.settings.width, rngs=rngs)
        self.llm = llm

    def embed_images(self, images: Mapping[str, Array]) -> dict[str, Array]:
        """Camera -> image tokens [B P D]; all cameras go through the encoder as one batch. uint8 becomes [-1, 1]."""
        if not images:
            return {}
        stacked = jnp.concatenate(list(images.values()))
        if stacked.dtype == jnp.uint8:
            stacked = stacked.astype(jnp.float32) / 127.5 - 1
        tokens = self.projector(self.vision(stacked))
        return dict(zip(images, jnp.split(tokens, len(images)), strict=True))

    def embed_text(self, ids: Array) -> Array:
        """Token ids [B n] -> [B n D]."""
        return self.llm.embed(ids)
