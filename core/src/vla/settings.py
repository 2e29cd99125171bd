"""Plain values -> settings records, strictly; `--set a.b=c`; and the TOML we write.

Used for the settings of every part and for `Spec`. Records are frozen attrs classes of int, float, bool, str, tuples of
them, Literal and Optional. Nothing is coerced except int -> float and list -> tuple: `"3"` is not 3, 3.7 is not 3.
"""

from __future__ import annotations

import difflib
import enum
import functools
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal, Union

import attrs

from vla.errors import SettingsError

_SIMPLE_KEY = re.compile(r"[A-Za-z0-9_-]+")


@attrs.frozen
class Between:
    """A validator: a number, or every number of a tuple, lies between two bounds; with `above` not on the lower one."""

    low: float
    high: float
    above: bool = False

    def __call__(self, settings: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        """Raise what does not hold; NaN lies between nothing."""
        numbers = value if isinstance(value, (tuple, list)) else () if value is None else (value,)
        for number in numbers:
            if not (self.low < number if self.above else self.low <= number) or not number <= self.high:
                raise SettingsError(f"{attribute.name} is out of bounds", got=value, expected=str(self))

    def __str__(self) -> str:
        return f"above {self.low:,}, at most {self.high:,}" if self.above else f"{self.low:,} to {self.high:,}"


def size(default: int | tuple[int, ...] | None, *, most: int, least: int = 1) -> Any:
    """A field of a settings record: a whole number (or a tuple of them) from `least` to `most`.

    Every size has a ceiling, because settings come with models from strangers: beyond it nothing real lies, and
    building it would fill the memory. Take one well above the largest that was ever published.
    """
    return attrs.field(default=default, validator=Between(least, most))


def number(default: float, *, most: float, least: float = 0.0, above: bool = False) -> Any:
    """A field of a settings record: a finite number from `least` to `most`; `above`: but not `least` itself."""
    return attrs.field(default=default, validator=Between(least, most, above))


def structure(cls: type, values: Mapping[str, Any], path: str) -> Any:
    """An instance of the attrs class from plain values; fields not named keep their default.

    Args:
        cls: a frozen attrs class.
        values: field -> value as a TOML file gives it.
        path: where the table stands (`head.tokens`), for messages.

    Raises:
        SettingsError: an unknown key or a wrong value; names path, value, expected type, known keys.
    """
    fields = fields_of(cls)
    given = {}
    for key, value in values.items():
        if key not in fields:
            raise unknown_key(f"{path}.{key}", [f"{path}.{name}" for name in fields])
        field = fields[key]
        try:
            given[key] = _read(value, Any if field.type is None else field.type, f"{path}.{key}")
            if field.validator is not None:
                field.validator(None, field, given[key])
        except SettingsError as error:
            if error.field:  # in a record inside this one
                raise
            raise wrong_value(f"{path}.{key}", value, field, error) from error
        except Exception as error:  # validators raise many kinds; all mean this value is wrong
            raise wrong_value(f"{path}.{key}", value, field, error) from error
    try:
        return cls(**given)
    except SettingsError as error:  # two settings that do not go together: its field is one of this table
        if error.field in fields:
            error.locate(f"{path}.{error.field}")
        raise
    except (ValueError, TypeError) as error:  # an attrs validator of the part's author
        raise SettingsError(
            f"the settings at {path} do not work together", field=path, got=dict(values), fix=str(error)
        ) from error


def type_faults(fields: Mapping[str, attrs.Attribute[Any]]) -> Iterable[str]:
    """Settings of a type that no file can hold, one line each."""
    for name, field in fields.items():
        if not _readable(Any if field.type is None else field.type):
            yield f"its setting {name!r} is of a type that no file can hold: {describe(field.type)}"


def _readable(wanted: Any) -> bool:
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Literal or wanted in (Any, type(None), int, float, bool, str, tuple, list, dict, Path, PurePath):
        return True
    if origin in (Union, types.UnionType, tuple, list, dict, Mapping):
        return all(_readable(one) for one in args if one is not Ellipsis)
    return isinstance(wanted, type) and (issubclass(wanted, enum.Enum) or attrs.has(wanted))


@functools.cache
def fields_of(cls: type) -> dict[str, attrs.Attribute[Any]]:
    """The fields of an attrs class with their annotations resolved."""
    try:
        attrs.resolve_types(cls)
    except NameError as error:
        raise SettingsError(
            f"{cls.__module__}.{cls.__qualname__} has an annotation that names nothing", got=str(error)
        ) from error
    return attrs.fields_dict(cls)


def unknown_key(path: str, known: Iterable[str], others: Iterable[str] = ()) -> SettingsError:
    """The error for a key that does not exist: lists the known keys of its table, suggests the nearest of all."""
    known = list(known)
    key = path.rsplit(".", 1)[-1]
    everywhere = dict.fromkeys([*known, *others])
    same = [other for other in everywhere if other.rsplit(".", 1)[-1] == key and other != path]
    close = difflib.get_close_matches(path, same, 3, 0) or difflib.get_close_matches(path, everywhere, 1, 0.7)
    fix = f"did you mean {' or '.join(close)}?" if close else "take one of the known keys"
    return SettingsError(
        f"unknown setting {key!r}", field=path, expected=", ".join(known) or "no settings here", fix=fix
    )


def wrong_value(path: str, value: Any, field: attrs.Attribute[Any], cause: Exception) -> SettingsError:
    """The error for a value of the wrong type, or that the part's own validator refuses."""
    got = f"{value!r} ({type(value).__name__})"
    expected = " or ".join(map(repr, choices(field))) or describe(field.type)
    fix = ""
    if typing.get_origin(field.type) is tuple and not isinstance(value, list | tuple):
        of_text = typing.get_args(field.type)[0] is str and isinstance(value, str)
        example = _value([value]) if of_text else _value(field.default) if field.default else "[...]"
        fix = f"a list is written like this: --set {path}='{example}'"
    elif isinstance(field.validator, Between):
        expected = f"{expected}, {field.validator}"
    elif field.validator is not None and not choices(field):
        fix = str(cause.args[0]) if cause.args else ""
    return SettingsError("a setting has a wrong value", field=path, got=got, expected=expected, fix=fix)


def choices(field: attrs.Attribute[Any]) -> tuple[Any, ...]:
    """The values a setting can take, where it has a closed list of them; else ()."""
    if typing.get_origin(field.type) is Literal:
        return typing.get_args(field.type)
    return tuple(getattr(field.validator, "options", None) or ())


def describe(wanted: Any) -> str:
    """A type as a reader would say it: `int`, `tuple of str`, `'a' or 'b'`, `float or nothing`."""
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Literal:
        return " or ".join(repr(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, args))
    if wanted is type(None):
        return "nothing"
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return f"list of {describe(args[0])}"
        return f"[{', '.join(describe(a) for a in args)}]"
    return getattr(wanted, "__name__", str(wanted))


def _read(value: Any, wanted: Any, path: str) -> Any:
    """The value as a setting of this type.

    Raises:
        TypeError, ValueError: it is none.
    """
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return value
    if origin is Literal:
        if not any(type(value) is type(one) and value == one for one in args):
            raise ValueError("none of the known values")
        return value
    if origin in (Union, types.UnionType):
        for one in args:
            try:
                return _read(value, one, path)
            except (TypeError, ValueError):
                continue
        raise TypeError(f"expected {describe(wanted)}")
    if tuple in (wanted, origin):
        if not isinstance(value, (list, tuple)):
            raise TypeError("expected a list")
        if args and args[-1] is not Ellipsis and len(args) != len(value):
            raise ValueError(f"expected {len(args)} values")
        types_of = args if args and args[-1] is not Ellipsis else (args[0] if args else Any,) * len(value)
        return tuple(_read(v, t, path) for v, t in zip(value, types_of, strict=True))
    if wanted is float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise TypeError("expected a finite number")
        return float(value)
    if list in (wanted, origin):
        if not isinstance(value, (list, tuple)):
            raise TypeError("expected a list")
        return [_read(v, args[0] if args else Any, path) for v in value]
    if dict in (wanted, origin):
        if not isinstance(value, Mapping):
            raise TypeError("expected a table")
        return {_read(k, args[0], path): _read(v, args[1], path) for k, v in value.items()} if args else dict(value)
    if isinstance(wanted, type) and issubclass(wanted, enum.Enum):
        return value if isinstance(value, wanted) else wanted(value)
    if wanted in (Path, PurePath):
        if not isinstance(value, (str, PurePath)):
            raise TypeError("expected a path")
        return wanted(value)
    if attrs.has(wanted) and isinstance(value, Mapping):
        return structure(wanted, value, path)
    if type(value) is not wanted:
        raise TypeError(f"expected {describe(wanted)}")
    return value


def parse_sets(sets: Mapping[str, Any] | Iterable[str] | str) -> dict[str, Any]:
    """`["a.b=c", ...]` or `{"a.b": c}` -> {path: value}; a path named twice keeps its last value.

    Text values are read as TOML, else JSON (`null` for nothing), else as bare strings.
    """
    if isinstance(sets, Mapping):
        return {str(path): value for path, value in sets.items()}
    out = {}
    for item in [sets] if isinstance(sets, str) else sets:
        path, equals, text = item.partition("=")
        if not equals or not all(path.strip().split(".")):
            fix = f"--set {path.strip() or 'PATH'}=VALUE"
            raise SettingsError("a setting is written path=value", field="--set", got=item, fix=fix)
        if not text.strip():  # "$NAME" of a variable that is not set
            fix = f"give one, or leave it out; an empty text is written --set '{path.strip()}=\"\"'"
            raise SettingsError("a setting has no value", field=path.strip(), got=item, fix=fix)
        out[path.strip()] = parse_value(text.strip())
    return out


def split_sets(sets: Mapping[str, Any] | Iterable[str] | str, of: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the others, those below `of` without it): `["a.b=1", "data.c=2"]` of "data" -> ({"a.b": 1}, {"c": 2})."""
    values = parse_sets(sets)
    inside = {path.partition(".")[2]: value for path, value in values.items() if path.startswith(f"{of}.")}
    return {path: value for path, value in values.items() if not path.startswith(f"{of}.")}, inside


def grouped_sets(sets: Mapping[str, Any] | Iterable[str] | str, groups: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Group -> its settings, of a verb that knows no others.

    `["data.b=1"]` with the groups ("data", "robot") -> {"data": {"b": 1}, "robot": {}}.

    Raises:
        SettingsError: a path begins with none of the groups.
    """
    found: dict[str, dict[str, Any]] = {group: {} for group in groups}
    for path, value in parse_sets(sets).items():
        group, _, name = path.partition(".")
        if group not in found or not name:
            raise SettingsError(
                "no such setting",
                field="--set",
                got=path,
                expected=" or ".join(f"{group}.NAME=VALUE" for group in groups),
                fix=f"leave out --set {path}",
            )
        found[group][name] = value
    return found


def parse_value(text: str) -> Any:
    """One value as a person types it."""
    import tomllib

    try:
        read = tomllib.loads(f"v = {text}")
        if list(read) == ["v"] and _plain(read["v"]):
            return read["v"]
    except (tomllib.TOMLDecodeError, RecursionError):
        pass
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text):
        return float(text)
    return text


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(map(_plain, value.values()))
    return isinstance(value, (bool, int, float, str))


def to_toml(table: Mapping[str, Any], prefix: str = "") -> str:
    """TOML of plain values and nested tables; None is spelled by absence. Reading it back gives equal values."""
    lines, tables = [], []
    for key, value in table.items():
        if value is None:
            continue
        if isinstance(value, Mapping):
            name = f"{prefix}{_key(key)}"
            tables.append(f"\n[{name}]\n{to_toml(value, f'{name}.')}")
        else:
            lines.append(f"{_key(key)} = {_value(value)}\n")
    return "".join(lines) + "".join(tables)


def _escaped(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) < 1 << 16 else f"\\U{ord(char):08x}"


def _key(key: str) -> str:
    return key if _SIMPLE_KEY.fullmatch(key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)) and not isinstance(value, enum.Enum):
        return repr(value)
    if isinstance(value, str) and not isinstance(value, enum.Enum):
        text = json.dumps(value, ensure_ascii=False)
        return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)
    if isinstance(value, enum.Enum):
        return _value(value.value)
    if isinstance(value, PurePath):
        return _value(str(value))
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_key(str(k))} = {_value(v)}' for k, v in value.items())}}}"
    raise SettingsError(
        "a setting cannot be written as TOML", got=f"{value!r} ({type(value).__name__})", expected="plain values"
    )
