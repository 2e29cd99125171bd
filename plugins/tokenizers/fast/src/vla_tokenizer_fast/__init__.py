"""The `fast` action tokenizer (arXiv 2501.09747)."""

from collections.abc import Mapping
from typing import Any

from vla.parts import Need, Part, at_least
from vla_tokenizer_fast.config import PRESETS, Fast


def _offers(settings: Fast, inner: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "emits": frozenset({"text", "state", "actions"}),
        "vocab_size": inner["text"]["vocab_size"],
        "prompt": "fast",
    }


def _needs(settings: Fast) -> tuple[Need, ...]:
    room = settings.codes + settings.skip + 4  # four special ids
    why = f"{settings.codes} action ids, a skip of {settings.skip} and 4 special ids live in the text vocabulary"
    return (at_least("text", "vocab_size", room, why),)


PART = Part(
    kind="tokenizer",
    name="fast",
    summary="FAST: DCT over time, quantised, byte-pair merges; own fit or the public processor's files",
    settings=Fast,
    slots={"text": ("tokenizer", "paligemma")},
    presets=PRESETS,
    offers=_offers,
    needs=_needs,
    numpy="vla_tokenizer_fast.codec:FastCodec",
)
