"""An image encoder of `transformers` (SigLIP, CLIP, DINOv2, DINOv3, ViT) as the eyes of a policy."""

from vla.parts import Part
from vla_vision_hf.config import PRESETS, Settings, offers

PART = Part(
    kind="vision",
    name="hf",
    summary="an image encoder of transformers: SigLIP, CLIP, DINOv2, DINOv3, ViT",
    settings=Settings,
    presets=PRESETS,
    offers=offers,
    torch="vla_vision_hf.torch_impl:HuggingFace",
    params="vla_vision_hf.params",
)
