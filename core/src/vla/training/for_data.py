"""A variant for a dataset: what the data says about shapes, cameras, rate and robot, as settings, each with its reason.

What the user sets wins. A model that has weights keeps every shape that can hold the data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import frozen

from vla.compose import Variant, build
from vla.errors import SettingsError
from vla.refit import stems_between
from vla.settings import to_toml
from vla.training.config import TrainConfig

CHUNK_SECONDS, MOST_STEPS = 1.0, 50  # of a new variant's chunk; 50 is openpi's longest
# The names that openpi's models have for cameras, which adapters and checkpoints know.
BASE, LEFT, RIGHT = "base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"


@frozen
class Choice:
    """One setting, and why it has this value."""

    path: str
    value: Any
    why: str

    @property
    def words(self) -> str:
        """As a file has it, `spec.action_dim = 44`."""
        return to_toml({"v": self.value}).strip().replace("v =", f"{self.path} =", 1)

    def __str__(self) -> str:
        return f"{self.words}   ({self.why})"


def choices(dataset: Any, variant: Variant, given: Collection[str] = (), trained: bool = False) -> list[Choice]:
    """What follows from a dataset for a variant.

    Args:
        dataset: an opened dataset or a mixture.
        variant: what the settings are for.
        given: paths that the user has set; they and what they decide stay.
        trained: it has weights: widths change only where the data is wider, the horizon and the cameras' names stay.
    """
    info, spec, robot = dataset.info, variant.spec, variant.robot
    found = []
    for key, what in (("state_dim", "states"), ("action_dim", "actions")):
        width = robot.offers.get(key) or getattr(info, key)
        if width > (have := getattr(spec, key)) and f"spec.{key}" in given:
            fix = f"--set spec.{key}={width}, or leave out --set spec.{key}"
            raise SettingsError(
                f"the data is wider: its {what}", field=f"spec.{key}", got=have, expected=f">= {width}", fix=fix
            )
        if width > have or (not trained and width != have):
            found.append(Choice(f"spec.{key}", width, f"the data's {what} have {width} values"))
    mine = dict.fromkeys(robot.offers.get("cameras", ()))
    if "robot.cameras" in given and not trained and mine and tuple(mine) != spec.cameras:
        found.append(Choice("spec.cameras", tuple(mine), "those that robot.cameras names"))
    elif "robot.cameras" not in given and robot.part.name == "plain" and info.cameras:
        found += _camera_choices(list(info.cameras), spec.cameras, trained)
    if not trained and info.hz:
        steps, why = _horizon(info.hz, [len(e) for e in dataset.episodes])
        found.append(Choice("spec.action_horizon", steps, why))
    return [choice for choice in found if choice.path not in given]


def fitted(
    variant: Variant,
    dataset: Any,
    given: Collection[str],
    reinit: Sequence[str],
    trained: bool,
    note: Callable[[str], None] = print,
) -> tuple[Variant, tuple[str, ...]]:
    """The variant with what the data says, and what `--reinit` then covers; both are said, with reasons.

    Args:
        given, trained: as for `choices`.
        reinit: weights that are made anew anyway.
    """
    from vla.training.prepare import for_robot_of

    note(facts(dataset))
    before = variant
    if "robot" not in given:
        variant = for_robot_of(variant, dataset, lambda text: note(f"  {text}"))
    made = choices(dataset, variant, given, trained)
    for choice in made:
        note(f"  {choice}")
    sets = {choice.path: choice.value for choice in made}
    out = build(base=variant, set=sets, name=variant.name) if sets else variant
    anew = tuple(stem for stem in stems_between(before, out) if stem not in reinit) if trained else ()
    if anew:
        note(f"  --reinit {','.join(anew)}   (their shapes follow from the data)")
    return out, (*reinit, *anew)


def room_for(variant: Variant, dataset: Any, note: Callable[[str], None] = print) -> Variant:
    """The variant with prompts as long as the data needs, measured; an action tokenizer is fitted for it and dropped.

    Without a text tokenizer on this machine nothing can be measured: that is said, and `vla train --fit-lengths` will.
    """
    from vla.token_lengths import ROUND, measure_token_lengths
    from vla.tokenizer import open_tokenizer
    from vla.training.prepare import fit_tokenizer, is_fitted
    from vla.transforms import build_group
    from vla.transforms.stats import compute_stats

    try:
        tokenizer = open_tokenizer(variant.parts["tokenizer"], variant.spec, None)
    except SettingsError as error:
        why = error.what.splitlines()[0]
        note(f"  spec.max_token_len = {variant.spec.max_token_len}   (not measured: {why}; vla train --fit-lengths)")
        return variant
    stats = compute_stats(dataset, variant)
    if not is_fitted(tokenizer):
        tokenizer = fit_tokenizer(variant, dataset, stats, tokenizer, np.arange(len(dataset)), TrainConfig(), note)
    group = build_group(variant, stats=stats, tokenizer=tokenizer)
    lengths = measure_token_lengths(dataset, group, tokenizer, variant.spec.action_horizon)
    room = -(-lengths.fits // ROUND) * ROUND
    note(f"  spec.max_token_len = {room}   (the longest sample has {lengths.longest} tokens)")
    return build(base=variant, set={"spec.max_token_len": room}, name=variant.name)


def camera_pairs(theirs: Sequence[str], mine: Sequence[str]) -> dict[str, str]:
    """Camera of the model -> camera of the data, by what their names say; cameras that find no place are left out.

    The same name first. Then a name with `wrist`, `hand` or `gripper` takes a wrist, on the side that it names, and any
    other the base; what is left takes what is free, in order.
    """
    pairs = {name: name for name in mine if name in theirs}
    free = [name for name in mine if name not in pairs]

    def take(camera: str, wanted: Sequence[str]) -> bool:
        place = next((name for name in wanted if name in free), None)
        if place is not None:
            free.remove(place)
            pairs[place] = camera
        return place is not None

    left = []
    for camera in theirs:
        if camera in pairs.values():
            continue
        words = set(re.split(r"[^a-z]+", camera.lower()))
        side = "left" if words & {"left", "l"} else "right" if words & {"right", "r"} else ""
        wrist = bool(words & {"wrist", "hand", "gripper"}) or "wrist" in camera.lower()
        places = [name for name in free if ("wrist" in name) == wrist and (not side or not wrist or side in name)]
        if not take(camera, places):
            left.append(camera)
    for camera in left:
        take(camera, free)
    return {name: pairs[name] for name in mine if name in pairs}


def _camera_choices(theirs: list[str], mine: Sequence[str], trained: bool) -> list[Choice]:
    if trained:
        if any(name in mine for name in theirs):
            return []
        pairs = camera_pairs(theirs, mine)
    else:
        places = [*dict.fromkeys([BASE, LEFT, RIGHT, *(f"camera_{i}" for i in range(3, len(theirs)))])]
        pairs = camera_pairs(theirs, places)
    out = []
    if not trained and tuple(pairs) != tuple(mine):
        out.append(Choice("spec.cameras", tuple(pairs), f"the data has {len(theirs)}: {', '.join(theirs)}"))
    if any(name != camera for name, camera in pairs.items()):
        why = "by what their names say" + ("" if len(pairs) == len(theirs) else "; the data has more than the model")
        out.append(Choice("robot.cameras", tuple(f"{name}={camera}" for name, camera in pairs.items()), why))
    return out


def _horizon(hz: float, lengths: Sequence[int]) -> tuple[int, str]:
    steps = min(MOST_STEPS, max(2, round(hz * CHUNK_SECONDS)))
    usual = int(np.median(lengths)) if len(lengths) else steps
    if usual < steps:
        return max(2, usual), f"half of the episodes have no more than {usual} frames"
    return steps, f"{steps / hz:.2g} s at {hz:g} Hz"


def facts(dataset: Any) -> str:
    """What a dataset says about itself, in one line."""
    info = dataset.info
    cameras: Mapping[str, Any] = info.cameras
    return (
        f"data: {len(dataset.episodes)} episodes, {len(dataset)} frames at {info.hz:g} Hz; states of {info.state_dim}, "
        f"actions of {info.action_dim}; cameras {', '.join(cameras) or 'none'}; robot {info.robot or 'not named'}"
    )
