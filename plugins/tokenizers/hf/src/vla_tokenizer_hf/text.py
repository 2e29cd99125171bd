"""Text by the `tokenizers` library: encoding, decoding, special ids, and the chat formats of the families.

A chat template is a program in a file of somebody's; it is not run. The three formats that the open families share are
written out here, and tested against the templates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vla.errors import SettingsError, StoreError
from vla.reading import read_json, read_text, reading
from vla.tokenizer import Prompt, clean, state_words
from vla_tokenizer_hf.config import BYTES, MOST_BYTES, SPECIAL_FILE, TOKENIZER_FILE, HuggingFace, tokenizer_file

# family -> (before the words of the user, after them, and the beginning of the answer)
CHATS = {
    "chatml": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    "gemma_chat": ("<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"),
    "llama3_chat": (
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
}


def _chat(before: str, after: str, has_state: bool) -> Callable[[str, Any], tuple[str, ...]]:
    def pieces(text: str, state: Any) -> tuple[str, ...]:
        words = f"Task: {clean(text)}, State: {state_words(state)}" if has_state else clean(text)
        return (f"{before}{words}{after}",)

    return pieces


FORMATS = {
    f"{name}{'_state' if has_state else ''}": Prompt(
        f"{name}{'_state' if has_state else ''}", has_state, _chat(*parts, has_state)
    )
    for name, parts in CHATS.items()
    for has_state in (False, True)
}


class TokenizersText:
    """A text tokenizer (`vla.codecs.TextTokenizer`) over one tokenizer.json.

    Args:
        settings: see `HuggingFace`.
        folder: `assets/tokenizer` of a model directory, or None; what is stored there wins.

    Raises:
        SettingsError: no tokenizer is found, or it has more ids than the settings say.
        StoreError: the file is no tokenizer.
    """

    formats = FORMATS

    def __init__(self, settings: HuggingFace, folder: Path | None = None):
        self.vocab_size, self.prompt = settings.ids, settings.prompt
        stored = None if folder is None else Path(folder) / TOKENIZER_FILE
        if stored is not None and stored.is_file():
            self._text, special = read_text(stored, MOST_BYTES), _special(stored.parent)
        elif settings.model == BYTES:
            self._text, special = byte_level(), {"bos_token": "<bos>", "eos_token": "<eos>"}
        else:
            file = tokenizer_file(settings.model)
            self._text, special = read_text(file, MOST_BYTES), _special(file.parent)
        self._made = _load(self._text)
        self._special = special
        self._bos, self._eos = (self._id(special.get(name)) for name in ("bos_token", "eos_token"))
        if self._made.get_vocab_size(with_added_tokens=True) > settings.vocab_size:
            raise SettingsError(
                "the tokenizer has more ids than the model has rows", field="tokenizer vocab_size",
                got=settings.vocab_size, expected=f">= {self._made.get_vocab_size(with_added_tokens=True)}",
                fix="set vocab_size to that of the model's config.json, or give the tokenizer of this model",
            )  # fmt: skip
        if self._eos is None:
            raise SettingsError(
                "the tokenizer names no end of text", field="eos_token", got=special.get("eos_token"),
                fix=f"put {SPECIAL_FILE} beside {TOKENIZER_FILE}",
            )  # fmt: skip
        missing = [t for t in _markers(self.prompt) if self._made.token_to_id(t) is None]
        if missing:
            raise SettingsError(
                "this tokenizer does not know the tokens of the chat format", field="tokenizer.prompt", got=self.prompt,
                expected=f"a vocabulary with {', '.join(missing)}", fix="set prompt to pi0 or pi05",
            )  # fmt: skip

    @property
    def eos_id(self) -> int:
        """The id of the end of text."""
        assert self._eos is not None
        return self._eos

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of a text; a tokenizer without a beginning of text adds none."""
        ids = self._made.encode(text, add_special_tokens=False).ids
        begin = [self._bos] if bos and self._bos is not None else []
        return [*begin, *ids, *([self.eos_id] if eos else [])]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, for people to read."""
        return self._made.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Copy the tokenizer, so that a model directory opens anywhere."""
        import json

        (folder / TOKENIZER_FILE).write_text(self._text, encoding="utf-8")
        (folder / SPECIAL_FILE).write_text(json.dumps(self._special, indent=1) + "\n", encoding="utf-8")

    def _id(self, token: Any) -> int | None:
        return self._made.token_to_id(token) if isinstance(token, str) else None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_made"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._made = _load(self._text)


def _markers(prompt: str) -> list[str]:
    import re

    parts = CHATS.get(prompt.removesuffix("_state"), ())
    return sorted({m for text in parts for m in re.findall(r"<[^>\n]+>", text)})


def _special(folder: Path) -> dict[str, Any]:
    """Names of the special tokens, from tokenizer_config.json (a token is text, or a table with `content`)."""
    file = folder / SPECIAL_FILE
    if not file.is_file():
        return {}
    found = read_json(file, "a tokenizer's configuration is no JSON")
    names = {name: found.get(name) for name in ("bos_token", "eos_token")}
    return {k: v.get("content") if isinstance(v, dict) else v for k, v in names.items()}


def _load(text: str) -> Any:
    from tokenizers import Tokenizer

    with reading("this file is no tokenizer of the tokenizers library", TOKENIZER_FILE, StoreError):
        try:
            return Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(str(error)) from error


def byte_level() -> str:
    """A tokenizer.json in which every byte is a token: ids 0 to 3 are <pad>, <eos>, <bos>, <unk>, then the bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*special, *letters])}, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    return made.to_str()
