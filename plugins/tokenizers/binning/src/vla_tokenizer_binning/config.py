"""Settings of the `binning` tokenizer."""

from typing import Literal

from attrs import frozen

from vla.settings import number, size


@frozen
class Binning:
    """Settings.

    Attributes:
        codes: bins per value.
        limit: bins cover [-limit, limit]; values beyond are clipped, as in RT-2 and OpenVLA.
        value: what a bin decodes to: its "centre", or its "left" edge as openpi's BinningTokenizer does.
        skip: ids at the end of the text vocabulary that stay free (PaliGemma: its 128 <seg> pieces).
    """

    codes: int = size(256, most=65_536, least=2)
    limit: float = number(1.0, most=1e6, above=True)
    value: Literal["centre", "left"] = "centre"
    skip: int = size(128, most=1_000_000, least=0)


PRESETS = {"full": {}, "tiny": {}, "small": {}, "openpi": {"value": "left"}}
