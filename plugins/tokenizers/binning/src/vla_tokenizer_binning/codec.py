"""Uniform bins over normalised actions, one token per value, steps first (C order of [h d]).

There is nothing to learn: the codec is always fitted, and serves any horizon and any dims. Values beyond the limit are
clipped to the outer bins; within it the error of a value is at most half a bin ("centre") or a bin ("left").
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vla.codecs import check_chunks, read_codec, write_codec
from vla.errors import DecodeError, SettingsError
from vla.reading import reading
from vla_tokenizer_binning.config import Binning


class BinningCodec:
    """The codec (`vla.codecs.ActionCodec`)."""

    fitted = True
    by_step = True

    def __init__(self, settings: Binning):
        self.settings = settings
        self.vocab_size = settings.codes
        self._width = 2 * settings.limit / settings.codes
        self._place = 0.5 if settings.value == "centre" else 0.0  # where in its bin the decoded value lies

    def fit(self, chunks: np.ndarray) -> BinningCodec:
        """Nothing to learn; checks the chunks."""
        check_chunks(chunks)
        return self

    def encode(self, chunks: np.ndarray) -> list[np.ndarray]:
        """int32 ids [h*d] of each chunk of [n h d]."""
        scaled = (check_chunks(chunks).astype(np.float64, copy=False) + self.settings.limit) / self._width
        ids = np.clip(np.floor(scaled), 0, self.vocab_size - 1).astype(np.int32)
        return list(ids.reshape(len(ids), -1))

    def decode(self, ids: np.ndarray, horizon: int, dim: int, mode: str = "strict") -> np.ndarray:
        """Actions [horizon dim] float64. relaxed: missing steps repeat the last complete one, surplus is dropped."""
        ids, want = np.asarray(ids, np.int64), horizon * dim
        outside = (ids < 0) | (ids >= self.vocab_size)
        if outside.any():
            raise DecodeError("not an action id", got=int(ids[outside][0]), expected=f"0 .. {self.vocab_size - 1}")
        if len(ids) != want:
            steps = min(horizon, len(ids) // dim)
            if mode != "relaxed" or not steps:
                raise _wrong_number(len(ids), horizon, dim)
            whole = ids[: steps * dim].reshape(steps, dim)
            ids = np.concatenate([whole, np.repeat(whole[-1:], horizon - steps, 0)]).ravel()
        return self._values(ids, horizon, dim)

    def decode_any(self, ids: np.ndarray, horizon: int, dim: int) -> np.ndarray:
        """As openpi: the first horizon * dim ids, whatever they are; ids outside the bins go on outside [-1, 1]."""
        if len(ids) < horizon * dim:
            raise _wrong_number(len(ids), horizon, dim)
        return self._values(np.asarray(ids[: horizon * dim], np.int64), horizon, dim)

    def _values(self, ids: np.ndarray, horizon: int, dim: int) -> np.ndarray:
        return ((ids + self._place) * self._width - self.settings.limit).reshape(horizon, dim)

    def lengths(self) -> np.ndarray:
        """Every id stands for one value."""
        return np.ones(self.vocab_size, np.int32)

    def total(self, horizon: int, dim: int) -> int:
        """Values of a chunk."""
        return horizon * dim

    def error_bound(self, horizon: int, dim: int) -> float:
        """Largest error of a value within the limit."""
        return self._width * max(self._place, 1 - self._place)

    def save(self, folder: Path) -> None:
        """`codec.json`."""
        facts = {"codes": self.settings.codes, "limit": self.settings.limit, "value": self.settings.value}
        write_codec(folder, "binning", facts, {})

    def load(self, folder: Path) -> BinningCodec:
        """The codec stored there."""
        facts, _ = read_codec(folder, "binning")
        with reading("a stored codec is damaged", folder, fix="fit it again"):
            codes, limit, value = int(facts["codes"]), float(facts["limit"]), str(facts["value"])
            if value not in ("centre", "left"):
                raise ValueError(value)
        if codes != self.vocab_size:
            raise SettingsError(
                "the stored codec has another number of bins than the settings say",
                field="tokenizer.codes",
                got=self.vocab_size,
                expected=codes,
                fix=f"--set tokenizer.codes={codes}, or fit again",
            )
        return BinningCodec(Binning(codes, limit, value, self.settings.skip))


def _wrong_number(got: int, horizon: int, dim: int) -> DecodeError:
    return DecodeError(
        f"the answer stands for {got} values, not {horizon * dim}",
        field="tokens",
        expected=f"{horizon} steps x {dim} dims",
        fix="decode with the grammar, allow more tokens, or decode with mode='relaxed'",
    )
