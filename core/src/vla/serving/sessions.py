"""Robots and their turns: one inference thread, one waiting request per robot, round robin between robots.

The inference thread takes the next request itself as soon as a pass has ended, so that a busy event loop costs the
accelerator nothing; results go back to the loop. What both touch is under one lock, held for microseconds.

A robot that sends a newer observation replaces the one that waits. When a turn comes, robots that wait are taken
together if one forward pass for all is known to be faster (measured at warm-up, kept up to date). Nobody waits past a
deadline: an answer, or a typed error, always comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from attrs import define, field
from vla_client.wire import ServerError

from vla.errors import ActionError, DecodeError, VlaError
from vla.serving.metrics import Metrics
from vla.serving.protocol import Ask

log = logging.getLogger("vla.serve")
STUCK = 60.0  # seconds after which a forward pass that does not end makes the server not ready


@define(eq=False)
class Request:
    """An observation that waits for a chunk."""

    ask: Ask
    arrived: float  # monotonic
    deadline: float  # monotonic
    future: asyncio.Future[dict[str, Any]]
    timer: asyncio.TimerHandle | None = None


@define(eq=False)
class Session:
    """One connected robot."""

    number: int
    peer: str
    name: str = ""
    waiting: Request | None = None
    running: int = 0  # requests of it that are in a pass, or whose result is on its way
    opened: float = field(factory=time.monotonic)
    last: float = field(factory=time.monotonic)
    draws: int = 0  # chunks since the episode began: what the noise of the next follows from
    counts: dict[str, int] = field(factory=dict)
    times: deque[float] = field(factory=lambda: deque(maxlen=500))  # seconds from arrival to answer
    row: Mapping[str, Any] | None = None  # what it saw last
    chunk: np.ndarray | None = None
    step: int | None = None

    def count(self, outcome: str) -> None:
        """One more request that ended so."""
        self.counts[outcome] = self.counts.get(outcome, 0) + 1


class Dispatcher:
    """Gives robots their turns.

    Args:
        policy: anything that `Acts`.
        action_dim: values per action that a chunk must have; 0: any.
        max_sessions, max_batch: how many robots, and how many in one forward pass at most.
        deadline: seconds that a request may wait for its turn, unless it asks for less.
        idle: seconds without a request after which a robot gives its place to another one, when all are taken.
        seed: what the noise follows from where a request brings no seed.
    """

    def __init__(
        self, policy: Any, metrics: Metrics, *, action_dim: int = 0, max_sessions: int = 64, max_batch: int = 8,
        deadline: float = 5.0, idle: float = 300.0, seed: int = 0,
    ):  # fmt: skip
        self.policy, self.metrics, self.action_dim, self.seed = policy, metrics, action_dim, seed
        self.max_sessions, self.max_batch, self.deadline, self.idle = max_sessions, max_batch, deadline, idle
        self.sessions: dict[int, Session] = {}
        self.costs: dict[int, float] = {}  # rows -> seconds of a forward pass
        self.draining = False
        self.busy_since: float | None = None
        self._turns: deque[Session] = deque()
        self._numbers = itertools.count(1)
        self._lock = threading.Condition()
        self._over = False
        self._broken = False

    # ---- robots -----------------------------------------------------------------------------------------------------

    def open(self, peer: str) -> Session:
        """A place for a robot.

        Raises:
            ServerError: BUSY or DRAINING.
        """
        if self.draining:
            raise ServerError("DRAINING", "the server is shutting down")
        if len(self.sessions) >= self.max_sessions and not self.idlest():
            raise ServerError("BUSY", f"all {self.max_sessions} places are taken", retry_after_ms=1000)
        session = Session(next(self._numbers), peer)
        self.sessions[session.number] = session
        self.join(session)
        self.metrics.sessions.set(len(self.sessions))
        return session

    def join(self, session: Session) -> None:
        """Give a session turns, without a place: the page's own requests."""
        with self._lock:
            self._turns.append(session)

    def idlest(self) -> Session | None:
        """The robot that has asked nothing for the longest, if that is longer than `idle`."""
        quiet = [s for s in self.sessions.values() if s.waiting is None and not s.running]
        longest = min(quiet, key=lambda s: s.last, default=None)
        return longest if longest and time.monotonic() - longest.last > self.idle > 0 else None

    def close(self, session: Session) -> None:
        """The robot is gone; a result that is under way is dropped."""
        self.sessions.pop(session.number, None)
        with self._lock:
            if session in self._turns:
                self._turns.remove(session)
        self._drop(session, None)
        self.metrics.sessions.set(len(self.sessions))

    # ---- requests ---------------------------------------------------------------------------------------------------

    async def ask(self, session: Session, ask: Ask) -> dict[str, Any]:
        """A chunk for an observation: {"actions": [t a], "policy_timing", "server_timing", ...}.

        Raises:
            ServerError: every way in which it may fail.
        """
        now, loop = time.monotonic(), asyncio.get_running_loop()
        outcome = "ok"
        try:
            session.last = now
            if self.draining:
                raise ServerError("DRAINING", "the server is shutting down")
            if self._broken:
                raise ServerError("INTERNAL", "the inference thread has ended; the server has to be started anew")
            check_finite(ask.row)
            patience = self.deadline
            if (wanted := ask.options.get("deadline_ms")) is not None:
                patience = min(patience, wanted / 1e3)
            if (wait := self._expected_wait(session)) > patience:
                raise ServerError(
                    "BUSY", f"its turn would come in {wait * 1e3:.0f} ms, the deadline is {patience * 1e3:.0f} ms",
                    retry_after_ms=round(max(wait - patience, 0.001) * 1e3),
                )  # fmt: skip
            self._drop(session, ServerError("SUPERSEDED", "a newer observation of this robot came"))
            request = Request(ask, now, now + patience, loop.create_future())
            request.timer = loop.call_at(loop.time() + patience, self._expire, session, request)
            session.row, session.step = ask.row, ask.options.get("step")
            self.metrics.waiting.inc()
            with self._lock:
                session.waiting = request
                self._lock.notify()
            answer = await request.future
            total = time.monotonic() - now
            session.times.append(total)
            session.chunk = answer["actions"]
            self.metrics.total.observe(total)
            return {**answer, "age_ms": total * 1e3}
        except ServerError as error:
            outcome = error.kind
            error.step = ask.options.get("step")
            raise
        except asyncio.CancelledError:
            outcome = "gone"
            raise
        finally:
            session.count(outcome)
            self.metrics.requests.labels(outcome).inc()

    def reset(self, session: Session) -> None:
        """An episode begins."""
        session.draws = 0

    def _drop(self, session: Session, error: ServerError | None) -> None:
        with self._lock:  # from here on the inference thread cannot take it
            request, session.waiting = session.waiting, None
        if request is None:
            return
        self.metrics.waiting.dec()
        if request.timer:
            request.timer.cancel()
        if not request.future.done():
            request.future.set_exception(error) if error else request.future.cancel()

    def _expire(self, session: Session, request: Request) -> None:
        if session.waiting is request:
            waited = (time.monotonic() - request.arrived) * 1e3
            self._drop(session, ServerError("STALE", f"its turn did not come within {waited:.0f} ms"))

    def _expected_wait(self, session: Session) -> float:
        """Seconds until the turn of this robot, from what forward passes took."""
        if not self.costs:
            return 0.0
        with self._lock:
            ahead = sum(s.waiting is not None for s in self._turns if s is not session)
        running, since = 0.0, self.busy_since
        if since is not None:
            running = max(0.0, self.costs[1] - (time.monotonic() - since))
        size = self.rows_for(ahead)
        return running + (ahead / size * self.costs[size] if ahead else 0.0)

    # ---- turns ------------------------------------------------------------------------------------------------------

    def rows_for(self, waiting: int) -> int:
        """How many of the robots that wait go into one pass: several, where that shortens the mean wait."""
        useful = [n for n in self.costs if 1 < n <= waiting and self.costs[n] < (n + 1) / 2 * self.costs[1]]
        return min(useful, key=lambda n: self.costs[n] / n, default=1)

    async def start(self, row: Mapping[str, Any] | None = None) -> None:
        """Start the inference thread; it warms the policy up with this observation first.

        Raises:
            VlaError: what the policy has to say about the observation.
        """
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        threading.Thread(target=self._work, args=(loop, ready, row), name="vla-infer", daemon=True).start()
        await ready

    def _work(self, loop: asyncio.AbstractEventLoop, ready: asyncio.Future[None], row: Any) -> None:
        """The inference thread."""
        try:
            if row is not None:
                self.warm_up(row)
        except BaseException as error:
            loop.call_soon_threadsafe(ready.set_exception, error)
            return
        loop.call_soon_threadsafe(ready.set_result, None)
        chosen: list[tuple[Session, Request]] = []
        try:
            while True:
                with self._lock:
                    while not (chosen := self._choose()) and not self._over:
                        self._lock.wait()
                if not chosen:
                    return
                asks = [request.ask for _, request in chosen]
                seeds = [self._seed_of(session, request.ask) for session, request in chosen]
                self.busy_since = began = time.monotonic()
                answers = self.forward(asks, seeds)
                took, self.busy_since = time.monotonic() - began, None
                self._learn(len(asks), took)
                loop.call_soon_threadsafe(self._deliver, chosen, answers, began, took)
        except BaseException as error:  # a policy may even end the thread: say so, and leave nobody without an answer
            self._broken, self.busy_since = True, None
            if loop.is_closed():
                return
            log.critical("the inference thread ended; the server is not ready any more", exc_info=error)
            lost = [ServerError("INTERNAL", f"the policy ended with {type(error).__name__}") for _ in chosen]
            loop.call_soon_threadsafe(self._deliver, chosen, lost, time.monotonic(), 0.0)

    def _deliver(self, chosen: list[tuple[Session, Request]], answers: list[Any], began: float, took: float) -> None:
        """Hand the results of a pass out, on the loop."""
        for (session, request), answer in zip(chosen, answers, strict=True):
            with self._lock:
                session.running -= 1
            self.metrics.waiting.dec()
            self.metrics.wait.observe(began - request.arrived)
            if request.timer:
                request.timer.cancel()
            if request.future.done():  # the robot went away
                continue
            if isinstance(answer, ServerError):
                request.future.set_exception(answer)
            else:
                timing = {"infer_ms": took * 1e3, "batch": len(chosen), "queue_ms": (began - request.arrived) * 1e3}
                request.future.set_result({**answer, "server_timing": timing})

    def _choose(self) -> list[tuple[Session, Request]]:
        """Whose turn it is, with the lock held; they wait no longer."""
        waiting = [session for session in self._turns if session.waiting is not None]
        chosen = []
        for session in waiting[: self.rows_for(len(waiting))]:
            request = session.waiting
            assert request is not None
            session.waiting, session.running = None, session.running + 1
            session.draws += 1
            self._turns.remove(session)
            self._turns.append(session)
            chosen.append((session, request))
        return chosen

    def _seed_of(self, session: Session, ask: Ask) -> int:
        given = ask.options.get("seed")
        return self.seed * 1_000_003 + session.number * 10_007 + session.draws if given is None else int(given)

    def _learn(self, rows: int, seconds: float) -> None:
        """A pass with a size that was warmed up took so long; an outlier weighs little."""
        self.metrics.infer.observe(seconds)
        self.metrics.batch.observe(rows)
        old = self.costs.get(rows)
        if not self.costs:
            self.costs = {1: seconds}
        elif old is not None:  # a new table: the loop may be reading the old one
            self.costs = {**self.costs, rows: old + 0.1 * (min(seconds, 2 * old) - old)}

    # ---- in the inference thread ------------------------------------------------------------------------------------

    def forward(self, asks: Sequence[Ask], seeds: Sequence[int]) -> list[dict[str, Any] | ServerError]:
        """One pass for these requests; a bad one costs the others nothing but time."""
        try:
            extra = extras(asks)
            answers = self.policy.infer_batch([ask.row for ask in asks], seeds=list(seeds), **extra)
            if len(answers) != len(asks):
                raise ValueError(f"{len(answers)} answers to {len(asks)} observations")
            return [self._checked(answer) for answer in answers]
        except Exception as error:
            if len(asks) > 1:
                return [self.forward([ask], [seed])[0] for ask, seed in zip(asks, seeds, strict=True)]
            return [self._explained(error)]

    def _checked(self, answer: Mapping[str, Any]) -> dict[str, Any] | ServerError:
        actions = np.asarray(answer["actions"])
        if actions.ndim != 2 or not len(actions) or (self.action_dim and actions.shape[1] != self.action_dim):
            log.error("the policy answered with actions of shape %s", actions.shape)
            return ServerError("INTERNAL", f"the policy's chunk has shape {list(actions.shape)}")
        if not np.isfinite(actions).all():
            self.metrics.nonfinite.inc()
            return ServerError("NONFINITE_ACTION", "the chunk has NaN or infinite values; it is not sent")
        return {**answer, "actions": actions}

    def _explained(self, error: Exception) -> ServerError:
        if isinstance(error, (ActionError, DecodeError)):  # the policy refused its own chunk, and says why
            if "NaN" not in error.what:
                return ServerError("BAD_ACTION", error.what)
            self.metrics.nonfinite.inc()
            return ServerError("NONFINITE_ACTION", error.what)
        if isinstance(error, VlaError):
            lines = str(error).splitlines()[:10]
            return ServerError("BAD_OBSERVATION", "\n".join(line[:300] for line in lines))
        number = uuid.uuid4().hex[:8]
        log.error("the policy failed (error %s)", number, exc_info=error)
        return ServerError("INTERNAL", f"the policy failed with {type(error).__name__}", error=number)

    def warm_up(self, row: Mapping[str, Any]) -> None:
        """Run every size of batch that pays (1, 2, 4, ...), so that later nothing is compiled or allocated anew.

        What the policy makes of an observation that shows nothing is nobody's chunk: it may refuse it.

        Raises:
            VlaError: it cannot read the observation.
        """
        size = 1
        while size <= self.max_batch:
            took = []
            for _ in range(2):
                began = time.monotonic()
                with contextlib.suppress(ActionError, DecodeError):
                    self.policy.infer_batch([row] * size, seeds=list(range(size)))
                took.append(time.monotonic() - began)
            self.costs[size] = min(took)
            if size > 1 and self.rows_for(size) != size:
                break
            size *= 2

    @property
    def stuck(self) -> bool:
        """Whether the forward pass under way does not end, or the inference thread has ended."""
        since = self.busy_since
        return self._broken or (since is not None and time.monotonic() - since > STUCK)

    async def drain(self, seconds: float) -> None:
        """Take nothing more; wait until what was taken is answered."""
        self.draining = True
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(s.waiting or s.running for s in self._turns):
            await asyncio.sleep(0.01)
        with self._lock:
            self._over = True
            self._lock.notify_all()


