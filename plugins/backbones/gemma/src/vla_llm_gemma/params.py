"""Names of Gemma's weights, expert by expert: ours, JAX, openpi and big_vision, Hugging Face.

Axes: v vocabulary, d width of the expert, m its modulation (3 d), n query heads, k kv heads, h head width, f mlp width;
{l} layer, {e} expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vla.layout import BACKBONE
from vla.params import Row, Site, bind
from vla.parts import Expert

EMBEDDING = (Row("embedder.weight", "embedder/embedding", "v d"),)
EXPERT = (
    Row("layers.{l}.{e}.q.weight", "layers/{e}/q/kernel", "(n h) d -> d n h"),
    Row("layers.{l}.{e}.k.weight", "layers/{e}/k/kernel", "(k h) d -> d k h"),
    Row("layers.{l}.{e}.v.weight", "layers/{e}/v/kernel", "(k h) d -> d k h"),
    Row("layers.{l}.{e}.o.weight", "layers/{e}/o/kernel", "d (n h) -> n h d"),
    Row("layers.{l}.{e}.gate.weight", "layers/{e}/gate/kernel", "f d -> d f"),
    Row("layers.{l}.{e}.up.weight", "layers/{e}/up/kernel", "f d -> d f"),
    Row("layers.{l}.{e}.down.weight", "layers/{e}/down/kernel", "d f -> f d"),
)
SCALES = (
    Row("layers.{l}.{e}.norm_attn.scale", "layers/{e}/norm_attn/scale", "d"),
    Row("layers.{l}.{e}.norm_mlp.scale", "layers/{e}/norm_mlp/scale", "d"),
    Row("final_norm.{e}.scale", "final_norm/{e}/scale", "d"),
)
ADARMS = (
    Row("layers.{l}.{e}.norm_attn.modulation.weight", "layers/{e}/norm_attn/modulation/kernel", "m d -> d m"),
    Row("layers.{l}.{e}.norm_attn.modulation.bias", "layers/{e}/norm_attn/modulation/bias", "m"),
    Row("layers.{l}.{e}.norm_mlp.modulation.weight", "layers/{e}/norm_mlp/modulation/kernel", "m d -> d m"),
    Row("layers.{l}.{e}.norm_mlp.modulation.bias", "layers/{e}/norm_mlp/modulation/bias", "m"),
    Row("final_norm.{e}.modulation.weight", "final_norm/{e}/modulation/kernel", "m d -> d m"),
    Row("final_norm.{e}.modulation.bias", "final_norm/{e}/modulation/bias", "m"),
)

# {x}: "" for the backbone's expert, "_1" for the one beside it. Both orders of the modulation are scale, shift, gate.
OPENPI_EMBEDDING = (Row("embedder.weight", "embedder/input_embedding", "v d"),)
OPENPI_ATTENTION = (
    Row("layers.{l}.{e}.q.weight", "layers/attn/q_einsum{x}/w", "(n h) d -> n d h"),
    Row("layers.{l}.{e}.k.weight", "layers/attn/kv_einsum{x}/w[0]", "(k h) d -> k d h"),
    Row("layers.{l}.{e}.v.weight", "layers/attn/kv_einsum{x}/w[1]", "(k h) d -> k d h"),
)
OPENPI_FULL_ATTENTION = (  # as many kv heads as query heads: one array
    Row("layers.{l}.{e}.q.weight", "layers/attn/qkv_einsum{x}/w[0]", "(n h) d -> n d h"),
    Row("layers.{l}.{e}.k.weight", "layers/attn/qkv_einsum{x}/w[1]", "(n h) d -> n d h"),
    Row("layers.{l}.{e}.v.weight", "layers/attn/qkv_einsum{x}/w[2]", "(n h) d -> n d h"),
)
OPENPI_EXPERT = (
    Row("layers.{l}.{e}.o.weight", "layers/attn/attn_vec_einsum{x}/w", "d (n h) -> n h d"),
    Row("layers.{l}.{e}.gate.weight", "layers/mlp{x}/gating_einsum[0]", "f d -> d f"),
    Row("layers.{l}.{e}.up.weight", "layers/mlp{x}/gating_einsum[1]", "f d -> d f"),
    Row("layers.{l}.{e}.down.weight", "layers/mlp{x}/linear", "d f -> f d"),
)
OPENPI_SCALES = (
    Row("layers.{l}.{e}.norm_attn.scale", "layers/pre_attention_norm{x}/scale", "d"),
    Row("layers.{l}.{e}.norm_mlp.scale", "layers/pre_ffw_norm{x}/scale", "d"),
    Row("final_norm.{e}.scale", "final_norm{x}/scale", "d"),
)
OPENPI_ADARMS = (
    Row("layers.{l}.{e}.norm_attn.modulation.weight", "layers/pre_attention_norm{x}/Dense_0/kernel", "m d -> d m"),
    Row("layers.{l}.{e}.norm_attn.modulation.bias", "layers/pre_attention_norm{x}/Dense_0/bias", "m"),
    Row("layers.{l}.{e}.norm_mlp.modulation.weight", "layers/pre_ffw_norm{x}/Dense_0/kernel", "m d -> d m"),
    Row("layers.{l}.{e}.norm_mlp.modulation.bias", "layers/pre_ffw_norm{x}/Dense_0/bias", "m"),
    Row("final_norm.{e}.modulation.weight", "final_norm{x}/Dense_0/kernel", "m d -> d m"),
    Row("final_norm.{e}.modulation.bias", "final_norm{x}/Dense_0/bias", "m"),
)

# {r}: "language_model" for the backbone's expert, "gemma_expert" for the one beside it (openpi's PyTorch, LeRobot).
HF_EMBEDDING = (Row("embedder.weight", "language_model.embed_tokens.weight", "v d"),)
HF_EXPERT = (
    Row("layers.{l}.{e}.q.weight", "{r}.layers.{l}.self_attn.q_proj.weight", "(n h) d"),
    Row("layers.{l}.{e}.k.weight", "{r}.layers.{l}.self_attn.k_proj.weight", "(k h) d"),
    Row("layers.{l}.{e}.v.weight", "{r}.layers.{l}.self_attn.v_proj.weight", "(k h) d"),
    Row("layers.{l}.{e}.o.weight", "{r}.layers.{l}.self_attn.o_proj.weight", "d (n h)"),
    Row("layers.{l}.{e}.gate.weight", "{r}.layers.{l}.mlp.gate_proj.weight", "f d"),
    Row("layers.{l}.{e}.up.weight", "{r}.layers.{l}.mlp.up_proj.weight", "f d"),
    Row("layers.{l}.{e}.down.weight", "{r}.layers.{l}.mlp.down_proj.weight", "d f"),
)
HF_SCALES = (
    Row("layers.{l}.{e}.norm_attn.scale", "{r}.layers.{l}.input_layernorm.weight", "d"),
    Row("layers.{l}.{e}.norm_mlp.scale", "{r}.layers.{l}.post_attention_layernorm.weight", "d"),
    Row("final_norm.{e}.scale", "{r}.norm.weight", "d"),
)
HF_ADARMS = (
    Row("layers.{l}.{e}.norm_attn.modulation.weight", "{r}.layers.{l}.input_layernorm.dense.weight", "m d"),
    Row("layers.{l}.{e}.norm_attn.modulation.bias", "{r}.layers.{l}.input_layernorm.dense.bias", "m"),
    Row("layers.{l}.{e}.norm_mlp.modulation.weight", "{r}.layers.{l}.post_attention_layernorm.dense.weight", "m d"),
    Row("layers.{l}.{e}.norm_mlp.modulation.bias", "{r}.layers.{l}.post_attention_layernorm.dense.bias", "m"),
    Row("final_norm.{e}.modulation.weight", "{r}.norm.dense.weight", "m d"),
    Row("final_norm.{e}.modulation.bias", "{r}.norm.dense.bias", "m"),
)


def rows(site: Site) -> Iterator[Row]:
    """Our names and JAX paths."""
    yield from _bound(site, EMBEDDING, EXPERT, SCALES, ADARMS)


def openpi(site: Site) -> Iterator[Row]:
    """Openpi's tree below `llm/` (big_vision's has the backbone's expert alone)."""
    s = site.settings
    attention = OPENPI_FULL_ATTENTION if s.num_kv_heads == s.num_heads else OPENPI_ATTENTION
    yield from _bound(site, OPENPI_EMBEDDING, (*attention, *OPENPI_EXPERT), OPENPI_SCALES, OPENPI_ADARMS)


def hf(site: Site) -> Iterator[Row]:
    """Transformers' GemmaModel, in the style of `vla.interop.paligemma.standard_name`."""
    yield from _bound(site, HF_EMBEDDING, HF_EXPERT, HF_SCALES, HF_ADARMS)


def _bound(
    site: Site, embedding: Sequence[Row], expert: Sequence[Row], scales: Sequence[Row], adarms: Sequence[Row]
) -> Iterator[Row]:
    s = site.settings
    shared = {"l": s.depth, "n": s.num_heads, "k": s.num_kv_heads, "h": s.head_dim}
    yield from bind(embedding, {"v": s.vocab_size, "d": s.width})
    for i, (name, e) in enumerate({BACKBONE: Expert(s.width, s.mlp_dim), **site.experts}.items()):
        own = {"d": e.width, "f": e.mlp_dim, "m": 3 * e.width}
        root = ("language_model", "gemma_expert")[i] if i < 2 else f"gemma_expert_{i}"
        words = {"e": name, "x": f"_{i}" if i else "", "r": root}
        yield from bind((*expert, *(adarms if e.adarms else scales)), {**shared, **own, **words})
