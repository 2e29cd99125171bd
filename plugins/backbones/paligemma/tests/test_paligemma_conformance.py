from vla.testing import BackboneConformance


class TestPaliGemma(BackboneConformance):
    name = "paligemma"
    excuse = {"test_every_inner_slot_refuses_some_part": "it takes any encoder and any LLM core: the projector joins their widths"}
