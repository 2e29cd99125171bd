"""The errors a user may see.

Every error that a user's mistake can cause derives from `VlaError`. The console turns it into one message and exit
status 2, without a traceback; library callers can catch it. A message says what is wrong, with which value, and what
to do about it.
"""

from __future__ import annotations

from typing import Any

_ABSENT = object()
MOST_SHOWN = 4000  # characters of one line of a message


class VlaError(Exception):
    """One clear error: what happened, in which field, with which value, and the way out."""

    status = 2  # of the console: the user must change something

    def __init__(self, what: str, *, field: str = "", got: Any = _ABSENT, expected: Any = _ABSENT, fix: str = ""):
        self.what, self.field, self.fix = what, field, fix
        self.got, self.expected = got, expected  # to say the same with more words
        super().__init__(self._text())

    def locate(self, field: str) -> None:
        """Name the place more fully than the code that raised it could."""
        self.field = field
        self.args = (self._text(),)

    def _text(self) -> str:
        got, expected = self.got, self.expected
        lines = [_brief(self.what, 5 * MOST_SHOWN)]
        if self.field:
            lines.append(f"  field:    {_brief(self.field)}")
        if got is not _ABSENT:
            lines.append(f"  got:      {_brief(got)}")
        if expected is not _ABSENT:
            lines.append(f"  expected: {_brief(expected)}")
        if self.fix:
            lines.append(f"  fix:      {_brief(self.fix)}")
        return "\n".join(lines)


def printable(text: str) -> str:
    """Text without control characters, which in a terminal move, colour, hide and rename: they are spelled out.

    Names and texts come from files of strangers; whatever prints them calls this. Lines and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _brief(value: Any, most: int = MOST_SHOWN) -> str:
    """The text of a value; what comes from a file may be of any length."""
    try:
        text = str(value)
    except ValueError:  # a whole number of more digits than Python prints
        return "a number of thousands of digits"
    return printable(text if len(text) <= most else f"{text[: most // 2]} ... ({len(text):,} characters)")


class PartError(VlaError):
    """A part is unknown, broken, ambiguous, or does not fit its neighbours."""


class SettingsError(VlaError):
    """A setting is unknown or has a wrong value."""


class DataError(VlaError):
    """Data (an observation, a dataset, statistics) is not what the policy needs."""


class StoreError(VlaError):
    """A model directory or checkpoint cannot be read or written."""


class NotFiniteError(StoreError):
    """Weights have NaN or infinite values: they are neither written as a model nor trained further."""

    status = 1


class DecodeError(VlaError):
    """A sequence of action tokens does not stand for a chunk of actions."""


class ActionError(VlaError):
    """The model's answer is no chunk that a robot may execute."""
