"""Connections: robots, health, metrics and the page on one port; a loop that is never blocked; an orderly end."""

from __future__ import annotations

import asyncio
import errno
import hmac
import ipaddress
import json
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, urlsplit

from attrs import field, frozen
from vla_client import codec
from vla_client.wire import CLOSING, ServerError
from websockets.asyncio.server import Server as WebsocketServer
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

from vla.errors import SettingsError
from vla.serving.metrics import Metrics
from vla.serving.protocol import Ask, Close, Reset, Say
from vla.serving.sessions import Dispatcher, Session

log = logging.getLogger("vla.serve")
OUTSTANDING = 8  # answers that a robot has not taken; then nothing more of it is read
OPEN_PAGES = ("/", "/healthz", "/readyz")  # they say nothing that a stranger may not know


@frozen
class Options:
    """How to serve.

    Attributes:
        host, port: where; port 0 is any free one.
        api_key: what clients have to send as `Authorization: Api-Key KEY`; "": nothing.
        insecure: serve other machines without a key.
        max_frame: bytes of one frame.
        drain: seconds that requests get to end when the server shuts down.
        tls: for wss.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = field(default="", repr=False)
    insecure: bool = False
    max_sessions: int = 64
    max_batch: int = 8
    max_frame: int = codec.MAX_FRAME
    deadline: float = 5.0
    idle: float = 300.0
    drain: float = 10.0
    seed: int = 0
    tls: ssl.SSLContext | None = field(default=None, repr=False)


def bind(options: Options) -> socket.socket:
    """A bound socket that does not listen yet: connections are refused until the policy is ready.

    Raises:
        SettingsError: the port is in use, the address is not of this machine, or it is open to other machines and has
            neither a key nor `insecure`.
    """
    if not is_loopback(options.host) and not options.api_key and not options.insecure:
        raise SettingsError(
            "other machines could use this policy without a key", field="--host", got=options.host,
            fix="set VLA_API_KEY (or --api-key KEY), or add --insecure if the network is yours alone",
        )  # fmt: skip
    try:
        infos = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, address = infos[0]
        made = socket.socket(family, kind, proto)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except socket.gaierror as error:
        fix = "an address of this machine, e.g. 127.0.0.1"
        raise SettingsError("there is no such address", field="--host", got=options.host, fix=fix) from error
    except (OSError, OverflowError) as error:
        made.close()
        number = getattr(error, "errno", 0)
        if number == errno.EADDRINUSE:
            raise in_use(options.port) from error
        if number == errno.EADDRNOTAVAIL:
            fix = "an address of this machine, 127.0.0.1, or 0.0.0.0 for all"
            raise SettingsError("not an address of this machine", field="--host", got=options.host, fix=fix) from error
        fix = "a port from 1024 to 65535, or 0 for any free one"
        raise SettingsError(f"cannot serve there: {error}", field="--port", got=options.port, fix=fix) from error
    return made


def in_use(port: int) -> SettingsError:
    """The error about a port that another server has."""
    fix = f"--port {port + 1 if port < 65535 else 8000}, or end what serves there"
    return SettingsError("the port is in use", field="--port", got=port, fix=fix)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Server:
    """A policy on a port.

    Args:
        policy: anything that `Acts`.
        contract: see `vla.serving.contract`.
        converse: contract -> a new `Conversation` of the protocol.
        options: how.
        live: what answers a browser at /live, `vla.serving.live.Live`; None: there is no page.
    """

    def __init__(
        self, policy: Any, contract: Mapping[str, Any], converse: Callable[[Mapping[str, Any]], Any], options: Options,
        live: Callable[[Server], Any] | None = None,
    ):  # fmt: skip
        self.policy, self.contract, self.options, self._converse = policy, contract, options, converse
        self.metrics = Metrics()
        self.dispatcher = Dispatcher(
            policy, self.metrics, action_dim=int(contract.get("action_dim") or 0), max_sessions=options.max_sessions,
            max_batch=options.max_batch, deadline=options.deadline, idle=options.idle, seed=options.seed,
        )  # fmt: skip
        self.connections: dict[int, ServerConnection] = {}
        self.started = time.monotonic()
        self.port = 0
        self.live = live(self) if live else None
        self._server: WebsocketServer | None = None
        self._chores: list[asyncio.Task[None]] = []

    # ---- life -------------------------------------------------------------------------------------------------------

    async def start(self, bound: socket.socket, row: Mapping[str, Any] | None = None) -> None:
        """Warm the policy up with an observation, then listen.

        Raises:
            SettingsError: the port is in use.
        """
        await self.dispatcher.start(row)
        try:
            bound.listen()
        except OSError as error:  # another server was bound there too, and was ready first
            raise in_use(bound.getsockname()[1]) from error
        self._server = await serve(
            self._connection, sock=bound, ssl=self.options.tls, compression=None, max_size=self.options.max_frame,
            process_request=self._http, max_queue=2, open_timeout=10, ping_interval=20, ping_timeout=20,
            close_timeout=2, server_header=None, logger=logging.getLogger("vla.serve.websockets"),
        )  # fmt: skip
        self.port = bound.getsockname()[1]
        self._chores = [asyncio.create_task(self._lag())]

    async def stop(self) -> None:
        """Take nothing new, finish what was taken, say goodbye (1001)."""
        await self.dispatcher.drain(self.options.drain)
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
        for chore in self._chores:
            chore.cancel()

    async def run_until_signal(self) -> None:
        """Serve until SIGTERM or SIGINT; the second one ends at once."""
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def asked(number: int) -> None:
            if stop.is_set():
                log.warning("stopped at once")
                os._exit(128 + number)
            log.warning("shutting down: requests get %g s to end; a second signal stops at once", self.options.drain)
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, asked, number)
        try:
            await stop.wait()
            await self.stop()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def _lag(self) -> None:
        """How late the loop wakes up: what everybody waits who is served by it."""
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.05)
            self.metrics.lag.observe(max(0.0, time.monotonic() - began - 0.05))

    # ---- a robot ----------------------------------------------------------------------------------------------------

    async def _connection(self, ws: ServerConnection) -> None:
        path = urlsplit(ws.request.path).path if ws.request else "/"
        try:
            await (self.live.watch(ws) if path == "/live" and self.live is not None else self._robot(ws))
        except ConnectionClosed:
            pass
        except Exception:
            log.exception("a connection failed")
            await ws.close(1011, "internal error")

    async def _robot(self, ws: ServerConnection) -> None:
        peer = "{}:{}".format(*(ws.remote_address or ("?", 0))[:2])
        try:
            await self._make_room()
            session = self.dispatcher.open(peer)
        except ServerError as error:
            await ws.send(error.line())
            await ws.close(1013, error.kind)
            return
        self.connections[session.number] = ws
        self.metrics.connections.labels("robot").inc()
        log.info("robot %d connected from %s", session.number, peer)
        tasks: set[asyncio.Task[None]] = set()
        talk = self._converse(self.contract)
        try:
            for frame in talk.begin():
                await ws.send(frame)
            async for frame in ws:
                if not await self._heard(ws, talk, session, frame, tasks):
                    break
        finally:
            self.connections.pop(session.number, None)
            self.dispatcher.close(session)
            for task in tasks:
                task.cancel()
            log.info("robot %d is gone: %s", session.number, _summary(session))

    async def _heard(
        self, ws: ServerConnection, talk: Any, session: Session, frame: Any, tasks: set[asyncio.Task[None]]
    ) -> bool:
        """Do what a frame asks for; whether the connection goes on."""
        session.last = time.monotonic()
        try:
            events = talk.receive(frame)
        except codec.FrameError as error:
            await self._end(ws, talk, ServerError("BAD_REQUEST", str(error)[:150]))
            return False
        except ServerError as error:
            session.count(error.kind)
            self.metrics.requests.labels(error.kind).inc()
            await ws.send(talk.refuse(None, error))
            return error.kind not in CLOSING
        except Exception as error:
            log.exception("the protocol failed on a frame of robot %d", session.number)
            what = f"the frame could not be read: {type(error).__name__}"
            await self._end(ws, talk, ServerError("BAD_REQUEST", what))
            return False
        session.name = getattr(talk, "name", "") or session.name
        for event in events:
            if isinstance(event, Ask):
                task = asyncio.create_task(self._answer(ws, talk, session, event))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                while len(tasks) >= OUTSTANDING:  # it sends, and does not read: let it wait, not our memory
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            elif isinstance(event, Say):
                await ws.send(event.frame)
            elif isinstance(event, Reset):
                self.dispatcher.reset(session)
            elif isinstance(event, Close):
                log.warning("robot %d was refused: %s", session.number, event.reason)
                await ws.send(event.frame)
                await ws.close(1008, event.reason[:100])
                return False
        await asyncio.sleep(0)  # a robot that sends without pause leaves the others their turn
        return True

    async def _answer(self, ws: ServerConnection, talk: Any, session: Session, ask: Ask) -> None:
        try:
            try:
                frame = talk.answer(ask, await self.dispatcher.ask(session, ask))
            except ServerError as error:
                if error.kind not in ("SUPERSEDED", "BUSY", "STALE", "DRAINING"):
                    log.warning("robot %d: %s", session.number, str(error).partition("\n")[0])
                frame = talk.refuse(ask, error)
            if frame is not None:
                await ws.send(frame)
        except ConnectionClosed:
            pass
        except Exception:
            log.exception("an answer to robot %d could not be written", session.number)
            await ws.close(1011, "internal error")

    async def _end(self, ws: ServerConnection, talk: Any, error: ServerError) -> None:
        log.warning("%s: %s", "{}:{}".format(*(ws.remote_address or ("?", 0))[:2]), error)
        self.metrics.requests.labels(error.kind).inc()
        await ws.send(talk.refuse(None, error))
        await ws.close(1008, error.kind)

    async def _make_room(self) -> None:
        """When all places are taken, the robot that was quiet for too long leaves."""
        if len(self.dispatcher.sessions) < self.options.max_sessions:
            return
        quiet = self.dispatcher.idlest()
        if quiet is not None:
            self.dispatcher.close(quiet)
            if (ws := self.connections.pop(quiet.number, None)) is not None:
                log.warning("robot %d was quiet for too long and gave its place to another", quiet.number)
                asyncio.create_task(ws.close(1013, "quiet for too long, and all places are taken"))

    # ---- HTTP -------------------------------------------------------------------------------------------------------

    def _http(self, ws: ServerConnection, request: HttpRequest) -> Response | None:
        """Pages; None for a websocket that may go on."""
        url = urlsplit(request.path)
        upgrade = "websocket" in request.headers.get("Upgrade", "").lower()
        if not self._same_origin(request.headers):
            return respond(403, "this page may not talk to the server: it comes from another site\n")
        if (upgrade or url.path not in OPEN_PAGES) and not self._allowed(request.headers, url.query):
            self.metrics.connections.labels("no key").inc()
            log.warning("a client without the right key was refused")
            return respond(401, "UNAUTHORISED: the key is missing or wrong (Authorization: Api-Key KEY)\n")
        if upgrade:
            return self._may_join(url.path)
        if url.path == "/healthz":
            return respond(200, "OK\n")
        if url.path == "/readyz":
            if self.dispatcher.draining or self.dispatcher.stuck:
                why = "shutting down" if self.dispatcher.draining else "a forward pass does not end"
                return respond(503, f"{why}\n")
            return respond(200, "ready\n")
        if url.path == "/spec":
            return respond(200, json.dumps(self.contract, indent=1, default=str) + "\n", "application/json")
        if url.path == "/metrics":
            return respond(200, self.metrics.text(), "text/plain; version=0.0.4; charset=utf-8")
        if url.path == "/" and self.live is not None:
            return respond(200, self.live.page(), "text/html; charset=utf-8")
        return respond(404, "there is /, /healthz, /readyz, /spec and /metrics; robots connect by websocket\n")

    def _may_join(self, path: str) -> Response | None:
        if path == "/live":
            return None if self.live is not None else respond(404, "this server has no page\n")
        if self.dispatcher.draining:
            return respond(503, "DRAINING: the server is shutting down\n", retry=5)
        full = len(self.dispatcher.sessions) >= self.options.max_sessions
        if full and self.dispatcher.idlest() is None:
            self.metrics.connections.labels("busy").inc()
            return respond(503, f"BUSY: all {self.options.max_sessions} places are taken (--max-sessions)\n", retry=1)
        return None

    def _allowed(self, headers: Headers, query: str) -> bool:
        if not self.options.api_key:
            return True
        given = headers.get("Authorization", "").removeprefix("Api-Key ")
        given = given or "".join(parse_qs(query).get("key", [])[:1])  # browsers cannot set a header
        return hmac.compare_digest(given.encode(), self.options.api_key.encode())

    def _same_origin(self, headers: Headers) -> bool:
        """A browser says from which site a page is; another site's page may not use the robot's server."""
        origin = headers.get("Origin")
        return origin is None or urlsplit(origin).netloc == headers.get("Host", "")


def respond(status: int, body: str | bytes, kind: str = "text/plain; charset=utf-8", retry: int = 0) -> Response:
    """An HTTP answer."""
    data = body.encode() if isinstance(body, str) else body
    headers = Headers(
        {
            "Content-Type": kind, "Content-Length": str(len(data)), "Connection": "close", "Cache-Control": "no-store",
            "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
            "img-src data: blob:; connect-src 'self'", "X-Content-Type-Options": "nosniff",
        }
    )  # fmt: skip
    if retry:
        headers["Retry-After"] = str(retry)
    return Response(status, HTTPStatus(status).phrase, headers, data)


def _summary(session: Session) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in sorted(session.counts.items())) or "it asked nothing"
