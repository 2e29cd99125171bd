from vla.testing import TokenizerConformance


class TestFSQ(TokenizerConformance):
    name = "fsq"
    settings = ("tokenizer.steps=150",)  # 800 take a while
