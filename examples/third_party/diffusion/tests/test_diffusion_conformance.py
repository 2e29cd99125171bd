from vla.testing import HeadConformance


class TestDiffusion(HeadConformance):
    name = "diffusion"


class TestInsideKI(HeadConformance):
    """Knowledge insulation with diffusion as its action half."""

    name = "ki"
    partners = {"tokenizer": "binning", "head.actions": "diffusion"}
