"""Any decoder of `transformers` as the LLM core: its layers run the backbone, an action expert looks at them."""

from vla.parts import Part
from vla_llm_hf.config import PRESETS, Settings, needs, offers

PART = Part(
    kind="llm",
    name="hf",
    summary="a decoder of transformers (Llama, Qwen, Gemma 1-3, SmolLM, ...), with experts beside it",
    settings=Settings,
    presets=PRESETS,
    offers=offers,
    needs=needs,
    torch="vla_llm_hf.torch_impl:HuggingFace",
    params="vla_llm_hf.params",
    contract=2,
)
