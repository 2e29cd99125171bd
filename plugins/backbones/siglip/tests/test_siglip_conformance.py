from vla.testing import VisionConformance


class TestSigLIP(VisionConformance):
    name = "siglip"
