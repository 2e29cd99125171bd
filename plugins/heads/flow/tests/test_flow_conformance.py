from vla.testing import HeadConformance


class TestFlow(HeadConformance):
    name = "flow"
