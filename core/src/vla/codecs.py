"""The contracts of text tokenizers and action codecs, and what a codec needs to check chunks and to keep its fit.

`vla.tokenizer` joins the two to the tokenizer of a variant.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vla.errors import DataError, SettingsError, StoreError
from vla.manifest import MANIFEST, verify_folder
from vla.reading import read_json, read_npz, reading

CODEC_FILE, ARRAYS_FILE = "codec.json", "codec.npz"


class TextTokenizer(Protocol):
    """What `Part.numpy` of a text tokenizer makes: called with (settings, assets folder or None)."""

    vocab_size: int
    prompt: str  # a name in `PROMPTS`

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; for people to read, never on the way to actions."""

    def save(self, folder: Path) -> None:
        """Write what `assets` must hold to open this tokenizer elsewhere."""


class ActionCodec(Protocol):
    """What `Part.numpy` of an action tokenizer makes: called with (settings).

    Chunks are normalised actions [n h d]: finite floats, mostly in [-1, 1]. Every method that needs a fit raises
    `SettingsError` on an unfitted codec, and `DataError` when the codec was fitted for other dims.
    """

    vocab_size: int  # action ids are 0 .. vocab_size - 1
    fitted: bool  # whether encode and decode work
    by_step: bool  # token k of an answer of n stands for step k * h // n alone; may be absent: False

    def fit(self, chunks: np.ndarray) -> ActionCodec:
        """Learn from chunks [n h d]; gives a fitted codec, deterministic."""

    def encode(self, chunks: np.ndarray) -> list[np.ndarray]:
        """int32 ids of each chunk of [n h d]."""

    def decode(self, ids: np.ndarray, horizon: int, dim: int, mode: str = "strict") -> np.ndarray:
        """Actions [h d] float64 from ids; `mode` as in `Tokenizer.decode`. Raises DecodeError, never gives NaN."""

    def lengths(self) -> np.ndarray:
        """int32 [vocab_size]: values each id stands for; 0: the id is never emitted under a grammar."""

    def total(self, horizon: int, dim: int) -> int:
        """What the lengths of one answer add up to."""

    def error_bound(self, horizon: int, dim: int) -> float:
        """Largest |x - decode(encode(x))| over chunks within the codec's range; inf when nothing is promised."""

    def save(self, folder: Path) -> None:
        """Write JSON and arrays."""

    def load(self, folder: Path) -> ActionCodec:
        """The codec that `save` wrote there."""


@runtime_checkable
class SlowFit(Protocol):
    """What a codec offers beside whose fit takes minutes, so that the verbs can say its cost first."""

    fitted: bool
    on_step: Callable[[int, int], None] | None  # called in a fit with (steps done, steps in all)

    def fit_seconds(self, chunks: np.ndarray) -> float:
        """About how long `fit` would take here, from a few steps of it."""

    def shortened(self, share: float) -> ActionCodec:
        """The unfitted codec whose fit takes this share of the steps, at least one."""


def check_text(text: str, name: str = "prompt") -> str:
    """A text that can be encoded.

    Raises:
        DataError: it has half of a surrogate pair, which is no character and has no encoding.
    """
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise DataError(
            "a text has half of a surrogate pair, which is no character", field=name, got=ascii(text)[:60],
            fix="decode what the sender wrote as UTF-8",
        )  # fmt: skip
    return text


def check_chunks(chunks: Any) -> np.ndarray:
    """Chunks [n h d] as floats.

    Raises:
        DataError: other axes, no steps or dims, or NaN or infinite values; names the place and the value.
    """
    chunks = np.asarray(chunks)
    if chunks.ndim != 3 or 0 in chunks.shape[1:] or chunks.dtype.kind not in "fiu":
        raise DataError(
            "action chunks have three axes",
            field="actions",
            got=f"{chunks.dtype} {chunks.shape}",
            expected="[n h d] floats",
        )
    if chunks.dtype not in (np.float32, np.float64):
        chunks = chunks.astype(np.float64)
    if not np.isfinite(chunks).all():
        n, h, d = np.argwhere(~np.isfinite(chunks))[0]
        raise DataError(
            "actions have NaN or infinite values",
            field=f"actions[{n}, {h}, {d}]",
            got=float(chunks[n, h, d]),
            fix="drop this episode, or check the sensor and the normalisation statistics",
        )
    return chunks


def write_codec(folder: Path, kind: str, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write `codec.json` and, if there are arrays, `codec.npz` (plain arrays, no pickle)."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"vla_codec": 1, "kind": kind, **facts}, indent=1)
    (folder / CODEC_FILE).write_text(text + "\n", encoding="utf-8")
    if arrays:
        np.savez_compressed(folder / ARRAYS_FILE, **dict(arrays))  # type: ignore[arg-type]


def read_codec(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `write_codec` wrote.

    Raises:
        SettingsError: the files are of a codec of another kind.
        StoreError: they are damaged or not there.
    """
    file = folder / CODEC_FILE
    if (folder / MANIFEST).is_file():  # of `vla tokenizer fit`; what is in a model is in the model's manifest
        verify_folder(folder, (CODEC_FILE, ARRAYS_FILE))
    facts = read_json(file, "a stored codec cannot be read")
    with reading("a stored codec cannot be read", file, fix="fit it again"):
        version, stored = facts["vla_codec"], facts["kind"]
    arrays = read_npz(folder / ARRAYS_FILE) if os.path.exists(folder / ARRAYS_FILE) else {}
    if version != 1:
        raise StoreError(
            "a stored codec is of another version", field=str(file), got=version, expected=1, fix="upgrade vla-core"
        )
    if stored != kind:
        raise SettingsError(
            "the stored codec is of another tokenizer",
            field=str(file),
            got=stored,
            expected=kind,
            fix=f"build with --tokenizer {stored}",
        )
    return facts, arrays
