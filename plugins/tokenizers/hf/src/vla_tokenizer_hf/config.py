"""Settings of the `hf` tokenizer. Nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from attrs import frozen

from vla.errors import SettingsError
from vla.reading import read_json
from vla.settings import size

BYTES = "bytes"
TOKENIZER_FILE, SPECIAL_FILE = "tokenizer.json", "tokenizer_config.json"
MOST_BYTES = 64 << 20  # of a tokenizer.json; the largest published ones take about 35 MB
# Formats that write the state into the prompt.
WITH_STATE = ("pi05", "chatml_state", "gemma_chat_state", "llama3_chat_state")


@frozen
class HuggingFace:
    """Settings.

    Attributes:
        model: a folder with `tokenizer.json` (and `tokenizer_config.json`, `config.json`), or "bytes": every byte is a
            token, no file is needed.
        vocab_size: rows of the model's embedding table, which may be more than the tokenizer has; 0: what `config.json`
            beside the tokenizer says, else the tokenizer's own number.
        extra_ids: rows added behind them, where action ids can live (`backbone.llm.extra_ids` says the same).
        prompt: the format: as in openpi ("pi0", "pi05"), or as a turn of a chat; `_state` writes the state into it.
    """

    model: str = BYTES
    vocab_size: int = size(0, most=1 << 24, least=0)
    extra_ids: int = size(0, most=1 << 20, least=0)
    prompt: Literal[
        "pi0", "pi05", "chatml", "chatml_state", "gemma_chat", "gemma_chat_state", "llama3_chat", "llama3_chat_state"
    ] = "pi05"

    def __attrs_post_init__(self) -> None:
        if not self.vocab_size:
            object.__setattr__(self, "vocab_size", _rows(self.model))

    @property
    def ids(self) -> int:
        """Ids in all."""
        return self.vocab_size + self.extra_ids


PRESETS = {"tiny": {"model": BYTES, "vocab_size": 4096}, "small": {"model": BYTES, "vocab_size": 4096}}


def tokenizer_file(model: str) -> Path:
    """The tokenizer.json that a setting names.

    Raises:
        SettingsError: it is not there.
    """
    path = Path(model).expanduser()
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise SettingsError(
            "there is no tokenizer.json at this path", field="tokenizer model", got=str(file),
            fix="give the folder of a model of transformers; a SentencePiece model belongs to tokenizer paligemma",
        )  # fmt: skip
    return file


def _rows(model: str) -> int:
    if model == BYTES:
        return 260
    file = tokenizer_file(model)
    beside = file.parent / "config.json"
    if beside.is_file():
        found: Any = read_json(beside, "a model's configuration is no JSON", error=SettingsError)
        for table in (found.get("text_config"), found.get("llm_config"), found):
            if isinstance(table, dict) and isinstance(table.get("vocab_size"), int):
                return table["vocab_size"]
    content = read_json(file, "a tokenizer is no JSON", most=MOST_BYTES, error=SettingsError)
    table = content.get("model", {}).get("vocab", {})
    added = [int(token["id"]) for token in content.get("added_tokens", []) if isinstance(token, dict)]
    ids = list(table.values()) if isinstance(table, dict) else list(range(len(table)))
    return max([*ids, *added], default=-1) + 1
