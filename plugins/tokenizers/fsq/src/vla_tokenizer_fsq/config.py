"""Settings of the `fsq` tokenizer."""

from attrs import frozen

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
    codes: int = 1024
    num_tokens: int = 16
    embed_dim: int = 128
    num_layers: int = 2
    mlp_ratio: float = 2.0
    bound: float = 0.0
    steps: int = 3000
    batch: int = 64
    lr: float = 1e-3
    seed: int = 0
    skip: int = 128


PRESETS = {
    "full": {},
    "small": {"num_tokens": 8, "embed_dim": 64},
    "tiny": {"codes": 256, "num_tokens": 8, "embed_dim": 64, "num_layers": 1, "steps": 800},
}