def extras(asks: Sequence[Ask]) -> dict[str, Any]:
    """What requests bring for real-time chunking, as further arguments of `infer_batch`; none when none brings it.

    Raises:
        ServerError: they want different ways of it, which one pass cannot give; each then gets a pass of its own.
    """
    if all(ask.options.get("prefix") is None for ask in asks):
        return {}
    modes = {ask.options.get("rtc", "") for ask in asks if ask.options.get("prefix") is not None}
    if len(modes) > 1:
        raise ServerError("INTERNAL", f"one pass, {len(modes)} ways of real-time chunking")
    found: dict[str, Any] = {"prefixes": [ask.options.get("prefix") for ask in asks]}
    found["delays"] = [ask.options.get("delay", 0) for ask in asks]
    return {**found, "rtc": mode} if (mode := modes.pop()) else found


def check_finite(row: Mapping[str, Any], path: str = "") -> None:
    """Refuse an observation with NaN or infinite values.

    Raises:
        ServerError: BAD_OBSERVATION, with key and index.
    """
    for key, value in row.items():
        where = f"{path}{key}"
        if isinstance(value, Mapping):
            check_finite(value, f"{where}/")
        elif isinstance(value, (float, list)) or getattr(getattr(value, "dtype", None), "kind", "") == "f":
            try:
                bad = ~np.isfinite(np.asarray(value, np.float64))
            except (TypeError, ValueError):
                continue  # a list of words, or of things of several kinds: the policy judges it
            if bad.any():
                at = ", ".join(map(str, np.argwhere(bad)[0]))
                raise ServerError("BAD_OBSERVATION", f"{where}[{at}] is NaN or infinite")
