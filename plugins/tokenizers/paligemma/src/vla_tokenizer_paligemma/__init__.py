"""The `paligemma` text tokenizer: a SentencePiece model, and the prompt formats of pi0 and pi0.5."""

from collections.abc import Mapping
from typing import Any

from vla.parts import Part
from vla_tokenizer_paligemma.config import PRESETS, Paligemma


def _offers(settings: Paligemma, inner: Mapping[str, Any]) -> dict[str, Any]:
    emits = {"text", "state"} if settings.prompt == "pi05" else {"text"}
    return {"emits": frozenset(emits), "vocab_size": settings.vocab_size, "prompt": settings.prompt}


PART = Part(
    kind="tokenizer",
    name="paligemma",
    summary="text over PaliGemma's vocabulary; prompts as in pi0 and pi0.5",
    settings=Paligemma,
    presets=PRESETS,
    offers=_offers,
    numpy="vla_tokenizer_paligemma.text:SentencePieceText",
)
