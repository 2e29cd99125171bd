"""Real-time chunking: the next chunk is asked for while the last one is executed, and goes on from it.

    time      ..........|<- delay ->|...............
    previous  ---------- ========== ooooooooooooo        = executed before the next one arrives, o its rest
    next                 ========== ~~~~~~~~~~~~~ ------

Modes that change how a chunk is sampled, for heads that offer them (facet `chunking`): `guided` (arXiv 2506.07339),
`trained` (2512.05964, after training with `train.rtc.max_delay`), `inpaint`, and `forced` for tokens. Modes that only
change how chunks are put together, for any policy: `none`, `append`, `aligned`, `blend` (names of LeRobot). Whoever
plays the chunks uses `Timeline`; the axes are t steps, d action dims.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import define, evolve, field

from vla.contracts import Prefix
from vla.errors import DataError, SettingsError
from vla.transforms.group import as_array

SAMPLED = ("guided", "trained", "inpaint", "forced")  # the policy is told the prefix
PLAYED = ("none", "append", "aligned", "blend")  # it is not
MODES = (*PLAYED, *SAMPLED)


def guidance(signal: Sequence[float], noise: Sequence[float], limit: float) -> list[float]:
    """How far each step moves x along the vector-Jacobian product of the error of the clean chunk.

    In flow matching (signal tau, noise 1 - tau) it is the paper's step times min(limit, (1 - tau) / (tau r^2)) with
    r^2 = (1 - tau)^2 / (tau^2 + (1 - tau)^2); written in signal and noise it holds for diffusion too.
    """
    gains = []
    for a, s, a_next, s_next in zip(signal, noise, signal[1:], noise[1:], strict=False):
        weight = limit if a * s <= 0 else min(limit, (a * a + s * s) / (a * s))
        gains.append(float((a_next * s - s_next * a) * weight))
    return gains


def weights(horizon: int, delay: int, overlap: int) -> np.ndarray:
    """How strongly each step [t] is held to the previous chunk: 1 up to `delay`, fading to 0 where it ends (`overlap`).

    c (e^c - 1) / (e - 1) with c falling evenly from 1 to 0 (2506.07339 eq. 5).
    """
    i = np.arange(horizon)
    c = np.clip((overlap - i) / (overlap - delay + 1), 0, 1)
    return np.where(i < delay, 1.0, np.where(i < overlap, c * np.expm1(c) / (np.e - 1), 0.0)).astype(np.float32)


def refusal(mode: str, delay: int, overlap: int, horizon: int, max_delay: int = 0) -> str:
    """Why a chunk cannot go on from `overlap` steps, `delay` of which are executed before it comes; "" if it can.

    What LeRobot admits: no more delay than was trained, steps of the old chunk for all of it, and new steps behind it.
    """
    if delay > overlap:
        return f"{delay} steps are executed meanwhile, and only {overlap} are left of the previous chunk"
    if delay >= horizon:
        return f"{delay} steps are executed meanwhile, and a chunk has {horizon}"
    if mode == "trained" and delay > max_delay:
        return f"the policy was trained to go on from at most {max_delay} steps (train.rtc.max_delay), not {delay}"
    return ""


def prefix_of(
    chunks: Sequence[np.ndarray | None], delays: Sequence[int], shape: tuple[int, int], mode: str, limit: float = 5.0
) -> Prefix:
    """The record from the rest of each row's previous chunk [p d], normalised and padded; None: that row has none."""
    horizon, dim = shape
    values = np.zeros((len(chunks), horizon, dim), np.float32)
    held = np.zeros((len(chunks), horizon), np.float32)
    for row, (chunk, delay) in enumerate(zip(chunks, delays, strict=True)):
        if chunk is not None:
            n = min(len(chunk), horizon)
            values[row, :n] = chunk[:n]
            held[row] = weights(horizon, delay, n)
    counts = [0 if chunk is None else delay for chunk, delay in zip(chunks, delays, strict=True)]
    return Prefix(values, held, np.asarray(counts, np.int32), mode, limit)


