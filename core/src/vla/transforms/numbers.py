"""Steps on states and actions: normalise, delta, pad, and back. Plain functions first, then the steps that use them.

All of them work on the last axis (and actions [... t d] against state [... s]), so leading batch axes are free. The
formulas and their epsilons are openpi's (`transforms.py`): changing one changes what a trained policy does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from attrs import field, frozen

from vla.errors import ActionError, DataError
from vla.transforms.group import Flat, as_array
from vla.transforms.stats import Stats

_SLACK = 1e-4  # in the robot's units: less does not count as going far
EPS = 1e-6  # added to the standard deviation, and to the quantile range
CONSTANT = 2.0  # |z| with which a dim that was constant in the data answers any other value, at most


# ---- functions -----------------------------------------------------------------------------------------------------


def make_bool_mask(*runs: int) -> tuple[bool, ...]:
    """+n stands for n times True, -n for n times False: (6, -1, 6, -1) is two arms with absolute grippers."""
    return tuple(value for n in runs for value in [n > 0] * abs(n))


def normalize(x: np.ndarray, stats: Stats, norm: str) -> np.ndarray:
    """x [... d] in model units; statistics longer than d are cut to d. float64.

    zscore: (x - mean) / (std + 1e-6). quantile: (x - q01) / (q99 - q01 + 1e-6) * 2 - 1. Nothing is clipped but a dim
    that was constant in the data, as our statistics know and openpi's do not: what it answers to another value is at
    most 2 in size (the formula gives a million for a difference of 1).

    Raises:
        DataError: x is wider than the statistics, or they have no quantiles.
    """
    low, width = _scale(stats, norm)
    d = x.shape[-1]
    if d > len(low):
        raise DataError(
            "the data is wider than its statistics",
            field="norm_stats",
            got=f"{d} values, statistics of {len(low)}",
            fix="compute the statistics of this data: vla stats DATA --model DIR --out DIR",
        )
    z = (x - low[:d]) / width[:d]
    z = z if norm == "zscore" else z * 2.0 - 1.0
    if stats.min is None or stats.max is None:
        return z
    return np.where((stats.min == stats.max)[:d], np.clip(z, -CONSTANT, CONSTANT), z)


def unnormalize(x: np.ndarray, stats: Stats, norm: str) -> np.ndarray:
    """The reverse of `normalize`, float64. Values beyond the statistics' width pass unscaled, as in openpi."""
    low, width = _scale(stats, norm)
    d = min(x.shape[-1], len(low))
    known = x[..., :d] if norm == "zscore" else (x[..., :d] + 1.0) / 2.0
    out = known * width[:d] + low[:d]
    if x.shape[-1] == d:
        return out
    rest = x[..., d:] * (1.0 + EPS) if norm == "zscore" else x[..., d:]
    return np.concatenate([out, rest], -1)


def _scale(stats: Stats, norm: str) -> tuple[np.ndarray, np.ndarray]:
    if norm == "zscore":
        return stats.mean, stats.std + EPS
    if stats.q01 is None or stats.q99 is None:
        raise DataError(
            "quantile normalisation needs quantiles, and these statistics have none",
            field="norm_stats: q01, q99",
            got=None,
            fix="compute them: vla stats DATA --model DIR --out DIR, or build with --set spec.norm=zscore",
        )
    return stats.q01, stats.q99 - stats.q01 + EPS


def shift(actions: np.ndarray, state: np.ndarray, mask: np.ndarray, sign: int) -> np.ndarray:
    """Actions [... t d] plus (sign 1) or minus (-1) the state [... s] of the chunk's start, where the mask is True."""
    d = len(mask)
    if actions.shape[-1] < d or state.shape[-1] < d:
        raise DataError(
            "the delta mask is wider than the data",
            field="actions, state",
            got=f"{actions.shape[-1]} and {state.shape[-1]} values",
            expected=f"at least {d}",
        )
    offset = np.where(mask, state[..., :d], 0)[..., None, :]
    out = np.array(actions, dtype=np.result_type(actions, offset))
    out[..., :d] += offset if sign > 0 else -offset
    return out


def pad_to(x: np.ndarray, dim: int, field: str) -> np.ndarray:
    """x [... d] with zeros up to [... dim]; wider data is refused, never cut."""
    d = x.shape[-1]
    if d > dim:
        raise DataError(
            f"{field} are wider than the model" if field.endswith("s") else f"the {field} is wider than the model",
            field=field,
            got=f"{d} values",
            expected=f"at most {dim}",
            fix=f"build with --set spec.{field.rstrip('s')}_dim={d}",
        )
    if d == dim:
        return x
    out = np.zeros((*x.shape[:-1], dim), x.dtype)
    out[..., :d] = x
    return out


def _array(value: Any, name: str, ndim: int) -> np.ndarray:
    x = as_array(value, name, numbers=True)
    if x.ndim < ndim or x.shape[-1] == 0:
        raise DataError(
            f"{name} has a wrong shape", field=name, got=x.shape, expected=f"{ndim} axes, none of them empty"
        )
    return x


