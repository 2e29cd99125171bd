"""Settings of the `binning` tokenizer."""

from typing import Literal

from attrs import frozen


@frozen
class Binning:
    """Settings.

    Attributes:
        codes: bins per value.
        limit: bins cover [-limit, limit]; values beyond are clipped, as in RT-2 and OpenVLA.
        value: what a bin decodes to: its "centre", or its "left" edge as openpi's BinningTokenizer does.
        skip: ids at the end of the text vocabulary that stay free (PaliGemma: its 128 <seg> pieces).
    """

    codes: int = 256
    limit: float = 1.0
    value: Literal["centre", "left"] = "centre"
    skip: int = 128


PRESETS = {"full": {}, "tiny": {}, "small": {}, "openpi": {"value": "left"}}