def forced(tokenizer: Any, chunks: Sequence[np.ndarray | None], delays: Sequence[int], spec: Any) -> Prefix:
    """The record for a token head: the codec ids of the first steps.

    Raises:
        SettingsError: a token of this codec does not stand for one step.
    """
    if not getattr(tokenizer.codec, "by_step", False):
        raise SettingsError(
            "the tokens of this policy stand for whole chunks, so that none of them can be forced for its first steps",
            field="rtc", got="forced", fix="use the tokenizer binning, or play chunks with rtc=blend",
        )  # fmt: skip
    horizon = spec.action_horizon
    found: list[np.ndarray] = []
    for chunk, delay in zip(chunks, delays, strict=True):
        if chunk is None:
            found.append(np.zeros(0, np.int32))
            continue
        whole = np.concatenate([chunk, np.repeat(chunk[-1:], max(0, horizon - len(chunk)), 0)])[:horizon]
        ids = tokenizer.codec.encode(whole[None])[0]
        found.append(ids[: delay * (len(ids) // horizon)])
    tokens = np.full((len(found), max(map(len, found))), -1, np.int32)
    for row, ids in enumerate(found):
        tokens[row, : len(ids)] = ids
    held = prefix_of(chunks, delays, (horizon, max(c.shape[1] for c in chunks if c is not None)), "forced")
    return evolve(held, tokens=tokens)


def trained_delay(record: Any) -> int:
    """The longest delay that a model was trained with, as its record says."""
    config = record.get("config") if isinstance(record, dict) else None
    return int(((config or {}).get("rtc") or {}).get("max_delay", 0))


@define
class Timeline:
    """The actions that one robot is about to execute, and how a new chunk joins them.

    Attributes:
        mode: one of `MODES`.
        blend: mode `blend`: steps over which the old actions fade into the new ones.
        max_delay: mode `trained`: the longest delay that was trained.
    """

    mode: str = "aligned"
    blend: int = 4
    max_delay: int = 0
    plan: np.ndarray | None = None  # [t d], from the next step on
    step: int = 0  # steps executed so far
    seams: list[int] = field(factory=list)  # steps at which another chunk took over
    late: int = 0  # chunks that came too late to be used

    def __attrs_post_init__(self) -> None:
        if self.mode not in MODES:
            raise SettingsError("no such way to chunk", field="rtc", got=self.mode, expected=list(MODES))

    def next(self) -> np.ndarray | None:
        """The next action [d], or None when there is none: the robot has to hold."""
        self.step += 1
        if self.plan is None or not len(self.plan):
            return None
        action, self.plan = self.plan[0], self.plan[1:]
        return action

    def add(self, chunk: np.ndarray, asked: int, execute: int, promised: int = 0) -> bool:
        """A chunk has come, for the observation at step `asked`.

        Args:
            chunk: [t d].
            asked: `step` when the observation was taken.
            execute: so many of its steps are wanted (`none`, `append`).
            promised: the delay that the policy was told, where it was told one.

        Returns:
            Whether it is used. A chunk is late when all its steps are over, or when more steps were executed than the
            policy knew of: it would go on from actions that nobody took.
        """
        gone = self.step - asked
        old = self.plan if self.plan is not None else chunk[:0]
        if self.mode == "none":
            self.plan, self.seams = chunk[:execute], [*self.seams, self.step]
            return True
        if self.mode == "append":
            self.seams.append(self.step + len(old))
            self.plan = np.concatenate([old, chunk[:execute]])
            return True
        told = self.mode in SAMPLED and len(self.seams) > 0
        if gone >= len(chunk) or (told and gone > promised):
            self.late += 1
            return False
        new = chunk[gone:].copy()
        if self.mode == "blend" and len(old):
            n = min(self.blend, len(old), len(new))
            fade = (np.arange(1, n + 1) / (n + 1))[:, None]
            new[:n] = (1 - fade) * old[:n] + fade * new[:n]
        self.plan, self.seams = new, [*self.seams, self.step]
        return True


def check_prefix(prefix: Any, delay: Any, width: int) -> tuple[np.ndarray, int]:
    """A prefix [p d] and its delay as a caller gave them.

    Raises:
        DataError: no numbers, other axes or width, values that are not finite, or a delay that is no whole number >= 0.
    """
    values = as_array(prefix, "prefix", numbers=True).astype(np.float64)
    if values.ndim != 2 or not len(values) or (width and values.shape[1] != width):
        raise DataError("a prefix is the rest of the previous chunk", field="prefix", got=values.shape,
                        expected=f"[steps, {width or 'dims'}]")  # fmt: skip
    if not np.isfinite(values).all():
        raise DataError("the prefix has NaN or infinite values", field="prefix")
    if isinstance(delay, bool) or not isinstance(delay, int | np.integer) or delay < 0:
        raise DataError("a delay is a number of steps", field="delay", got=repr(delay), expected=">= 0")
    return values, int(delay)


def steps_of(latency: int | str, hz: float) -> int:
    """A delay in control steps, from steps (4, "4steps") or from a time ("80ms", "0.4s"), rounded up.

    Raises:
        SettingsError: it is neither, or negative.
    """
    text = str(latency).strip().lower().replace(" ", "")
    for unit, scale in (("steps", 1.0), ("ms", hz / 1000), ("s", hz), ("", 1.0)):
        number = text.removesuffix(unit)
        if (unit and number == text) or not number.replace(".", "", 1).isdigit():
            continue
        steps = float(number) * scale
        if unit in ("ms", "s") or steps == int(steps):
            return math.ceil(steps - 1e-9)
    raise SettingsError(
        "no such latency", field="latency", got=latency, expected="a time or control steps", fix="80ms, 0.4s or 4steps"
    )
