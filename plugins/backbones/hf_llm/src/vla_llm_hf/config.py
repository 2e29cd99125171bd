"""Settings of a decoder of `transformers`: its own configuration, kept as text. No framework is imported here.

`model` names a folder with `config.json`; what that says becomes `config` when the settings are made, so that a variant
file says by itself what it is, and no path that comes with a file is followed. A configuration names sizes, never
code: keys that could are left out, and a family is one of those named here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from vla.errors import SettingsError
from vla.parts import Need, equals
from vla.reading import parse_json, read_json
from vla.settings import size

# `model_type` of the families whose layers were compared with transformers itself (see the tests).
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2", "phi3",
)  # fmt: skip
# A vision-language model's configuration holds that of its decoder.
NESTED = ("text_config", "llm_config", "language_config")
# Keys that name code, files or a precision, which a policy chooses itself.
NOT_KEPT = (
    *("auto_map", "_name_or_path", "transformers_version", "architectures", "_attn_implementation"),
    *("torch_dtype", "dtype"),
)
MOST_BYTES = 1 << 20
# The ceilings of `gemma`.
MOST = {
    "hidden_size": 65_536, "num_hidden_layers": 256, "num_attention_heads": 512, "vocab_size": 4_194_304,
    "intermediate_size": 524_288,
}  # fmt: skip


@frozen
class Settings:
    """Settings.

    Attributes:
        model: a folder with the decoder's `config.json` (of a whole VLM: its text part is taken). It is read when the
            settings are made and not kept: `config` is what counts from then on.
        config: that configuration as JSON text, e.g. '{"model_type": "qwen3", "hidden_size": 1024, ...}'; default:
            SmolLM2-360M's.
        extra_ids: rows added to the table behind the configuration's, where action ids can live
            (`tokenizer.text.extra_ids` says the same); they start as the mean of the others.
    """

    model: str = ""
    config: str = ""
    extra_ids: int = size(0, most=1 << 20, least=0)

    def __attrs_post_init__(self) -> None:
        found = _read(self.model) if self.model else _parse(self.config or str(PUBLISHED[DEFAULT]["config"]))
        object.__setattr__(self, "config", json.dumps(_decoder(found), sort_keys=True))
        object.__setattr__(self, "model", "")

    @property
    def width(self) -> int:
        """D: what a backbone's projector writes."""
        return int(self.values["hidden_size"])

    @property
    def values(self) -> dict[str, Any]:
        """The configuration as plain data."""
        return json.loads(self.config)


def _tiny(family: str, **more: Any) -> dict[str, object]:
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 4096, "max_position_embeddings": 1024,
        "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "tie_word_embeddings": True,
    }  # fmt: skip
    return {"config": json.dumps({"model_type": family, **sizes, **more}, sort_keys=True)}


def _sizes(
    family: str, width: int, mlp: int, depth: int, heads: int, kv: int, head: int, vocab: int, **more: Any
) -> dict[str, object]:
    values = {
        "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": depth, "num_attention_heads": heads,
        "num_key_value_heads": kv, "head_dim": head, "vocab_size": vocab, "tie_word_embeddings": True,
    }  # fmt: skip
    return {"config": json.dumps({"model_type": family, **values, **more}, sort_keys=True)}


