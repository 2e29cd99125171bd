"""`build_group`: what every part of a variant contributes, in the fixed stages, closed by the core's own steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from attrs import frozen

from vla.errors import DataError, PartError, VlaError
from vla.transforms.group import STAGES, Group, check_order, order
from vla.transforms.images import ResizeImages
from vla.transforms.numbers import CheckRow, Normalize, Pad, RefuseFar, Select, Unnormalize, Unpad
from vla.transforms.stats import Stats
from vla.transforms.text import TOKEN_KEYS, Detokenize, InjectDefaultPrompt, ReadPrompt, Tokenize

_log = logging.getLogger(__name__)
RAW = ("images/*", "state", "actions", "actions_is_pad", "prompt")  # what a raw sample may bring
KNOWN = (*RAW, "image_masks/*", "extra/*", "episode", "frame", "dataset")  # and what a step reads; others are refused
MODEL_KEYS = ("images", "image_masks", "state", *TOKEN_KEYS, "actions", "actions_mask", "extra")


@frozen(eq=False)
class Context:
    """What a part may know when it contributes steps.

    Attributes:
        variant: the whole tree (`vla.compose.Variant`); an adapter reads `variant.spec`, never a model type.
        stats: {"state": Stats, "actions": Stats}, or None while statistics are being computed.
        tokenizer: `vla.tokenizer.Tokenizer`, or None.
        robot_state_dim, robot_action_dim: the robot's own widths, before padding to those of the spec.
        default_prompt: the instruction of samples that bring none.
        guard: how far actions may lie beyond what was recorded, in widths of that range; None: anywhere.
    """

    variant: Any
    stats: Mapping[str, Stats] | None
    tokenizer: Any
    robot_state_dim: int
    robot_action_dim: int
    default_prompt: str | None = None
    guard: float | None = None


def make_context(
    variant: Any,
    stats: Mapping[str, Stats] | None,
    tokenizer: Any = None,
    default_prompt: str | None = None,
    guard: float | None = None,
) -> Context:
    """The context of a variant. A robot without widths has those of the statistics, else those of the spec."""
    offers, spec = variant.parts["robot"].offers, variant.spec

    def width(facet: str, key: str, limit: int) -> int:
        own = offers.get(facet) or 0
        if own > limit:
            raise DataError(
                f"the robot is wider than the model: {facet}",
                field=f"spec.{facet}",
                got=f"robot {own}, model {limit}",
                fix=f"build with --set spec.{facet}={own}",
            )
        return own or min(len(stats[key].mean) if stats else limit, limit)

    state = width("state_dim", "state", spec.state_dim)
    actions = width("action_dim", "actions", spec.action_dim)
    return Context(variant, stats, tokenizer, state, actions, default_prompt, guard)


def part_steps(context: Context) -> list[tuple[str, list[tuple[str, Any]]]]:
    """(path of the part, its contributions) of every part that has some; then those of hooks.

    Raises:
        PartError: a part's function fails or gives something else than (stage, step) pairs.
    """
    from vla.compose import load_object

    found = []
    for slot, top in context.variant.parts.items():
        for path, chosen in _walk(slot, top):
            if not chosen.part.transforms:
                continue
            what = f"{chosen.part.kind} {chosen.part.name!r}"
            function = load_object(chosen.part.transforms, what)
            try:
                found.append((path, _pairs(function(chosen.settings, context), what)))
            except VlaError:
                raise
            except Exception as error:  # a plugin's own bug: name the plugin
                raise PartError(
                    f"{what} fails in its transforms",
                    field=chosen.part.transforms,
                    got=f"{type(error).__name__}: {error}",
                    fix="report this to its authors",
                ) from error
    return found + _hook_steps(context)


def _hook_steps(context: Context) -> list[tuple[str, list[tuple[str, Any]]]]:
    from vla import hooks, registry

    if not registry.listed(registry.HOOKS):
        return []
    found = []
    for answer in sorted(hooks.ask("vla_transforms", context=context), key=lambda a: a.listener):
        if answer.problem:
            _log.warning("%s; its transforms, if it has any, are not applied", answer.problem)
        elif answer.value:
            found.append((f"hook {answer.listener}", _pairs(answer.value, f"hook {answer.listener!r}")))
    return found


def _pairs(value: Any, what: str) -> list[tuple[str, Any]]:
    try:
        return [(stage, step) for stage, step in value]
    except (TypeError, ValueError) as error:
        raise PartError(
            f"the transforms of {what} are no list of (stage, step)", got=value, expected=list(STAGES)
        ) from error


def _walk(path: str, chosen: Any) -> Any:
    yield path, chosen
    for slot, inner in chosen.inner.items():
        yield from _walk(f"{path}.{slot}", inner)


def core_steps(context: Context) -> list[tuple[str, Any]]:
    """The steps every variant has; the context has statistics."""
    spec = context.variant.spec
    robot = context.variant.parts["robot"]
    assert context.stats is not None
    widths = {key: _widths(robot.offers.get(facet), context.stats[key])
              for key, facet in (("state", "state_dim"), ("actions", "action_dim"))}  # fmt: skip
    most, least = ({key: pair[i] for key, pair in widths.items()} for i in (1, 0))
    state_dim, action_dim = context.robot_state_dim, context.robot_action_dim
    height, width = spec.image_size
    steps: list[tuple[str, Any]] = [
        ("inputs.repack", InjectDefaultPrompt(context.default_prompt)),
        (
            "inputs.normalize",
            CheckRow(most["state"], most["actions"], robot.part.name, (least["state"], least["actions"])),
        ),
        ("inputs.normalize", Normalize(context.stats, spec.norm)),
        ("inputs.images", ResizeImages(height, width, tuple(spec.cameras))),
        ("inputs.pad", Pad(spec.state_dim, spec.action_dim, spec.action_horizon)),
        ("inputs.pad", Select(MODEL_KEYS)),
        ("outputs.unpad", Unpad(state_dim, action_dim)),
        ("outputs.unnormalize", Unnormalize(context.stats, spec.norm)),
    ]
    if context.guard is not None:
        steps += [("outputs.unnormalize", RefuseFar(context.stats["actions"], context.guard))]
    if context.tokenizer is not None:
        steps += [("inputs.prompt", ReadPrompt()), ("inputs.tokenize", Tokenize(context.tokenizer))]
        if context.tokenizer.codec is not None:
            steps += [("outputs.detokenize", Detokenize(context.tokenizer, spec.action_horizon, action_dim))]
    return steps


def _widths(own: int | None, stats: Stats) -> tuple[int, int]:
    """(least, most) values of a row: the robot's own; else those of the statistics.

    Ours are as wide as what was recorded, and know its extremes. Of others dims at the end that were always 0 may be
    missing: openpi publishes statistics of padded data.
    """
    if own:
        return own, own
    if stats.min is not None:
        return len(stats.mean), len(stats.mean)
    moved = np.flatnonzero((stats.std != 0) | (stats.mean != 0))
    return (int(moved[-1]) + 1 if len(moved) else 1), len(stats.mean)


def _needed(stats: Mapping[str, Stats] | None, norm: str) -> dict[str, Stats]:
    """Statistics of state and actions, as this normalisation needs them."""
    for key in ("state", "actions"):
        if not stats or key not in stats:
            raise DataError(
                "there are no normalisation statistics",
                field=f"norm_stats.json: {key}",
                got=None if not stats else sorted(stats),
                fix="compute them: vla stats DATA --model DIR --out DIR",
            )
        if norm == "quantile" and (stats[key].q01 is None or stats[key].q99 is None):
            raise DataError(
                "quantile normalisation needs quantiles, and these statistics have none",
                field=f"norm_stats.json: {key}.q01",
                got=None,
                fix="compute them: vla stats DATA --model DIR --out DIR, or build with --set spec.norm=zscore",
            )
    assert stats is not None
    return {key: stats[key] for key in ("state", "actions")}


def build_group(
    variant: Any,
    *,
    stats: Mapping[str, Stats] | None,
    tokenizer: Any,
    default_prompt: str | None = None,
    guard: float | None = None,
) -> Group:
    """The transforms of a variant.

    Args:
        variant: `vla.compose.Variant`.
        stats: {"state": Stats, "actions": Stats}; see `vla.transforms.stats`.
        tokenizer: `vla.tokenizer.Tokenizer`; None leaves tokenising out (statistics, fitting a tokenizer).
        default_prompt: the instruction of samples that bring none.
        guard: actions further beyond what was recorded than this many times its range are refused; None: none are.

    Raises:
        DataError: no statistics, or none of the kind that spec.norm needs.
        PartError: a part's contributions are malformed, or cannot be brought into an order.
        SettingsError: cameras of robot and model do not fit.
    """
    context = make_context(variant, _needed(stats, variant.spec.norm), tokenizer, default_prompt, guard)
    ins, outs = order([*part_steps(context), ("core", core_steps(context))])
    check_order(ins, RAW)
    check_order(outs, ("actions", "tokens", "state"))
    read = [pattern.rstrip("?") for placed in ins for pattern in placed.step.reads]
    return Group(ins, outs, context.robot_action_dim, tuple(dict.fromkeys([*KNOWN, *read])))


def stats_steps(variant: Any) -> tuple[Any, ...]:
    """The input steps of the robot and delta stages that statistics run: those that touch state or actions."""
    ins, _ = order(part_steps(make_context(variant, None)))
    touched = ("state", "actions")
    return tuple(
        p for p in ins if p.stage in ("robot", "delta") and any(w.rstrip("?") in touched for w in p.step.writes)
    )
