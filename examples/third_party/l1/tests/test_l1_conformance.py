from vla.testing import HeadConformance


class TestL1(HeadConformance):
    name = "l1"


class TestAsInOFT(HeadConformance):
    """One query per value, and the state as a token."""

    name = "l1"
    settings = ("head.queries=value", "head.state=continuous")
