"""The options of a verb, read from the signature and the docstring of its function.

One set of rules for all verbs:

- a positional-only parameter is a word in its place, a list there takes all words that are left;
- any other parameter is an option, `--batch-size 8` or `--batch-size=8`; without a default it must be given;
- `bool` is a switch, `--json`, and `--no-json` turns it off again; a number is finite, a text is not empty; `X | None`
  takes `none`; a `Literal` takes one of its values;
- an option that is no list is given once;
- lists are given by repeating their option, and what is given replaces the default; `none` empties one whose default is
  not empty (a recipe's `freeze`, say);
- a frozen attrs record is a group of options, one per field; the fields of a record inside it are `--record.field`.

Not argparse, nor a package for it: every verb waits for the import, and every mistake must give one `VlaError`.
"""

from __future__ import annotations

import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
from attrs import frozen

from vla.errors import SettingsError
from vla.settings import fields_of

REQUIRED = inspect.Parameter.empty
_KINDS = {
    str: ("TEXT", "text"),
    int: ("INT", "a whole number"),
    float: ("FLOAT", "a finite number"),
    Path: ("PATH", "a path"),
}


@frozen(eq=False)
class Option:
    """One option, or one word in its place."""

    path: tuple[str, ...]  # the parameter, then fields of records
    name: str  # as typed after `--`
    type: Any  # of one value
    default: Any
    help: str = ""
    group: str = ""
    placed: bool = False  # a word in its place
    many: bool = False
    optional: bool = False  # takes `none`

    @property
    def switch(self) -> bool:
        """Whether it takes no value."""
        return self.type is bool

    @property
    def values(self) -> tuple[Any, ...]:
        """The values it can take, where these are a closed list."""
        return typing.get_args(self.type) if typing.get_origin(self.type) is Literal else ()

    @property
    def label(self) -> str:
        """As errors call it: `--steps`, or `MODEL`."""
        return self.name.upper() if self.placed else f"--{self.name}"

    @property
    def value_label(self) -> str:
        """What stands for its value: `INT`, `torch|jax`."""
        return "|".join(map(str, self.values)) or _KINDS[self.type][0]

    @property
    def full(self) -> str:
        """`--steps INT`, `--json`, `MODEL`, `[NAMES ...]`."""
        if self.placed:
            word = f"{self.label} ..." if self.many else self.label
            return word if self.default is REQUIRED else f"[{word}]"
        return self.label if self.switch else f"{self.label} {self.value_label}"

    def read(self, text: str) -> Any:
        """One value from what was typed.

        Raises:
            SettingsError: it is not a value of this option.
        """
        if self.optional and text.lower() == "none":
            return None
        if not text.strip() and self.type in (str, Path):  # "$NAME" of a variable that is not set
            fix = f"give {_KINDS[self.type][1]}, or leave {self.label} out"
            raise SettingsError("an empty value", field=self.label, got=repr(text), fix=fix)
        for value in self.values:
            if str(value) == text:
                return value
        if not self.values:
            try:
                value = self.type(os.path.expanduser(text) if self.type is Path else text)  # no shell expands --out=~/x
                if not isinstance(value, float) or math.isfinite(value):
                    return value
            except ValueError:
                pass
        expected = " or ".join(map(repr, self.values)) or _KINDS[self.type][1]
        raise SettingsError("a wrong value", field=self.label, got=text, expected=expected + " or none" * self.optional)


def options_of(function: Callable[..., Any], defaults: Mapping[str, Any]) -> list[Option]:
    """The options of a function.

    Args:
        function: annotated; described under `Args:` in its docstring, records under `Attributes:` in theirs.
        defaults: parameter -> another default than the signature's.
    """
    described = descriptions(function)  # a word of the language gets an underscore behind it: `for_`
    types_of = typing.get_type_hints(function)
    out: list[Option] = []
    for name, parameter in inspect.signature(function).parameters.items():
        default, wanted = defaults.get(name, parameter.default), types_of[name]
        about = described.get(name, "")
        if attrs.has(wanted):
            out += _fields((name,), (), default, about)
        else:
            placed = parameter.kind is parameter.POSITIONAL_ONLY
            out.append(_option((name,), (name,), wanted, default, help=about, placed=placed))
    return out


def _fields(path: tuple[str, ...], words: tuple[str, ...], record: Any, group: str) -> Iterator[Option]:
    cls: Any = type(record)
    described = descriptions(cls)
    for name, field in fields_of(cls).items():
        value, about = getattr(record, name), described.get(name, "")
        if attrs.has(type(value)):
            yield from _fields((*path, name), (*words, name), value, f"{name}: {about}")
        else:
            yield _option((*path, name), (*words, name), field.type, value, help=about, group=group)


def _option(path: tuple[str, ...], words: tuple[str, ...], wanted: Any, default: Any, **more: Any) -> Option:
    optional = typing.get_origin(wanted) in (typing.Union, types.UnionType)
    if optional:
        (wanted,) = (t for t in typing.get_args(wanted) if t is not type(None))
    many = typing.get_origin(wanted) in (tuple, list)
    if many:
        wanted = typing.get_args(wanted)[0]
    name = ".".join(words).rstrip("_").replace("_", "-")
    return Option(path, name, wanted, default, many=many, optional=optional, **more)


