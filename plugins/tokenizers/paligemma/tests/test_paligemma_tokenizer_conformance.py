from vla.testing import TokenizerConformance


class TestPaliGemma(TokenizerConformance):
    name = "paligemma"
