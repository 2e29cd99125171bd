"""The conformance kit of protocols: what a client says is understood, what it must not say is refused in a line."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from vla.compose import load_object, resolve
from vla.settings import parse_sets
from vla.testing.closeness import close
from vla.testing.parts import PartConformance

CONTRACT: Mapping[str, Any] = {
    "version": 1, "name": "stand-in", "digest": "d" * 64, "cameras": ["front", "wrist"], "image_size": [16, 16],
    "state_dim": 3, "action_dim": 2, "action_horizon": 4, "hz": 10.0, "action_space": None, "parts": {},
    "embodiment": {"cameras": ["front", "wrist"], "state_dim": 3, "action_dim": 2, "hz": 10.0},
}  # fmt: skip
CHUNK = np.arange(8, dtype=np.float64).reshape(4, 2) / 4
MUTATIONS = 2000


def row_of(seed: int = 0) -> dict[str, Any]:
    """An observation that fits `CONTRACT`."""
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 255, (16, 16, 3), dtype=np.uint8) for name in CONTRACT["cameras"]}
    return {"images": images, "state": rng.normal(size=3).astype(np.float32), "prompt": "touch the red block"}


def answer_of(chunk: np.ndarray = CHUNK) -> dict[str, Any]:
    """What the server gives a conversation as an answer."""
    timing = {"infer_ms": 3.0, "queue_ms": 0.1, "batch": 1}
    return {"actions": chunk, "policy_timing": {"infer_ms": 2.0}, "server_timing": timing, "age_ms": 4.0}


class ProtocolConformance(PartConformance):
    """A protocol. A third party's class plays its client:

        def say(self, row):
            return [json.dumps(...)]            # the frames with which a client asks for a chunk, greetings included

        def hear(self, frame):
            return json.loads(frame)["actions"]  # the actions [t a] or the action [a] in the frame of an answer
    """  # fmt: skip

    kind = "protocol"

    def say(self, row: Mapping[str, Any]) -> list[Any]:
        """The frames with which a client asks for a chunk for this observation."""
        raise NotImplementedError("a test class of a protocol says what its client sends: def say(self, row)")

    def hear(self, frame: Any) -> Any:
        """The actions in the frame of an answer."""
        raise NotImplementedError("a test class of a protocol says what its client reads: def hear(self, frame)")

    @property
    def chosen(self) -> Any:
        """The part with the class's settings."""
        return resolve("protocol", {"part": self.name, **parse_sets(self.settings)}, "protocol")

    def conversation(self) -> Any:
        """A new conversation."""
        chosen = self.chosen
        return load_object(chosen.part.numpy, f"protocol {self.name!r}")(chosen.settings, CONTRACT)

    def _asked(self, talk: Any, row: Mapping[str, Any]) -> Any:
        from vla.serving.protocol import Ask, Say

        events = [event for frame in self.say(row) for event in talk.receive(frame)]
        asks = [event for event in events if isinstance(event, Ask)]
        assert len(asks) == 1, f"one observation is one request; `receive` gave {events}"
        assert all(isinstance(event.frame, (bytes, str)) for event in events if isinstance(event, Say))
        return asks[0]

    # ---- instead of a variant, beside which a protocol stands --------------------------------------------------------

    def test_a_variant_with_it_survives_its_file(self) -> None:
        """A protocol is no part of a variant; its own table survives."""
        assert resolve("protocol", self.chosen.table(), "protocol") == self.chosen

    def test_names_of_parts_are_all_that_a_file_can_say(self) -> None:
        assert self.part.numpy not in str(self.chosen.table())

    # ---- what is said ------------------------------------------------------------------------------------------------

    def test_the_first_frames_are_frames(self) -> None:
        assert all(isinstance(frame, (bytes, str)) for frame in self.conversation().begin())

    def test_an_observation_is_understood(self) -> None:
        row = row_of()
        got = self._asked(self.conversation(), row).row
        close(got["state"], row["state"], 1e-6, "the state")
        assert got["prompt"] == row["prompt"]
        for name, image in row["images"].items():
            assert np.array_equal(got["images"][name], image), f"camera {name}"

    def test_an_answer_is_understood(self) -> None:
        talk = self.conversation()
        heard = np.asarray(self.hear(talk.answer(self._asked(talk, row_of()), answer_of())), np.float64)
        close(heard, CHUNK if heard.ndim == 2 else CHUNK[0], 1e-6, "the actions", scale=1.0)

    def test_every_error_is_a_short_frame(self) -> None:
        from vla_client.wire import KINDS, ServerError

        for kind in KINDS:
            talk = self.conversation()
            for ask in (None, self._asked(talk, row_of())):
                frame = talk.refuse(ask, ServerError(kind, "why", retry_after_ms=10.0, error="ab12"))
                assert frame is None or (isinstance(frame, (bytes, str)) and len(frame) < 1000)
                if frame is None:
                    assert kind == "SUPERSEDED", "only a request that a newer one replaced may go without a word"
                else:
                    assert kind in (frame if isinstance(frame, str) else frame.decode("utf-8", "replace"))

    def test_conversations_share_nothing(self) -> None:
        one, two = self.conversation(), self.conversation()
        asked = self._asked(one, row_of(1))
        one.answer(asked, answer_of())
        close(self._asked(two, row_of(2)).row["state"], row_of(2)["state"], 1e-6, "the state of another client")

    # ---- what must not be said ---------------------------------------------------------------------------------------

    def test_what_is_no_frame_is_refused(self) -> None:
        from vla_client import FrameError, ServerError

        junk: list[Any] = [b"", "", "hello", b"\x80\x04\x95\x00", b"\x91" * 50_000, b"\xdd\xff\xff\xff\xff", bytes(100)]
        for frame in junk:
            with pytest.raises((FrameError, ServerError)):
                self.conversation().receive(frame)

    def test_mutated_frames_are_understood_or_refused(self) -> None:
        """Anything but a `FrameError` or `ServerError` is a fault that a stranger can cause."""
        from vla_client import FrameError, ServerError

        rng = random.Random(0)
        frames = self.say(row_of())
        for _ in range(MUTATIONS):
            talk = self.conversation()
            for frame in (mutated(frame, rng) for frame in frames):
                try:
                    talk.receive(frame)
                except (FrameError, ServerError) as error:
                    assert len(str(error)) < 1000
                    break

    # ---- over a socket -----------------------------------------------------------------------------------------------

    def test_a_robot_is_served(self) -> None:
        """The whole server, with a policy that repeats the state."""
        from websockets.sync.client import connect

        with _served(self) as url, connect(url, compression=None, max_size=None) as ws:
            for _ in self.conversation().begin():
                ws.recv(timeout=10)
            for seed in (1, 2):
                row = row_of(seed)
                greeting = 0
                for frame in self.say(row):
                    ws.send(frame)
                    greeting += 1
                for _ in range(greeting):
                    try:
                        heard = np.asarray(self.hear(ws.recv(timeout=10)), np.float64)
                        break
                    except (KeyError, TypeError, ValueError):
                        continue  # the answer to a greeting
                heard = heard if heard.ndim == 1 else heard[0]
                close(heard, row["state"][:2], 1e-6, "the actions")


