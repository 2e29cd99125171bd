"""Where action ids live in the text vocabulary of a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from attrs import frozen

from vla.errors import SettingsError, StoreError
from vla.reading import read_json, reading

ID_MAP_FILE = "id_map.json"
RESERVED_IDS = 4  # pad, eos, bos, unk: action ids never land there


@frozen(eq=False)
class IdMap:
    """Where action ids live in the text vocabulary: `text_ids[id]`. Stored, because pre-trained models differ."""

    vocab_size: int
    text_ids: np.ndarray  # [codes] int32

    @classmethod
    def from_end(cls, vocab_size: int, codes: int, skip: int) -> IdMap:
        """openpi's rule: text id = vocab_size - 1 - skip - id (PaliGemma: skip 128 leaves the <seg> pieces alone).

        Raises:
            SettingsError: the vocabulary is too small.
        """
        if skip < 0:
            raise SettingsError("the skip of the id map is negative", field="tokenizer.skip", got=skip, expected=">= 0")
        need = codes + skip + RESERVED_IDS
        if vocab_size < need:
            raise SettingsError(
                f"the text vocabulary is too small for {codes} action ids after a skip of {skip}",
                field="tokenizer.text vocab_size",
                got=vocab_size,
                expected=f">= {need}",
                fix=f"take fewer action ids, lower tokenizer.skip (now {skip}), or take a larger text vocabulary",
            )
        return cls(vocab_size, (vocab_size - 1 - skip - np.arange(codes)).astype(np.int32))

    def to_text(self, ids: np.ndarray) -> np.ndarray:
        """Text ids of action ids."""
        return self.text_ids[ids]

    def to_codec(self, tokens: np.ndarray) -> np.ndarray:
        """Action ids of text ids; -1 where a token is no action token."""
        order = np.argsort(self.text_ids)
        at = np.minimum(np.searchsorted(self.text_ids[order], tokens), len(order) - 1)
        return np.where(self.text_ids[order[at]] == tokens, order[at], -1)

    def save(self, folder: Path) -> None:
        """Write `id_map.json`."""
        content = {"vla_id_map": 1, "vocab_size": self.vocab_size, "text_ids": self.text_ids.tolist()}
        (folder / ID_MAP_FILE).write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> IdMap:
        """Read `id_map.json`.

        Raises:
            StoreError: the file is damaged.
        """
        file = folder / ID_MAP_FILE
        content = read_json(file, "the id map cannot be read")
        with reading("the id map cannot be read", file):
            vocab_size, ids = int(content["vocab_size"]), np.asarray(content["text_ids"], np.int32)
            if ids.ndim != 1:
                raise ValueError(f"ids of {ids.ndim} axes")
        if len(set(ids.tolist())) != len(ids) or (len(ids) and (ids.min() < 0 or ids.max() >= vocab_size)):
            raise StoreError(
                "the id map is not one-to-one into the vocabulary",
                field=str(file),
                got=f"{len(ids)} ids",
                expected=f"< {vocab_size}",
            )
        return cls(vocab_size, ids)
