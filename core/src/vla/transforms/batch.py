"""Model inputs of single samples -> one batch: `batch` for the model, `collate` for its arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla.contracts import Actions, Observation, Spec, check_observation, observation_from, pack
from vla.errors import DataError


def batch(
    rows: Sequence[Mapping[str, Any]], spec: Spec, vocab_size: int | None = None
) -> tuple[Observation, Actions | None]:
    """What `Group.inputs` gave -> what the model takes, on the host: stacked, checked, nothing absent or padded.

    Args:
        rows: one model input each.
        spec: of the variant.
        vocab_size: of the backbone.

    Returns:
        The observation, and the chunk to learn where the rows have one.

    Raises:
        DataError: no rows, rows that differ in keys or shapes, or what `check_observation` refuses.
    """
    data = collate(rows)
    obs = observation_from(data)
    check_observation(obs, spec, vocab_size)
    return pack(obs), Actions(data["actions"], data.get("actions_mask")) if "actions" in data else None


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack what `Group.inputs` gave; every array gains a first axis b.

    A camera that some rows lack is black there, with its mask False. A camera that no row has is left out, with its
    mask: then nothing is spent on it.

    Raises:
        DataError: no rows, or rows that differ in keys or shapes.
    """
    if not rows:
        raise DataError("a batch of no samples", field="rows", got=0)
    out: dict[str, Any] = {}
    for key in rows[0]:
        if key in ("images", "image_masks"):
            continue
        lacking = [i for i, row in enumerate(rows) if key not in row]
        if lacking:
            raise _uneven(key, lacking[0], rows)
        out[key] = _stack(key, [row[key] for row in rows])
    for i, row in enumerate(rows):
        if extra := [k for k in row if k not in rows[0]]:
            raise _uneven(extra[0], 0 if i else i, rows)
    images, masks = _images(rows)
    return {"images": images, "image_masks": masks, **out}


def _images(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    shapes: dict[str, np.ndarray] = {}  # camera -> its first image, in the order of the masks
    for row in rows:
        for name in row.get("image_masks", {}):
            if name in row.get("images", {}):
                shapes.setdefault(name, np.asarray(row["images"][name]))
    images, masks = {}, {}
    for name, first in shapes.items():
        batch = np.zeros((len(rows), *first.shape), first.dtype)
        seen = np.zeros(len(rows), bool)
        for i, row in enumerate(rows):
            if name in row["images"]:
                image = np.asarray(row["images"][name])
                if image.shape != first.shape or image.dtype != first.dtype:
                    raise DataError(
                        "the images of one camera differ",
                        field=f"images[{name!r}]",
                        got=f"{image.dtype} {image.shape}",
                        expected=f"{first.dtype} {first.shape}",
                    )
                batch[i] = image
                seen[i] = bool(row["image_masks"].get(name, True))
        images[name], masks[name] = batch, seen
    return images, masks


def _stack(key: str, values: list[Any]) -> Any:
    if isinstance(values[0], Mapping):
        return {k: _stack(f"{key}/{k}", [v[k] for v in values]) for k in values[0]}
    arrays = [np.asarray(v) for v in values]
    for array in arrays:
        if array.shape != arrays[0].shape:
            raise DataError(
                "the samples of a batch differ in shape", field=key, got=array.shape, expected=arrays[0].shape
            )
    return np.stack(arrays)


def _uneven(key: str, row: int, rows: Sequence[Mapping[str, Any]]) -> DataError:
    return DataError(
        "the samples of a batch differ in what they hold", field=key, got=f"sample {row} has {sorted(rows[row])}"
    )
