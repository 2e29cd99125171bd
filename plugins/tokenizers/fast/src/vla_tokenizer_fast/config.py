"""Settings of the `fast` tokenizer."""

from typing import Literal

from attrs import frozen

from vla.settings import number, size


@frozen
class Fast:
    """Settings.

    Attributes:
        source: "": fit on your own data. Else a folder that `vla tokenizer fit` wrote, or the files of a public
        processor:
            a folder, or a hub repository in the local cache ("physical-intelligence/fast", which has codes = 2048).
            None of its code is run.
        codes: action ids, base symbols included.
        scale: DCT coefficients are multiplied by this and rounded: larger is finer. A public processor brings its own.
        overflow: what encoding does with a coefficient beyond the fitted range: "clip" (and say so once) or "error".
        skip: ids at the end of the text vocabulary that stay free (PaliGemma: its 128 <seg> pieces).
    """

    source: str = ""
    codes: int = size(1024, most=16_384, least=2)
    scale: float = number(10.0, most=1e6, above=True)
    overflow: Literal["clip", "error"] = "clip"
    skip: int = size(128, most=1_000_000, least=0)


PRESETS = {
    "full": {},
    "tiny": {"codes": 64, "scale": 3.0},
    "small": {},
    "public": {"source": "physical-intelligence/fast", "codes": 2048},
}
