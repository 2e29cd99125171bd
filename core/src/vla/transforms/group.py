"""Steps, and the `Group` of ordered steps between a robot's raw dict and the model's input, and back.

A step is a callable on a flat dict (nested keys joined by "/"). It returns a new dict and changes no array in place. It
declares what it touches:

    reads    keys it needs; "images/*" is any camera, at least one; a "?" at the end means: if it is there
    writes   keys it may set or remove, same patterns
    shapes   optional text for the table, e.g. "actions [t a] -> [t 32]"
    batched    True: gives the same result for arrays with leading batch axes, state [... s] with actions [... t a]
    pointwise  True: works on every single action by itself, whatever its chunk and state (implies batched)

The last two are promises that let statistics run over whole arrays; both default to False.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from attrs import evolve, frozen

from vla.errors import DataError, PartError

Flat = dict[str, Any]

INPUT_STAGES = ("repack", "robot", "delta", "normalize", "prompt", "images", "tokenize", "pad")
OUTPUT_STAGES = ("detokenize", "unpad", "unnormalize", "absolute", "robot")
# What a part writes beside a step: which way, and where on that way.
STAGES = tuple(f"inputs.{s}" for s in INPUT_STAGES) + tuple(f"outputs.{s}" for s in OUTPUT_STAGES)
PUSHED = "pushed"  # the stage of steps added by `Group.push`


class Step(Protocol):
    """See the module's docstring."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]

    def __call__(self, data: Flat) -> Flat:
        """The dict after this step."""
        ...


@frozen
class FunctionStep:
    """A step made of a plain function."""

    name: str
    function: Callable[[Flat], Flat]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    shapes: str = ""
    batched: bool = False
    pointwise: bool = False

    def __call__(self, data: Flat) -> Flat:
        return self.function(data)


@frozen
class Placed:
    """A step in its stage; `origin` says who contributed it (a path such as `robot`, or `core`)."""

    stage: str
    step: Any
    origin: str = ""


