"""Robots and their turns: one inference thread, one waiting request per robot, round robin between robots.

A robot that sends a newer observation replaces the one that waits. When a turn comes, robots that wait are taken
together if one forward pass for all is known to be faster (measured at warm-up, kept up to date). Nobody waits past a
deadline: an answer, or a typed error, always comes.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    started: float = 0.0


@define(eq=False)
class Session:
    """One connected robot."""

    number: int
    peer: str
    name: str = ""
    waiting: Request | None = None
    running: bool = False
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
        self._wake = asyncio.Event()
        self._worker = ThreadPoolExecutor(1, "vla-infer")

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
        self.metrics.sessions.set(len(self.sessions))
        self.join(session)
        return session

    def join(self, session: Session) -> None:
        """Give a session turns, without a place: the page's own requests."""
        self._turns.append(session)

    def idlest(self) -> Session | None:
        """The robot that has asked nothing for the longest, if that is longer than `idle`."""
        quiet = [s for s in self.sessions.values() if s.waiting is None and not s.running]
        longest = min(quiet, key=lambda s: s.last, default=None)
        return longest if longest and time.monotonic() - longest.last > self.idle > 0 else None

    def close(self, session: Session) -> None:
        """The robot is gone; a result that is under way is dropped."""
        self.sessions.pop(session.number, None)
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
            session.waiting, session.row, session.step = request, ask.row, ask.options.get("step")
            self.metrics.waiting.inc()
            self._wake.set()
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
        request = session.waiting
        if request is None:
            return
        session.waiting = None
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
        ahead = sum(s.waiting is not None for s in self._turns if s is not session)
        running = 0.0
        if self.busy_since is not None:
            running = max(0.0, self.costs[1] - (time.monotonic() - self.busy_since))
        size = self.rows_for(ahead)
        return running + (ahead / size * self.costs[size] if ahead else 0.0)

    # ---- turns ------------------------------------------------------------------------------------------------------

    def rows_for(self, waiting: int) -> int:
        """How many of the robots that wait go into one pass: several, where that shortens the mean wait."""
        useful = [n for n in self.costs if 1 < n <= waiting and self.costs[n] < (n + 1) / 2 * self.costs[1]]
        return min(useful, key=lambda n: self.costs[n] / n, default=1)

    async def run(self) -> None:
        """Serve turns until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            chosen = self._choose()
            if not chosen:
                self._wake.clear()
                continue
            asks = [request.ask for _, request in chosen]
            seeds = [self._seed_of(session, request.ask) for session, request in chosen]
            self.busy_since = began = time.monotonic()
            for _, request in chosen:
                request.started = began
                self.metrics.wait.observe(began - request.arrived)
            try:
                answers = await loop.run_in_executor(self._worker, self.forward, asks, seeds)
            finally:
                self.busy_since = None
            self._learn(len(asks), time.monotonic() - began)
            for (session, request), answer in zip(chosen, answers, strict=True):
                session.running = False
                if request.future.done():  # the robot went away
                    continue
                if isinstance(answer, ServerError):
                    request.future.set_exception(answer)
                else:
                    timing = {"infer_ms": (time.monotonic() - began) * 1e3, "batch": len(asks)}
                    timing["queue_ms"] = (began - request.arrived) * 1e3
                    request.future.set_result({**answer, "server_timing": timing})

    def _choose(self) -> list[tuple[Session, Request]]:
        waiting = [session for session in self._turns if session.waiting is not None]
        chosen = []
        for session in waiting[: self.rows_for(len(waiting))]:
            request = session.waiting
            assert request is not None
            session.waiting, session.running = None, True
            session.draws += 1
            self.metrics.waiting.dec()
            if request.timer:
                request.timer.cancel()
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
        if not self.costs:
            self.costs[1] = seconds
        elif rows in self.costs:
            self.costs[rows] += 0.1 * (min(seconds, 2 * self.costs[rows]) - self.costs[rows])

    # ---- in the inference thread ------------------------------------------------------------------------------------

    def forward(self, asks: Sequence[Ask], seeds: Sequence[int]) -> list[dict[str, Any] | ServerError]:
        """One pass for these requests; a bad one costs the others nothing but time."""
        try:
            extra = extras(asks)
            answers = self.policy.infer_batch([ask.row for ask in asks], seeds=list(seeds), **extra)
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
        """Run every size of batch that pays (1, 2, 4, ...), so that later nothing is compiled or allocated anew."""
        size = 1
        while size <= self.max_batch:
            took = []
            for _ in range(2):
                began = time.monotonic()
                self.policy.infer_batch([row] * size, seeds=list(range(size)))
                took.append(time.monotonic() - began)
            self.costs[size] = min(took)
            if size > 1 and self.rows_for(size) != size:
                break
            size *= 2

    @property
    def stuck(self) -> bool:
        """Whether the forward pass under way does not end."""
        return self.busy_since is not None and time.monotonic() - self.busy_since > STUCK

    async def drain(self, seconds: float) -> None:
        """Take nothing more; wait until what was taken is answered."""
        self.draining = True
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(s.waiting or s.running for s in self._turns):
            await asyncio.sleep(0.01)
        self._worker.shutdown(wait=False, cancel_futures=True)


def extras(asks: Sequence[Ask]) -> dict[str, Any]:
    """What requests bring beside the observation, as further arguments of `infer_batch`, only when one brings it."""
    found = {}
    for name, argument in (("prefix", "prefixes"), ("delay", "delays")):
        values = [ask.options.get(name) for ask in asks]
        if any(value is not None for value in values):
            found[argument] = values
    return found


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