def descriptions(thing: Any) -> dict[str, str]:
    """name -> text, from the `Args:` or `Attributes:` of a docstring."""
    found: dict[str, str] = {}
    inside, name = False, ""
    for line in inspect.cleandoc(thing.__doc__ or "").splitlines():
        if not line.startswith(" ") and line.strip():
            inside = line in ("Args:", "Attributes:")
        elif inside and line.startswith("    ") and not line.startswith("     "):
            name, _, text = line.strip().partition(": ")
            found[name] = text
        elif inside and name:
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def parse(options: Sequence[Option], argv: Sequence[str], verb: str) -> dict[str, Any]:
    """What was typed, as parameter -> value; records as tables, field -> value; defaults are filled in.

    Raises:
        SettingsError: an option that is not there (suggests the nearest), a wrong, missing or superfluous value.
    """
    named = {o.name: o for o in options if not o.placed}
    given: dict[Option, Any] = {}
    words: list[str] = []
    last: Option | None = None  # the option before the word at hand
    queue = list(argv)
    while queue:
        word = queue.pop(0)
        if word == "--":
            words += queue
            break
        if not word.startswith("-") or word == "-" or _number(word):
            if last is not None and last.many and len(words) >= _room(options):
                fix = f"repeat the option: {last.label} {word}"
                raise SettingsError("a word too many", field=last.label, got=word, expected="one value", fix=fix)
            words.append(word)
            continue
        name, equals, text = word.lstrip("-").partition("=")
        name = name.replace("_", "-")
        option = named.get(name) if word.startswith("--") else None
        off = named.get(name.removeprefix("no-")) if option is None and word.startswith("--no-") else None
        if off is not None and off.switch:
            option = off
        if option is None:
            raise _unknown(word.partition("=")[0], name, text or (queue[0] if queue else ""), options, verb)
        if option.switch:
            if equals:
                fix = f"--{name} alone; --{name.removeprefix('no-')} and --no-{name.removeprefix('no-')} are opposites"
                raise SettingsError("a switch takes no value", field=f"--{name}", got=text, fix=fix)
            if option in given:
                raise _twice(option)
            given[option] = option is not off
        else:
            if not equals:
                if not queue or (queue[0].startswith("--") and queue[0] != "--"):
                    fix = f"{option.full}; a value that begins with -- is written --{name}=VALUE"
                    raise SettingsError("an option has no value", field=option.label, fix=fix)
                text = queue.pop(0)
            if option.many and text.lower() == "none" and option.default not in ((), REQUIRED):
                given[option] = ()
            elif option in given and not option.many:
                raise _twice(option)
            else:
                value = option.read(text)
                given[option] = (*given.get(option, ()), value) if option.many else value
        last = option
    _place(options, words, given, verb)
    return _values(options, given, verb)


def _twice(option: Option) -> SettingsError:
    return SettingsError("an option is given twice", field=option.label, fix="give it once: it is no list")


def _number(word: str) -> bool:
    return word[1:2].isdigit() or word[1:2] == "."


def _room(options: Sequence[Option]) -> float:
    placed = [o for o in options if o.placed]
    return float("inf") if any(o.many for o in placed) else len(placed)


def _place(options: Sequence[Option], words: list[str], given: dict[Option, Any], verb: str) -> None:
    for option in options:
        if option.placed and words:
            given[option] = tuple(map(option.read, words)) if option.many else option.read(words[0])
            del words[: len(words) if option.many else 1]
    if words:
        raise SettingsError("a word too many", field=f"vla {verb}", got=words[0], fix=f"usage: {usage(options, verb)}")


def _values(options: Sequence[Option], given: Mapping[Option, Any], verb: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for option in options:
        if option not in given and option.default is REQUIRED:
            what = "a word is missing" if option.placed else "an option is missing"
            raise SettingsError(
                what, field=option.label, expected=option.help or option.value_label, fix=usage(options, verb)
            )
        value = given.get(option, option.default)
        table = out
        for name in option.path[:-1]:
            table = table.setdefault(name, {})
        table[option.path[-1]] = value
    return out


def arguments(
    function: Callable[..., Any], values: Mapping[str, Any], defaults: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """The values of `parse` as positional and named arguments; tables of records become records.

    Raises:
        VlaError: a record refuses its values.
    """
    placed, named = [], {}
    for name, parameter in inspect.signature(function).parameters.items():
        value = values[name]
        if isinstance(value, dict):
            value = _changed(defaults.get(name, parameter.default), value)
        if parameter.kind is parameter.POSITIONAL_ONLY:
            placed.append(value)
        else:
            named[name] = value
    return placed, named


def _changed(record: Any, table: Mapping[str, Any]) -> Any:
    return attrs.evolve(
        record,
        **{name: _changed(getattr(record, name), v) if isinstance(v, dict) else v for name, v in table.items()},
    )


def _unknown(word: str, name: str, text: str, options: Sequence[Option], verb: str) -> SettingsError:
    import difflib

    from vla.parts import TOP_SLOTS

    see = f"`vla {verb} --help` lists the options"
    known = {o.name: o for o in options}
    if name in known and known[name].placed:
        fix = f"write it without its name: {usage(options, verb)}"
    elif name in known:
        fix = f"two dashes: --{name}"
    elif "." in name and "set" in known and name.partition(".")[0] in ("spec", *TOP_SLOTS):
        fix = f"settings are given as --set {word.lstrip('-')}={text or 'VALUE'}"
    else:
        close = difflib.get_close_matches(name, [n for n, o in known.items() if not o.placed], 1)
        fix = f"did you mean --{close[0]}?   {see}" if close else see
    return SettingsError("there is no such option", field=word, fix=fix)


def usage(options: Sequence[Option], verb: str) -> str:
    """`vla check KIND NAME [options]`."""
    needed = [o.full for o in options if o.placed or o.default is REQUIRED]
    return " ".join([f"vla {verb}", *needed, "[options]"])
