import pytest

from vla.testing import LlmConformance

REASON = "no installed head lets the backbone look at an expert; test_hf_llm.py builds one that does"


class TestHuggingFace(LlmConformance):
    name = "hf"
    excuse = {"test_every_need_can_fail": REASON}


@pytest.mark.slow
class TestGemma3(LlmConformance):
    """Sliding windows, normalised queries and keys, two rotary embeddings."""

    name = "hf"
    settings = ("backbone.llm.preset=tiny_gemma3_text",)
    excuse = {"test_every_need_can_fail": REASON}
