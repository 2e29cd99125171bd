from vla.testing import LlmConformance


class TestGemmaFast(LlmConformance):
    name = "gemma_fast"
