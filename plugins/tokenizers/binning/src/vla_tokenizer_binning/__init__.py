"""The `binning` action tokenizer: one token per value."""

from collections.abc import Mapping
from typing import Any

from vla.parts import Need, Part, at_least
from vla_tokenizer_binning.config import PRESETS, Binning


def _offers(settings: Binning, inner: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "emits": frozenset({"text", "state", "actions"}),
        "vocab_size": inner["text"]["vocab_size"],
        "prompt": "fast",
        "tokens_per_value": 1,
    }


def _needs(settings: Binning) -> tuple[Need, ...]:
    room = settings.codes + settings.skip + 4  # four special ids
    why = f"{settings.codes} action ids, a skip of {settings.skip} and 4 special ids live in the text vocabulary"
    return (at_least("text", "vocab_size", room, why),)


PART = Part(
    kind="tokenizer",
    name="binning",
    summary="one token per action value, uniform bins, as in RT-2 and OpenVLA",
    settings=Binning,
    slots={"text": ("tokenizer", "paligemma")},
    presets=PRESETS,
    offers=_offers,
    needs=_needs,
    numpy="vla_tokenizer_binning.codec:BinningCodec",
)
