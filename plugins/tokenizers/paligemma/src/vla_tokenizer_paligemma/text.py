"""SentencePiece text: finding the model, encoding, decoding."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from vla.errors import SettingsError, StoreError
from vla.reading import MB, read_bytes
from vla_tokenizer_paligemma.config import EMBEDDED, Paligemma

MODEL_FILE = "tokenizer.model"  # inside assets/tokenizer/
VARIABLE = "VLA_PALIGEMMA_TOKENIZER"
# Repositories of the hub that hold PaliGemma's tokenizer.model, looked up in the local cache only.
HUB_REPOSITORIES = ("google/paligemma-3b-pt-224", "google/paligemma-3b-mix-224", "google/paligemma-3b-pt-448")
PAD, EOS, BOS = 0, 1, 2
MOST = 64 * MB  # of a model; PaliGemma's has 4 MB


class SentencePieceText:
    """A text tokenizer (`vla.codecs.TextTokenizer`) over one SentencePiece model.

    Args:
        settings: see `Paligemma`.
        folder: `assets/tokenizer` of a model directory, or None.

    Raises:
        SettingsError: no model is found, or it is not the one the settings describe.
        StoreError: the file is not a SentencePiece model.
    """

    def __init__(self, settings: Paligemma, folder: Path | None = None):
        self.vocab_size = settings.vocab_size
        self.prompt = settings.prompt
        self._bytes, where = find_model(settings, folder)
        self._sp = _load(self._bytes, where)
        if self._sp.vocab_size() != settings.vocab_size:
            raise SettingsError(
                f"the SentencePiece model {where} has another number of pieces than the settings say",
                field="tokenizer vocab_size",
                got=self._sp.vocab_size(),
                expected=settings.vocab_size,
                fix="set vocab_size to the model's, or give the model that belongs to these settings (model=PATH)",
            )
        special = (self._sp.pad_id(), self._sp.eos_id(), self._sp.bos_id())
        if special != (PAD, EOS, BOS):
            raise SettingsError(
                f"the SentencePiece model {where} has other special ids than PaliGemma's",
                field="pad, eos, bos",
                got=special,
                expected=(PAD, EOS, BOS),
                fix="give PaliGemma's model",
            )

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of a text."""
        return self._sp.encode(text, add_bos=bos, add_eos=eos)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, for people to read."""
        return self._sp.decode([int(i) for i in ids])

    def save(self, folder: Path) -> None:
        """Copy the model, so that a model directory opens anywhere."""
        (folder / MODEL_FILE).write_bytes(self._bytes)


def find_model(settings: Paligemma, folder: Path | None) -> tuple[bytes, str]:
    """Content and place of the SentencePiece model, from the first place that has it.

    Order: the model directory, whatever its settings say: that is the one it was trained with, and a path that comes
    with a model is not followed; the path in the settings, or the embedded model; the variable
    VLA_PALIGEMMA_TOKENIZER; the caches of openpi and of the hub.
    """
    stored = None if folder is None else Path(folder) / MODEL_FILE
    if stored is not None and os.path.lexists(stored):
        return read_bytes(stored, MOST), str(stored)
    if settings.model == EMBEDDED:
        return (files("vla_tokenizer_paligemma") / "embedded.model").read_bytes(), "embedded"
    if settings.model:
        path = Path(settings.model).expanduser()
        path = path / MODEL_FILE if path.is_dir() else path
        if not os.path.exists(path):
            raise SettingsError(
                "there is no SentencePiece model at this path",
                field="tokenizer model",
                got=str(path),
                fix="correct the path, or set it to '' to search, or to 'embedded' for the small model",
            )
        return read_bytes(path, MOST), str(path)
    tried = []
    for what, path in _places(stored):
        if path is not None and path.is_file():
            return read_bytes(path, MOST), str(path)
        tried.append(f"{what}: {path or 'not set'}")
    raise SettingsError(
        "PaliGemma's tokenizer model (tokenizer.model, 257,152 pieces) was not found; looked in\n    "
        + "\n    ".join(tried),
        field="tokenizer model",
        fix=(
            f"accept Gemma's terms and run `hf download {HUB_REPOSITORIES[0]} tokenizer.model`; "
            f"or set {VARIABLE} to a copy; or take the embedded small model: --set tokenizer.preset=tiny "
            "(under an action tokenizer: --set tokenizer.text.preset=tiny)"
        ),
    )


def _places(stored: Path | None) -> Iterator[tuple[str, Path | None]]:
    yield "model directory", stored
    named = os.environ.get(VARIABLE)
    path = Path(named).expanduser() if named else None
    if path is not None and not path.exists():
        raise SettingsError(
            f"{VARIABLE} names a file that is not there", field=VARIABLE, got=named, fix="correct or unset it"
        )
    yield f"variable {VARIABLE}", path / MODEL_FILE if path is not None and path.is_dir() else path
    openpi = Path(os.environ.get("OPENPI_DATA_HOME", "~/.cache/openpi")).expanduser()
    yield "openpi's cache", openpi / "big_vision" / "paligemma_tokenizer.model"
    for repository in HUB_REPOSITORIES:
        yield f"hub cache, {repository}", _hub_file(repository)


def _hub_file(repository: str) -> Path | None:
    """tokenizer.model of a repository in the hub's local cache (its documented layout), newest snapshot first."""
    home = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "hub"
    snapshots = Path(home).expanduser() / f"models--{repository.replace('/', '--')}" / "snapshots"
    found = sorted(snapshots.glob(f"*/{MODEL_FILE}"), key=lambda p: p.stat().st_mtime)
    return found[-1] if found else snapshots / "*" / MODEL_FILE


def _load(content: bytes, where: str):  # noqa: ANN202 - a class of a package without types
    import sentencepiece

    try:
        if not content:
            raise RuntimeError("the file is empty")
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        text = (str(error).splitlines() or ["unreadable"])[0]
        raise StoreError("this file is no SentencePiece model", field=where, got=text, fix="copy it again") from error
