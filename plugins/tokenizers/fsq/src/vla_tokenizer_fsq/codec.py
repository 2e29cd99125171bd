"""The FSQ codec: a fixed number of ids per chunk. Fitted in PyTorch; encoding and decoding are numpy (`net.py`).

Error bound. An autoencoder promises no small error. What holds always: a codec fitted here decodes into the range of
the values it was fitted on, so within that range no error exceeds its width; typical errors on the fitted chunks are
kept as `fit_rmse` and `fit_max`. For an openpi checkpoint nothing is promised (bound: inf), because nothing limits its
output.

Every row of `num_tokens` ids decodes: only a wrong number of ids, or ids out of range, are errors.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve

from vla.codecs import CODEC_FILE, check_chunks, read_codec, write_codec
from vla.errors import DataError, DecodeError, SettingsError, StoreError
from vla.reading import FAULTS, read_json, reading, reason
from vla_tokenizer_fsq import net
from vla_tokenizer_fsq.config import HEAD_DIM, LEVELS, Fsq

BATCH = 256
_TIMED = 4  # steps that tell how long a fit takes
_SIZES = ("num_tokens", "embed_dim", "num_layers", "mlp_ratio", "bound")


class FsqCodec:
    """The codec (`vla.codecs.ActionCodec`)."""

    def __init__(self, settings: Fsq):
        self.settings = settings
        self.on_step: Callable[[int, int], None] | None = None
        self.vocab_size = settings.codes
        self._levels = LEVELS[settings.codes]
        self.shape: tuple[int, int] | None = None  # (h, d) it was fitted on
        self._params: dict[str, np.ndarray] | None = None
        self._range: np.ndarray | None = None  # [2 d]: lowest and highest value of the fitted chunks
        self.fit_rmse = self.fit_max = float("nan")  # of the fitted chunks, normalised units
        source = Path(settings.source).expanduser()
        if settings.source and (source / CODEC_FILE).is_file():
            stored = self.load(source)
            self.settings = evolve(stored.settings, source=settings.source)
            self.shape, self._params, self._range = stored.shape, stored._params, stored._range
            self.fit_rmse, self.fit_max = stored.fit_rmse, stored.fit_max
        elif settings.source:
            self._read_openpi(source)

    @property
    def fitted(self) -> bool:
        """Whether encode and decode work."""
        return self._params is not None

    def fit(self, chunks: np.ndarray) -> FsqCodec:
        """Train on chunks [n h d] (PyTorch; minutes on a CPU). What came from `source` is kept as it is."""
        chunks = check_chunks(chunks)
        s = self.settings
        if s.source:
            return self
        if not len(chunks):
            raise DataError("no chunks to fit on", field="actions", got=chunks.shape, fix="give at least one chunk")
        try:
            from vla_tokenizer_fsq import torch_impl
        except ModuleNotFoundError as error:
            raise SettingsError(
                "fitting fsq needs PyTorch", got=str(error), fix="pip install 'vla-tokenizer-fsq[torch]'"
            ) from error
        out = FsqCodec(s)
        out.shape = chunks.shape[1:]
        clipped = out._bounded(chunks)
        out._params = torch_impl.fit(
            clipped,
            out._shapes(),
            levels=self._levels,
            layers=s.num_layers,
            steps=s.steps,
            batch=s.batch,
            lr=s.lr,
            seed=s.seed,
            on_step=self.on_step,
        )
        out._range = np.stack([clipped.min((0, 1)), clipped.max((0, 1))]).astype(np.float32)
        if not all(np.isfinite(value).all() for value in out._params.values()):
            raise DataError(
                "the fit of fsq diverged",
                field="tokenizer.lr",
                got=s.lr,
                fix="lower tokenizer.lr, check the normalisation",
            )
        error = np.abs(out._decode(np.stack(out.encode(chunks))) - clipped)
        out.fit_rmse, out.fit_max = float(np.sqrt(np.mean(error**2))), float(error.max())
        return out

    def fit_seconds(self, chunks: np.ndarray) -> float:
        """About how long `fit` would take here: a few steps are made, after one that pays for the start."""
        chunks = check_chunks(chunks)[: self.settings.batch]
        self.shortened(0).fit(chunks)
        began = time.perf_counter()
        FsqCodec(evolve(self.settings, steps=_TIMED)).fit(chunks)
        return (time.perf_counter() - began) / _TIMED * self.settings.steps

    def shortened(self, share: float) -> FsqCodec:
        """The unfitted codec whose fit makes this share of the steps, at least one."""
        return FsqCodec(evolve(self.settings, steps=max(1, int(self.settings.steps * min(share, 1)))))

    def encode(self, chunks: np.ndarray) -> list[np.ndarray]:
        """int32 ids [num_tokens] of each chunk of [n h d]."""
        params, chunks = self._need_params(), check_chunks(chunks)
        self._check_dims(*chunks.shape[1:])
        out: list[np.ndarray] = []
        for start in range(0, len(chunks), BATCH):
            part = self._bounded(chunks[start : start + BATCH])
            out += list(net.encode(params, part, self._levels, self.settings.num_layers).astype(np.int32))
        return out

    def decode(self, ids: np.ndarray, horizon: int, dim: int, mode: str = "strict") -> np.ndarray:
        """Actions [horizon dim] float64. relaxed: surplus ids are dropped; missing ones cannot be made up."""
        self._need_params()
        self._check_dims(horizon, dim)
        ids, want = np.asarray(ids, np.int64), self.settings.num_tokens
        outside = (ids < 0) | (ids >= self.vocab_size)
        if outside.any():
            raise DecodeError("not an action id", got=int(ids[outside][0]), expected=f"0 .. {self.vocab_size - 1}")
        if len(ids) < want or (len(ids) > want and mode == "strict"):
            raise DecodeError(
                "the answer has another number of action tokens than a chunk",
                field="tokens",
                got=len(ids),
                expected=want,
                fix="decode with the grammar, or allow more tokens",
            )
        return self._decode(ids[None, :want])[0].astype(np.float64)

    def _decode(self, ids: np.ndarray) -> np.ndarray:
        params = self._need_params()
        parts = [
            net.decode(params, ids[i : i + BATCH], self._levels, self.settings.num_layers)
            for i in range(0, len(ids), BATCH)
        ]
        out = np.concatenate(parts)
        return out if self._range is None else np.clip(out, self._range[0], self._range[1])

    def lengths(self) -> np.ndarray:
        """Each id is one token of the fixed number."""
        return np.ones(self.vocab_size, np.int32)

    def total(self, horizon: int, dim: int) -> int:
        """Tokens of a chunk."""
        self._check_dims(horizon, dim)
        return self.settings.num_tokens

    def error_bound(self, horizon: int, dim: int) -> float:
        """See the head of this file."""
        self._need_params()
        return float("inf") if self._range is None else float((self._range[1] - self._range[0]).max())

    def save(self, folder: Path) -> None:
        """`codec.json` and the parameters."""
        params, s = self._need_params(), self.settings
        facts: dict[str, Any] = {"codes": s.codes, "shape": self.shape, **{name: getattr(s, name) for name in _SIZES}}
        facts |= {"fit_rmse": self.fit_rmse, "fit_max": self.fit_max} if self._range is not None else {}
        write_codec(folder, "fsq", facts, params if self._range is None else {**params, "range": self._range})

    def load(self, folder: Path) -> FsqCodec:
        """The codec stored there."""
        facts, arrays = read_codec(folder, "fsq")
        try:
            if facts["codes"] != self.vocab_size:
                raise SettingsError(
                    "the stored codec has another number of ids than the settings say",
                    field="tokenizer.codes",
                    got=self.vocab_size,
                    expected=facts["codes"],
                    fix=f"--set tokenizer.codes={facts['codes']}, or fit again",
                )
            sizes = {name: type(getattr(self.settings, name))(facts[name]) for name in _SIZES}
            out = FsqCodec(evolve(self.settings, source="", **sizes))
            h, d = facts["shape"]
            out.shape = (int(h), int(d))
            out._range = arrays.pop("range", None)
            if out._range is not None and (out._range.shape != (2, out.shape[1]) or not np.isfinite(out._range).all()):
                raise ValueError(f"range {out._range.shape}")
            out.fit_rmse, out.fit_max = float(facts.get("fit_rmse", "nan")), float(facts.get("fit_max", "nan"))
        except FAULTS as error:
            raise StoreError(
                "a stored codec is damaged", field=str(folder), got=reason(error), fix="fit it again"
            ) from error
        out._take(arrays, str(folder))
        return out

    def _read_openpi(self, path: Path) -> None:
        """openpi's checkpoint: STEP/params (orbax) and STEP/config (JSON: the arguments of its network)."""
        from vla.interop.orbax import read_item

        steps = (
            sorted((int(p.name), p) for p in path.iterdir() if p.is_dir() and p.name.isdigit()) if path.is_dir() else []
        )
        folder = steps[-1][1] if steps else path
        about = folder / "config" / "metadata"
        if not os.path.exists(about):
            raise SettingsError(
                "this is no FSQ checkpoint of openpi",
                field="tokenizer.source",
                got=str(path),
                expected="a folder STEP/ with params/ and config/metadata",
                fix="correct the path",
            )
        config = read_json(about, "the config of an FSQ checkpoint is damaged")
        with reading("the config of an FSQ checkpoint is damaged", about):
            h, d = int(config["data_horizon"]), int(config["data_dim"])
            sizes = {
                name: type(getattr(self.settings, name))(config.get(name) or getattr(Fsq(), name)) for name in _SIZES
            }
            codes = int(config["target_codebook_size"])
        for name in ("causal", "use_state_conditioning"):
            if config.get(name):
                raise SettingsError(
                    "this FSQ checkpoint uses what vla does not support", field=f"{folder}/config", got=name
                )
        for name, here, there in (
            ("codes", self.vocab_size, codes),
            ("num_tokens", self.settings.num_tokens, sizes["num_tokens"]),
        ):
            if here != there:
                raise SettingsError(
                    "the FSQ checkpoint is of another size than the settings say",
                    field=f"tokenizer.{name}",
                    got=here,
                    expected=there,
                    fix=f"--set tokenizer.{name}={there}",
                )
        self.settings = evolve(self.settings, **sizes)
        self.shape = (h, d)
        leaves = read_item(folder / "params")
        self._take(
            {name.removeprefix("params/"): np.asarray(leaf, np.float32) for name, leaf in leaves.items()}, str(folder)
        )

    def _take(self, params: dict[str, np.ndarray], where: str) -> None:
        want = self._shapes()
        if params.keys() != want.keys() or any(params[name].shape != shape for name, shape in want.items()):
            odd = sorted(params.keys() ^ want.keys()) or [n for n, shape in want.items() if params[n].shape != shape]
            raise StoreError(
                "the parameters of an FSQ codec do not fit its sizes", field=where, got=odd[:4], fix="copy it again"
            )
        if bad := [name for name, value in params.items() if not np.isfinite(value).all()]:
            raise StoreError(
                "the parameters of an FSQ codec are not finite", field=where, got=bad[:4], fix="fit it again"
            )
        self._params = {name: np.asarray(value, np.float32) for name, value in params.items()}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        s = self.settings
        assert self.shape is not None
        h, d = self.shape
        return net.shapes(s.embed_dim, d, h, s.num_tokens, s.num_layers, s.mlp_ratio, len(self._levels), HEAD_DIM)

    def _bounded(self, chunks: np.ndarray) -> np.ndarray:
        limit = self.settings.bound
        chunks = chunks.astype(np.float32, copy=False)
        return np.clip(chunks, -limit, limit) if limit else chunks

    def _need_params(self) -> dict[str, np.ndarray]:
        if self._params is None:
            raise SettingsError(
                "the fsq tokenizer is not fitted",
                field="tokenizer",
                got="no parameters",
                fix="vla tokenizer fit DATA --tokenizer fsq --out FOLDER, then "
                "--set tokenizer.source=FOLDER; or set it to an openpi FSQ checkpoint",
            )
        return self._params

    def _check_dims(self, h: int, d: int) -> None:
        if self.shape is not None and (h, d) != tuple(self.shape):
            raise DataError(
                "the fsq tokenizer was fitted on chunks of other dims",
                field="actions",
                got=(h, d),
                expected=tuple(self.shape),
                fix="fit again on this data, or change the horizon",
            )
