"""Name tables: one weight, its name in every layout.

A row says what a weight of ours is called in another layout, and how the axes move:

    Row("layers.{l}.{e}.q.weight", "layers/{e}/q/kernel", "(n h) d -> d n h")

- The first name is ours: the parameter's name in the PyTorch module and in `model.safetensors`.
- The second is the path in the other layout: the nnx attributes of the JAX module, openpi's tree, a Hugging Face name.
- `{l}` is the layer. If only our name has it, the other layout stacks the layers on a leading axis.
- `path[1]` means: element 1 of an axis that comes right after the layer axis (openpi keeps k and v in one array).
- `grid` names three axes (cells, rows, columns) of a position embedding: `cells` lists a grid row by row, behind what
  else it holds (a class token), so the weight can be resampled to another image size.
- `axes` reads ours -> theirs, as in einops; letters have sizes, so a table knows every shape without any framework.

A part's `params` module has `rows(site)`, its weights with their JAX paths, and, where the weights exist elsewhere,
`openpi(site)` and `hf(site)`, all as generators of rows relative to the part; `Site` says where it stands. Names of
inner parts get the slot in front ("vision." and "vision/"), so the tree of parts is the tree of names. A part without
a `params` module has no weights of its own. For a layout other than JAX, `UNDER = {"openpi": {"vision": "img/"}}` says
what goes in front of an inner part's names (default: nothing).

numpy alone; arrays may be lazy: anything with `.shape` and `__array__`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

import numpy as np
from attrs import evolve, field, frozen

from vla.contracts import Spec
from vla.errors import PartError, StoreError
from vla.parts import Expert

JAX = "jax"
FUNCTIONS = {JAX: "rows", "openpi": "openpi", "hf": "hf"}  # layout -> function of a part's params module


@frozen
class Site:
    """Where a part stands in a variant: all that its names and shapes may depend on."""

    settings: Any
    spec: Spec
    backbone: Mapping[str, Any]  # what the backbone offers: width, depth, num_heads, ...
    experts: Mapping[str, Expert]  # the experts beside "backbone", in layout order
    inner: Mapping[str, Any] = field(factory=dict)  # slot -> Chosen


@frozen
class Row:
    """One weight, or one per layer: our name, the name elsewhere, how the axes move, and how long they are."""

    torch: str
    other: str
    axes: str
    sizes: Mapping[str, int] = field(factory=dict)
    grid: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """The other name without its `[i]`."""
        return re.sub(r"\[\d+\]$", "", self.other)

    @property
    def pick(self) -> int | None:
        """The i of `[i]`, or None."""
        found = re.search(r"\[(\d+)\]$", self.other)
        return int(found[1]) if found else None

    @property
    def layers(self) -> int | None:
        """How many layers the row stands for, or None if it is one weight."""
        return self.sizes["l"] if "{l}" in self.torch else None

    @property
    def stacked(self) -> bool:
        """Whether the other layout has all layers in one array."""
        return self.layers is not None and "{l}" not in self.other

    def names(self) -> list[str]:
        """Our names, by layer."""
        return (
            [self.torch.replace("{l}", str(i)) for i in range(self.layers)] if self.layers is not None else [self.torch]
        )

    def shape(self, side: int) -> tuple[int, ...]:
        """The shape of one layer's weight: side 0 is ours, side 1 the other layout's."""
        return tuple(int(np.prod([self.sizes[a] for a in group])) for group in _sides(self.axes)[side])


def bind(rows: Iterable[Row], values: Mapping[str, int | str]) -> Iterator[Row]:
    """The rows with axis sizes (int) and names for `{placeholders}` (str) filled in."""
    sizes = {k: v for k, v in values.items() if not isinstance(v, str)}
    words = {"{" + k + "}": v for k, v in values.items() if isinstance(v, str)}
    for row in rows:
        torch, other = row.torch, row.other
        for hole, word in words.items():
            torch, other = torch.replace(hole, word), other.replace(hole, word)
        yield evolve(row, torch=torch, other=other, sizes={**sizes, **row.sizes})


def stack_of(rows: Iterable[Row], torch: str, other: str) -> Iterator[Row]:
    """The rows with these prefixes in front of our name and of the other."""
    for row in rows:
        yield evolve(row, torch=torch + row.torch, other=other + row.other)


def table(variant: Any, layout: str = JAX, *, experts: bool = True) -> tuple[Row, ...]:
    """Every row of a variant's parts in one layout (`jax`, `openpi`, `hf`).

    Args:
        variant: a `vla.compose.Variant`.
        layout: which table of the parts to collect.
        experts: False leaves out the experts beside the backbone (a plain vision-language model has none).

    Raises:
        PartError: a part's table is malformed: a size is missing, or two weights share a name.
    """
    beside = variant.experts() if experts else {}
    rows: list[Row] = []
    for slot in ("backbone", "head"):
        prefix = f"{slot}/" if layout == JAX else ""
        site = Site(None, variant.spec, variant.parts["backbone"].offers, beside)
        rows += _collect(variant.parts[slot], site, f"{slot}.", prefix, layout)
    seen: dict[tuple[str, str], Row] = {}
    for row in rows:
        try:
            row.shape(0), row.shape(1), row.names()
        except KeyError as error:
            raise PartError(
                "a row of a name table has an axis without a size",
                field=row.torch,
                got=row.axes,
                fix=f"give {error} a size",
            ) from None
        for key in (("our name", row.torch), ("other name", row.other)):
            if key in seen:
                raise PartError(f"two rows of a name table have the same {key[0]}", field=key[1], fix="name each once")
            seen[key] = row
    return tuple(rows)


def shapes(rows: Iterable[Row]) -> dict[str, tuple[int, ...]]:
    """Our name -> shape, for every weight of a table. No framework, no memory."""
    return {name: row.shape(0) for row in rows for name in row.names()}


def other_shapes(rows: Iterable[Row]) -> dict[str, tuple[int, ...]]:
    """The other layout's name -> shape."""
    out: dict[str, tuple[int, ...]] = {}
    for (path, picked, layers, shape), group in _arrays(rows).items():
        out[path] = (*layers, *((len(group),) if picked else ()), *shape)
    return out


