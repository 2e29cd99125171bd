"""Write docs/reference.md: every public name with its signature and docstring, from the docstrings themselves.

python scripts/make_reference.py [FILE]
"""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Modules that plugin authors and users import from, beside `vla` itself.
MODULES = (
    "vla.parts",
    "vla.layout", "vla.contracts", "vla.errors", "vla.compose", "vla.fitting", "vla.registry", "vla.params",
    "vla.codecs", "vla.id_map", "vla.tokenizer", "vla.datasets", "vla.draws", "vla.sampling", "vla.rtc", "vla.files",
    "vla.manifest", "vla.store",
    "vla.policy", "vla.hooks",
    "vla.testing.frameworks",
    "vla.testing.parts", "vla.testing.models", "vla.testing.heads", "vla.testing.tokenizers", "vla.testing.datasets",
)  # fmt: skip


def reference() -> str:
    """The page."""
    import vla

    out = [
        "# Reference",
        "",
        "Generated from docstrings by `scripts/make_reference.py`; do not edit.",
        "",
        "## vla",
        "",
    ]
    for name in ["__version__", *vla._PUBLIC]:
        if name != "__version__":
            thing = getattr(vla, name)
            out += [f"- `vla.{name}`: `{thing.__module__}.{name}`. {first_line(thing)}"]
    for module in MODULES:
        out += ["", f"## {module}", "", text_of(import_module(module))]
        for name, thing in public(import_module(module)):
            out += ["", f"### {name}{signature(thing)}", "", text_of(thing)]
            if inspect.isclass(thing):
                for method, function in vars(thing).items():
                    function = getattr(function, "__func__", function)
                    if method.startswith("_") or not callable(function) or not inspect.getdoc(function):
                        continue
                    out += ["", f"**{method}**`{signature(function)}`", "", text_of(function)]
    return "\n".join(out) + "\n"


def public(module: Any) -> list[tuple[str, Any]]:
    """Classes and functions that the module defines, in the order of its text."""
    found = [
        (name, thing)
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(thing) or inspect.isfunction(thing))
        and thing.__module__ == module.__name__
    ]
    return sorted(found, key=lambda pair: inspect.getsourcelines(pair[1])[1])


def signature(thing: Any) -> str:
    """The arguments, without what documentation need not show."""
    try:
        text = str(inspect.signature(thing)).replace("'", "").replace("NOTHING", "...")
        return re.sub(r"<(?:function|object) [^<>]*>", "...", text)  # defaults without a name of their own
    except (TypeError, ValueError):
        return ""


def text_of(thing: Any) -> str:
    """The docstring; indented blocks become code."""
    return (inspect.getdoc(thing) or "").replace("```", "")


def first_line(thing: Any) -> str:
    """The first line of the docstring."""
    return text_of(thing).partition("\n")[0]


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "reference.md"
    target.write_text(reference(), encoding="utf-8")
    print(target)
