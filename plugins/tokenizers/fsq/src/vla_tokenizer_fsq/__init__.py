"""The `fsq` action tokenizer: a small quantised autoencoder."""

from collections.abc import Mapping
from typing import Any

from vla.parts import Need, Part, at_least
from vla_tokenizer_fsq.config import PRESETS, Fsq


def _offers(settings: Fsq, inner: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "emits": frozenset({"text", "state", "actions"}),
        "vocab_size": inner["text"]["vocab_size"],
        "prompt": "fast",
        "tokens_per_chunk": settings.num_tokens,
    }


def _needs(settings: Fsq) -> tuple[Need, ...]:
    room = settings.codes + settings.skip + 4  # four special ids
    why = f"{settings.codes} action ids, a skip of {settings.skip} and 4 special ids live in the text vocabulary"
    return (at_least("text", "vocab_size", room, why),)


PART = Part(
    kind="tokenizer",
    name="fsq",
    summary="a fixed number of tokens per chunk, from a small quantised autoencoder trained on your data",
    settings=Fsq,
    slots={"text": ("tokenizer", "paligemma")},
    presets=PRESETS,
    offers=_offers,
    needs=_needs,
    numpy="vla_tokenizer_fsq.codec:FsqCodec",
)
