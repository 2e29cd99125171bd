"""Known trees by name: `pi0`, `pi05`, ... Entries of plugins, never an enum to edit."""

from __future__ import annotations

from vla import registry
from vla.parts import TOP_SLOTS, ModelType


def find_type(name: str) -> ModelType:
    """The model type of this name, from whichever plugin publishes it.

    Raises:
        PartError: unknown (lists the installed ones), ambiguous, or broken.
    """
    item = registry.find(registry.MODEL_TYPE, name, path="type")
    model_type: ModelType = registry.load(item)
    if unknown := set(model_type.tree) - set(TOP_SLOTS):
        raise registry.broken(item, f"its tree has {sorted(unknown)[0]!r}, which is none of {list(TOP_SLOTS)}")
    return model_type
