from vla.testing import LlmConformance


class TestGemma(LlmConformance):
    name = "gemma"
