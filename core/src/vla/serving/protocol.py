"""What a protocol part has to do: turn frames into requests and answers into frames. No sockets, no threads.

`Part.numpy` of a part of the kind "protocol" names a class that is made once per connection:

    class Conversation:
        def __init__(self, settings, contract): ...
        def begin(self) -> list[Frame]                      frames sent before the client says anything
        def receive(self, frame) -> list[Ask | Say | Close | Reset]
        def answer(self, ask, answer) -> Frame              answer: {"actions": [t a], ...}
        def refuse(self, ask, error) -> Frame | None        error: `vla_client.ServerError`; ask: None if there is none

`receive` raises `vla_client.FrameError` for bytes that are no frame: the server refuses them and closes the
connection. Whatever else it raises is a fault of the protocol's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from attrs import field, frozen

Frame = bytes | str


@frozen(eq=False)
class Ask:
    """A chunk is wanted for an observation in the robot's names and units.

    `options`: "seed" (int), "deadline_ms" (float), "step" (int), "prefix" ([n a]), "delay" (int) and "rtc" (str)
    for real-time chunking; all may be absent.
    `token` is the protocol's own.
    """

    row: Mapping[str, Any]
    options: Mapping[str, Any] = field(factory=dict)
    token: Any = None


@frozen(eq=False)
class Say:
    """An answer that needs no policy."""

    frame: Frame


@frozen(eq=False)
class Close:
    """A last frame; then the connection is closed."""

    frame: Frame
    reason: str = ""


@frozen
class Reset:
    """An episode begins: the noise of this robot's chunks starts anew."""


class Conversation(Protocol):
    """See the module's docstring."""

    def begin(self) -> list[Frame]:
        """Frames sent before the client says anything."""
        ...

    def receive(self, frame: Frame) -> list[Any]:
        """What a frame of the client asks for."""
        ...

    def answer(self, ask: Ask, answer: Mapping[str, Any]) -> Frame:
        """The frame of a chunk."""
        ...

    def refuse(self, ask: Ask | None, error: Any) -> Frame | None:
        """The frame of an error; None: nothing is sent."""
        ...
