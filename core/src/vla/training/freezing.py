"""`train.freeze`: which weights its prefixes cover, the same for both engines and for LoRA."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from vla.errors import SettingsError


def under(name: str, prefixes: Sequence[str]) -> bool:
    """Whether one of the prefixes is the dotted name or a beginning of it: `head` covers `head.x`, not `heads`."""
    return any(name == prefix or name.startswith(prefix.rstrip(".") + ".") for prefix in prefixes)


def frozen_names(names: Collection[str], prefixes: Sequence[str]) -> set[str]:
    """The names that the prefixes cover.

    Raises:
        SettingsError: a prefix that names nothing (the parts are listed), or nothing is left to train.
    """
    for prefix in prefixes:
        if not any(under(name, [prefix]) for name in names):
            parts = {".".join(n.split(".")[:d]) for n in names for d in (1, 2, 3) if n.count(".") >= d}
            expected = ", ".join(sorted(parts))
            raise SettingsError("no weights have this name", field="train.freeze", got=prefix, expected=expected)
    found = {name for name in names if under(name, prefixes)}
    if len(found) == len(names):
        raise SettingsError("nothing is left to train", field="train.freeze", got=list(prefixes), fix="freeze less")
    return found
