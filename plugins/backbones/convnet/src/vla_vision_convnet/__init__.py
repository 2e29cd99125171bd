"""Small convolutional vision encoder."""

from vla.parts import Part
from vla_vision_convnet.config import PRESETS, Settings

PART = Part(
    kind="vision",
    name="convnet",
    summary="small convolutional encoder, for policies that learn to see from scratch",
    settings=Settings,
    presets=PRESETS,
    offers=lambda s, inner: {"width": s.widths[-1], "pooled": False},
    torch="vla_vision_convnet.torch_impl:ConvNet",
    jax="vla_vision_convnet.jax_impl:ConvNet",
    params="vla_vision_convnet.params",
)
