"""Settings of the `fsq` tokenizer."""

from attrs import frozen

from vla.errors import SettingsError
from vla.settings import number, size

# Ids -> levels per latent digit: openpi's "custom" table, the one its tokenizer uses.
LEVELS = {2**8: (16, 16), 2**10: (32, 32), 2**12: (64, 64), 2**14: (128, 128), 2**16: (256, 256)}
HEAD_DIM = 64  # attention heads are this wide, as in openpi


@frozen
class Fsq:
    """Settings.

    Attributes:
        source: "": fit on your own data. Else a folder that `vla tokenizer fit` wrote, or an openpi FSQ checkpoint,
        which
            brings its own sizes; its `codes` and `num_tokens` must be these.
        codes: action ids: 256, 1024, 4096, 16384 or 65536.
        num_tokens: tokens per chunk.
        embed_dim: width of the network, a multiple of 64.
        num_layers: layers of encoder and decoder each.
        mlp_ratio: hidden width of the MLPs over embed_dim.
        bound: clip actions to [-bound, bound] before encoding; 0: do not.
        steps, batch, lr, seed: of the fit.
        skip: ids at the end of the text vocabulary that stay free (PaliGemma: its 128 <seg> pieces).
    """

    source: str = ""
    codes: int = size(1024, most=65_536, least=256)
    num_tokens: int = size(16, most=4096)
    embed_dim: int = size(128, most=4096, least=HEAD_DIM)
    num_layers: int = size(2, most=64)
    mlp_ratio: float = number(2.0, most=64, above=True)
    bound: float = number(0.0, most=1e6)
    steps: int = size(3000, most=10_000_000)
    batch: int = size(64, most=65_536)
    lr: float = number(1e-3, most=1, above=True)
    seed: int = size(0, most=2**63 - 1, least=0)
    skip: int = size(128, most=1_000_000, least=0)

    def __attrs_post_init__(self) -> None:
        if self.codes not in LEVELS:
            raise SettingsError(
                "fsq has no levels for this number of ids", field="codes", got=self.codes, expected=sorted(LEVELS)
            )
        if self.embed_dim % HEAD_DIM:
            raise SettingsError(
                "a head is 64 wide, so the network is a multiple of it", field="embed_dim", got=self.embed_dim,
                expected=f"a multiple of {HEAD_DIM}",
            )  # fmt: skip


PRESETS = {
    "full": {},
    "small": {"num_tokens": 8, "embed_dim": 64},
    "tiny": {"codes": 256, "num_tokens": 8, "embed_dim": 64, "num_layers": 1, "steps": 800},
}
