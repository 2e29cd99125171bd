"""Settings of the `paligemma` tokenizer."""

from typing import Literal

from attrs import frozen

from vla.settings import size

EMBEDDED = "embedded"
EMBEDDED_VOCAB = 4096


@frozen
class Paligemma:
    """Settings.

    Attributes:
        model: path of a SentencePiece model; "embedded": the small one that comes with this package; "": search
            (model directory, VLA_PALIGEMMA_TOKENIZER, openpi's cache, hub cache).
        vocab_size: pieces of that model; the file is checked against it.
        prompt: the format, as in openpi: "pi05" writes the state into the prompt, "pi0" does not.
    """

    model: str = ""
    vocab_size: int = size(257152, most=4_194_304)
    prompt: Literal["pi0", "pi05"] = "pi05"


_SMALL = {"model": EMBEDDED, "vocab_size": EMBEDDED_VOCAB}
PRESETS = {"full": {}, "tiny": _SMALL, "small": _SMALL}