def mutated(frame: Any, rng: random.Random) -> Any:
    """The frame with one to four small faults."""
    data = bytearray(frame.encode() if isinstance(frame, str) else frame)
    for _ in range(rng.randint(1, 4)):
        at, how = rng.randrange(len(data) + 1), rng.randrange(5)
        if how == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif how == 1:
            data[at:at] = bytes([rng.randrange(256)])
        elif how == 2:
            del data[at : at + rng.randint(1, 8)]
        elif how == 3:
            del data[at:]
        else:
            data[at:at] = data[: rng.randint(0, 64)]
    return bytes(data).decode("utf-8", "replace") if isinstance(frame, str) else bytes(data)


class _States:
    """A policy that answers with the first values of the state."""

    name = "states"

    def infer_batch(self, rows: Any, *, seeds: Any = None) -> list[dict[str, Any]]:
        return [{"actions": np.tile(np.asarray(row["state"], np.float64)[:2], (1, 1))} for row in rows]

    def reset(self) -> None:
        pass


class _served:
    """A server in a thread; a context manager that gives its address."""

    def __init__(self, kit: ProtocolConformance):
        self.kit, self.ready, self.url = kit, threading.Event(), ""
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        assert self.ready.wait(20)
        if self.error:
            raise self.error
        return self.url

    def __exit__(self, *exception: object) -> None:
        self.loop.call_soon_threadsafe(self.over.set)
        self.thread.join(20)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self.error = error
        finally:
            self.ready.set()

    async def _serve(self) -> None:
        from vla.serving.server import Options, Server, bind

        options = Options(port=0)
        server = Server(_States(), CONTRACT, lambda contract: self.kit.conversation(), options)
        self.loop, self.over = asyncio.get_running_loop(), asyncio.Event()
        await server.start(bind(options))
        self.url = f"ws://127.0.0.1:{server.port}"
        self.ready.set()
        await self.over.wait()
        await server.stop()
