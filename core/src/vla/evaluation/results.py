"""What an evaluation found: episodes, success with its interval, the table per task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from attrs import asdict, field, frozen


@frozen
class Motion:
    """How smooth executed actions are, in half ranges of the action space (root mean square over dims).

    Attributes:
        seam_jump: from the last action of one chunk to the first of the next, mean over seams; None without a seam.
        step: from any action to the next: what a jump has to be compared with.
        seam_jerk: second differences of actions that touch a seam, root mean square; None without a seam.
        jerk: all second differences. Of relative actions that is the third difference of the position.
    """

    seam_jump: float | None
    step: float
    seam_jerk: float | None
    jerk: float


@frozen
class Episode:
    """One rollout.

    Attributes:
        seed: the environment was reset with it; it fixes the scene and the instruction.
        task: the row of the table it belongs to.
        prompt: the instruction that decides success.
        told: the instruction the policy got; another one when instructions are shuffled.
        steps: control steps taken.
        calls: chunks asked for.
        refused: why the last chunk was refused (`vla.errors.ActionError`, `DecodeError`), which ends an episode as a
            failure: a robot would have stopped. "": none was.
        motion: how smooth the executed actions were.
    """

    index: int
    seed: int
    task: str
    prompt: str
    told: str
    success: bool
    steps: int
    calls: int
    refused: str = ""
    motion: Motion | None = None


@frozen
class Evaluation:
    """All episodes of one policy in one environment."""

    policy: str
    env: str
    settings: Mapping[str, Any]  # of the environment
    execute: int  # steps executed of each chunk
    instruction: str  # given | shuffled
    episodes: tuple[Episode, ...]
    seconds: float = 0.0
    digest: str = ""  # identity of the model
    pictures: str = "given"  # given | swapped
    differences: tuple[str, ...] = ()  # what the environment names otherwise than the data of the policy
    latency: int = 0  # steps between an observation and its chunk
    rtc: str = "none"  # how chunks are put together, see `vla.rtc`
    late: int = 0  # chunks that came too late to be used

    @property
    def successes(self) -> int:
        """Episodes that succeeded."""
        return sum(e.success for e in self.episodes)

    @property
    def refused(self) -> int:
        """Episodes that ended because a chunk was refused."""
        return sum(bool(e.refused) for e in self.episodes)

    @property
    def rate(self) -> float:
        """Share of episodes that succeeded."""
        return self.successes / len(self.episodes)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the success rate."""
        return wilson(self.successes, len(self.episodes))

    def motion(self, name: str) -> tuple[float, float, int]:
        """(mean over episodes, half its 95 % interval, episodes) of a field of `Motion`, where it is not None."""
        values = [getattr(e.motion, name) for e in self.episodes if e.motion is not None]
        values = [v for v in values if v is not None]
        if not values:
            return math.nan, math.nan, 0
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))
        return mean, 1.96 * spread / math.sqrt(len(values)), len(values)

    def tasks(self) -> list[tuple[str, int, int, tuple[float, float]]]:
        """(task, successes, episodes, interval) per task, in alphabetical order."""
        rows = []
        for task in sorted({e.task for e in self.episodes}):
            mine = [e.success for e in self.episodes if e.task == task]
            rows.append((task, sum(mine), len(mine), wilson(sum(mine), len(mine))))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON stores them."""
        low, high = self.interval
        return {
            "policy": self.policy,
            "model": self.digest,
            "env": self.env,
            "env_settings": dict(self.settings),
            "execute": self.execute,
            "instruction": self.instruction,
            "pictures": self.pictures,
            "differences": list(self.differences),
            "latency_steps": self.latency,
            "rtc": self.rtc,
            "late_chunks": self.late,
            "success": {"rate": self.rate, "low": low, "high": high, "n": len(self.episodes)},  # 95 % Wilson
            "tasks": [
                {"task": t, "successes": k, "episodes": n, "low": lo, "high": hi} for t, k, n, (lo, hi) in self.tasks()
            ],
            "seconds": self.seconds,
            "episodes": [asdict(e) for e in self.episodes],
        }

    def __str__(self) -> str:
        low, high = self.interval
        text = f"{self.successes} of {len(self.episodes)} ({self.rate:.0%}; 95 % interval {low:.0%} to {high:.0%})"
        return "; ".join([text, *self.notes()])

    def notes(self) -> list[str]:
        """What a reader of the rate has to know."""
        found = [f"the environment and the data of the policy differ in {text}" for text in self.differences]
        if why := next((e.refused for e in self.episodes if e.refused), ""):
            found.append(f"{self.refused} of {len(self.episodes)} episodes ended by a chunk that was refused: {why}")
        return found


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a success rate (Wilson 1927); 95 % by default. Sound for 0 and for all successes."""
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials")
    rate = successes / trials
    centre = rate + z * z / (2 * trials)
    spread = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # Exact at the ends, where rounding would leave 1e-17.
    low = 0.0 if successes == 0 else max(0.0, (centre - spread) / scale)
    high = 1.0 if successes == trials else min(1.0, (centre + spread) / scale)
    return low, high


@frozen
class Comparison:
    """Two evaluations on the same episodes."""

    better: int  # episodes only the first one solved
    worse: int  # episodes only the second one solved
    p: float = field()  # exact McNemar test, two-sided


def compare(first: Evaluation, second: Evaluation) -> Comparison:
    """Paired comparison, episode by episode (exact McNemar test).

    Raises:
        ValueError: the two were not run on the same episodes.
    """
    if [e.seed for e in first.episodes] != [e.seed for e in second.episodes] or first.env != second.env:
        raise ValueError("the two evaluations were not run on the same episodes")
    pairs = [(a.success, b.success) for a, b in zip(first.episodes, second.episodes, strict=True)]
    better, worse = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    n = better + worse
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1)) / 2**n
    return Comparison(better, worse, min(1.0, 2 * tail))
