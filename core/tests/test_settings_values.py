"""Which plain values are settings of which type: strictly, with the path in the message."""

from __future__ import annotations

from typing import Literal

import pytest
from attrs import frozen

from vla.errors import SettingsError
from vla.settings import structure


@frozen
class Below:
    depth: int = 0


@frozen
class Every:
    whole: int = 0
    real: float = 0.0
    text: str = ""
    yes: bool = False
    maybe: float | None = None
    one: Literal["a", 1, True] = "a"
    many: tuple[int, ...] = ()
    pair: tuple[int, str] = (0, "")
    loose: tuple = ()
    below: Below = Below()


GOOD = [
    ("whole", 3, 3), ("real", 3, 3.0), ("real", 2.5, 2.5), ("text", "3", "3"), ("yes", True, True),
    ("maybe", None, None), ("maybe", 1, 1.0), ("one", "a", "a"), ("one", 1, 1), ("many", [1, 2], (1, 2)), ("many", [], ()),
    ("pair", [1, "x"], (1, "x")), ("loose", [1, "x", None], (1, "x", None)), ("below", {"depth": 2}, Below(2)),
    ("below", Below(4), Below(4)),
]  # fmt: skip
BAD = [
    ("whole", 3.0), ("whole", "3"), ("whole", True), ("whole", None), ("real", "3"), ("real", float("inf")),
    ("real", True), ("text", 3), ("yes", 1), ("yes", "true"), ("maybe", "none"), ("one", "b"), ("one", 1.0),
    ("many", 1), ("many", "12"), ("many", [1.5]), ("pair", [1]), ("pair", [1, 2]), ("pair", [1, "x", 2]), ("below", 3),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "read"), GOOD)
def test_values_that_fit(key, value, read):
    got = getattr(structure(Every, {key: value}, "head"), key)
    assert got == read and type(got) is type(read)


@pytest.mark.parametrize(("key", "value"), BAD)
def test_values_that_do_not(key, value):
    with pytest.raises(SettingsError, match="wrong value") as error:
        structure(Every, {key: value}, "head")
    assert error.value.field == f"head.{key}" and repr(value) in str(error.value)


def test_the_path_goes_into_records():
    with pytest.raises(SettingsError) as error:
        structure(Every, {"below": {"depth": "x"}}, "head")
    assert error.value.field == "head.below.depth"
    with pytest.raises(SettingsError, match="unknown setting 'dept'") as error:
        structure(Every, {"below": {"dept": 1}}, "head")
    assert "did you mean head.below.depth?" in str(error.value)
