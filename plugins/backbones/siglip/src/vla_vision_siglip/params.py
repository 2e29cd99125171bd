"""Names of SigLIP's weights: ours, JAX, openpi and big_vision, Hugging Face.

Axes: d width, n heads, h head width, f mlp width, p patches in y rows and x columns, c colours, i j rows and columns of
a patch; {l} block.
"""

from __future__ import annotations

from collections.abc import Iterator

from vla.params import Row, Site, bind

_ATTENTION = (
    Row("q.weight", "q/kernel", "(n h) d -> d n h"),
    Row("q.bias", "q/bias", "(n h) -> n h"),
    Row("k.weight", "k/kernel", "(n h) d -> d n h"),
    Row("k.bias", "k/bias", "(n h) -> n h"),
    Row("v.weight", "v/kernel", "(n h) d -> d n h"),
    Row("v.bias", "v/bias", "(n h) -> n h"),
    Row("o.weight", "o/kernel", "d (n h) -> n h d"),
    Row("o.bias", "o/bias", "d"),
)
_MLP = (
    Row("fc1.weight", "fc1/kernel", "f d -> d f"),
    Row("fc1.bias", "fc1/bias", "f"),
    Row("fc2.weight", "fc2/kernel", "d f -> f d"),
    Row("fc2.bias", "fc2/bias", "d"),
)
ROWS = (
    Row("patch.weight", "patch/kernel", "d c i j -> i j c d"),
    Row("patch.bias", "patch/bias", "d"),
    Row("blocks.{l}.norm_attn.weight", "blocks/norm_attn/scale", "d"),
    Row("blocks.{l}.norm_attn.bias", "blocks/norm_attn/bias", "d"),
    *(Row("blocks.{l}.attn." + r.torch, "blocks/attn/" + r.other, r.axes) for r in _ATTENTION),
    Row("blocks.{l}.norm_mlp.weight", "blocks/norm_mlp/scale", "d"),
    Row("blocks.{l}.norm_mlp.bias", "blocks/norm_mlp/bias", "d"),
    *(Row("blocks.{l}.mlp." + r.torch, "blocks/mlp/" + r.other, r.axes) for r in _MLP),
    Row("norm.weight", "norm/scale", "d"),
    Row("norm.bias", "norm/bias", "d"),
)
LEARNED = (Row("position", "position", "1 p d", grid=("p", "y", "x")),)
CLASS_TOKEN = (Row("class_token", "class_token", "1 1 d"),)
MAP_POOL = (
    Row("pool.probe", "pool/probe", "1 1 d"),
    *(Row("pool.attn." + r.torch, "pool/attn/" + r.other, r.axes) for r in _ATTENTION),
    Row("pool.norm.weight", "pool/norm/scale", "d"),
    Row("pool.norm.bias", "pool/norm/bias", "d"),
    *(Row("pool.mlp." + r.torch, "pool/mlp/" + r.other, r.axes) for r in _MLP),
)

_BLOCK = "Transformer/encoderblock/"
_HEADS = _BLOCK + "MultiHeadDotProductAttention_0/"
OPENPI = (
    Row("patch.weight", "embedding/kernel", "d c i j -> i j c d"),
    Row("patch.bias", "embedding/bias", "d"),
    Row("blocks.{l}.norm_attn.weight", _BLOCK + "LayerNorm_0/scale", "d"),
    Row("blocks.{l}.norm_attn.bias", _BLOCK + "LayerNorm_0/bias", "d"),
    Row("blocks.{l}.attn.q.weight", _HEADS + "query/kernel", "(n h) d -> d n h"),
    Row("blocks.{l}.attn.q.bias", _HEADS + "query/bias", "(n h) -> n h"),
    Row("blocks.{l}.attn.k.weight", _HEADS + "key/kernel", "(n h) d -> d n h"),
    Row("blocks.{l}.attn.k.bias", _HEADS + "key/bias", "(n h) -> n h"),
    Row("blocks.{l}.attn.v.weight", _HEADS + "value/kernel", "(n h) d -> d n h"),
    Row("blocks.{l}.attn.v.bias", _HEADS + "value/bias", "(n h) -> n h"),
    Row("blocks.{l}.attn.o.weight", _HEADS + "out/kernel", "d (n h) -> n h d"),
    Row("blocks.{l}.attn.o.bias", _HEADS + "out/bias", "d"),
    Row("blocks.{l}.norm_mlp.weight", _BLOCK + "LayerNorm_1/scale", "d"),
    Row("blocks.{l}.norm_mlp.bias", _BLOCK + "LayerNorm_1/bias", "d"),
    Row("blocks.{l}.mlp.fc1.weight", _BLOCK + "MlpBlock_0/Dense_0/kernel", "f d -> d f"),
    Row("blocks.{l}.mlp.fc1.bias", _BLOCK + "MlpBlock_0/Dense_0/bias", "f"),
    Row("blocks.{l}.mlp.fc2.weight", _BLOCK + "MlpBlock_0/Dense_1/kernel", "d f -> f d"),
    Row("blocks.{l}.mlp.fc2.bias", _BLOCK + "MlpBlock_0/Dense_1/bias", "d"),
    Row("norm.weight", "Transformer/encoder_norm/scale", "d"),
    Row("norm.bias", "Transformer/encoder_norm/bias", "d"),
)
OPENPI_LEARNED = (Row("position", "pos_embedding", "1 p d"),)

