"""PaliGemma backbone: vision encoder + linear projector + LLM core."""

from vla.parts import Part

PART = Part(
    kind="backbone",
    name="paligemma",
    summary="vision encoder, linear projector and LLM core, as in PaliGemma",
    slots={"vision": ("vision", "siglip"), "llm": ("llm", "gemma")},
    offers=lambda s, inner: {**inner["llm"], "images": True},
    torch="vla_backbone_paligemma.torch_impl:PaliGemma",
    jax="vla_backbone_paligemma.jax_impl:PaliGemma",
    params="vla_backbone_paligemma.params",
)
