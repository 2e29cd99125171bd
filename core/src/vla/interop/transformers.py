"""Starting weights from a model folder of `transformers`: whatever parts of the backbone know their names there.

A part's `params` module says with `hf(site)` what its weights are called. A language model fills the LLM core, a
vision-language model both; in such a file the names stand behind a prefix, which is found, not guessed: it must hold
for every name of the part. Nothing is dropped in silence: `Start` lists what is new, and what the file has beyond it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla.errors import StoreError
from vla.interop.paligemma import Start, read_shards
from vla.layout import BACKBONE
from vla.params import Row, Site, _params_module, shapes, stack_of, table

SLOTS = ("vision", "llm")


def read_transformers(path: str | Path, variant: Any) -> Start:
    """Starting weights for the vision encoder and the LLM core of a variant, as far as the folder has them.

    Args:
        path: a folder with `*.safetensors`, one file or shards with an index.
        variant: a `vla.compose.Variant`.

    Raises:
        StoreError: the folder is damaged, no part of the backbone is in it, or a tensor of one has another shape.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise StoreError(
            "no model folder here", field=str(path), expected="a folder with config.json and *.safetensors",
            fix="download one and give its path; nothing is fetched for you",
        )  # fmt: skip
    found = read_shards(path)
    weights: dict[str, np.ndarray] = {}
    used: set[str] = set()
    tried = []
    for slot in SLOTS:
        rows = _rows(variant, slot)
        if not rows:
            tried.append(f"backbone.{slot} ({variant.backbone.inner[slot].part.name}): has no names there")
            continue
        named = _locate([row.other for row in rows], found)
        if named is None:
            tried.append(f"backbone.{slot}: {rows[0].other} and {len(rows) - 1} others are not all there")
            continue
        for row, name in zip(rows, named, strict=True):
            weights[row.torch] = _fit(found[name], row.shape(0), row.torch, name)
            used.add(name)
    if not weights:
        raise StoreError(
            "no part of the backbone is in this folder", field=str(path), got="; ".join(tried),
            fix="build the variant for this model: --set backbone.llm=hf --set backbone.llm.model=PATH",
        )  # fmt: skip
    new = tuple(name for name in shapes(table(variant)) if name not in weights)
    return Start(
        str(path), weights, new, tuple(f"{n}: not a weight of this backbone" for n in sorted(set(found) - used))
    )


def _rows(variant: Any, slot: str) -> list[Row]:
    """Our full names and transformers' names of one part, one row a weight; [] where the part does not know them."""
    chosen = variant.backbone.inner[slot]
    function = getattr(_params_module(chosen.part), "hf", None)
    if function is None:
        return []
    site = Site(chosen.settings, variant.spec, variant.backbone.offers, {}, chosen.inner)
    rows = list(stack_of(function(site), f"{BACKBONE}.{slot}.", ""))
    return rows if all(row.layers is None and row.axes.count("->") == 0 for row in rows) else []


def _locate(names: Sequence[str], found: Mapping[str, Any]) -> list[str] | None:
    """The names in the file: behind one prefix, or as they are; the output table may stand elsewhere."""
    bare = [re.sub(r"^model\.", "", name) for name in names]
    probe = max(bare, key=len)
    prefixes = sorted({name.removesuffix(probe) for name in found if name.endswith(probe)}, key=len)
    for prefix in prefixes:
        places = [_output(found) if name == "lm_head.weight" else prefix + name for name in bare]
        if all(place in found for place in places):
            return places
    return None


def _output(found: Mapping[str, Any]) -> str:
    return next((name for name in found if name.endswith("lm_head.weight")), "lm_head.weight")


def _fit(array: np.ndarray, shape: tuple[int, ...], ours: str, theirs: str) -> np.ndarray:
    """The array; a table with fewer rows is filled up with their mean (ids that the model has not seen)."""
    if array.shape == shape:
        return array
    grows = array.ndim == 2 and array.shape[1:] == shape[1:] and array.shape[0] < shape[0] and "embedder" in ours
    if not grows:
        raise StoreError(
            "a tensor has another shape than the variant's", field=theirs, got=array.shape,
            expected=f"{shape} ({ours})",
            fix="build the variant for this model: --set backbone.llm.model=PATH",
        )  # fmt: skip
    mean = np.asarray(array, np.float32).mean(0, keepdims=True).astype(array.dtype)
    return np.concatenate([array, np.repeat(mean, shape[0] - array.shape[0], 0)])
