from vla.testing import VisionConformance


class TestConvNet(VisionConformance):
    name = "convnet"
