"""`vla doctor`: import everything that is installed, and say what is wrong and what to do."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from attrs import frozen

from vla.cli import console

# Part attributes that name code, with the framework that must be there for it.
_CODE = {"torch": "torch", "jax": "jax", "numpy": "", "transforms": "", "draws": "", "params": ""}


@frozen
class Problem:
    """One thing that is wrong."""

    where: str
    what: str
    fix: str = ""
    trace: str = ""


def problems(name: str = "", heavy: bool = True) -> Iterator[Problem]:
    """Everything that is wrong with the installed parts (or those called `name`).

    Args:
        name: only parts of this name.
        heavy: also import the code in each installed framework, not only the light modules.
    """
    from vla import registry
    from vla.errors import VlaError

    if not name:
        for stray in registry.strays():
            yield Problem(stray.dist, stray.what, "uninstall it until pip no longer finds it, then install it once")
    for kind in registry.ALL_GROUPS:
        for item in registry.listed(kind):
            if name and item.name != name:
                continue
            where = f"{kind} {item.name} ({item.source})"
            if registry.ambiguous(item):
                others = ", ".join(other.source for other in registry.shadowed(item))
                fix = f"write {item.dist}/{item.name}, or uninstall one of them"
                yield Problem(where, f"the same name is published by {others}", fix)
            try:
                thing = item.load()
            except VlaError as error:
                what = getattr(error, "what", str(error)).partition("broken: ")[2] or str(error)
                cause = error.__cause__
                trace = "".join(traceback.format_exception(cause)) if cause else ""
                yield Problem(where, what, f"repair, upgrade or uninstall {item.dist}", trace)
                continue
            if kind in registry.GROUPS:
                yield from _of_part(where, item, thing, heavy)
            elif kind == registry.MODEL_TYPE:
                yield from _of_type(where, thing)


def _of_part(where: str, item: Any, part: Any, heavy: bool) -> Iterator[Problem]:
    from vla import compose, registry
    from vla.errors import VlaError

    try:
        chosen = compose.resolve(item.kind, f"{item.dist}/{item.name}")
        _ = chosen.offers, chosen.needs
        if part.layout is not None:
            chosen.layout(), chosen.experts()
    except VlaError as error:
        missing = getattr(error, "fix", "")
        yield Problem(where, f"does not resolve with its defaults: {str(error).splitlines()[0]}", missing)
    for slot, (kind, default) in part.slots.items():
        if default and not any(i.name == default for i in registry.listed(kind)):
            yield Problem(where, f"its slot {slot!r} defaults to {kind} {default!r}, which is not installed")
    if not heavy:
        return
    for attribute, framework in _CODE.items():
        target = getattr(part, attribute)
        if not target or (framework and not _installed(framework)):
            continue
        try:
            with contextlib.redirect_stdout(sys.stderr):
                compose.load_object(target, where)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin may do anything at import; the doctor goes on
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            what = f"its {attribute} code {target!r} cannot be loaded: {reason}"
            yield Problem(where, what, getattr(error, "fix", ""), traceback.format_exc())


def _of_type(where: str, thing: Any) -> Iterator[Problem]:
    from vla import compose
    from vla.errors import VlaError

    try:
        compose.build(type=thing.name)
    except VlaError as error:
        yield Problem(where, f"does not build: {' '.join(str(error).split())[:300]}")


def _installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def doctor(name: str = "", /, light: bool = False) -> int:
    """Import everything that is installed and report what is wrong; exit status 1 if anything is.

    Args:
        name: only parts of this name; their tracebacks are shown.
        light: do not import frameworks.
    """
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from vla import registry
    from vla.parts import CONTRACTS

    versions = []
    for package in ("vla-core", "attrs", "numpy", "torch", "jax", "flax"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} absent")
    console.show(
        f"python {platform.python_version()} on {platform.system()} {platform.machine()}; " + ", ".join(versions),
        "contracts spoken: "
        + ", ".join(f"{k} {lo}" if lo == hi else f"{k} {lo}-{hi}" for k, (lo, hi) in CONTRACTS.items()),
    )
    found = list(problems(name, heavy=not light))
    total = sum(len([i for i in registry.listed(k) if not name or i.name == name]) for k in registry.ALL_GROUPS)
    for problem in found:
        fix = f"\n  fix: {console.escape(problem.fix)}" if problem.fix else ""
        console.show(f"[red]✗[/] {console.escape(problem.where)}: {console.escape(problem.what)}{fix}")
        if name and problem.trace:
            console.show(console.escape(problem.trace))
    if not total and name:
        console.show(f"nothing installed is called {name!r}; `vla list` shows what is")
        return 1
    hint = "" if name or not any(p.trace for p in found) else "; `vla doctor NAME` shows the traceback"
    console.show(f"{total} entry points, {len(found)} problem{'s' * (len(found) != 1)}{hint}")
    return 1 if found else 0


def main(argv: list[str]) -> int:
    """The verb."""
    return console.call(doctor, "doctor", argv)
