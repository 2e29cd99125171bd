"""Plain ViT vision encoder."""

from vla.parts import Part
from vla_vision_vit.config import PRESETS, Settings, needs

PART = Part(
    kind="vision",
    name="vit",
    summary="plain ViT image encoder with a class token",
    settings=Settings,
    presets=PRESETS,
    offers=lambda s, inner: {"width": s.width, "pooled": s.pool in ("cls", "mean")},
    needs=needs,
    torch="vla_vision_vit.torch_impl:ViT",
    jax="vla_vision_vit.jax_impl:ViT",
    params="vla_vision_vit.params",
)
