"""Gemma LLM core with any number of experts side by side."""

from vla.parts import Part
from vla_llm_gemma.config import PRESETS, Settings, needs, offers

PART = Part(
    kind="llm",
    name="gemma",
    summary="Gemma decoder, any number of experts joined in attention, adaRMS, prefix cache",
    settings=Settings,
    presets=PRESETS,
    offers=lambda s, inner: {**offers(s), "multi_expert": True, "adarms": True, "insulates": True},
    needs=needs,
    torch="vla_llm_gemma.torch_impl:Gemma",
    jax="vla_llm_gemma.jax_impl:Gemma",
    params="vla_llm_gemma.params",
    contract=2,
)
