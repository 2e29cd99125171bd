from vla.testing import HeadConformance


class TestAR(HeadConformance):
    name = "ar"
    excuse = {"test_every_need_can_fail": "every LLM core that is installed here can decode; one that cannot is refused"}
