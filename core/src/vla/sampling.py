"""Options of a call as people write them, `{"num_steps": 5, ...}` or `--set sampling.num_steps=5`, -> `Sampling`.

Core's own are the fields of `Common`. Every head adds those that its part declares as a record (`Part.sampling`), and
reads them back with `Sampling.read`: a new option is an edit of the head alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from attrs import evolve, frozen

from vla.contracts import DEFAULT_SAMPLING, MOST_STEPS, Sampling
from vla.errors import SettingsError
from vla.settings import fields_of, number, size, structure, unknown_key

LEAST_TEMPERATURE = 1e-3


@frozen
class Common:
    """Options that heads share."""

    num_steps: int | None = size(None, most=MOST_STEPS)  # of denoising
    temperature: float = number(0.0, most=1e6)  # of token sampling; 0 is greedy


def options(head: Any, values: Mapping[str, Any], base: Sampling = DEFAULT_SAMPLING) -> Sampling:
    """The record with these options changed.

    Args:
        head: `variant.parts["head"]` (`vla.compose.Chosen`).
        values: name -> value.
        base: what the others are taken from.

    Raises:
        SettingsError: an option that neither core nor the head knows, or a wrong value.
    """
    if not isinstance(values, Mapping):
        raise SettingsError("options of sampling are a table", field="sampling", got=values, expected="name -> value")
    declared = {name: cls for cls in (Common, *declared_by(head)) for name in fields_of(cls)}
    read = {}
    for name, value in values.items():
        if name not in declared:
            raise unknown_key(f"sampling.{name}", [f"sampling.{known}" for known in declared])
        value = value.item() if isinstance(value, np.generic) else value
        read[name] = getattr(structure(declared[name], {name: value}, "sampling"), name)
    if 0 < read.get("temperature", 0.0) < LEAST_TEMPERATURE:  # logits divided by it would overflow
        raise SettingsError(
            "a temperature is 0, for the likeliest token, or not so near to it", field="sampling.temperature",
            got=read["temperature"], expected=f"0, or at least {LEAST_TEMPERATURE:g}",
        )  # fmt: skip
    common = {name: read.pop(name) for name in fields_of(Common) if name in read}
    return evolve(base, **common, extra={**base.extra, **read})


def for_model(variant: Any, codec_dim: int, tokenizer: Any) -> Sampling:
    """What a model's own shapes say: the action dims that the robot has, and the grammar of a token head.

    Args:
        variant: a `vla.compose.Variant`.
        codec_dim: how many action dims the robot has (`Group.codec_dim`); 0: all.
        tokenizer: the tokenizer of the variant.
    """
    spec = variant.spec
    tokens = variant.parts["head"].offers.get("gives") == "tokens"
    return Sampling(
        grammar=tokenizer.grammar(spec.action_horizon, codec_dim) if tokens else None,
        action_dim_mask=np.arange(spec.action_dim) < (codec_dim or spec.action_dim),
    )


def declared_by(head: Any) -> tuple[type, ...]:
    """The records of options of a head and of the heads in its slots."""
    return tuple(chosen.part.sampling for _, chosen in head.walk("head") if chosen.part.sampling is not None)
