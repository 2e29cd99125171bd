from vla.testing import TokenizerConformance


class TestFast(TokenizerConformance):
    name = "fast"
