from vla.testing import TokenizerConformance


class TestHuggingFace(TokenizerConformance):
    name = "hf"