def flatten(data: Mapping[str, Any], prefix: str = "") -> Flat:
    """Nested dicts as one dict; keys joined by "/"."""
    out: Flat = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out.update(flatten(value, f"{name}/"))
        else:
            out[name] = value
    return out


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `flatten` for one level: "images/a/b" -> {"images": {"a/b": ...}}."""
    out: dict[str, Any] = {}
    for key, value in flat.items():
        head, slash, rest = key.partition("/")
        if slash:
            out.setdefault(head, {})[rest] = value
        else:
            out[head] = value
    return out


def as_array(value: Any, name: str, numbers: bool = False) -> np.ndarray:
    """An array from an array of numpy, torch or JAX, or from lists.

    Args:
        name: for messages.
        numbers: refuse text, objects and everything else that is no number.

    Raises:
        DataError: it cannot be read as an array, or parts of it are masked.
    """
    if np.ma.is_masked(value):
        raise DataError(f"{name} is masked in places", field=name, got=f"{np.ma.count_masked(value)} masked values")
    try:
        x = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # torch: on a device, with a gradient; lists of many lengths
        got = f"{type(value).__module__}.{type(value).__qualname__}: {str(error).splitlines()[0][:80]}"
        raise DataError(
            f"{name} cannot be read as an array", field=name, got=got, fix="send an array of numpy"
        ) from error
    if numbers and x.dtype.kind not in "fiub":
        raise DataError(f"{name} must be numbers", field=name, got=f"{x.dtype} {x.shape}")
    return x


def step_name(step: Any) -> str:
    """The name of a step in tables and errors."""
    return getattr(step, "name", "") or type(step).__name__


def matches(pattern: str, keys: Iterable[str]) -> list[str]:
    """The keys that a pattern of `reads` or `writes` stands for."""
    pattern = pattern.rstrip("?")
    if pattern.endswith("*"):
        return [key for key in keys if key.startswith(pattern[:-1])]
    return [key for key in keys if key == pattern]


def missing(step: Any, keys: Iterable[str]) -> list[str]:
    """Patterns the step reads that no key satisfies; those with "?" may be absent."""
    have = set(keys)
    return [p for p in step.reads if not p.endswith("?") and p not in have and not matches(p, have)]


@frozen
class Group:
    """Ordered input steps and output steps.

    Attributes:
        input_steps, output_steps: in the order they run.
        codec_dim: values per action that the model's tokenizer and the robot know, before padding to spec.action_dim.
        known: keys that a sample may have, as patterns; (): any. A key that nobody reads would be left out without a
            word: a misspelt `actions_is_pad` turns its mask off.
    """

    input_steps: tuple[Placed, ...] = ()
    output_steps: tuple[Placed, ...] = ()
    codec_dim: int = 0
    known: tuple[str, ...] = ()

    def inputs(self, sample: Mapping[str, Any], until: str | None = None) -> dict[str, Any]:
        """Model input of one raw sample; the sample is not changed.

        Args:
            sample: nested or flat.
            until: the last stage to run, e.g. "normalize"; default: all.

        Raises:
            DataError: something a step reads is missing, or a value is not what the policy needs.
        """
        return nest(_run(self._flat(sample), self._upto(until)))

    def inputs_batch(self, samples: Sequence[Mapping[str, Any]], until: str | None = None) -> list[dict[str, Any]]:
        """As `inputs` for many samples; steps that have `many(list) -> list` (tokenising) see them all at once."""
        rows = [self._flat(sample) for sample in samples]
        for placed in self._upto(until):
            if hasattr(placed.step, "many") and rows:
                for row in rows:
                    _check(placed, row)
                rows = placed.step.many(rows)
            else:
                rows = [_run(row, (placed,)) for row in rows]
        return [nest(row) for row in rows]

    def _flat(self, sample: Mapping[str, Any]) -> Flat:
        flat = flatten(sample)
        if self.known and (unknown := [k for k in flat if not any(matches(pattern, (k,)) for pattern in self.known)]):
            close = difflib.get_close_matches(unknown[0], self.known, 1, 0.6)
            raise DataError(
                "a sample has a key that nothing reads",
                field=unknown[0],
                got=sorted(flat),
                expected=", ".join(self.known),
                fix=f"did you mean {close[0]}?"
                if close
                else "leave it out; what a head of your own reads goes below extra/",
            )
        return flat

    def outputs(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        """The model's answer in the robot's units.

        Args:
            answer: "actions" [t action_dim] or "tokens" [n], and "state" as the model saw it.
        """
        return nest(_run(flatten(answer), self.output_steps))

    def push(self, inputs: Iterable[Any] = (), outputs: Iterable[Any] = (), origin: str = "") -> Group:
        """The group with more steps around it: inputs go to the end, outputs to the front (openpi's rule)."""
        more_in = tuple(Placed(PUSHED, step, origin) for step in inputs)
        more_out = tuple(Placed(PUSHED, step, origin) for step in outputs)
        return evolve(self, input_steps=self.input_steps + more_in, output_steps=more_out + self.output_steps)

    def _upto(self, until: str | None) -> tuple[Placed, ...]:
        if until is None:
            return self.input_steps
        if until not in INPUT_STAGES:
            raise DataError("no such input stage", field="until", got=until, expected=list(INPUT_STAGES))
        last = INPUT_STAGES.index(until)
        return tuple(p for p in self.input_steps if p.stage in INPUT_STAGES[: last + 1])

    def table(self, sample: Mapping[str, Any] | None = None) -> str:
        """The steps as text, in running order; with a sample, the shapes that it really had after each input step."""
        seen = _trace(flatten(sample), self.input_steps) if sample is not None else {}
        rows = [("stage", "step", "reads", "writes", "shapes")]
        for way, steps in (("in", self.input_steps), ("out", self.output_steps)):
            for i, p in enumerate(steps):
                shapes = seen.get(i, "") if way == "in" and seen else getattr(p.step, "shapes", "")
                rows.append(
                    (f"{way} {p.stage}", step_name(p.step), " ".join(p.step.reads), " ".join(p.step.writes), shapes)
                )
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[4]]).rstrip() for row in rows]
        return "\n".join([lines[0], "  ".join("-" * w for w in [*widths, 6]), *lines[1:]])

    def __str__(self) -> str:
        return self.table()


