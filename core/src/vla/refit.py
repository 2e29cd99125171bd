"""The weights of one model in another variant: which stay as they are, decided by their shapes and not by a list.

Horizon, token length, cameras, normalisation, prompt format, robot and sampler settings are in no weight's shape, so
they change freely. A position embedding is resampled to the grid of another image size. Whatever else has another
shape, or is missing, or would be left over, is refused by name, or made anew where that is asked for. numpy alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from attrs import evolve, field, frozen

from vla.errors import SettingsError, VlaError
from vla.params import Row, table
from vla.posemb import resample_2d
from vla.training.freezing import under


@frozen
class Origin:
    """Where the weights of a model come from; its record keeps `to_table()` under `weights`.

    Attributes:
        base: the model directory or checkpoint whose weights stand here; "": none, all are new.
        digest: of that model.
        seed: of the weights that were made anew; None: there are none.
        kept: how many weights are the base's.
        resampled: the base's, resampled to another image size.
        reinit: made anew although the base has some of this name.
        new: made anew because the base has none.
        dropped: of the base, without a place here.
        unused: of a checkpoint of another system, each with the reason.
        untrained: those that are still what was drawn, since no run has trained them.
    """

    base: str = ""
    digest: str = ""
    seed: int | None = None
    kept: int = 0
    resampled: tuple[str, ...] = ()
    reinit: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    untrained: frozenset[str] = field(default=frozenset(), converter=frozenset)

    def to_table(self) -> dict[str, Any]:
        """Plain values, with the layers of a stack folded into one name."""
        lists = ("resampled", "reinit", "new", "dropped", "untrained")
        named = {key: groups(sorted(getattr(self, key))) for key in lists if getattr(self, key)}
        start = {"base": self.base, "digest": self.digest, "kept": self.kept} if self.base else {"new": "all"}
        return {**start, **({} if self.seed is None else {"seed": self.seed}), **named}

    def __str__(self) -> str:
        if not self.base:
            return f"weights: new, seed {self.seed}"
        anew = len(self.reinit) + len(self.new)
        lines = [f"weights: {self.kept} of {self.base}" + (f"; {anew} new, seed {self.seed}" if anew else "")]
        for key in ("resampled", "reinit", "new", "dropped"):
            lines += [f"  {key:<9}  {name}" for name in groups(getattr(self, key))]
        return "\n".join([*lines, *(f"  unused     {text}" for text in self.unused)])


def untrained_names(record: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """The weights that no run has trained, as the record of their model says."""
    source = record.get("weights")
    patterns = source.get("untrained", ()) if isinstance(source, Mapping) else ()
    stems = [str(text).partition(" x")[0] for text in patterns]
    return {name for name in names if any(_covers(stem, name) for stem in stems)}


def refit(
    old: Any,
    new: Any,
    weights: Mapping[str, np.ndarray],
    fresh: Callable[[], Mapping[str, np.ndarray]],
    origin: Origin,
    reinit: Sequence[str] = (),
    drop: bool = False,
) -> tuple[dict[str, np.ndarray], Origin]:
    """Weights for `new` from those of `old`, and where each comes from.

    Args:
        old, new: the variants (`vla.compose.Variant`).
        weights: of `old`: torch name -> array.
        fresh: makes all weights of `new`; called only when some are needed.
        origin: base, digest and untrained weights of `old`, and the seed of `fresh`.
        reinit: names, beginnings of names or patterns of weights to make anew.
        drop: leave out weights of `old` that have no place in `new`; else that is asked for with `reinit`.

    Raises:
        SettingsError: weights do not fit and are not to be made anew; they are listed, with the settings to blame. Or
            `reinit` names nothing.
    """
    have, want = _rows(old), _rows(new)
    for pattern in reinit:
        if not any(_covers(pattern, name) for name in [*have, *want]):
            parts = sorted({re.sub(r"\.\d+\.", ".*.", name).rpartition(".")[0] for name in want})
            raise SettingsError("no weights have this name", field="--reinit", got=pattern, expected=", ".join(parts))
    kept, resampled, anew, missing, wrong = [], [], [], [], []
    for name, row in want.items():
        if any(_covers(pattern, name) for pattern in reinit):
            (anew if name in have else missing).append(name)
        elif name in have and _same(have[name], row):
            kept.append(name)
        elif name in have and _only_the_grid(have[name], row):
            resampled.append(name)
        else:
            wrong.append(name)
    gone = [name for name in have if name not in want]
    left = [name for name in gone if not drop and not any(_covers(pattern, name) for pattern in reinit)]
    if wrong or left:
        raise _misfit(old, new, have, want, wrong, left, reinit)
    made = fresh() if anew or missing else {}
    out = {name: np.asarray(weights[name]) for name in kept}
    out |= {name: _resampled(np.asarray(weights[name], np.float32), have[name], want[name]) for name in resampled}
    out |= {name: np.asarray(made[name]) for name in (*anew, *missing)}
    origin = evolve(
        origin,
        seed=origin.seed if anew or missing else None,
        kept=len(kept),
        resampled=tuple(resampled),
        reinit=tuple(anew),
        new=tuple(missing),
        dropped=tuple(gone),
        untrained={*(n for n in origin.untrained if n in want), *anew, *missing},
    )
    return {name: out[name] for name in want}, origin


def stems_between(old: Any, new: Any) -> list[str]:
    """Beginnings of the names of all weights that a change of variant makes anew or leaves out."""
    have, want = _rows(old), _rows(new)
    fits = {n for n, row in want.items() if n in have and (_same(have[n], row) or _only_the_grid(have[n], row))}
    return _stems({*have, *want} - fits, {*have, *want})


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Path -> (value in `old`, value in `new`) of every setting and shape that two variants have differently."""
    one, two = _flat(old), _flat(new)
    paths = dict.fromkeys([*one, *two])
    return {path: (one.get(path), two.get(path)) for path in paths if one.get(path) != two.get(path)}


