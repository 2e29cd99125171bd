"""Compose Vision-Language-Action robot policies from plugins, in PyTorch and JAX.

    import vla
    variant = vla.build(head="ki", tokenizer="fast", backbone="paligemma", preset="tiny")
    print(variant.to_toml())

Importing this package loads no array library; every name below is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> module that holds it
_PUBLIC = {
    "Actions": "contracts", "DecodeGrammar": "contracts", "Observation": "contracts", "Spec": "contracts",
    "Expert": "parts", "ModelType": "parts", "Need": "parts", "NoSettings": "parts", "Part": "parts",
    "at_least": "parts", "equals": "parts", "has": "parts", "is_true": "parts",
    "Layout": "layout",
    "DataError": "errors", "DecodeError": "errors", "PartError": "errors", "SettingsError": "errors",
    "StoreError": "errors", "VlaError": "errors",
    "Chosen": "compose", "Variant": "compose", "build": "compose", "read_variant": "compose",
    "resolve": "compose", "variant_from_toml": "compose",
    "find": "registry", "listed": "registry",
    "open": "policy", "Policy": "policy",
    "train": "training.loop", "TrainConfig": "training.config",
    "evaluate": "evaluation",
}  # fmt: skip
# `vla.open` is public, but `from vla import *` must not take Python's own away.
__all__ = ["__version__", *(name for name in _PUBLIC if name != "open")]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vla' has no attribute {name!r}")
    value = getattr(import_module(f"vla.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


if TYPE_CHECKING:
    from vla.compose import Chosen, Variant, build, read_variant, resolve, variant_from_toml
    from vla.contracts import Actions, DecodeGrammar, Observation, Spec
    from vla.errors import DataError, DecodeError, PartError, SettingsError, StoreError, VlaError
    from vla.layout import Layout
    from vla.parts import Expert, ModelType, Need, NoSettings, Part, at_least, equals, has, is_true
    from vla.registry import find, listed