_LAYER = "encoder.layers.{l}."
HF = (
    Row("patch.weight", "embeddings.patch_embedding.weight", "d c i j"),
    Row("patch.bias", "embeddings.patch_embedding.bias", "d"),
    Row("blocks.{l}.norm_attn.weight", _LAYER + "layer_norm1.weight", "d"),
    Row("blocks.{l}.norm_attn.bias", _LAYER + "layer_norm1.bias", "d"),
    Row("blocks.{l}.attn.q.weight", _LAYER + "self_attn.q_proj.weight", "(n h) d"),
    Row("blocks.{l}.attn.q.bias", _LAYER + "self_attn.q_proj.bias", "(n h)"),
    Row("blocks.{l}.attn.k.weight", _LAYER + "self_attn.k_proj.weight", "(n h) d"),
    Row("blocks.{l}.attn.k.bias", _LAYER + "self_attn.k_proj.bias", "(n h)"),
    Row("blocks.{l}.attn.v.weight", _LAYER + "self_attn.v_proj.weight", "(n h) d"),
    Row("blocks.{l}.attn.v.bias", _LAYER + "self_attn.v_proj.bias", "(n h)"),
    Row("blocks.{l}.attn.o.weight", _LAYER + "self_attn.out_proj.weight", "d (n h)"),
    Row("blocks.{l}.attn.o.bias", _LAYER + "self_attn.out_proj.bias", "d"),
    Row("blocks.{l}.norm_mlp.weight", _LAYER + "layer_norm2.weight", "d"),
    Row("blocks.{l}.norm_mlp.bias", _LAYER + "layer_norm2.bias", "d"),
    Row("blocks.{l}.mlp.fc1.weight", _LAYER + "mlp.fc1.weight", "f d"),
    Row("blocks.{l}.mlp.fc1.bias", _LAYER + "mlp.fc1.bias", "f"),
    Row("blocks.{l}.mlp.fc2.weight", _LAYER + "mlp.fc2.weight", "d f"),
    Row("blocks.{l}.mlp.fc2.bias", _LAYER + "mlp.fc2.bias", "d"),
    Row("norm.weight", "post_layernorm.weight", "d"),
    Row("norm.bias", "post_layernorm.bias", "d"),
)
HF_LEARNED = (Row("position", "embeddings.position_embedding.weight", "1 p d -> p d"),)


def rows(site: Site) -> Iterator[Row]:
    """Our names and JAX paths."""
    s = site.settings
    extra = (*(LEARNED if s.posemb == "learn" else ()), *({"tok": CLASS_TOKEN, "map": MAP_POOL}.get(s.pool, ())))
    yield from bind((*ROWS, *extra), _sizes(site))


def openpi(site: Site) -> Iterator[Row]:
    """Openpi's and big_vision's tree, below `img/`."""
    yield from bind((*OPENPI, *(OPENPI_LEARNED if site.settings.posemb == "learn" else ())), _sizes(site))


def hf(site: Site) -> Iterator[Row]:
    """Transformers' SiglipVisionModel."""
    yield from bind((*HF, *(HF_LEARNED if site.settings.posemb == "learn" else ())), _sizes(site))


def _sizes(site: Site) -> dict[str, int]:
    s = site.settings
    rows, columns = (side // s.patch_size for side in site.spec.image_size)
    return {
        "l": s.depth, "d": s.width, "n": s.num_heads, "h": s.width // s.num_heads, "f": s.mlp_dim,
        "p": rows * columns, "y": rows, "x": columns, "c": 3, "i": s.patch_size, "j": s.patch_size,
    }  # fmt: skip
