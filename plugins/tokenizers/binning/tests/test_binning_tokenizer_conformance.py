from vla.testing import TokenizerConformance


class TestBinning(TokenizerConformance):
    name = "binning"
