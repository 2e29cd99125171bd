from vla.testing import HeadConformance


class TestAR(HeadConformance):
    name = "ar"
