"""SigLIP vision encoder."""

from vla.parts import Part
from vla_vision_siglip.config import Settings, needs, presets

PART = Part(
    kind="vision",
    name="siglip",
    summary="SigLIP image encoder, all big_vision variants",
    settings=Settings,
    presets=presets(),
    offers=lambda s, inner: {"width": s.width, "pooled": s.pool != "none"},
    needs=needs,
    torch="vla_vision_siglip.torch_impl:SigLIP",
    jax="vla_vision_siglip.jax_impl:SigLIP",
    params="vla_vision_siglip.params",
)
