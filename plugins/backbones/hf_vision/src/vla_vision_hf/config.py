"""Settings of an image encoder of `transformers`: its own configuration, kept as text. Imports no framework."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from attrs import field, frozen

from vla.errors import SettingsError
from vla.reading import parse_json, read_json
from vla.settings import Between

HALF = (0.5, 0.5, 0.5)
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# `model_type` of the families that were compared with transformers itself, and what their pixels are normalised by.
FAMILIES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "siglip_vision_model": (HALF, HALF), "clip_vision_model": CLIP, "dinov2": IMAGENET,
    "dinov2_with_registers": IMAGENET, "dinov3_vit": IMAGENET, "vit": (HALF, HALF),
}  # fmt: skip
# A vision-language model's configuration holds that of its encoder.
NESTED = ("vision_config",)
# Keys that name code, files or a precision, which a policy chooses itself.
NOT_KEPT = (
    *("auto_map", "_name_or_path", "transformers_version", "architectures", "_attn_implementation"),
    *("torch_dtype", "dtype"),
)
MOST_BYTES = 1 << 20
# The ceilings of `siglip`.
MOST = {"hidden_size": 16_384, "num_hidden_layers": 128, "num_attention_heads": 256, "patch_size": 256}


@frozen
class Settings:
    """Settings.

    Attributes:
        model: a folder with the encoder's `config.json` (of a whole VLM: its vision part is taken), and, where it has
            one, `preprocessor_config.json`. It is read when the settings are made and not kept.
        config: that configuration as JSON text, with `image_mean` and `image_std` where the model says them; default:
            SigLIP base, 16-pixel patches.
        tokens: what the LLM gets of an image: "patches" [P D], or "class", the class token alone [1 D].
        mean, std: what pixels in [0, 1] are normalised by, per colour; default: the model's, else the family's.
    """

    model: str = ""
    config: str = ""
    tokens: Literal["patches", "class"] = "patches"
    mean: tuple[float, ...] = field(default=(), validator=Between(-1000, 1000))
    std: tuple[float, ...] = field(default=(), validator=Between(0, 1000, above=True))

    def __attrs_post_init__(self) -> None:
        text = self.config or str(PUBLISHED[DEFAULT]["config"])
        found = _read(self.model) if self.model else parse_json(text, "config", error=SettingsError)
        object.__setattr__(self, "config", json.dumps(_encoder(found), sort_keys=True))
        object.__setattr__(self, "model", "")
        for name, three in zip(("mean", "std"), self.normalisation, strict=True):
            if len(three) != 3 or (name == "std" and min(three) <= 0):
                raise SettingsError("one number per colour", field=name, got=three, expected="3 numbers, std > 0")
        if self.tokens == "class" and self.values["model_type"] == "siglip_vision_model":
            raise SettingsError("SigLIP has no class token", field="tokens", got="class", expected="patches")

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of pixels in [0, 1]: the settings', else the model's, else the family's."""
        mean, std = FAMILIES[self.values["model_type"]]
        return (
            tuple(map(float, self.mean or self.values.get("image_mean") or mean)),
            tuple(map(float, self.std or self.values.get("image_std") or std)),
        )

    @property
    def values(self) -> dict[str, Any]:
        """The configuration as plain data."""
        return json.loads(self.config)


def _sizes(
    family: str, width: int, mlp: int, depth: int, heads: int, image: int, patch: int, **more: Any
) -> dict[str, object]:
    values = {
        "model_type": family, "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": depth,
        "num_attention_heads": heads, "image_size": image, "patch_size": patch,
    }  # fmt: skip
    return {"config": json.dumps({**values, **more}, sort_keys=True)}


def _tiny(family: str, **more: Any) -> dict[str, object]:
    return _sizes(family, 32, 64, 2, 2, 32, 8, **more)


TINY: dict[str, dict[str, object]] = {family: _tiny(family) for family in FAMILIES}
# Published sizes: google/siglip-base-patch16-224, facebook/dinov2-base, openai/clip-vit-large-patch14.
PUBLISHED = {
    "siglip_base": _sizes("siglip_vision_model", 768, 3072, 12, 12, 224, 16),
    "dinov2_base": _sizes("dinov2", 768, 3072, 12, 12, 518, 14),
    "clip_large": _sizes("clip_vision_model", 1024, 4096, 24, 16, 224, 14),
}
DEFAULT = "siglip_base"
PRESETS = {
    **PUBLISHED,
    "tiny": TINY["siglip_vision_model"],
    **{f"tiny_{family}": settings for family, settings in TINY.items()},
}


def offers(settings: Settings, inner: Mapping[str, Any]) -> dict[str, Any]:
    """What the encoder is; size and normalisation as its weights know them."""
    c = settings.values
    size = c.get("image_size", 224)
    return {
        "width": int(c["hidden_size"]), "pooled": settings.tokens == "class", "patch_size": int(c["patch_size"]),
        "image_size": tuple(size) if isinstance(size, list) else (int(size), int(size)),
        "image_mean": settings.normalisation[0], "image_std": settings.normalisation[1],
    }  # fmt: skip


def _read(model: str) -> dict[str, Any]:
    folder = Path(model).expanduser()
    file = folder / "config.json" if folder.is_dir() else folder
    if not file.is_file():
        raise SettingsError(
            "there is no configuration of an image encoder at this path", field="model", got=str(file),
            fix="give the folder of a model of transformers (config.json, *.safetensors); nothing is fetched for you",
        )  # fmt: skip
    found = read_json(file, "a model's configuration is no JSON", most=MOST_BYTES, error=SettingsError)
    beside = file.with_name("preprocessor_config.json")
    if beside.is_file():
        pixels = read_json(beside, "a preprocessor's configuration is no JSON", most=MOST_BYTES, error=SettingsError)
        found = {**found, "pixels": {k: pixels[k] for k in ("image_mean", "image_std") if pixels.get(k)}}
    return found


def _encoder(found: dict[str, Any]) -> dict[str, Any]:
    """The encoder's own keys: checked, without what could name code."""
    pixels = found.pop("pixels", {})
    for name in NESTED:
        if isinstance(found.get(name), dict):
            found = found[name]
    family = found.get("model_type")
    if family not in FAMILIES:
        code = "auto_map" in found
        foreign = "this model brings its own code, and code from a model is not run"
        raise SettingsError(
            foreign if code else "no such family of encoders",
            field="config.auto_map" if code else "config.model_type", got=family, expected=", ".join(FAMILIES),
            fix="take a model of one of these families",
        )  # fmt: skip
    for name, most in MOST.items():
        size = found.get(name)
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
            raise SettingsError(
                "a size of the encoder is missing or no size", field=f"config.{name}", got=size,
                expected=f"1 to {most:,}",
            )  # fmt: skip
    kept = {k: v for k, v in found.items() if k not in NOT_KEPT and not k.startswith("_")}
    return dict(sorted({**kept, **pixels}.items()))
