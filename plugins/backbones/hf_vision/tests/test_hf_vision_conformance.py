import pytest

from vla.testing import VisionConformance


class TestHuggingFace(VisionConformance):
    name = "hf"


@pytest.mark.slow
class TestClip(VisionConformance):
    name = "hf"
    settings = ("backbone.vision.preset=tiny_clip_vision_model",)


@pytest.mark.slow
class TestDino(VisionConformance):
    name = "hf"
    settings = ("backbone.vision.preset=tiny_dinov2_with_registers",)
