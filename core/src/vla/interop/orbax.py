"""Reading an orbax checkpoint with `tensorstore` alone.

On disk, an item (openpi's `params/`) is `_METADATA` (JSON: the list of leaves) and, in one OCDBT store, a zarr array
per leaf under its dot-joined path. Nothing is unpickled and no code of the checkpoint's writer is needed. Leaves are
opened first, which tells shape and dtype, and read only when asked for.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from attrs import field, frozen

from vla.errors import StoreError
from vla.reading import MOST_NAMES, read_json, reading


@frozen
class Leaf:
    """An array on disk; `np.asarray(leaf)` reads it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    store: Any = field(repr=False)
    where: str
    complete: bool  # the writer stored every chunk, so an absent one is a loss and not a run of zeros

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        try:
            lost = self.complete and self.store.storage_statistics(query_not_stored=True).result().not_stored
            found = None if lost else np.asarray(self.store.read().result())
        except Exception as error:  # tensorstore raises ValueError, OSError or its own kinds for damaged data
            raise StoreError(
                "an array of the checkpoint is damaged", field=self.where, got=_first_line(error), fix="copy it again"
            ) from error
        if found is None:
            raise StoreError(
                "pieces of an array are missing", field=self.where, fix="the checkpoint is incomplete: copy it again"
            )
        return found if dtype is None else found.astype(dtype)


def is_item(folder: Path) -> bool:
    """Whether the folder is an orbax item, such as `params/`."""
    return (folder / "_METADATA").is_file()


def read_item(folder: Path) -> dict[str, Leaf]:
    """Path joined by "/" -> leaf, for all arrays of one orbax item.

    Raises:
        StoreError: the folder is not an orbax item, its list of leaves is damaged, or a listed leaf is not there.
    """
    ts = _tensorstore()
    listing = folder / "_METADATA"
    if not os.path.exists(listing):
        raise StoreError(
            "not an orbax checkpoint",
            field=str(listing),
            fix="give the folder that holds `params/`, or `params/` itself",
        )
    meta = read_json(listing, "the list of arrays is damaged")
    with reading("the list of arrays is damaged", listing):
        leaves = [_leaf_path(entry) for entry in meta["tree_metadata"].values() if _is_array(entry)]
        if len(leaves) > MOST_NAMES:
            raise ValueError(f"it lists {len(leaves):,} arrays, at most {MOST_NAMES:,} are read")
        complete = bool(meta.get("store_array_data_equal_to_fill_value"))
        driver = "zarr3" if meta.get("use_zarr3") else "zarr"
    pending = {}
    for parts in leaves:
        name = ".".join(parts) + "/"
        base = folder.absolute().as_uri()
        if (folder / "manifest.ocdbt").exists():
            store = {"driver": "ocdbt", "base": base + "/", "path": name}
        else:  # older checkpoints: a folder per array
            store = {"driver": "file", "path": f"{folder.absolute()}/{name}"}
        pending["/".join(parts)] = ts.open({"driver": driver, "kvstore": store}, open=True)
    out, broken = {}, {}
    for path, future in pending.items():
        try:
            array = future.result()
        except Exception as error:  # see Leaf.__array__
            broken[path] = _first_line(error)
            continue
        out[path] = Leaf(tuple(array.shape), array.dtype.numpy_dtype, array, f"{folder}: {path}", complete)
    if broken:
        lines = "\n".join(f"    {path}: {why}" for path, why in broken.items())
        raise StoreError(
            f"{len(broken)} of {len(leaves)} arrays that the checkpoint lists cannot be opened:\n{lines}",
            field=str(folder),
            fix="the checkpoint is incomplete: copy it again",
        )
    return out


def _leaf_path(entry: dict[str, Any]) -> list[str]:
    parts = [str(key["key"]) for key in entry["key_metadata"]]
    if not parts or any(not part or "/" in part or part.startswith(".") for part in parts):
        raise ValueError(f"{parts} names no array of this folder")
    return parts


def _is_array(entry: dict[str, Any]) -> bool:
    """Empty containers and None are listed too; they have no array."""
    return entry["value_metadata"]["value_type"] not in ("None", "Dict", "List", "NamedTuple", "Empty")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0][:200]


def _tensorstore() -> Any:
    try:
        import tensorstore
    except ImportError as error:
        raise StoreError(
            "openpi's checkpoints are read with tensorstore, which is not installed",
            fix="pip install 'vla-core[orbax]'",
        ) from error
    return tensorstore