def cover(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Any], what: str, fix: str = "") -> None:
    """Refuse weights that are not exactly those expected.

    Args:
        expected: name -> shape (`shapes`, `other_shapes`).
        found: name -> array or shape.
        what: what the weights are, for the message.
        fix: the way out, for the message.

    Raises:
        StoreError: lists every missing, unknown and wrongly shaped tensor.
    """
    got = {name: tuple(getattr(x, "shape", x)) for name, x in found.items()}
    missing = [f"missing      {n} {expected[n]}" for n in expected if n not in got]
    unknown = [f"unknown      {n} {got[n]}" for n in got if n not in expected]
    wrong = [
        f"wrong shape  {n} {got[n]}, expected {expected[n]}" for n in expected if n in got and got[n] != expected[n]
    ]
    if lines := missing + unknown + wrong:
        head = f"{what}: {len(missing)} missing, {len(unknown)} unknown, {len(wrong)} of a wrong shape"
        raise StoreError("\n".join([head, *("    " + line for line in lines)]), fix=fix)


def to_other(rows: Iterable[Row], weights: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our weights in the other layout: {path: array}. Bit-exact; dtypes are kept.

    Raises:
        StoreError: a weight is missing, unknown or of the wrong shape.
    """
    rows = tuple(rows)
    cover(shapes(rows), weights, "weights do not match the name table")
    out = {}
    for (path, picked, layers, _), group in _arrays(rows).items():
        if picked and sorted(row.pick or 0 for row in group) != list(range(len(group))):
            raise PartError("a name table leaves holes in an array", field=path, got=[row.other for row in group])
        pieces = []
        for row in sorted(group, key=lambda row: row.pick or 0):
            moved = [_move(np.asarray(weights[name]), row, back=False) for name in row.names()]
            pieces.append(np.stack(moved) if layers else moved[0])
        out[path] = np.stack(pieces, axis=len(layers)) if picked else pieces[0]
    return out


def to_torch(rows: Iterable[Row], tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Weights in the other layout under our names: {name: array}, the exact inverse of `to_other`.

    A lazy array of `tree` is read when its turn comes, after every shape was checked.

    Raises:
        StoreError: a weight is missing, unknown or of the wrong shape.
    """
    rows = tuple(rows)
    cover(other_shapes(rows), tree, "weights do not match the name table")
    out: dict[str, np.ndarray] = {}
    for (path, picked, layers, _), group in _arrays(rows).items():
        whole = np.asarray(tree[path])
        for row in group:
            mine = np.take(whole, row.pick or 0, axis=len(layers)) if picked else whole
            for name, array in zip(row.names(), mine if layers else [mine], strict=True):
                out[name] = _move(array, row, back=True)
    return {name: out[name] for row in rows for name in row.names()}


def to_jax(variant: Any, weights: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """PyTorch-named weights -> {"backbone/llm/layers/backbone/q/kernel": array}: the nnx paths of the JAX model."""
    return to_other(table(variant), weights)


def from_jax(variant: Any, tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The exact inverse of `to_jax`."""
    return to_torch(table(variant), tree)


def count(variant: Any, prefix: str = "") -> int:
    """Number of parameters whose name starts with `prefix`; from the tables, so full sizes cost nothing."""
    return sum(int(np.prod(shape)) for name, shape in shapes(table(variant)).items() if name.startswith(prefix))


def _collect(chosen: Any, site: Site, torch: str, other: str, layout: str) -> Iterator[Row]:
    """Rows of a part and of the parts in its slots, with full names."""
    module = _params_module(chosen.part)
    mine = getattr(module, FUNCTIONS[layout], None) if module else None
    if mine is not None:
        here = evolve(site, settings=chosen.settings, inner=chosen.inner)
        yield from stack_of(mine(here), torch, other)
    under = getattr(module, "UNDER", {}).get(layout, {}) if module else {}
    for slot, inner in chosen.inner.items():
        below = other + f"{slot}/" if layout == JAX else other + under.get(slot, "")
        yield from _collect(inner, site, f"{torch}{slot}.", below, layout)


def _params_module(part: Any) -> Any:
    if not part.params:
        return None
    try:
        return import_module(part.params)
    except ImportError as error:
        raise PartError(
            f"the name table of part {part.name!r} cannot be imported: {error}", field="params", got=part.params
        ) from error


# An array of the other layout: its path, whether rows pick elements of it, its leading layer axis, one piece's shape.
_Array = tuple[str, bool, tuple[int, ...], tuple[int, ...]]


def _arrays(rows: Iterable[Row]) -> dict[_Array, list[Row]]:
    """Rows grouped by the array they live in."""
    groups: dict[_Array, list[Row]] = {}
    for row in rows:
        layers = (row.layers or 0,) if row.stacked else ()
        if row.layers is not None and not row.stacked:
            if row.pick is not None:
                raise PartError("[i] works on stacked or single arrays only", field=row.other)
            for i in range(row.layers):
                one = evolve(row, torch=row.torch.replace("{l}", str(i)), other=row.other.replace("{l}", str(i)))
                groups[(one.path, False, (), one.shape(1))] = [one]
        else:
            groups.setdefault((row.path, row.pick is not None, layers, row.shape(1)), []).append(row)
    return groups


def _sides(axes: str) -> tuple[list[list[str]], list[list[str]]]:
    """'(n h) d -> d n h' as [['n','h'],['d']], [['d'],['n'],['h']]; one side alone stands for both; 1 is a length."""
    left, _, right = axes.partition("->")
    sides = []
    for side in (left, right or left):
        groups = [m.strip("()").split() for m in re.findall(r"\([^)]*\)|\S+", side)]
        sides.append([[a for a in group if a != "1"] for group in groups])
    if sorted(sum(sides[0], [])) != sorted(sum(sides[1], [])):
        raise PartError("both sides of `axes` must have the same letters", field="axes", got=axes)
    return sides[0], sides[1]


def _move(array: np.ndarray, row: Row, *, back: bool) -> np.ndarray:
    """One weight through `axes`, or back; contiguous."""
    source, target = _sides(row.axes)[:: -1 if back else 1]
    flat = sum(source, [])
    order = [flat.index(a) for a in sum(target, [])]
    out = array.reshape([row.sizes[a] for a in flat]).transpose(order).reshape(row.shape(0 if back else 1))
    return out if out.flags.c_contiguous else out.copy(order="C")
