"""The text of `vla VERB --help`."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from vla.cli.options import REQUIRED, Option, usage

INDENT = 26  # where descriptions begin


def help_text(function: Callable[..., Any], options: Sequence[Option], verb: str) -> str:
    """Usage, what the verb does, and every option with its default, as wide as the terminal."""
    width = min(max(shutil.get_terminal_size().columns, 60), 120)
    body = re.split(r"^\w+:$", inspect.cleandoc(function.__doc__ or ""), maxsplit=1, flags=re.MULTILINE)[0]
    out = [f"{_bold('usage:')} {usage(options, verb)}", ""]
    for paragraph in body.strip().split("\n\n"):
        out += [textwrap.fill(" ".join(paragraph.split()), width), ""]
    groups: dict[str, list[Option]] = {}
    for option in options:
        groups.setdefault("arguments" if option.placed else option.group or "options", []).append(option)
    for title, members in groups.items():
        out.append(_bold(textwrap.fill(title.rstrip(".") + ":", width)))
        for option in members:
            out += _entry(_left(option), _right(option), width)
        if title == "options":
            out += _entry("-h, --help", "show this", width)
        out.append("")
    return "\n".join(out).rstrip()


def _left(option: Option) -> str:
    if option.switch and option.default is True:
        return f"--no-{option.name}"
    return option.full


def _right(option: Option) -> str:
    text, value = option.help, option.default
    if option.switch:
        return f"switch off: {text}" if value is True else text
    if option.many and not option.placed and "repeated" not in text:
        text = f"{text} May be repeated.".strip()
    if value is REQUIRED:
        return text if option.placed else f"{text} (must be given)"
    if value in ("", None, ()) or value == []:
        return text
    shown = " ".join(map(str, value)) if option.many else str(value)
    return f"{text} (default: {shown})".strip()


def _entry(left: str, right: str, width: int) -> list[str]:
    lines = textwrap.wrap(right, width - INDENT, break_on_hyphens=False) or [""]
    padded = f"  {left}".ljust(INDENT - 1)
    if len(padded) < INDENT:
        first = [f"{_bold(padded)} {lines[0]}".rstrip()]
        rest = lines[1:]
    else:
        first, rest = [_bold(padded)], lines if right else []
    return first + [" " * INDENT + line for line in rest]


def _bold(text: str) -> str:
    plain = "NO_COLOR" in os.environ or not sys.stdout.isatty()
    return text if plain else f"\x1b[1m{text}\x1b[0m"
