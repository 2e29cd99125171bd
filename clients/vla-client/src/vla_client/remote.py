"""A policy behind a websocket. Every call ends within its time-out; a lost server is found again, and checked again."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection, connect

from vla_client import codec
from vla_client.wire import CLOSING, VERSION, ServerError, read_answer

FIRST_WAIT, LONGEST_WAIT = 0.1, 1.0  # seconds between attempts to reach the server again


class RemoteError(Exception):
    """The policy cannot be used from here."""


class Unreachable(RemoteError):
    """No server answers at the address, or it lets nobody in."""


class NoAnswer(RemoteError):
    """The server did not answer within the time-out."""


class OtherModel(RemoteError):
    """The server came back with other weights than before."""


class RemotePolicy:
    """A policy that runs elsewhere; used as a local one: `infer`, `infer_batch`, `reset`.

    Args:
        url: ws://HOST:PORT, wss://HOST:PORT, or HOST:PORT.
        api_key: sent as `Authorization: Api-Key KEY`.
        timeout: seconds that a call may take, connecting included.
        embodiment: the robot as it names itself (robot, cameras, state_dim, action_dim, state_names, action_names,
            state_units, action_units, hz; any of them). A server of ours refuses a robot that it was not trained for.
        digest: the weights that are expected; None: those that are met first.
        name: what the server's page calls this robot.
        max_frame: bytes of an answer at most.
        ssl: for wss://, an `ssl.SSLContext`, e.g. one that trusts your own certificate; None: the system's.

    One request is under way at a time; use one object per thread.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 1.0,
        embodiment: Mapping[str, Any] | None = None,
        digest: str | None = None,
        name: str = "",
        max_frame: int = codec.MAX_FRAME,
        ssl: Any = None,
    ):
        self.url = url if "://" in url else f"ws://{url}"
        self.timeout, self.embodiment, self.digest, self.robot_name = timeout, embodiment, digest, name
        self.max_frame, self.ssl = max_frame, ssl
        self.metadata: dict[str, Any] = {}
        self.connections = 0  # how often the server was reached
        self._key = api_key
        self._ws: ClientConnection | None = None
        self._wait, self._not_before = FIRST_WAIT, 0.0
        self._why: Exception | None = None  # what the last attempt met
        self._others: list[RemotePolicy] = []
        self._lock = threading.Lock()

    def __enter__(self) -> RemotePolicy:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def name(self) -> str:
        """The policy's name, as the server tells it; the address before it was reached."""
        return str(self.contract.get("name") or self.url)

    @property
    def contract(self) -> Mapping[str, Any]:
        """What a server of ours says of its policy: cameras, sizes, horizon, rate, embodiment; {} of others."""
        ours = self.metadata.get("vla")
        return ours if isinstance(ours, Mapping) else {}

    # ---- asking -----------------------------------------------------------------------------------------------------

    def infer(
        self,
        obs: Mapping[str, Any],
        *,
        timeout: float | None = None,
        step: int | None = None,
        seed: int | None = None,
        prefix: np.ndarray | None = None,
        delay: int | None = None,
        rtc: str | None = None,
    ) -> dict[str, Any]:
        """A chunk for an observation: {"actions": [t a], ...}.

        Args:
            obs: in the robot's names and units, e.g. {"images": {camera: uint8 [h w 3]}, "state": [s], "prompt": str}.
            timeout: seconds for this call.
            step: the control step of the observation; comes back in the answer's "vla".
            seed: what the chunk's noise follows from.
            prefix, delay: real-time chunking: the rest of the last chunk [n a] from the step of this observation on,
                and how many of these steps will be executed before the answer arrives; the new chunk goes on from them.
            rtc: the way of it, e.g. "guided"; None: the best that the policy can do. The last five are for servers of
                ours; others are not sent them.

        Raises:
            ServerError: the server answered with an error.
            NoAnswer: it did not answer in time.
            Unreachable: it is not there.
            OtherModel: it is there with other weights.
        """
        patience = self.timeout if timeout is None else timeout
        with self._lock:
            end = time.monotonic() + patience
            ws = self._connected(end)
            said: dict[str, Any] = {"step": step, "seed": seed, "delay": delay, "rtc": rtc}
            said["prefix"] = None if prefix is None else np.asarray(prefix, np.float32)
            said["deadline_ms"] = max(1.0, (end - time.monotonic()) * 1e3)
            said = {key: value for key, value in said.items() if value is not None}
            frame = codec.pack({**obs, "vla": said} if self.contract else dict(obs))
            answer = self._exchange(ws, frame, end)
        return _finite(answer)

    def infer_batch(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        seeds: Sequence[int] | None = None,
        prefixes: Sequence[np.ndarray | None] | None = None,
        delays: Sequence[int] | None = None,
        rtc: str = "",
    ) -> list[dict[str, Any]]:
        """A chunk per observation, each over a connection of its own, so that a server may take them in one pass.

        The rest is per row what `infer` takes for one.
        """
        while len(self._others) < len(rows) - 1:
            self._others.append(
                RemotePolicy(
                    self.url,
                    api_key=self._key,
                    timeout=self.timeout,
                    embodiment=self.embodiment,
                    digest=self.digest,
                    name=self.robot_name,
                    max_frame=self.max_frame,
                    ssl=self.ssl,
                )
            )
        wanted: list[dict[str, Any]] = [{} for _ in rows]
        for name, values in (("seed", seeds), ("prefix", prefixes), ("delay", delays)):
            for more, value in zip(wanted, values or ()):
                more[name] = value
        for more in wanted:
            if more.get("prefix") is None:
                more.pop("delay", None)
            elif rtc:
                more["rtc"] = rtc
        if len(rows) < 2:
            return [self.infer(row, **more) for row, more in zip(rows, wanted)]
        with ThreadPoolExecutor(len(rows)) as pool:
            everyone = zip([self, *self._others], rows, wanted)
            calls = [pool.submit(who.infer, row, **more) for who, row, more in everyone]
            return [call.result() for call in calls]

    def reset(self) -> None:
        """An episode begins. A server of ours starts its noise anew; others are told nothing, as in openpi."""
        with self._lock:
            if self._ws is not None and self.contract:
                self._exchange(self._ws, codec.pack({"vla": {"reset": True}}), time.monotonic() + self.timeout)

    def accept_model(self) -> None:
        """After `OtherModel`: go on with the weights that the server has now."""
        self.digest = None
        for other in self._others:
            other.digest = None

    def close(self) -> None:
        """Say goodbye. The object can be used again: it connects anew."""
        for other in self._others:
            other.close()
        with self._lock:
            ws, self._ws = self._ws, None
            if ws is not None:
                ws.close()

    # ---- the connection ---------------------------------------------------------------------------------------------

    def connect(self, timeout: float | None = None) -> Mapping[str, Any]:
        """Reach the server now; gives its metadata. Raises as `infer` does."""
        with self._lock:
            self._connected(time.monotonic() + (self.timeout if timeout is None else timeout))
        return self.metadata

    def _connected(self, end: float) -> ClientConnection:
        while self._ws is None:
            pause = self._not_before - time.monotonic()
            if pause > 0:
                if time.monotonic() + pause >= end:
                    time.sleep(max(0.0, end - time.monotonic()))
                    if isinstance(self._why, ServerError):
                        raise self._why
                    raise Unreachable(f"{self._why}; trying again in {pause:.1f} s")
                time.sleep(pause)
            try:
                self._ws = self._meet(end)
                self._wait = FIRST_WAIT
            except (Unreachable, NoAnswer, ServerError) as error:
                self._not_before = time.monotonic() + self._wait
                self._wait, self._why = min(2 * self._wait, LONGEST_WAIT), error
                if getattr(error, "final", False) or time.monotonic() >= end:
                    raise
        return self._ws

    def _meet(self, end: float) -> ClientConnection:
        """Connect, read the metadata, introduce ourselves; all of it again after every loss."""
        left = max(0.05, end - time.monotonic())
        headers = {"Authorization": f"Api-Key {self._key}"} if self._key else None
        try:
            ws = connect(
                self.url, compression=None, max_size=self.max_frame, additional_headers=headers, open_timeout=left,
                close_timeout=1, user_agent_header=None, proxy=None, ssl=self.ssl,
            ).__enter__()  # fmt: skip
        except InvalidStatus as error:
            raise self._refused(error) from None
        except InvalidURI:
            raise _final(Unreachable(f"{self.url} is no address; ws://HOST:PORT is")) from None
        except (OSError, InvalidHandshake, EOFError, ConnectionClosed) as error:
            what = "nobody serves there" if isinstance(error, ConnectionRefusedError) else _said(error)
            raise Unreachable(f"{self.url}: {what}") from error
        self._quick(ws)
        try:
            self.metadata = read_answer(self._receive(ws, end), self.max_frame)
            self._check_server()
            if self.contract:
                robot = {"embodiment": dict(self.embodiment)} if self.embodiment else {}
                hello = {"version": VERSION, "name": self.robot_name, **robot}
                self._send(ws, codec.pack({"vla": {"hello": hello}}))
                read_answer(self._receive(ws, end), self.max_frame)
        except BaseException as error:
            _abort(ws)
            if isinstance(error, codec.FrameError):
                raise Unreachable(f"{self.url} does not speak openpi's protocol: {error}") from None
            if isinstance(error, ServerError) and error.kind in CLOSING:
                _final(error)
            raise
        self.connections += 1
        return ws

    def _check_server(self) -> None:
        theirs = self.contract.get("version", VERSION)
        if theirs != VERSION:
            way = "upgrade vla-client" if theirs > VERSION else "upgrade the server's vla-core"
            raise ServerError("VERSION", f"the server speaks version {theirs}, this client {VERSION}; {way}")
        digest = self.contract.get("digest")
        if digest and self.digest and digest != self.digest:
            raise OtherModel(
                f"{self.url} serves other weights now: {digest[:12]}, not {self.digest[:12]}; accept_model() takes them"
            )
        self.digest = digest or self.digest

    def _refused(self, error: InvalidStatus) -> Exception:
        body = (error.response.body or b"").decode("utf-8", "replace").strip()[:300]
        known = ServerError.read(body)
        if known.kind in ("BUSY", "DRAINING"):
            return known
        return _final(Unreachable(f"{self.url}: {body or 'refused'} (HTTP {error.response.status_code})"))

    def _quick(self, ws: ClientConnection) -> None:
        """A peer that does not read must not block a send for longer than a call may take."""
        seconds = max(0.05, self.timeout)
        if os.name == "posix":
            packed = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        else:
            packed = struct.pack("I", int(seconds * 1e3))
        ws.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, packed)

    def _exchange(self, ws: ClientConnection, frame: bytes, end: float) -> dict[str, Any]:
        try:
            self._send(ws, frame)
            return read_answer(self._receive(ws, end), self.max_frame)
        except ServerError as error:
            if error.kind in CLOSING or error.kind == "OTHER":  # openpi's server closes after an error
                self._lose()
            raise
        except (Unreachable, NoAnswer):
            self._lose()  # an answer that comes later must not be taken for that of the next request
            raise
        except codec.FrameError as error:
            self._lose()
            raise Unreachable(f"{self.url} answered with {error}") from None

    def _send(self, ws: ClientConnection, frame: bytes) -> None:
        try:
            ws.send(frame)
        except (ConnectionClosed, OSError) as error:
            raise Unreachable(f"{self.url}: {_said(error)}") from None

    def _receive(self, ws: ClientConnection, end: float) -> Any:
        try:
            return ws.recv(timeout=max(0.0, end - time.monotonic()))
        except TimeoutError:
            raise NoAnswer(f"{self.url} did not answer in time") from None
        except (ConnectionClosed, OSError) as error:
            raise Unreachable(f"{self.url}: {_said(error)}") from None

    def _lose(self) -> None:
        ws, self._ws = self._ws, None
        if ws is not None:
            _abort(ws)


def _abort(ws: ClientConnection) -> None:
    """End a connection at once: a closing handshake would wait for a server that may be gone."""
    with contextlib.suppress(OSError):  # it is closed already
        ws.socket.shutdown(socket.SHUT_RDWR)


def _final(error: Any) -> Any:
    """An error that trying again does not mend."""
    error.final = True
    return error


def _said(error: BaseException) -> str:
    if isinstance(error, ConnectionClosed):
        reason = error.rcvd.reason if error.rcvd and error.rcvd.reason else "the connection was lost"
        return f"{reason}"
    return f"{str(error) or type(error).__name__}"


def _finite(answer: dict[str, Any]) -> dict[str, Any]:
    actions = answer.get("actions")
    if not isinstance(actions, np.ndarray) or actions.ndim != 2 or not len(actions) or actions.dtype.kind != "f":
        raise ServerError("OTHER", "the answer has no actions [t a]")
    if not np.isfinite(actions).all():
        raise ServerError("NONFINITE_ACTION", "the chunk has NaN or infinite values")
    return answer