def groups(names: Iterable[str]) -> list[str]:
    """Weight names with layers folded: "backbone.llm.layers.*.backbone.q.weight x18"."""
    folded: dict[str, int] = {}
    for name in names:
        key = re.sub(r"\.\d+\.", ".*.", name)
        folded[key] = folded.get(key, 0) + 1
    return [f"{key} x{n}" if "*" in key else key for key, n in folded.items()]


# ---- inside ----------------------------------------------------------------------------------------------------------


def _rows(variant: Any) -> dict[str, Row]:
    return {name: row for row in table(variant) for name in row.names()}


def _same(a: Row, b: Row) -> bool:
    """Equal in both frameworks: the other layout tells heads apart that share one axis in ours."""
    return all(a.shape(side) == b.shape(side) for side in (0, 1))


def _only_the_grid(a: Row, b: Row) -> bool:
    if not a.grid or a.grid != b.grid:
        return False
    cells, rows, columns = a.grid
    same = {k: v for k, v in a.sizes.items() if k not in a.grid} == {
        k: v for k, v in b.sizes.items() if k not in b.grid
    }
    return (
        same and a.sizes[cells] - a.sizes[rows] * a.sizes[columns] == b.sizes[cells] - b.sizes[rows] * b.sizes[columns]
    )


def _resampled(array: np.ndarray, a: Row, b: Row) -> np.ndarray:
    """[1 P D] on the grid of `b`; what stands before the grid (a class token) stays."""
    cells, rows, columns = a.grid
    high, wide = a.sizes[rows], a.sizes[columns]
    lead = a.sizes[cells] - high * wide
    grid = resample_2d(array[0, lead:].reshape(high, wide, -1), b.sizes[rows], b.sizes[columns])
    return np.concatenate([array[:, :lead], grid.reshape(1, -1, array.shape[-1])], 1).astype(np.float32)


def _covers(pattern: str, name: str) -> bool:
    stem = pattern.rstrip(".")
    return under(name, [stem]) or fnmatchcase(name, stem) or fnmatchcase(name, f"{stem}.*")


def _misfit(
    old: Any, new: Any, have: Mapping[str, Row], want: Mapping[str, Row], wrong: list[str], left: list[str],
    reinit: Sequence[str],
) -> SettingsError:  # fmt: skip
    shape = {name: f"{list(row.shape(0))}" for name, row in want.items()}
    shape |= {name: f"{list(row.shape(0))} -> {shape.get(name, 'no place')}" for name, row in have.items()}
    lines = [f"    {text} {shape[name]}" for text, name in _folded([*wrong, *left]).items()]
    changed, culprits = differences(old, new), _culprits(old, new)
    anew = ",".join(dict.fromkeys([*reinit, *_stems({*wrong, *left}, {*have, *want})]))
    leave = f"leave out --set {', '.join(culprits)}; or " if culprits else ""
    return SettingsError(
        "\n".join(["the weights of the model do not fit what is asked for", *lines]),
        field=", ".join(culprits) or "model",
        got=", ".join(f"{path}: {changed[path][0]!r} -> {changed[path][1]!r}" for path in culprits) or None,
        fix=f"{leave}make these weights anew: --reinit {anew}",
    )


def _folded(names: Iterable[str]) -> dict[str, str]:
    """ "a.*.b x18" -> the first of these names."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(re.sub(r"\.\d+\.", ".*.", name), name)
    return dict(zip(groups(names), first.values(), strict=True))


def _stems(bad: set[str], every: set[str]) -> list[str]:
    """The shortest beginnings of names that cover these names and no others; layers as `*`."""
    found = {}
    for name in sorted(bad):
        words = name.split(".")
        starts = (".".join(words[:depth]) for depth in range(1, len(words) + 1))
        stem = next(start for start in starts if all(n in bad for n in every if under(n, [start])))
        found[re.sub(r"\.\d+(\.|$)", r".*\1", stem)] = None
    return list(found)


def _culprits(old: Any, new: Any) -> list[str]:
    """The settings each of which, changed alone, changes the shape of a weight."""
    from vla.compose import build

    have, found = _rows(old), []
    for path, (_, value) in differences(old, new).items():
        try:
            want = _rows(build(base=old, set={path: value}))
        except VlaError:  # it has no meaning alone
            continue
        fits = have.keys() == want.keys() and all(
            _same(h, want[n]) or _only_the_grid(h, want[n]) for n, h in have.items()
        )
        if not fits:
            found.append(path)
    return found


def _flat(variant: Any) -> dict[str, Any]:
    from attrs import asdict

    out = {"name": variant.name, **{f"spec.{key}": value for key, value in asdict(variant.spec).items()}}

    def add(path: str, node: Mapping[str, Any]) -> None:
        for key, value in node.items():
            if isinstance(value, Mapping):
                add(f"{path}.{key}", value)
            elif key not in ("from", "settings_version"):
                out[path if key == "part" else f"{path}.{key}"] = value

    for slot, chosen in variant.parts.items():
        add(slot, chosen.table())
    return out


def names_of(text: Collection[str]) -> tuple[str, ...]:
    """The names of `--reinit a,b --reinit c`."""
    return tuple(name.strip() for item in text for name in item.split(",") if name.strip())
