"""A buffer of actions that the control tick reads without ever waiting, filled from a policy in the background.

Steps are counted by the ticks of this robot, times are this machine's monotonic clock. Action k of a chunk belongs to
the step of its observation plus k: so a chunk that comes late loses its first actions, a chunk that comes twice changes
nothing, and of two chunks the one with the newer observation decides, in whatever order they arrive.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_client.guard import Guard
from vla_client.remote import OtherModel, RemoteError
from vla_client.wire import ServerError

FALLBACKS = ("hold", "stop", "continue")


@dataclass
class Tick:
    """The decision of one control step.

    Attributes:
        action: [a] to execute; None only before the first chunk, when there is nothing to hold and no stop action.
        source: "chunk", or the fallback that took its place: "hold", "stop", "continue"; "none" without an action.
        step: number of the tick.
        age: seconds since the observation that the action follows from; None for a fallback.
        state: "starting", "streaming", "degraded" (a fallback acts), "stalled" (the guard gave up: `reset`).
    """

    action: np.ndarray | None
    source: str
    step: int
    age: float | None
    state: str


class ChunkPlayer:
    """Plays chunks of a policy at a fixed rate.

    Args:
        policy: a `RemotePolicy`, or anything with `infer(obs, step=)`.
        hz: ticks per second.
        fallback: what to do at a tick for which no action is there, or only one that is too old: "hold" (the last
            action again), "stop" (`stop_action`), "continue" (go on as in the last tick, for `coast` ticks, then hold).
        control: "position" or "velocity". A velocity that is held goes on moving: only "stop" is allowed then.
        stop_action: [a]; what stops the robot, e.g. zeros for velocities.
        every: ticks from one request to the next; default: half a chunk. Sooner, when the last answers took so long
            that the next one would come too late.
        max_age: seconds since its observation after which an action is not executed; default: the length of a chunk.
        coast: ticks that "continue" lasts.
        guard: the last check; its interventions are counted.
        rtc: real-time chunking: the policy is told what will be executed until its answer arrives, so that the new
            chunk goes on from there. "" for none, "best" for the best way that the policy can do, or the way's name
            ("guided", ...).
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        policy: Any,
        *,
        hz: float,
        fallback: str,
        control: str = "position",
        stop_action: Any = None,
        every: int | None = None,
        max_age: float | None = None,
        coast: int = 5,
        guard: Guard | None = None,
        rtc: str = "",
        clock: Callable[[], float] = time.monotonic,
    ):
        if fallback not in FALLBACKS:
            raise ValueError(f"fallback is one of {FALLBACKS}, not {fallback!r}")
        if control not in ("position", "velocity"):
            raise ValueError(f"control is 'position' or 'velocity', not {control!r}")
        if control == "velocity" and fallback != "stop":
            raise ValueError("a velocity that is held goes on moving: fallback='stop', with a stop_action")
        if fallback == "stop" and stop_action is None:
            raise ValueError("fallback='stop' needs a stop_action, e.g. zeros for velocities")
        if not hz > 0:
            raise ValueError(f"hz is above 0, not {hz}")
        self.policy, self.hz, self.fallback, self.coast = policy, float(hz), fallback, coast
        self.stop_action = None if stop_action is None else np.asarray(stop_action, np.float64)
        self.every, self.max_age, self.guard, self.clock = every, max_age, guard or Guard(), clock
        self.rtc, self._delays = rtc, deque([1], maxlen=10)  # steps that the last answers took
        self.step = -1
        self.error = ""  # what went wrong last; "" again after a chunk
        self.counts: dict[str, int] = {}
        self._buffer: dict[int, tuple] = {}  # step -> (step of its observation, time of its observation, action)
        self._horizon = 0
        self._newest: tuple | None = None  # (step, time, observation)
        self._asked = -1  # step of the observation that was asked about last
        self._coasted = 0
        self._sent: list = []  # the last two actions
        self._lock = threading.Condition()
        self._over = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ChunkPlayer:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self) -> ChunkPlayer:
        """Start asking in the background."""
        self._over = False
        self._thread = threading.Thread(target=self._ask_on, name="vla-chunks", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop asking."""
        with self._lock:
            self._over = True
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.join(5)

    def reset(self) -> None:
        """An episode begins, or a stall is over: forget chunks, and what was executed."""
        with self._lock:
            self._buffer.clear()
            self._asked, self._newest, self._coasted, self._sent = self.step, None, 0, []
        self.guard.reset()

    # ---- the control tick -------------------------------------------------------------------------------------------

    def tick(self, obs: Mapping[str, Any] | None = None) -> Tick:
        """The decision of this control step; never waits for the network.

        Args:
            obs: what the robot sees now. It is kept until it is sent: do not write into its arrays later.
        """
        now = self.clock()
        with self._lock:
            self.step += 1
            if obs is not None:
                self._newest = (self.step, now, obs)
                self._lock.notify_all()
            for old in [step for step in self._buffer if step < self.step]:
                del self._buffer[old]
            entry = self._buffer.get(self.step)
            age_limit = self.max_age if self.max_age is not None else self._horizon / self.hz
        self._count("ticks")
        if entry is not None and now - entry[1] > age_limit:
            self._count("stale")
            entry = None
        if entry is not None and not self.guard.stalled:
            action = self.guard.check(entry[2])
            if action is not None and not self.guard.stalled:
                self._coasted = 0
                return self._decided(action, "chunk", now - entry[1])
        return self._fall_back()

    def _fall_back(self) -> Tick:
        source, action = self.fallback, None
        if source == "continue" and len(self._sent) == 2 and self._coasted < self.coast and not self.guard.stalled:
            self._coasted += 1
            action = self.guard.check(2 * self._sent[1] - self._sent[0])
        elif source == "stop":
            action = self.stop_action
        if action is None and source != "stop":
            source, action = "hold", self._sent[-1] if self._sent else self.stop_action
        return self._decided(action, source if action is not None else "none", None)

    def _decided(self, action: np.ndarray | None, source: str, age: float | None) -> Tick:
        self._count(source)
        if action is not None:
            self.guard.executed(action)
            self._sent = [*self._sent[-1:], np.array(action, np.float64)]
        good = "streaming" if age is not None else "degraded" if self._horizon else "starting"
        return Tick(action, source, self.step, age, "stalled" if self.guard.stalled else good)

    # ---- chunks -----------------------------------------------------------------------------------------------------

    def add(self, step: int, seen: float, actions: Any) -> int:
        """Take a chunk [t a] whose observation is of this step and time; gives how many of its actions are of use."""
        chunk = np.asarray(actions, np.float64)
        if chunk.ndim != 2 or not len(chunk):
            raise ValueError(f"a chunk is [t a], not {chunk.shape}")
        used = 0
        with self._lock:
            self._horizon = max(self._horizon, len(chunk))
            for k in range(len(chunk)):
                known = self._buffer.get(step + k)
                if step + k > self.step and (known is None or known[0] < step):
                    self._buffer[step + k] = (step, seen, chunk[k])
                    used += 1
        self._count("chunks")
        self._count("late", min(len(chunk), max(0, self.step + 1 - step)))
        return used

    @property
    def ahead(self) -> int:
        """Actions that are there for the steps to come, without a gap."""
        with self._lock:
            return self._planned()

    def _planned(self) -> int:
        n = 0
        while self.step + 1 + n in self._buffer:
            n += 1
        return n

    def _due(self) -> tuple | None:
        """The observation to ask about now, with the lock held."""
        if self._newest is None or self._newest[0] <= self._asked:
            return None
        every = self.every if self.every is not None else max(1, self._horizon // 2)
        late = self._planned() <= max(self._delays) + 2  # the last answers took about as long as what is left
        return self._newest if late or self._asked < 0 or self._newest[0] - self._asked >= every else None

    def _going_on(self, step: int) -> dict[str, Any]:
        """What is planned from this step on, and how much of it will be executed before an answer is here."""
        planned = []
        while (entry := self._buffer.get(step + len(planned))) is not None:
            planned.append(entry[2])
        if not planned:
            return {}
        more: dict[str, Any] = {"prefix": np.stack(planned), "delay": min(max(self._delays), len(planned))}
        return more if self.rtc == "best" else {**more, "rtc": self.rtc}

    def _ask_on(self) -> None:
        while True:
            with self._lock:
                while not self._over and (due := self._due()) is None:
                    self._lock.wait(0.5)
                if self._over:
                    return
                step, seen, obs = due
                self._asked = step
                more = self._going_on(step) if self.rtc else {}
            try:
                answer = self.policy.infer(obs, step=step, **more)
                self._delays.append(self.step - step)
                self.add(step, seen, answer["actions"])
                self.error = ""
            except (RemoteError, ServerError) as error:
                self.error = str(error)
                self._count(getattr(error, "kind", type(error).__name__))
                pause = (getattr(error, "retry_after_ms", None) or 20.0) / 1e3
                time.sleep(min(1.0, pause) if not isinstance(error, OtherModel) else 0.5)
            except Exception as error:  # the policy is the user's; the arm must not notice
                self.error = f"{type(error).__name__}: {error}"
                self._count("failed")
                time.sleep(0.1)

    def _count(self, what: str, n: int = 1) -> None:
        if n:
            self.counts[what] = self.counts.get(what, 0) + n
