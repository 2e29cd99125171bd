"""FAST (arXiv 2501.09747): a discrete cosine transform, quantised and merged.

DCT over time of each action dim, scaled and rounded; the lowest frequency of all dims first; byte-pair merges.

Error bound. Rounding moves each scaled coefficient by at most 1/2 and the DCT is orthonormal, so with nothing clipped
the root mean square error of each dim over the chunk is at most 1 / (2 scale), and the error of a single value at most
sqrt(h) / (2 scale). Coefficients beyond the fitted range are moved to its end ("clip"), counted by `out_of_range`; the
own fit's range holds every chunk whose values lie in [-1, 1], and the chunks it was fitted on unless it warned.

Axes: n chunks, h steps, d dims.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve

from vla.codecs import CODEC_FILE, check_chunks, read_codec, write_codec
from vla.errors import DataError, DecodeError, SettingsError
from vla.reading import reading
from vla_tokenizer_fast.bpe import Merger, learn, spell
from vla_tokenizer_fast.config import Fast
from vla_tokenizer_fast.public import PublicFiles

BATCH = 8192  # chunks per pass: bounds memory (about 15 kB per chunk of 700 values)
FIT_SYMBOLS = 2**21  # the fit looks at no more coefficients; chunks are thinned out evenly
_log = logging.getLogger("vla.fast")


@functools.cache
def dct_matrix(h: int) -> np.ndarray:
    """The orthonormal DCT-II as a matrix [frequency time]; its transpose is the inverse."""
    t, k = np.arange(h), np.arange(h)[:, None]
    matrix = np.sqrt(2 / h) * np.cos(np.pi * (t + 0.5) * k / h)
    matrix[0] /= np.sqrt(2)
    return matrix


@functools.cache
def scaled_inverse(h: int, scale: float) -> np.ndarray:
    """Time from scaled coefficients, [time frequency]."""
    return np.ascontiguousarray(dct_matrix(h).T / scale)


class OwnMerges:
    """Coefficients `low .. low + base - 1` as symbols, and merges learned on them."""

    def __init__(self, low: int, base: int, merges: np.ndarray):
        self.low, self.high, self.merges = low, low + base - 1, merges
        self._merger = Merger(base, merges)
        self._lengths = self._merger.lengths
        # id -> its coefficients as the bytes of float64
        self.table = {i: (np.asarray(t) + np.float64(low)).tobytes() for i, t in enumerate(self._merger.texts)}

    def nearest(self, coefficients: np.ndarray) -> np.ndarray:
        """Each coefficient moved into range."""
        return np.clip(coefficients, self.low, self.high)

    def encode(self, coefficients: np.ndarray) -> list[np.ndarray]:
        """Ids of rows [n h*d] of coefficients in range."""
        grid = (coefficients - self.low).astype(np.uint16)
        return self._merger.encode(grid, np.full(len(grid), grid.shape[1]))

    def decode(self, ids: list[int]) -> np.ndarray:
        """Coefficients of one row of ids, float64. KeyError: an id that was never learned."""
        return np.frombuffer(spell(self.table, ids))

    def lengths(self, codes: int) -> np.ndarray:
        """Coefficients per id, [codes]."""
        out = np.zeros(codes, np.int32)
        out[: len(self._lengths)] = self._lengths
        return out


class FastCodec:
    """The codec (`vla.codecs.ActionCodec`). `source` names a public processor's files; without it, `fit` first."""

    def __init__(self, settings: Fast):
        self.settings = settings
        self.vocab_size = settings.codes
        self.scale = settings.scale
        self.shapes: tuple[tuple[int, int], ...] = ()  # fitted (h, d); empty: any
        self._model: OwnMerges | PublicFiles | None = None
        self._said = False
        if settings.source and (Path(settings.source).expanduser() / CODEC_FILE).is_file():
            stored = self.load(Path(settings.source).expanduser())
            self._model, self.scale, self.shapes = stored._model, stored.scale, stored.shapes
        elif settings.source:
            self._use(PublicFiles.find(settings.source))

    def _use(self, files: PublicFiles) -> None:
        if files.size != self.vocab_size:
            raise SettingsError(
                "the public FAST files hold another number of ids than the settings say",
                field="tokenizer.codes",
                got=self.vocab_size,
                expected=files.size,
                fix=f"--set tokenizer.codes={files.size}",
            )
        self._model, self.scale = files, files.scale

    @property
    def fitted(self) -> bool:
        """Whether encode and decode work."""
        return self._model is not None

    def fit(self, chunks: np.ndarray) -> FastCodec:
        """A codec with merges learned on chunks [n h d]; what came from `source` is kept as it is."""
        chunks = check_chunks(chunks)
        if self.settings.source:
            return self
        if not len(chunks):
            raise DataError("no chunks to fit on", field="actions", got=chunks.shape, fix="give at least one chunk")
        h, d = chunks.shape[1:]
        rows = self._coefficients(_thin(chunks, max(1, FIT_SYMBOLS // (h * d))))
        # Any chunk within [-1, 1] has coefficients up to scale * sqrt(h).
        reach = int(np.ceil(self.scale * np.sqrt(h)))
        if 2 * reach + 1 > self.vocab_size:
            raise SettingsError(
                f"{self.vocab_size} ids are too few: single coefficients of {h} steps already take {2 * reach + 1}",
                field="tokenizer.codes",
                got=self.vocab_size,
                expected=f">= {2 * reach + 1}, better twice that",
                fix="raise tokenizer.codes or lower tokenizer.scale",
            )
        most = max(reach, self.vocab_size // 4)  # otherwise at most half of the ids are single coefficients
        low, high = max(min(-reach, int(rows.min())), -most), min(max(reach, int(rows.max())), most)
        if most < max(-rows.min(), rows.max()):
            share = np.mean((rows < low) | (rows > high))
            _log.warning(
                "%.2g %% of the coefficients lie beyond the range of %d ids and are clipped; "
                "are the actions normalised?",
                100 * share,
                self.vocab_size,
            )
        base = high - low + 1
        merges = learn(np.clip(rows, low, high) - low, base, self.vocab_size)
        out = FastCodec(self.settings)
        out._model, out.shapes = OwnMerges(low, base, merges), ((h, d),)
        return out

    def encode(self, chunks: np.ndarray) -> list[np.ndarray]:
        """int32 ids of each chunk of [n h d]."""
        model, chunks = self._need_model(), check_chunks(chunks)
        self._check_dims(*chunks.shape[1:])
        out: list[np.ndarray] = []
        for start in range(0, len(chunks), BATCH):
            rows = self._coefficients(chunks[start : start + BATCH])
            near = model.nearest(rows)
            if not np.array_equal(near, rows):
                self._overflow(rows, near, start)
            out += model.encode(near)
        return out

    def decode(self, ids: np.ndarray, horizon: int, dim: int, mode: str = "strict") -> np.ndarray:
        """Actions [horizon dim] float64; see `vla.tokenizer.Tokenizer.decode`.

        relaxed: missing coefficients, the highest frequencies, are taken as 0, and what is too many is dropped.
        """
        model = self._need_model()
        self._check_dims(horizon, dim)
        try:
            values = model.decode(np.asarray(ids).tolist())
        except KeyError as error:
            raise DecodeError(
                "not an action id", got=error.args[0], expected=f"one of the {len(model.table)} learned"
            ) from None
        want = horizon * dim
        if len(values) != want:
            if mode != "relaxed" or not len(values):
                raise DecodeError(
                    f"the answer stands for {len(values)} coefficients, not {want}",
                    field="tokens",
                    got=f"{len(ids)} action tokens",
                    expected=f"{horizon} steps x {dim} dims",
                    fix="decode with the grammar, allow more tokens, or decode with mode='relaxed'",
                )
            values = np.concatenate([values[:want], np.zeros(max(0, want - len(values)), values.dtype)])
        return scaled_inverse(horizon, self.scale).dot(values.reshape(horizon, dim))

    def out_of_range(self, chunks: np.ndarray) -> np.ndarray:
        """How many coefficients of each chunk lie beyond the range, [n]."""
        rows = self._coefficients(check_chunks(chunks))
        return (self._need_model().nearest(rows) != rows).sum(1)

    def lengths(self) -> np.ndarray:
        """Coefficients per id, int32 [codes]; 0 for ids that no encoding has."""
        return self._need_model().lengths(self.vocab_size)

    def total(self, horizon: int, dim: int) -> int:
        """Coefficients of a chunk."""
        self._check_dims(horizon, dim)
        return horizon * dim

    def error_bound(self, horizon: int, dim: int) -> float:
        """Largest error of one value when no coefficient is out of range (see the head of this file)."""
        return float(np.sqrt(horizon) / (2 * self.scale))

    def save(self, folder: Path) -> None:
        """`codec.json` and the merges, or `codec.json` and the public files."""
        model = self._need_model()
        facts: dict[str, Any] = {"codes": self.vocab_size, "scale": self.scale}
        if isinstance(model, PublicFiles):
            write_codec(folder, "fast", facts | {"public": True}, {})
            model.save(folder)
        else:
            facts |= {"low": model.low, "high": model.high, "shapes": self.shapes, "public": False}
            write_codec(folder, "fast", facts, {"merges": model.merges})

    def load(self, folder: Path) -> FastCodec:
        """The codec stored there."""
        facts, arrays = read_codec(folder, "fast")
        with reading("a stored codec is damaged", folder, fix="fit it again"):
            codes, scale, public = int(facts["codes"]), float(facts["scale"]), bool(facts["public"])
            if not public:
                low, base = int(facts["low"]), int(facts["high"]) - int(facts["low"]) + 1
                shapes = tuple((int(h), int(d)) for h, d in facts["shapes"])
                merges = np.asarray(arrays["merges"], np.int32).reshape(-1, 2)
                earlier = base + np.arange(len(merges))[:, None]
                if (
                    base < 1
                    or base + len(merges) > codes
                    or (merges < 0).any()
                    or (merges >= earlier).any()
                    or not scale > 0
                ):
                    raise ValueError("merges of unknown tokens")
                model = OwnMerges(low, base, merges)
        if codes != self.vocab_size:
            raise SettingsError(
                "the stored codec has another number of ids than the settings say",
                field="tokenizer.codes",
                got=self.vocab_size,
                expected=codes,
                fix=f"--set tokenizer.codes={codes}, or fit again",
            )
        out = FastCodec(evolve(self.settings, source="", scale=scale))
        if public:
            out._use(PublicFiles.read(folder))
        else:
            out._model, out.shapes = model, shapes
        return out

    def _coefficients(self, chunks: np.ndarray) -> np.ndarray:
        """Rounded scaled coefficients [n h*d], frequency by frequency, all dims of one frequency together."""
        scaled = np.matmul(dct_matrix(chunks.shape[1]), chunks.astype(np.float64, copy=False))
        limit = np.float64(2**30)
        return np.rint(np.clip(scaled * self.scale, -limit, limit)).astype(np.int32).reshape(len(chunks), -1)

    def _overflow(self, rows: np.ndarray, near: np.ndarray, start: int) -> None:
        n, i = np.argwhere(near != rows)[0]
        if self.settings.overflow == "error":
            raise DataError(
                "a DCT coefficient lies beyond the range of the FAST codec",
                field=f"actions[{start + n}]",
                got=int(rows[n, i]),
                expected=f"nearest is {int(near[n, i])}",
                fix="check the normalisation, fit on data that has such chunks, or set tokenizer.overflow=clip",
            )
        if not self._said:
            self._said = True
            _log.warning(
                "%d of %d DCT coefficients lie beyond the range of the FAST codec and are moved to the nearest it "
                "has, e.g. %d to %d. (Said once.)",
                (near != rows).sum(),
                rows.size,
                rows[n, i],
                near[n, i],
            )

    def _need_model(self) -> OwnMerges | PublicFiles:
        if self._model is None:
            raise SettingsError(
                "the fast tokenizer is not fitted",
                field="tokenizer",
                got="no merges",
                fix="vla tokenizer fit DATA --tokenizer fast --out FOLDER, then "
                "--set tokenizer.source=FOLDER; or set it to a public processor",
            )
        return self._model

    def _check_dims(self, h: int, d: int) -> None:
        if self.shapes and (h, d) not in self.shapes:
            raise DataError(
                "the fast tokenizer was fitted on chunks of other dims",
                field="actions",
                got=(h, d),
                expected=" or ".join(map(str, self.shapes)),
                fix="fit again on this data, or change the horizon",
            )


def _thin(chunks: np.ndarray, most: int) -> np.ndarray:
    """At most `most` chunks, evenly spread."""
    return chunks if len(chunks) <= most else chunks[np.linspace(0, len(chunks) - 1, most).astype(np.int64)]
