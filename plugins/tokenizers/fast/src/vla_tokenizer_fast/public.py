"""The files of a public FAST processor (`physical-intelligence/fast`): read as data; none of its code is run.

`processor_config.json` holds scale and min_token, `tokenizer.json` a byte-level BPE: a coefficient c is the character
c - min_token, its UTF-8 bytes are the symbols, and GPT-2's pattern cuts the text into words that merges never span.
Both are done here on whole arrays. Two properties of such a processor are handled, not copied: it drops coefficients
whose character it never saw (a later decode then fails, or gives huge values), here they become the nearest
coefficient it has; and it gives zeros for sequences that are no chunk, here they are errors.
"""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np

from vla.errors import DecodeError, SettingsError, StoreError
from vla.reading import read_json, reading
from vla_tokenizer_fast.bpe import Merger, spell

CONFIG, TOKENIZER = "processor_config.json", "tokenizer.json"
_SPACES = {9, 10, 11, 12, 13, 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}
_LETTER, _NUMBER, _OTHER, _SPACE = range(4)
_QUOTE, _BLANK = 39, 32
_CONTRACTIONS = ("s", "t", "re", "ve", "m", "ll", "d")  # after a quote
MAX_SIZE = 16384


def byte_characters() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: character -> byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


class PublicFiles:
    """The merges and settings of one processor.

    Args:
        config: content of processor_config.json.
        tokenizer: content of tokenizer.json.
        where: for messages.
    """

    def __init__(self, config: dict[str, Any], tokenizer: dict[str, Any], where: str):
        self.config, self.tokenizer = config, tokenizer
        with reading("these are no FAST processor files", where):
            self.scale, self.low = float(config["scale"]), int(config["min_token"])
            vocab: dict[str, int] = tokenizer["model"]["vocab"]
            merges = [m.split(" ") if isinstance(m, str) else m for m in tokenizer["model"]["merges"]]
            self.size = max(vocab.values()) + 1
            words = _check_supported(tokenizer, where)
            self._build(vocab, merges)
        self._words = words

    def _build(self, vocab: dict[str, int], merges: list[list[str]]) -> None:
        if not 0 < self.size <= MAX_SIZE or not self.scale > 0:
            raise ValueError(f"{self.size} ids, scale {self.scale}")
        if len(vocab) > self.size or min(vocab.values()) < 0:
            raise ValueError(f"{len(vocab)} texts for {self.size} ids")
        stand_in = byte_characters()
        self.table: dict[int, bytes] = {}  # what each id decodes to
        for text, i in vocab.items():
            known = all(c in stand_in for c in text)
            self.table[i] = bytes(stand_in[c] for c in text) if known else text.encode("utf-8", "surrogatepass")
        # Symbols: the 256 bytes. Internal tokens: symbols, then merges by rank; `_ids` takes them to the file's ids.
        internal = {c: b for c, b in stand_in.items()}
        pairs, ids = [], [vocab.get(c, -1) for c, _ in sorted(stand_in.items(), key=lambda x: x[1])]
        for left, right in merges:
            if left + right in internal:
                raise ValueError(f"two merges make {left + right!r}")
            pairs.append((internal[left], internal[right]))
            internal[left + right] = 256 + len(pairs) - 1
            ids.append(vocab[left + right])
        self._ids = np.asarray(ids, np.int32)
        # Ids that hold whole coefficients -> those as the bytes of float64: the fast way back.
        self._whole = {i: w.tobytes() for i, raw in self.table.items() if (w := self._coefficients(raw)) is not None}
        self._merger = Merger(256, np.asarray(pairs, np.int32).reshape(-1, 2))
        # Characters that can be written: all their bytes are in the vocabulary.
        present = self._ids[:256] >= 0
        top = 0x800 if present[0xC2:0xE0].any() else 0x80
        utf8 = [list(chr(c).encode()) for c in range(top)]
        self._width = np.asarray([len(u) for u in utf8], np.uint8)
        fine = np.flatnonzero([present[u].all() for u in utf8])
        if not len(fine):
            raise ValueError("no coefficient can be written")
        after = np.clip(np.searchsorted(fine, np.arange(top)), 1, max(1, len(fine) - 1))
        low, high = fine[after - 1], fine[np.minimum(after, len(fine) - 1)]
        self._nearest = np.where(np.arange(top) - low <= high - np.arange(top), low, high).astype(np.int32)
        self._class = np.asarray([_char_class(c) for c in range(top)], np.uint8)

    @classmethod
    def find(cls, source: str) -> PublicFiles:
        """The files in a folder, or of a hub repository in the local cache.

        Raises:
            SettingsError: there are none.
            StoreError: they are damaged, or ask for what is not supported.
        """
        folder = Path(source).expanduser()
        if folder.is_dir():
            return cls.read(folder)
        home = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "hub"
        snapshots = Path(home).expanduser() / f"models--{source.replace('/', '--')}" / "snapshots"
        found = sorted((p.parent for p in snapshots.glob(f"*/{TOKENIZER}")), key=lambda p: p.stat().st_mtime)
        if found:
            return cls.read(found[-1])
        raise SettingsError(
            "the files of the public FAST processor were not found",
            field="tokenizer.source",
            got=source,
            expected=f"a folder with {CONFIG} and {TOKENIZER}, or a hub repository in {home}",
            fix=f"`hf download {source if '/' in source else 'physical-intelligence/fast'}`, or give a folder, "
            "or fit your own (source = '')",
        )

    @classmethod
    def read(cls, folder: Path) -> PublicFiles:
        """The files in a folder."""
        return cls(
            *(read_json(folder / name, "FAST processor files cannot be read") for name in (CONFIG, TOKENIZER)),
            str(folder),
        )

    def save(self, folder: Path) -> None:
        """Write both files."""
        (folder / CONFIG).write_text(json.dumps(self.config, indent=1), encoding="utf-8")
        (folder / TOKENIZER).write_text(json.dumps(self.tokenizer), encoding="utf-8")

    def nearest(self, coefficients: np.ndarray) -> np.ndarray:
        """Each coefficient, or the nearest one that can be written."""
        return self._nearest[np.clip(coefficients - self.low, 0, len(self._nearest) - 1)] + self.low

    def encode(self, coefficients: np.ndarray) -> list[np.ndarray]:
        """Ids of rows [n h*d] of coefficients that can be written."""
        text = (coefficients - self.low).astype(np.uint16)
        starts = word_starts(self._class[text], text) if self._words else None
        flat = np.frombuffer(text.tobytes().decode("utf-16-le").encode("utf-8"), np.uint8)
        if len(flat) == text.size:
            grid, lengths = flat.reshape(text.shape), np.full(len(text), text.shape[1])
        else:
            lengths = self._width[text].sum(1, dtype=np.int64)
            inside = np.arange(int(lengths.max())) < lengths[:, None]
            grid = np.zeros(inside.shape, np.uint8)
            grid[inside] = flat
            if starts is not None:
                first = inside.copy()
                first[inside] = (flat & 0xC0) != 0x80  # not a byte that continues a character
                at = np.zeros(inside.shape, bool)
                at[first] = starts.ravel()
                starts = at
        return [self._ids[tokens] for tokens in self._merger.encode(grid, lengths, starts)]

    def decode(self, ids: list[int]) -> np.ndarray:
        """Coefficients of one row of ids, float64. KeyError: an id that is not in the file."""
        try:
            return np.frombuffer(spell(self._whole, ids))
        except KeyError:  # an id that is not there, or holds part of a coefficient
            raw = spell(self.table, ids)
        values = self._coefficients(raw)
        if values is None:
            raise DecodeError("action tokens break a coefficient apart", field="tokens", got=f"{len(ids)} tokens")
        return values

    def _coefficients(self, raw: bytes) -> np.ndarray | None:
        """Of UTF-8 bytes; None where they are not whole characters."""
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            return None
        return np.frombuffer(text.encode("utf-32-le"), np.int32) + np.float64(self.low)

    def lengths(self, codes: int) -> np.ndarray:
        """Coefficients per id, [codes].

        0 for ids that no encoding has, and for those that hold part of a coefficient (a grammar counts whole ones).
        """
        out = np.zeros(codes, np.int32)
        for i in self._ids[self._ids >= 0].tolist():
            out[i] = len(self._whole.get(i, b"")) // 8
        return out


