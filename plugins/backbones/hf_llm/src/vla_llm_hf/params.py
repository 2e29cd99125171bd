"""Names of the decoder's weights and of the experts beside it. The decoder's own are asked of transformers."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

from vla.errors import PartError
from vla.layout import BACKBONE
from vla.params import Row, Site, bind

EXPERT = (
    Row("layers.{l}.{e}.q.weight", "layers/{e}/q/kernel", "n d -> d n"),
    Row("layers.{l}.{e}.k.weight", "layers/{e}/k/kernel", "k d -> d k"),
    Row("layers.{l}.{e}.v.weight", "layers/{e}/v/kernel", "k d -> d k"),
    Row("layers.{l}.{e}.o.weight", "layers/{e}/o/kernel", "d n -> n d"),
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
# Our name of a module <- transformers' (`hf`); layers keep theirs below `layers.{l}.backbone.`.
THEIRS = {"embedder": "model.embed_tokens", "final_norm.backbone": "model.norm", "unembedder": "lm_head"}


def rows(site: Site) -> Iterator[Row]:
    """Our names and JAX-style paths (no JAX code exists; linears end in `kernel`, which LoRA looks for)."""
    for ours, _, shape in decoder_names(site.settings):
        linear = len(shape) == 2 and "embedder" not in ours
        other = re.sub(r"/weight$", "/kernel", ours.replace(".", "/")) if linear else ours.replace(".", "/")
        yield _row(ours, other, shape, turned=linear)
    offers = site.backbone
    heads = {
        "l": int(offers["depth"]), "n": int(offers["num_heads"]) * int(offers["head_dim"]),
        "k": int(offers["num_kv_heads"]) * int(offers["head_dim"]),
    }  # fmt: skip
    for name, e in site.experts.items():
        own = {"d": e.width, "f": e.mlp_dim, "m": 3 * e.width, "e": name}
        yield from bind((*EXPERT, *(ADARMS if e.adarms else SCALES)), {**heads, **own})


def hf(site: Site) -> Iterator[Row]:
    """Our names and transformers' own, of the decoder alone."""
    for ours, theirs, shape in decoder_names(site.settings):
        yield _row(ours, theirs, shape, turned=False)


def _row(ours: str, other: str, shape: tuple[int, ...], turned: bool) -> Row:
    letters = "abcd"[: len(shape)]
    axes = f"{' '.join(letters)} -> {' '.join(reversed(letters))}" if turned else " ".join(letters)
    return Row(ours, other, axes, dict(zip(letters, shape, strict=True)))


@functools.lru_cache(maxsize=32)
def decoder_names(settings: object) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """(our name, transformers' name, shape) of every weight of the decoder, from a model on the meta device."""
    try:
        import torch

        from vla_llm_hf.torch_impl import make_decoder
    except ImportError as error:
        fix = "pip install 'vla-llm-hf[torch]'"
        raise PartError("what its weights are called is asked of transformers", got=str(error), fix=fix) from error

    with torch.device("meta"):
        model = make_decoder(settings)  # type: ignore[arg-type]
    found = []
    for name, p in model.named_parameters():
        if (ours := _ours(name)) is not None:
            found.append((ours, name, tuple(p.shape)))
    return tuple(found)


def _ours(name: str) -> str | None:
    if layer := re.match(r"model\.layers\.(\d+)\.(.+)", name):
        return f"layers.{layer[1]}.{BACKBONE}.{layer[2]}"
    module, _, leaf = name.rpartition(".")
    for ours, theirs in THEIRS.items():
        if module == theirs:
            return f"{ours}.{leaf}"
    raise KeyError(f"transformers has a weight {name!r} that this part does not know")