def _check(placed: Placed, data: Flat) -> None:
    lacking = missing(placed.step, data)
    if lacking:
        raise DataError(
            f"the step {step_name(placed.step)} (stage {placed.stage}) lacks its input",
            field=lacking[0],
            got=sorted(data),
            expected=" ".join(placed.step.reads),
            fix="give it in the sample, or let an earlier step write it"
            + (f"; the step comes from {placed.origin}" if placed.origin not in ("", "core") else ""),
        )


def _run(data: Flat, steps: Iterable[Placed]) -> Flat:
    for placed in steps:
        _check(placed, data)
        data = placed.step(data)
    return data


def _trace(data: Flat, steps: Sequence[Placed]) -> dict[int, str]:
    out = {}
    for i, placed in enumerate(steps):
        data = _run(data, (placed,))
        keys = [k for pattern in placed.step.writes for k in matches(pattern, data)]
        out[i] = ", ".join(f"{k} {list(np.shape(data[k]))}" for k in keys if not isinstance(data[k], str))
    return out


def order(
    contributions: Iterable[tuple[str, Iterable[tuple[str, Any]]]],
) -> tuple[tuple[Placed, ...], tuple[Placed, ...]]:
    """Input and output steps in their running order.

    Stages run in the fixed order. Within an input stage contributors come in the order given and each one's steps in
    its own order; within an output stage contributors come in the reverse order, so that who came last on the way in
    comes first on the way out. How a contributor mixes its stages does not matter.

    Args:
        contributions: (origin, [(stage, step), ...]) with stages of `STAGES`; the core last, as it closes every stage.

    Raises:
        PartError: an unknown stage, or something that is no step.
    """
    by_stage: dict[str, list[list[Placed]]] = {stage: [] for stage in STAGES}
    for origin, steps in contributions:
        mine: dict[str, list[Placed]] = {}
        for stage, step in steps:
            if stage not in by_stage:
                raise PartError(
                    "no such stage of transforms",
                    field=f"{origin}: {step_name(step)}",
                    got=stage,
                    expected=list(STAGES),
                )
            for name in ("reads", "writes"):
                value = getattr(step, name, None)
                if not isinstance(value, tuple) or not all(isinstance(v, str) for v in value):
                    raise PartError(
                        "a step must declare what it reads and writes",
                        field=f"{origin}: {step_name(step)}.{name}",
                        got=value,
                        expected="a tuple of keys",
                    )
            mine.setdefault(stage, []).append(Placed(stage.partition(".")[2], step, origin))
        for stage, placed in mine.items():
            by_stage[stage].append(placed)
    ins = [p for s in INPUT_STAGES for group in by_stage[f"inputs.{s}"] for p in group]
    outs = [p for s in OUTPUT_STAGES for group in reversed(by_stage[f"outputs.{s}"]) for p in group]
    return tuple(ins), tuple(outs)


def check_order(steps: Sequence[Placed], given: Iterable[str]) -> None:
    """Refuse an order in which a step reads what only a later step writes.

    Args:
        given: patterns that are there from the start.

    Raises:
        PartError: naming both steps.
    """
    start = list(given)
    for i, placed in enumerate(steps):
        before = [w for p in steps[:i] for w in p.step.writes] + start
        for pattern in placed.step.reads:
            if pattern.endswith("?") or any(_overlap(pattern, w) for w in before):
                continue
            for later in steps[i + 1 :]:
                if any(_overlap(pattern, w) for w in later.step.writes):
                    raise PartError(
                        f"the step {step_name(placed.step)} reads what only a later step writes",
                        field=pattern,
                        got=f"{step_name(placed.step)} in {placed.stage}, {step_name(later.step)} in {later.stage}",
                        fix="move one of them to another stage",
                    )


def _overlap(a: str, b: str) -> bool:
    a, b = a.rstrip("?"), b.rstrip("?")
    if a.endswith("*") and b.endswith("*"):
        return a[:-1].startswith(b[:-1]) or b[:-1].startswith(a[:-1])
    if a.endswith("*"):
        return b.startswith(a[:-1])
    if b.endswith("*"):
        return a.startswith(b[:-1])
    return a == b
