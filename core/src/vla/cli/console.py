"""What the verbs share: parsing options, and writing to the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from vla.errors import printable


def call(
    function: Callable[..., int | None], verb: str, argv: Sequence[str], defaults: Mapping[str, Any] | None = None
) -> int:
    """Call a function with the options that `vla.cli.options` reads from its signature and docstring.

    Args:
        function: the verb.
        verb: its name, for messages.
        argv: the words after it. With `--help` among them the options are explained instead.
        defaults: parameter -> another default than the signature's.
    """
    from vla.cli import options

    table = options.options_of(function, defaults or {})
    if {"-h", "--help"} & set(argv[: argv.index("--") if "--" in argv else len(argv)]):
        from vla.cli.help import help_text

        print(help_text(function, table, verb))
        return 0
    placed, named = options.arguments(function, options.parse(table, argv, verb), defaults or {})
    return function(*placed, **named) or 0


def note(text: str) -> None:
    """A line for the person, not for the pipe."""
    with suppress(OSError):  # the terminal is gone (SIGHUP)
        print(printable(text), file=sys.stderr)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr that is gone afterwards; yields what moves it to so many of `total`."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        line = bar.add_task(label, total=total)
        yield lambda done: bar.update(line, completed=done)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    """A rich table; cells may hold rich markup, so escape what others wrote."""
    from rich import box
    from rich.table import Table

    out = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        out.add_column(printable(name), overflow="fold")
    for row in rows:
        out.add_row(*(printable(cell) if isinstance(cell, str) else cell for cell in row))
    return out


def tables(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Any]:
    """As `table`, for many columns: as many tables as it takes for every cell to be whole, each with the first column.

    A table that is wider than the terminal squeezes its cells until nothing is left of them.
    """
    from rich.text import Text

    def wide(cell: str) -> int:
        return Text.from_markup(cell).cell_len

    between = 2  # blanks
    widths = [max(min(wide(name), 16), *(wide(row[i]) for row in rows)) + between for i, name in enumerate(columns)]
    room, used = _width(), widths[0]
    parts: list[list[int]] = [[]]
    for i, width in enumerate(widths[1:], 1):
        if parts[-1] and used + width > room:
            parts.append([])
            used = widths[0]
        parts[-1].append(i)
        used += width
    return [
        table(title if not k else "", [columns[i] for i in (0, *part)], [[row[i] for i in (0, *part)] for row in rows])
        for k, part in enumerate(parts)
    ]


def _width() -> int:
    """Columns of the terminal; 120 when stdout is none."""
    from rich.console import Console

    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120).width


def show(*things: Any) -> None:
    """Print rich things to stdout; a plain text width when stdout is no terminal."""
    from rich.console import Console

    console = Console(file=sys.stdout, width=_width(), highlight=False)
    for thing in things:
        console.print(printable(thing) if isinstance(thing, str) else thing)


def escape(text: str) -> str:
    """Text in which rich sees no markup."""
    from rich.markup import escape as rich_escape

    return rich_escape(printable(text))