# ---- steps ---------------------------------------------------------------------------------------------------------


@frozen
class CheckRow:
    """Refuse values that are not finite, or not of the robot's widths (0: any).

    Attributes:
        least: the smallest widths of state and actions where not all of `state_dim` and `action_dim` are needed.
    """

    state_dim: int
    action_dim: int
    robot: str
    least: tuple[int, int] | None = None
    reads: ClassVar = ("state", "actions?")
    writes: ClassVar = ("state", "actions?")
    batched: ClassVar = True
    pointwise: ClassVar = True

    @property
    def shapes(self) -> str:
        """Text for the table."""
        return f"state [{self.state_dim or 's'}], actions [t {self.action_dim or 'a'}]"

    def __call__(self, data: Flat) -> Flat:
        out = dict(data)
        least = self.least or (self.state_dim, self.action_dim)
        for name, low, want, ndim in (
            ("state", least[0], self.state_dim, 1),
            ("actions", least[1], self.action_dim, 2),
        ):
            if name not in data:
                continue
            x = out[name] = _array(data[name], name, ndim)
            if want and not low <= x.shape[-1] <= want:
                raise DataError(
                    f"another number of values in {name} than the robot {self.robot!r} and its statistics have",
                    field=name,
                    got=f"{x.shape[-1]} values",
                    expected=want,
                    fix="send what was recorded; another robot has its own adapter, --robot NAME, and statistics",
                )
            if not np.isfinite(x).all():
                bad = tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])
                raise DataError(
                    f"{name} has NaN or infinite values",
                    field=f"{name}{list(bad)}",
                    got=float(x[bad]),
                    fix="check the sensor, or drop this frame",
                )
        return out


@frozen(eq=False, repr=False)
class Normalize:
    """State and actions into model units, with the statistics of that key."""

    stats: Mapping[str, Stats]
    norm: str
    batched: ClassVar = True
    pointwise: ClassVar = True

    @property
    def reads(self) -> tuple[str, ...]:
        """Keys there are statistics of; actions are not there at inference."""
        return tuple(k if k == "state" else f"{k}?" for k in self.stats)

    @property
    def writes(self) -> tuple[str, ...]:
        """The same keys."""
        return self.reads

    def __call__(self, data: Flat) -> Flat:
        return {**data, **{k: normalize(np.asarray(data[k]), s, self.norm) for k, s in self.stats.items() if k in data}}


@frozen(eq=False, repr=False)
class Unnormalize:
    """State and actions back into the robot's units."""

    stats: Mapping[str, Stats]
    norm: str
    reads: ClassVar = ("actions", "state?")
    writes: ClassVar = ("actions", "state?")

    def __call__(self, data: Flat) -> Flat:
        return {
            **data,
            **{k: unnormalize(np.asarray(data[k]), s, self.norm) for k, s in self.stats.items() if k in data},
        }


@frozen(eq=False, repr=False)
class RefuseFar:
    """Refuse actions further beyond what was recorded than `spans` times its range."""

    stats: Stats
    spans: float
    reads: ClassVar = ("actions",)
    writes: ClassVar = ()

    def __call__(self, data: Flat) -> Flat:
        x = np.asarray(data["actions"], np.float64)
        low, high = self.stats.recorded
        d = min(x.shape[-1], len(low))
        low, high, x = low[:d], high[:d], x[..., :d]
        room = self.spans * (high - low) + _SLACK  # a dim that never moved has no range
        far = np.maximum(low - x, x - high) - room
        if (far > 0).any():
            at = tuple(int(i) for i in np.unravel_index(np.argmax(far), far.shape))
            dim = at[-1]
            raise ActionError(
                "an action lies far beyond everything that was recorded; the chunk is not returned",
                field=f"actions{list(at)}",
                got=f"{x[at]:.6g}",
                expected=f"{low[dim] - room[dim]:.6g} to {high[dim] + room[dim]:.6g} (recorded: {low[dim]:.6g} to "
                f"{high[dim]:.6g}; guard: {self.spans:g} spans)",
                fix="look at the observation, its units and norm_stats.json; or allow it: --guard M",
            )
        return data


@frozen
class DeltaActions:
    """Actions relative to the state of the chunk's first frame, where the mask is True."""

    mask: tuple[bool, ...]
    reads: ClassVar = ("state", "actions?")
    writes: ClassVar = ("actions?",)
    batched: ClassVar = True

    def __call__(self, data: Flat) -> Flat:
        if "actions" not in data:
            return data
        return {
            **data,
            "actions": shift(np.asarray(data["actions"]), np.asarray(data["state"]), np.array(self.mask), -1),
        }


@frozen
class AbsoluteActions:
    """The reverse of `DeltaActions`."""

    mask: tuple[bool, ...]
    reads: ClassVar = ("state", "actions")
    writes: ClassVar = ("actions",)

    def __call__(self, data: Flat) -> Flat:
        return {
            **data,
            "actions": shift(np.asarray(data["actions"]), np.asarray(data["state"]), np.array(self.mask), 1),
        }


