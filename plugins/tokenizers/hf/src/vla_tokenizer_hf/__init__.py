"""The `hf` text tokenizer: any `tokenizer.json`, with the prompts of pi0 and pi0.5, or as chat."""

from collections.abc import Mapping
from typing import Any

from vla.parts import Part
from vla_tokenizer_hf.config import PRESETS, WITH_STATE, HuggingFace


def _offers(settings: HuggingFace, inner: Mapping[str, Any]) -> dict[str, Any]:
    emits = {"text", "state"} if settings.prompt in WITH_STATE else {"text"}
    return {"emits": frozenset(emits), "vocab_size": settings.ids, "prompt": settings.prompt}


PART = Part(
    kind="tokenizer",
    name="hf",
    summary="text over the vocabulary of a tokenizer.json; prompts as in pi0 and pi0.5, or as chat",
    settings=HuggingFace,
    presets=PRESETS,
    offers=_offers,
    numpy="vla_tokenizer_hf.text:TokenizersText",
)
