from vla.testing import HeadConformance


class TestKI(HeadConformance):
    name = "ki"
