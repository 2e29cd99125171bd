"""Gemma LLM core for one expert: packed projections and a preallocated cache, for fast token decoding."""

from vla.parts import Part
from vla_llm_gemma_fast.config import PRESETS, Settings, needs, offers

PART = Part(
    kind="llm",
    name="gemma_fast",
    summary="Gemma decoder, one expert, preallocated KV cache, fast decode; weights as in gemma",
    settings=Settings,
    presets=PRESETS,
    offers=lambda s, inner: {**offers(s), "multi_expert": False, "adarms": False, "insulates": False},
    needs=needs,
    torch="vla_llm_gemma_fast.torch_impl:GemmaFast",
    jax="vla_llm_gemma_fast.jax_impl:GemmaFast",
    params="vla_llm_gemma.params",  # the same weights
    contract=2,
)
