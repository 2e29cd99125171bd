from vla.testing import VisionConformance


class TestViT(VisionConformance):
    name = "vit"
