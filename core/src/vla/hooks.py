"""Events that many may listen to (pluggy). Choosing one of many is never a hook: that is what parts are for.

A plugin publishes a module under the entry-point group `vla.hooks`:

    from vla.hooks import hookimpl

    @hookimpl
    def vla_check(variant):
        return [Finding("warning", "30 Hz is much for this arm")]

Each listener is loaded and called by itself: one that fails is reported and costs the others nothing.
"""

from __future__ import annotations

from typing import Any, Literal

import pluggy
from attrs import frozen

from vla import registry
from vla.errors import PartError

hookspec = pluggy.HookspecMarker("vla")
hookimpl = pluggy.HookimplMarker("vla")


@frozen
class Finding:
    """What a listener, or the house itself, has to say about a variant."""

    level: Literal["error", "warning", "note"]
    message: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.level}: {self.message}" + (f"\n  fix: {self.fix}" if self.fix else "")


@hookspec
def vla_check(variant: Any) -> list[Finding]:  # type: ignore[empty-body]
    """Look at a variant that fits; an `error` refuses it, a `warning` or `note` is shown."""


@hookspec
def vla_transforms(context: Any) -> list[tuple[str, Any]]:  # type: ignore[empty-body]
    """More transform steps, as (stage, step), for a `vla.transforms.Context`; after those of the parts."""


@hookspec
def vla_training(event: str, record: dict[str, Any]) -> None:
    """Hear training. Events: start, step, validation, bad_step, checkpoint, note, end (`vla.training.metrics`)."""


@frozen
class Answer:
    """What one listener returned, or why it could not."""

    listener: str
    value: Any = None
    problem: str = ""


def ask(hook: str, **arguments: Any) -> list[Answer]:
    """Call one hook on every listener; a listener that has no such hook says nothing."""
    return [answer for item in registry.listed(registry.HOOKS) for answer in ask_one(item, hook, **arguments)]


def ask_one(item: Any, hook: str, **arguments: Any) -> list[Answer]:
    """Call one hook on one listener, as the registry lists it."""
    try:
        manager = pluggy.PluginManager("vla")
        manager.add_hookspecs(_specs())
        manager.register(item.load(), item.name)
        manager.check_pending()
        return [Answer(item.name, value) for value in getattr(manager.hook, hook)(**arguments)]
    except PartError as error:
        return [Answer(item.name, problem=error.what)]
    except Exception as error:  # other people's code: it must cost only its own word
        reason = f"{type(error).__name__}: {error}"
        return [Answer(item.name, problem=f"hooks {item.name!r} ({item.source}) fail in {hook}: {reason}")]


def findings(variant: Any) -> list[Finding]:
    """All findings about a variant; a failing listener is itself a warning."""
    out: list[Finding] = []
    for answer in ask("vla_check", variant=variant):
        out += [Finding("warning", answer.problem)] if answer.problem else list(answer.value)
    return out


def _specs() -> Any:
    import sys

    return sys.modules[__name__]
