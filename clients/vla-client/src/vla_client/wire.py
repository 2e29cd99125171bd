"""What the openpi protocol says beside arrays: typed errors, and one optional key, "vla", that openpi never sends.

A request may bring `{"vla": {"step", "sent", "deadline_ms", "seed", "prefix", "delay", "rtc"}}` and its answer then
brings `{"vla": {"step", "sent", "age_ms", "digest"}}`. `sent` is a number of the sender's own clock and comes back as
it was: no wall clock is ever compared between machines.

An error is a text frame, as in openpi, in one line that a person and a program can read:

    BUSY [retry_after_ms=120 step=7]: 9 robots wait, a chunk takes 60 ms
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vla_client import codec

VERSION = 1  # of the "vla" key
KINDS = {
    "BAD_REQUEST": "the frame is none of this protocol; the connection is closed",
    "BAD_OBSERVATION": "the observation is not what the policy needs",
    "EMBODIMENT": "the policy is for another robot; the connection is closed",
    "VERSION": "client and server are too far apart; the connection is closed",
    "BUSY": "no place, or the answer would come after the deadline; retry_after_ms says when to ask again",
    "STALE": "the deadline passed before it was this request's turn",
    "SUPERSEDED": "a newer observation of the same robot took its place",
    "NONFINITE_ACTION": "the chunk had NaN or infinite values and was not sent",
    "BAD_ACTION": "the model's answer is no chunk that a robot may execute; it was not sent",
    "DRAINING": "the server is shutting down",
    "INTERNAL": "the policy failed; the server's log has the reason under `error`",
}
CLOSING = ("BAD_REQUEST", "EMBODIMENT", "VERSION")
_LINE = re.compile(r"^([A-Z_]+)(?: \[([^\]\n]*)\])?: (.*)", re.DOTALL)


class ServerError(Exception):
    """What a server answered instead of a chunk.

    Attributes:
        kind: one of `KINDS`, or "OTHER" from a server that is not ours.
        text: the reason, for a person.
        retry_after_ms, step, error: where the server says them.
    """

    def __init__(
        self,
        kind: str,
        text: str,
        *,
        retry_after_ms: float | None = None,
        step: int | None = None,
        error: str = "",
    ):
        self.kind, self.text = kind, text
        self.retry_after_ms, self.step, self.error = retry_after_ms, step, error
        super().__init__(f"{kind}: {text}")

    def line(self) -> str:
        """The text frame."""
        said = {"retry_after_ms": self.retry_after_ms, "step": self.step, "error": self.error or None}
        notes = " ".join(f"{key}={value}" for key, value in said.items() if value is not None)
        return f"{self.kind} [{notes}]: {self.text}" if notes else f"{self.kind}: {self.text}"

    @classmethod
    def read(cls, line: str) -> ServerError:
        """The error of a text frame; a traceback of openpi's server becomes "OTHER" with its last line."""
        match = _LINE.match(line)
        if match is None or match[1] not in KINDS:
            lines = [text for text in line.strip().splitlines() if text.strip()]
            return cls("OTHER", (lines[-1] if lines else "an empty error").strip()[:300])
        notes = dict(word.partition("=")[::2] for word in (match[2] or "").split())
        return cls(
            match[1],
            match[3],
            retry_after_ms=_number(notes.get("retry_after_ms"), float),
            step=_number(notes.get("step"), int),
            error=notes.get("error", ""),
        )


def _number(text: str | None, kind: type) -> Any:
    try:
        return None if text is None else kind(text)
    except ValueError:
        return None


def read_answer(frame: Any, max_frame: int | None = None) -> dict[str, Any]:
    """The answer of a frame of the server.

    Raises:
        ServerError: the server answered with an error.
        FrameError: it is no frame of this protocol.
    """
    if isinstance(frame, str):
        raise ServerError.read(frame)
    answer = codec.unpack(frame, max_frame)
    if not isinstance(answer, Mapping):
        raise codec.FrameError(f"an answer is a map, this is a {type(answer).__name__}")
    return dict(answer)