def delta_steps(*runs: int) -> list[tuple[str, Any]]:
    """`DeltaActions` and `AbsoluteActions` in their stages, for a mask as `make_bool_mask` writes it."""
    mask = make_bool_mask(*runs)
    return [("inputs.delta", DeltaActions(mask)), ("outputs.absolute", AbsoluteActions(mask))]


@frozen
class SubsampleActions:
    """Every stride-th action of the chunk; `actions_is_pad` likewise."""

    stride: int = field()
    reads: ClassVar = ("actions?", "actions_is_pad?")
    writes: ClassVar = ("actions?", "actions_is_pad?")

    @stride.validator
    def _positive(self, _: Any, value: int) -> None:
        if value < 1:
            raise DataError("the stride of actions must be at least 1", field="stride", got=value)

    def __call__(self, data: Flat) -> Flat:
        out = dict(data)
        if "actions" in data:
            out["actions"] = np.asarray(data["actions"])[..., :: self.stride, :]
        if "actions_is_pad" in data:
            out["actions_is_pad"] = np.asarray(data["actions_is_pad"])[..., :: self.stride]
        return out


@frozen
class Repack:
    """Pick and rename keys; everything not listed is dropped (openpi's RepackTransform).

    `structure` maps new flat keys to old ones; an old key that ends in "?" may be absent.
    """

    structure: Mapping[str, str]

    @property
    def reads(self) -> tuple[str, ...]:
        """Old keys."""
        return tuple(self.structure.values())

    @property
    def writes(self) -> tuple[str, ...]:
        """New keys."""
        return tuple(self.structure)

    def __call__(self, data: Flat) -> Flat:
        return {new: data[old.rstrip("?")] for new, old in self.structure.items() if old.rstrip("?") in data}


@frozen
class Pad:
    """State and actions as the model wants them: float32, zeros up to its widths, and a mask of what is real.

    `actions_mask` is False on padded dims and on the steps where `actions_is_pad` is True.
    """

    state_dim: int
    action_dim: int
    horizon: int
    reads: ClassVar = ("state", "actions?", "actions_is_pad?")
    writes: ClassVar = ("state", "actions?", "actions_mask?", "actions_is_pad?")

    @property
    def shapes(self) -> str:
        """Text for the table."""
        return f"state [{self.state_dim}], actions and actions_mask [{self.horizon} {self.action_dim}]"

    def __call__(self, data: Flat) -> Flat:
        state = np.asarray(data["state"])
        if state.ndim != 1:
            raise DataError("the state of one sample has one axis", field="state", got=state.shape, expected="[s]")
        out = {**data, "state": pad_to(state, self.state_dim, "state").astype(np.float32)}
        is_pad = out.pop("actions_is_pad", None)
        if "actions" not in data:
            return out
        actions = np.asarray(data["actions"])
        if actions.ndim != 2 or actions.shape[0] != self.horizon:
            raise DataError(
                "the chunk has another length than the model's",
                field="actions",
                got=actions.shape,
                expected=f"{self.horizon} steps",
                fix=f"build with --set spec.action_horizon={actions.shape[0]}, or ask "
                f"the dataset for {self.horizon} steps",
            )
        real = np.ones(self.horizon, bool) if is_pad is None else ~np.asarray(is_pad, bool)
        if real.shape != (self.horizon,):
            raise DataError(
                "actions_is_pad does not fit the chunk",
                field="actions_is_pad",
                got=real.shape,
                expected=(self.horizon,),
            )
        mask = np.zeros((self.horizon, self.action_dim), bool)
        mask[real, : actions.shape[-1]] = True
        out["actions"] = pad_to(actions, self.action_dim, "actions").astype(np.float32)
        out["actions_mask"] = mask
        return out


@frozen
class Unpad:
    """Only the robot's own dims of actions and state."""

    state_dim: int
    action_dim: int
    reads: ClassVar = ("actions", "state?")
    writes: ClassVar = ("actions", "state?")

    @property
    def shapes(self) -> str:
        """Text for the table."""
        return f"actions [t {self.action_dim}], state [{self.state_dim}]"

    def __call__(self, data: Flat) -> Flat:
        out = {**data, "actions": np.asarray(data["actions"])[..., : self.action_dim]}
        if "state" in data:
            out["state"] = np.asarray(data["state"])[..., : self.state_dim]
        return out


@frozen
class Select:
    """Keep what the model reads: keys whose first part is one of the names, e.g. everything under `images/`."""

    names: tuple[str, ...]
    reads: ClassVar = ()
    writes: ClassVar = ("*?",)
    shapes: ClassVar = "only what the model reads is left"

    def __call__(self, data: Flat) -> Flat:
        return {k: v for k, v in data.items() if k.partition("/")[0] in self.names}
