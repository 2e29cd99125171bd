"""What tests of parts need: the conformance kit and random batches.

A third party's whole test file:

    from vla.testing import HeadConformance

    class TestMyHead(HeadConformance):
        name = "my-head"

Install the kit with its stand-in partners: `pip install vla-core[testing]`. `vla check head my-head` runs the same
without a file. This module is light; each name below is imported when it is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

# public name -> module that holds it
_PUBLIC = {
    "HeadConformance": "heads",
    "VisionConformance": "vision",
    "LlmConformance": "llms",
    "BackboneConformance": "backbones",
    "TokenizerConformance": "tokenizers",
    "DatasetConformance": "datasets",
    "ProtocolConformance": "protocols",
    "random_batch": "batches",
}
# kind of part -> its conformance class
KITS = {name.removesuffix("Conformance").lower(): name for name in _PUBLIC if name.endswith("Conformance")}
__all__ = [*_PUBLIC, "KITS"]

if "pytest" in sys.modules:  # their `assert` statements show values, as those of a test file do
    modules = dict.fromkeys(f"vla.testing.{name}" for name in ("parts", "models", *_PUBLIC.values()))
    sys.modules["pytest"].register_assert_rewrite(*(name for name in modules if name not in sys.modules))


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vla.testing' has no attribute {name!r}")
    return getattr(import_module(f"vla.testing.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