def _check_supported(tokenizer: dict[str, Any], where: str) -> bool:
    """Refuse a tokenizer.json that asks for anything beyond byte-level BPE; says whether text is cut into words."""
    model, before = tokenizer["model"], tokenizer["pre_tokenizer"]
    odd = [key for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    odd += [key for key in ("byte_fallback", "ignore_merges") if model.get(key)]
    odd += [key for key in ("normalizer", "truncation", "padding", "added_tokens") if tokenizer.get(key)]
    if model.get("type", "BPE") != "BPE" or before["type"] != "ByteLevel" or before["add_prefix_space"]:
        odd.append("pre_tokenizer or model type")
    if odd:
        raise StoreError(
            "this tokenizer.json has features FAST files do not have", field=where, got=odd, expected="byte-level BPE"
        )
    return bool(before.get("use_regex", True))


def _char_class(code: int) -> int:
    if code in _SPACES:
        return _SPACE
    return {"L": _LETTER, "N": _NUMBER}.get(unicodedata.category(chr(code))[0], _OTHER)


def word_starts(kind: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Where GPT-2's pattern begins a new word, bool [n l], for character classes and codes [n l].

    The pattern: contractions ('s 't 're 've 'm 'll 'd), or a run of letters, of numbers or of other characters, each
    with at most one blank before it; or white space, whose last character stands alone when text follows.
    """
    n, length = text.shape
    starts = np.ones((n, length), bool)
    if length < 2:
        return starts
    before, here = kind[:, :-1], kind[:, 1:]
    starts[:, 1:] = before != here
    # Text right after a blank takes it along; the last white space of a run begins anew when text follows.
    starts[:, 1:] &= ~((text[:, :-1] == _BLANK) & (here != _SPACE))
    starts[:, 1:-1] |= (here[:, :-1] == _SPACE) & (kind[:, 2:] != _SPACE)
    for row, at in np.argwhere(starts & (text == _QUOTE)).tolist():
        tail = "".join(map(chr, text[row, at + 1 : at + 3].tolist()))
        fit = next((c for c in _CONTRACTIONS if tail.startswith(c)), None)
        if fit is not None:
            starts[row, at + 1] = False
            after = at + 1 + len(fit)
            if after < length:
                starts[row, after] |= kind[row, after] == _LETTER
    return starts
