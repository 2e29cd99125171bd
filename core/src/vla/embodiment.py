"""A robot as data names it, and whether two sides mean the same robot.

Widths alone say little: a state of seven values in another order, in degrees, or at another rate has the right form and
the wrong meaning. Names, units and rate are compared wherever both sides have them. What one side does not say cannot
differ. The record of a trained model holds the embodiment of its data, so that a dataset it is fine-tuned on, or a
robot that asks for actions, can be compared with it:

    check_same(policy.embodiment, Embodiment.from_table(hello["embodiment"]), "the policy", "the robot")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

from attrs import asdict, frozen

from vla.errors import DataError

RATE_TOLERANCE = 0.01  # 29.97 and 30 frames per second are one rate; 25 and 30 are two
_SHOWN = 8  # names of a list in a message


@frozen
class Embodiment:
    """A robot as the data names it, in its own terms: before an adapter, not padded. Empty or 0: not said.

    Attributes:
        robot: name of the robot adapter.
        cameras: names of the cameras.
        state_dim, action_dim: widths.
        state_names, action_names: one name per dim; other numbers of names name nothing, and are left out.
        state_units, action_units: one unit per dim, likewise.
        hz: frames, and so actions, per second.
    """

    robot: str = ""
    cameras: tuple[str, ...] = ()
    state_dim: int = 0
    action_dim: int = 0
    state_names: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()
    state_units: tuple[str, ...] = ()
    action_units: tuple[str, ...] = ()
    hz: float = 0.0

    @staticmethod
    def of(info: Any) -> Embodiment:
        """The embodiment of a dataset, from its `DatasetInfo`."""
        names = ("robot", "cameras", "state_dim", "action_dim", "state_names", "action_names", "hz")
        units = getattr(info, "units", None) or {}
        table = {name: getattr(info, name, None) for name in names}
        return Embodiment.from_table({**table, "state_units": units.get("state"), "action_units": units.get("actions")})

    @staticmethod
    def from_table(table: Any) -> Embodiment:
        """The embodiment of a table as `to_table` gives it: of a model's record, of a robot that introduces itself.

        What is not there, or in a form that cannot be compared, counts as not said.
        """
        get = table.get if isinstance(table, Mapping) else {}.get
        width = {side: _whole(get(f"{side}_dim")) for side in ("state", "action")}
        lists = {}
        for side in width:
            words = {what: _words(get(f"{side}_{what}")) for what in ("names", "units")}
            width[side] = width[side] or len(words["names"])
            lists |= {f"{side}_{what}": w if len(w) == width[side] else () for what, w in words.items()}
        robot, hz = get("robot"), get("hz")
        return Embodiment(
            robot=robot if isinstance(robot, str) else "",
            cameras=_words(get("cameras")),
            state_dim=width["state"],
            action_dim=width["action"],
            hz=float(hz) if isinstance(hz, int | float) and 0 < hz < float("inf") else 0.0,
            **lists,
        )

    def to_table(self) -> dict[str, Any]:
        """Plain values, as JSON and msgpack store them; what is not said is left out."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {k: v for k, v in plain.items() if v}


@frozen
class Difference:
    """One thing that two sides say differently: a field of `Embodiment`, and the words of both."""

    field: str
    mine: str
    theirs: str

    def __str__(self) -> str:
        return f"{self.field}: {self.mine} and {self.theirs}"


def differences(mine: Embodiment, theirs: Embodiment) -> tuple[Difference, ...]:
    """What the two say differently, at most one per field of `Embodiment`, so nine at most.

    Only what both say is compared. Names without regard to case and surrounding blanks; rates within 1 %. Cameras
    differ if each side has one that the other lacks: leaving some out is not a difference here.
    """
    found = []

    def differ(name: str, a: Any, b: Any) -> None:
        found.append(Difference(name, str(a), str(b)))

    if mine.robot and theirs.robot and mine.robot != theirs.robot:
        differ("robot", _cut(mine.robot), _cut(theirs.robot))
    for side in ("state", "action"):
        a, b = getattr(mine, f"{side}_dim"), getattr(theirs, f"{side}_dim")
        if a and b and a != b:
            differ(f"{side}_dim", a, b)
    for name in ("state_names", "action_names", "state_units", "action_units"):
        a, b = getattr(mine, name), getattr(theirs, name)
        if a and b and (told := _unlike(a, b)):
            differ(name, *told)
    a, b = set(map(_plain, mine.cameras)), set(map(_plain, theirs.cameras))
    if a - b and b - a:
        differ("cameras", _few(mine.cameras), _few(theirs.cameras))
    if mine.hz and theirs.hz and not same_rate(mine.hz, theirs.hz):
        differ("hz", f"{mine.hz:g}", f"{theirs.hz:g}")
    return tuple(found)


def check_same(
    mine: Embodiment, theirs: Embodiment, me: str, they: str, fix: str = "", ignore: Sequence[str] = ()
) -> None:
    """Refuse two sides that mean different robots.

    Args:
        me, they: what the sides are called in the message, e.g. "the policy" and "the data".
        fix: the way out.
        ignore: fields that may differ.

    Raises:
        DataError: naming every field that differs, with both values.
    """
    found = [d for d in differences(mine, theirs) if d.field not in ignore]
    if found:
        lines = [f"    {d.field}: {d.mine} in {me}, {d.theirs} in {they}" for d in found]
        raise DataError(
            "\n".join([f"{me} and {they} do not mean the same robot, or name it otherwise", *lines]),
            field=", ".join(d.field for d in found),
            fix=fix,
        )


def same_rate(a: float, b: float) -> bool:
    """Whether two rates count as one."""
    return abs(a - b) <= RATE_TOLERANCE * max(a, b)


def _unlike(a: Sequence[str], b: Sequence[str]) -> tuple[str, str] | None:
    """How two lists of names differ: both lists, or of long ones the first places where they do."""
    at = [i for i, (x, y) in enumerate(zip(a, b, strict=False)) if _plain(x) != _plain(y)]
    if len(a) == len(b) and not at:
        return None
    if len(a) != len(b) or len(a) <= _SHOWN:
        return _few(a), _few(b)
    rest = f", ... ({len(at)} of {len(a)} differ)" if len(at) > 3 else ""

    def say(names: Sequence[str]) -> str:
        return ", ".join(f"[{i}] {_cut(names[i])}" for i in at[:3]) + rest

    return say(a), say(b)


def _few(names: Sequence[str]) -> str:
    shown = [_cut(name) for name in names[:_SHOWN]]
    return "[" + ", ".join(shown if len(names) <= _SHOWN else [*shown, f"... ({len(names)})"]) + "]"


def _cut(name: str) -> str:
    return repr(name[:32])  # a name may come from a stranger: no control characters, no endless line


def _plain(name: str) -> str:
    return name.strip().casefold()


def _whole(value: Any) -> int:
    try:
        return max(0, index(value))
    except TypeError:
        return 0


def _words(value: Any) -> tuple[str, ...]:
    listed = isinstance(value, Sequence | Mapping) and not isinstance(value, str | bytes)
    return tuple(map(str, value)) if listed else ()
