"""The model-server protocol of `vla-eval` (version 1): its benchmarks ask for one action per observation.

A chunk is asked for once and handed out step by step (`execute` steps of it), so the policy runs as often as it would
on a robot. Images come raw, as PNG or as JPEG, and are measured before they are decoded.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np
from vla_client import codec
from vla_client.wire import ServerError

from vla.serving.protocol import Ask, Close, Frame, Reset, Say

VERSION = 1
FORMATS = {"png": "PNG", "jpeg": "JPEG"}


class Conversation:
    """One connection."""

    def __init__(self, settings: Any, contract: Mapping[str, Any]):
        self.settings, self.contract = settings, contract
        self.name = ""
        self._seq = 0
        self._left: list[np.ndarray] = []  # actions of the last chunk that were not handed out

    def begin(self) -> list[Frame]:
        """The client speaks first."""
        return []

    def receive(self, frame: Frame) -> list[Any]:
        """A message {type, payload, seq, timestamp}."""
        message = codec.unpack(frame)
        if not isinstance(message, dict) or not {"type", "payload", "seq"} <= message.keys():
            raise codec.FrameError("a message has type, payload and seq")
        kind, payload, seq = message["type"], message["payload"], message["seq"]
        if not isinstance(kind, str) or not isinstance(payload, dict) or type(seq) is not int:
            raise codec.FrameError("the type of a message is text, its payload a map, its seq a number")
        self._seq = seq
        if kind == "hello":
            return [self._meet(payload)]
        if kind in ("episode_start", "episode_end"):
            self._left = []
            return [Reset()]
        if kind == "observation":
            if self._left:
                return [Say(self._message("action", {"actions": self._left.pop(0)}, seq))]
            return [Ask(self._row(payload), token=seq)]
        if kind == "error":
            return []
        raise codec.FrameError(f"message type {kind[:20]!r}")

    def answer(self, ask: Ask, answer: Mapping[str, Any]) -> Frame:
        """The first action of the chunk; the others wait for the next observations."""
        chunk = np.asarray(answer["actions"], np.float32)
        first, *self._left = chunk[: self.settings.execute or len(chunk)]
        return self._message("action", {"actions": first}, ask.token)

    def refuse(self, ask: Ask | None, error: ServerError) -> Frame | None:
        """An error message; none for an observation that a newer one replaced (live benchmarks do not wait)."""
        if error.kind == "SUPERSEDED":
            return None
        return self._message("error", {"error": error.line()}, self._seq if ask is None else ask.token)

    def _meet(self, payload: Mapping[str, Any]) -> Any:
        self.name = str(payload.get("benchmark", ""))[:80]
        theirs = payload.get("protocol_version")
        if type(theirs) is not int or theirs != VERSION:
            text = f"the client speaks vla-eval protocol {str(theirs)[:20]}, this server {VERSION}"
            return Close(self._message("error", {"error": ServerError("VERSION", text).line()}, self._seq), text)
        from vla import __version__

        params = dict(pair.partition("=")[::2] for pair in self.settings.params)
        hello = {
            "harness_version": f"vla-core {__version__}", "protocol_version": VERSION,
            "model_server": self.contract.get("name", ""), "capabilities": {},
            "observation_params": {key: _value(text) for key, text in params.items()},
        }  # fmt: skip
        return Say(self._message("hello", hello, self._seq))

    def _row(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        images = payload.get("images")
        if not isinstance(images, dict) or not images:
            raise ServerError("BAD_OBSERVATION", f"no images; the observation has {sorted(payload)}")
        pairs = [pair.partition("=")[::2] for pair in self.settings.cameras]
        pairs = pairs or list(zip(self.contract["cameras"], images, strict=False))
        if lacking := [theirs for _, theirs in pairs if theirs not in images]:
            raise ServerError("BAD_OBSERVATION", f"no camera {lacking[0]!r}; the observation has {sorted(images)} "
                              "(--set 'protocol.cameras=[\"ROBOT=BENCHMARK\"]')")  # fmt: skip
        row: dict[str, Any] = {"images": {mine: _image(images[theirs], theirs) for mine, theirs in pairs}}
        for key, name in (("state", self.settings.state), ("prompt", self.settings.prompt)):
            if name in payload:
                row[key] = payload[name]
            elif key == "state" and self.contract.get("state_dim"):
                way = "--set protocol.state=KEY, or ask for it: --set 'protocol.params=[\"send_state=true\"]'"
                raise ServerError("BAD_OBSERVATION", f"no {name!r}; the observation has {sorted(payload)} ({way})")
        if "state" in row:
            row["state"] = _numbers(row["state"], self.settings.state)
        return row

    def _message(self, kind: str, payload: Mapping[str, Any], seq: int) -> bytes:
        message = {"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}
        return msgpack.packb(message, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {
            "__ndarray__": True, "data": value.tobytes(), "dtype": value.dtype.str, "shape": list(value.shape),
        }  # fmt: skip
    return value.item() if isinstance(value, np.generic) else value


def _value(text: str) -> Any:
    return {"true": True, "false": False}.get(text.lower(), text)


def _numbers(value: Any, name: str) -> np.ndarray:
    """An array, or a list of numbers, as float32."""
    try:
        array = np.asarray(value)
    except ValueError:  # lists of several lengths
        array = np.asarray(None)
    if array.dtype.kind not in "biuf":
        raise ServerError("BAD_OBSERVATION", f"{name!r} is no array of numbers")
    with np.errstate(over="ignore"):  # infinite then, which the server refuses
        return array.astype(np.float32)


def _image(value: Any, name: str) -> np.ndarray:
    """An image that came as an array, or encoded."""
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, dict) or "__image__" not in value:
        raise ServerError("BAD_OBSERVATION", f"images[{name!r}] is no image")
    data, form, shape = value.get("data"), value.get("format"), value.get("shape")
    dtype = value.get("dtype")
    sizes = isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and 0 < n < 2**14 for n in shape)
    if not isinstance(data, bytes) or not sizes or math.prod(shape) > codec.MAX_FRAME:
        raise codec.FrameError("an image has bytes and three sizes")
    if not isinstance(form, str) or not isinstance(dtype, (str, type(None))):
        raise codec.FrameError("format and dtype of an image are text")
    if form == "raw":
        if dtype not in codec.DTYPES or math.prod(shape) * codec.DTYPES[dtype] != len(data):
            raise codec.FrameError("a raw image has as many bytes as its shape says")
        return np.frombuffer(data, dtype).reshape(shape)
    if form not in FORMATS:
        raise codec.FrameError("an image is raw, png or jpeg")
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=[FORMATS[form]]) as picture:
            if (picture.height, picture.width) != tuple(shape[:2]):
                raise codec.FrameError("an image has another size than it says")
            image = np.asarray(picture)
    except codec.FrameError:
        raise
    except Exception:  # Pillow raises many kinds on broken files
        raise codec.FrameError(f"a broken {form} image") from None
    if image.shape != tuple(shape) and image.shape != tuple(shape[:2]):
        raise codec.FrameError("an image has another shape than it says")
    return image.reshape(shape)
