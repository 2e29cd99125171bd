"""What the verbs share: parsing options, and writing to the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

# A repeatable option, with default []. Bare `list` means words; `list[str]` would have tyro load its type checker to
# look at the default, which costs every verb 50 ms.
Words = list


def call(function: Callable[..., int | None], verb: str, argv: Sequence[str]) -> int:
    """Call a function with options parsed from its signature and docstring (tyro).

    Positional-only arguments become positional words; lists are given by repeating their option.
    """
    import tyro

    config = (tyro.conf.UseAppendAction, tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands)
    return tyro.cli(function, prog=f"vla {verb}", args=list(argv), config=config) or 0


def note(text: str) -> None:
    """A line for the person, not for the pipe."""
    print(text, file=sys.stderr)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    """A rich table; cells may hold rich markup, so escape what others wrote."""
    from rich import box
    from rich.table import Table

    out = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        out.add_column(name, overflow="fold")
    for row in rows:
        out.add_row(*row)
    return out


def show(*things: Any) -> None:
    """Print rich things to stdout; a plain text width when stdout is no terminal."""
    from rich.console import Console

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)
    for thing in things:
        console.print(thing)


def escape(text: str) -> str:
    """Text in which rich sees no markup."""
    from rich.markup import escape as rich_escape

    return rich_escape(text)