TINY: dict[str, dict[str, object]] = {
    "llama": _tiny("llama"),
    "mistral": _tiny("mistral", sliding_window=6),
    "qwen2": _tiny("qwen2"),
    "qwen3": _tiny("qwen3", tie_word_embeddings=False),
    "gemma": _tiny("gemma", num_key_value_heads=1),
    "gemma2": _tiny("gemma2", query_pre_attn_scalar=16, sliding_window=6, final_logit_softcapping=None),
    "gemma3_text": _tiny(
        "gemma3_text", query_pre_attn_scalar=16, sliding_window=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "smollm3": _tiny("smollm3", no_rope_layers=[1, 1, 0]),
    "olmo2": _tiny("olmo2"),
    "phi3": _tiny("phi3", partial_rotary_factor=0.5),
}  # fmt: skip
# Published sizes, so that a variant can be composed and planned before its weights are here.
PUBLISHED: dict[str, dict[str, object]] = {
    "smollm2_360m": _sizes("llama", 960, 2560, 32, 15, 5, 64, 49_152, rope_theta=100_000.0, rms_norm_eps=1e-5),
    "qwen3_0.6b": _sizes("qwen3", 1024, 3072, 28, 16, 8, 128, 151_936, rope_theta=1e6, rms_norm_eps=1e-6),
    "gemma3_270m": _sizes(
        "gemma3_text", 640, 2048, 18, 4, 1, 256, 262_144, rope_theta=1e6, rope_local_base_freq=10_000.0,
        rms_norm_eps=1e-6, query_pre_attn_scalar=256, sliding_window=512,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
    ),
}  # fmt: skip
DEFAULT = "smollm2_360m"
PRESETS = {"tiny": TINY["qwen3"], **PUBLISHED, **{f"tiny_{family}": settings for family, settings in TINY.items()}}


def offers(settings: Settings, inner: Mapping[str, Any]) -> dict[str, Any]:
    """What the decoder is. It decodes tokens unless its logits pass through a cap that token heads know nothing of."""
    c = settings.values
    heads = int(c["num_attention_heads"])
    return {
        "width": int(c["hidden_size"]), "depth": int(c["num_hidden_layers"]), "num_heads": heads,
        "num_kv_heads": int(c.get("num_key_value_heads") or heads), "head_dim": head_dim(c),
        "vocab_size": int(c["vocab_size"]) + settings.extra_ids,
        "decodes": not c.get("final_logit_softcapping"), "prefix_cache": True,
        "multi_expert": True, "adarms": True, "insulates": True,
    }  # fmt: skip


def head_dim(c: Mapping[str, Any]) -> int:
    """H of a configuration; families that do not say it divide the width."""
    return int(c.get("head_dim") or int(c["hidden_size"]) // int(c["num_attention_heads"]))


def needs(settings: Settings) -> tuple[Need, ...]:
    """The decoder runs before the experts, so nothing of it may look at them."""
    why = "the decoder's layers run before the experts, so no token of the backbone may look at an expert's"
    return (equals("head", "backbone_sees_experts", False, why),)


def _read(model: str) -> dict[str, Any]:
    file = Path(model).expanduser()
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise SettingsError(
            "there is no configuration of a decoder at this path", field="model", got=str(file),
            fix="give the folder of a model of transformers (config.json, *.safetensors); nothing is fetched for you",
        )  # fmt: skip
    return read_json(file, "a model's configuration is no JSON", most=MOST_BYTES, error=SettingsError)


def _parse(text: str) -> dict[str, Any]:
    return parse_json(text, "config", "a model's configuration is no JSON", error=SettingsError)


def _decoder(found: dict[str, Any]) -> dict[str, Any]:
    """The decoder's own keys: checked, without what could name code."""
    for name in NESTED:
        if isinstance(found.get(name), dict):
            found = found[name]
    family = found.get("model_type")
    if "auto_map" in found and family not in FAMILIES:
        raise SettingsError(
            "this model brings its own code, and code from a model is not run", field="config.auto_map",
            got=str(family), expected=", ".join(FAMILIES),
        )  # fmt: skip
    if family not in FAMILIES:
        raise SettingsError(
            "no such family of decoders", field="config.model_type", got=family, expected=", ".join(FAMILIES),
            fix="take a model of one of these families",
        )  # fmt: skip
    for name, most in MOST.items():
        found_size = found.get(name)
        if not isinstance(found_size, int) or isinstance(found_size, bool) or not 1 <= found_size <= most:
            raise SettingsError(
                "a size of the decoder is missing or no size", field=f"config.{name}", got=found_size,
                expected=f"1 to {most:,}",
            )  # fmt: skip
    kept = {k: v for k, v in found.items() if k not in NOT_KEPT and not k.startswith("_")}
    return dict(sorted(kept.items()))
