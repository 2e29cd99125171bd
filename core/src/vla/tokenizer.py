"""The tokenizer of a variant: the one prompt builder, and a text tokenizer joined to an action codec.

A tokenizer is a text tokenizer and, for `fast`, `binning` and `fsq`, an action codec; they differ only in the codec.
`Tokenizer` joins the two: it lays out the prompt, places action ids in the text vocabulary by an explicit stored id
map, and cuts answers back into action ids. Decoding slices ids; it never goes through text.

Formats (openpi `models/tokenizer.py`), `B` = begin of text, `E` = end of text:

    pi0    B <prompt> \\n                                             prompt stripped, "_" and "\\n" become blanks
    pi05   B Task: <prompt>, State: <s0 s1 ...>;\\nAction:_            as pi0; the state in 256 bins
    fast   B Task: <prompt>, State: <s0 s1 ...>;\\n | Action:_ <ids>"|"E  lower case, stripped, "_" becomes a blank,
    "\\n" kept

What stands right of the bar is the target: `token_ar_mask` 1 and `token_loss_mask` True.

A sequence that is too long is an error, at inference as well: openpi keeps its head, which pushes out the end of the
state, "Action: " and the targets. Where something has to go (training on a rare long sample, which is counted; or
spec.long_prompt = "shorten"), words of the instruction go before anything else of the prompt.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve, frozen

from vla.codecs import CODEC_FILE, ActionCodec, TextTokenizer, check_chunks, check_text
from vla.contracts import DecodeGrammar, Spec
from vla.errors import DataError, DecodeError, SettingsError
from vla.id_map import ID_MAP_FILE, IdMap

FOLDER = "tokenizer"  # inside `assets/`
MODES = ("strict", "relaxed", "openpi")
PAD = 0
_log = logging.getLogger("vla.tokenizer")


# ---- state and prompt -----------------------------------------------------------------------------------------------


def discretise_state(state: np.ndarray, bins: int = 256) -> np.ndarray:
    """Bin numbers of a normalised state [..., s]: `bins` equal bins over [-1, 1).

    As openpi does: a value below -1 gives -1 (it is printed as "-1"), a value of 1 or more gives bins - 1.
    """
    return np.digitize(state, np.linspace(-1, 1, bins + 1)[:-1]) - 1


def state_words(state: np.ndarray) -> str:
    """The state as prompts write it: bin numbers between blanks."""
    return " ".join(map(str, discretise_state(state)))


def clean(prompt: str) -> str:
    """An instruction as openpi writes it into a prompt: stripped, on one line, blanks for underscores."""
    return prompt.strip().replace("_", " ").replace("\n", " ")


@frozen
class Prompt:
    """One prompt format: the pieces of text before the actions, encoded one by one; the first begins the text."""

    name: str
    has_state: bool
    pieces: Callable[[str, Any], tuple[str, ...]]  # (prompt, state [s] or None)


PROMPTS: dict[str, Prompt] = {
    p.name: p
    for p in (
        Prompt("pi0", False, lambda text, state: (clean(text), "\n")),
        Prompt("pi05", True, lambda text, state: (f"Task: {clean(text)}, State: {state_words(state)};\nAction: ",)),
        Prompt(
            "fast",
            True,
            lambda text, state: (f"Task: {text.lower().strip().replace('_', ' ')}, State: {state_words(state)};\n",),
        ),
    )
}
ANSWER_PREFIX, ANSWER_END = "Action: ", "|"


# ---- the tokenizer --------------------------------------------------------------------------------------------------


class Tokenizer:
    """Text tokenizer + codec + prompt format of one variant; made by `open_tokenizer`."""

    def __init__(
        self,
        text: TextTokenizer,
        codec: ActionCodec | None,
        prompt: str,
        id_map: IdMap | None,
        max_len: int,
        long_prompt: str = "error",
    ):
        self.text, self.codec, self.max_len, self.long_prompt = text, codec, max_len, long_prompt
        self.id_map = id_map or IdMap(text.vocab_size, np.zeros(0, np.int32))
        self._format = prompt
        if prompt not in self.formats:
            known = list(self.formats)
            raise SettingsError("no such prompt format", field="tokenizer.prompt", got=prompt, expected=known)
        self.vocab_size = text.vocab_size
        self._warned = False
        if codec is None:
            return
        self._prefix = np.asarray(text.encode(ANSWER_PREFIX), np.int32)
        self._suffix = np.asarray(text.encode(ANSWER_END, eos=True), np.int32)
        if self.id_map.vocab_size != text.vocab_size or len(self.id_map.text_ids) != codec.vocab_size:
            raise SettingsError(
                "the stored id map is of another tokenizer",
                field=f"assets/{FOLDER}/{ID_MAP_FILE}",
                got=f"{len(self.id_map.text_ids)} action ids in a vocabulary of {self.id_map.vocab_size}",
                expected=f"{codec.vocab_size} action ids in a vocabulary of {text.vocab_size}",
                fix="fit the tokenizer again, or restore the settings it was fitted with",
            )
        markers = np.concatenate([self._prefix, self._suffix])
        if clash := sorted(set(markers[self.id_map.to_codec(markers) >= 0].tolist())):
            raise SettingsError(
                "action ids fall on pieces that the prompt format needs",
                field="tokenizer",
                got=f"text ids {clash}",
                fix="lower the number of action ids, change tokenizer.skip, or take a larger text vocabulary",
            )

    @property
    def prompt(self) -> Prompt:
        """The prompt format; looked up, so that a tokenizer can be sent to worker processes."""
        return self.formats[self._format]

    @property
    def formats(self) -> Mapping[str, Prompt]:
        """Prompt formats by name: openpi's, and those that the text tokenizer brings (`formats`)."""
        return {**PROMPTS, **getattr(self.text, "formats", {})}

    @property
    def fitted(self) -> bool:
        """Whether nothing is left to learn: True for a text-only tokenizer."""
        return self.codec is None or self.codec.fitted

    def fit(self, chunks: np.ndarray) -> Tokenizer:
        """Fit the codec on normalised chunks [n h d]; a text-only tokenizer has nothing to learn. Returns itself."""
        if self.codec is not None:
            self.codec = self.codec.fit(check_chunks(chunks))
        return self

    def tokenize(
        self,
        prompt: str,
        state: np.ndarray | None = None,
        actions: np.ndarray | None = None,
        cut: bool = False,
    ) -> dict[str, np.ndarray]:
        """Model input of one sample.

        Args:
            prompt: instruction.
            state: [s] normalised and not padded; needed by the formats that print it.
            actions: [h d] normalised, not padded; None at inference. Ignored when there is no codec.
            cut: take away what does not fit, last words of the instruction and then the end of the targets, and count
                it in `tokens_cut`: what training does.

        Returns:
            tokenized_prompt int32 [l], tokenized_prompt_mask bool [l], token_ar_mask int32 [l], token_loss_mask bool
            [l], tokens_cut int32 [].

        Raises:
            DataError: no text, a missing or bad state, bad actions, or more tokens than spec.max_token_len.
        """
        batch = self.tokenize_batch(
            [prompt], None if state is None else [state], None if actions is None else np.asarray(actions)[None], cut
        )
        return {key: value[0] for key, value in batch.items()}

    def tokenize_batch(
        self,
        prompts: Sequence[str],
        states: Sequence[np.ndarray] | None = None,
        actions: np.ndarray | None = None,
        cut: bool = False,
    ) -> dict[str, np.ndarray]:
        """As `tokenize`, for a batch: states [b s], actions [b h d]; the arrays gain a first axis."""
        rows = self.ids(prompts, states, actions)
        whole = np.array([len(prefix) + len(targets) for prefix, targets in rows], np.int32)
        for row, (prefix, targets) in enumerate(rows):
            if len(prefix) > self.max_len:
                rows[row] = (self._shortened(prompts[row], None if states is None else states[row], cut), targets)
            if len(rows[row][0]) + len(targets) > self.max_len and not cut:
                raise DataError(
                    "the prompt and its action tokens do not fit",
                    field="spec.max_token_len",
                    got=f"{len(prefix)} + {len(targets)} tokens",
                    expected=f"at most {self.max_len}",
                    fix=f"--set spec.max_token_len={len(prefix) + len(targets)}",
                )
        kept = [min(len(prefix) + len(targets), self.max_len) for prefix, targets in rows]
        return {**self.arrange(rows), "tokens_cut": whole - np.array(kept, np.int32)}

    def ids(
        self, prompts: Sequence[str], states: Sequence[np.ndarray] | None = None, actions: np.ndarray | None = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids of the prompt, ids of the targets) of each row, however long they are; arguments as `tokenize_batch`."""
        targets = [np.zeros(0, np.int32)] * len(prompts)
        if self.codec is not None and actions is not None:
            found = self.codec.encode(check_chunks(actions))
            if len(found) != len(prompts):
                raise DataError(
                    "prompts and actions differ in number", field="actions", got=len(found), expected=len(prompts)
                )
            targets = [np.concatenate([self._prefix, self.id_map.to_text(ids), self._suffix]) for ids in found]
        prefixes = [self._prompt_ids(p, None if states is None else states[row]) for row, p in enumerate(prompts)]
        return list(zip(prefixes, targets))

    def arrange(self, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
        """The four token arrays [b l] of rows as `ids` gives them; what is too long keeps its head, as in openpi."""
        shape = (len(rows), self.max_len)
        out = {
            "tokenized_prompt": np.zeros(shape, np.int32),
            "tokenized_prompt_mask": np.zeros(shape, bool),
            "token_ar_mask": np.zeros(shape, np.int32),
            "token_loss_mask": np.zeros(shape, bool),
        }
        for row, (prefix, targets) in enumerate(rows):
            ids = np.concatenate([prefix, targets])[: self.max_len]
            n = len(ids)
            out["tokenized_prompt"][row, :n] = ids
            out["tokenized_prompt_mask"][row, :n] = True
            out["token_ar_mask"][row, len(prefix) : n] = 1
            out["token_loss_mask"][row, len(prefix) : n] = True
        return out

    def _prompt_ids(self, prompt: str, state: np.ndarray | None) -> np.ndarray:
        if not isinstance(prompt, str):
            raise DataError("the prompt is not text", field="prompt", got=type(prompt).__name__, expected="str")
        check_text(prompt)
        if self.prompt.has_state:
            if state is None:
                raise DataError(
                    f"the prompt format {self.prompt.name!r} writes the state into the prompt, and there is none",
                    field="state",
                    fix="give the state",
                )
            state = np.asarray(state)
            if state.ndim != 1:
                raise DataError("the state of one sample has one axis", field="state", got=state.shape, expected="[s]")
            if not np.isfinite(state).all():
                bad = int(np.argwhere(~np.isfinite(state))[0, 0])
                raise DataError("the state has NaN or infinite values", field=f"state[{bad}]", got=float(state[bad]))
        pieces = self.prompt.pieces(prompt, state)
        return np.concatenate([self.text.encode(piece, bos=i == 0) for i, piece in enumerate(pieces)]).astype(np.int32)

    def _shortened(self, prompt: str, state: np.ndarray | None, cut: bool) -> np.ndarray:
        """The prompt with as many first words of the instruction as fit; the state and the rest stay whole.

        Raises:
            DataError: nothing may be cut (neither `cut` nor spec.long_prompt allow it), or the state alone is too long.
        """
        ends = [0, *(word.end() for word in re.finditer(r"\S+", prompt))]
        low, high = 0, len(ends) - 1  # the first `low` words fit, if any number does; all `high` do not
        while high - low > 1:
            middle = (low + high) // 2
            fits = len(self._prompt_ids(prompt[: ends[middle]], state)) <= self.max_len
            low, high = (middle, high) if fits else (low, middle)
        kept = self._prompt_ids(prompt[: ends[low]], state)
        whole = len(self._prompt_ids(prompt, state))
        if len(kept) > self.max_len:
            raise DataError(
                "the state alone is longer than the prompt may be",
                field="spec.max_token_len",
                got=f"{len(kept)} tokens without a word of the instruction",
                expected=f"at most {self.max_len}",
                fix=f"--set spec.max_token_len={whole}",
            )
        if not cut and self.long_prompt == "error":
            raise DataError(
                "the instruction is too long for this policy: it would push out the end of the prompt",
                field="prompt",
                got=f"{len(ends) - 1} words, {whole} tokens with everything else of the prompt",
                expected=f"at most {self.max_len} tokens (spec.max_token_len)",
                fix=f"shorten it: {low} words fit; a policy built with --set spec.long_prompt=shorten does so itself"
                if low
                else f"a policy built with --set spec.max_token_len={whole} reads it",
            )
        if not self._warned and not cut:
            self._warned = True
            _log.warning("an instruction of %d words is cut to its first %d. (Said once.)", len(ends) - 1, low)
        return kept

    def grammar(self, horizon: int, dim: int) -> DecodeGrammar:
        """Which answers stand for a chunk [horizon dim]."""
        codec = self._need_codec()
        return DecodeGrammar(
            prefix=tuple(self._prefix.tolist()),
            action_ids=self.id_map.text_ids,
            lengths=codec.lengths(),
            total=codec.total(horizon, dim),
            suffix=tuple(self._suffix.tolist()),
        )

    def decode(self, tokens: np.ndarray, horizon: int, dim: int, mode: str = "strict") -> np.ndarray:
        """Actions [horizon dim] from the tokens of one answer [n] (prompt, padding and end of text may be there too).

        Modes:
            strict: after "Action: " only action tokens, up to the first "|", end of text or padding; they must stand
            for
                exactly one chunk.
            openpi: tokens that are no action tokens are passed over, as openpi does (`binning` gives them the value of
                their id, outside [-1, 1]); the rest must stand for exactly one chunk (`binning`: at least one).
            relaxed: as openpi, but a chunk too short is filled up and one too long is cut, as the codec says.

        Raises:
            DecodeError: the tokens stand for no chunk, and why. openpi gives zeros there, which moves a robot.
        """
        codec = self._need_codec()
        if mode not in MODES:
            raise SettingsError("no such decode mode", field="mode", got=mode, expected=list(MODES))
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise DataError(
                "tokens of one answer are a row of whole numbers", field="tokens", got=f"{tokens.dtype} {tokens.shape}"
            )
        answer = self._answer(tokens.astype(np.int64))
        if mode == "openpi" and hasattr(codec, "decode_any"):
            # The id map is a line in openpi's case; outside it the same line is followed.
            return codec.decode_any(int(self.id_map.text_ids[0]) - answer, horizon, dim)
        ids = self.id_map.to_codec(answer)
        foreign = np.flatnonzero(ids < 0)
        if len(foreign) and mode == "strict":
            raise DecodeError(
                "a token of the answer is no action token",
                field=f"answer[{foreign[0]}]",
                got=int(answer[foreign[0]]),
                fix="decode with the grammar, or mode='relaxed'",
            )
        return codec.decode(ids[ids >= 0], horizon, dim, mode)

    def _answer(self, tokens: np.ndarray) -> np.ndarray:
        """The tokens between "Action: " and what closes it."""
        starts = _find(tokens, self._prefix)
        if not len(starts):
            raise DecodeError(
                "the answer has no 'Action: '",
                field="tokens",
                got=tokens[:8].tolist(),
                fix="train longer, or decode with the grammar",
            )
        answer = tokens[starts[0] + len(self._prefix) :]
        ends = np.flatnonzero(np.isin(answer, [PAD, *self._suffix.tolist()]))
        end = ends[0] if len(ends) else len(answer)
        again = _find(answer[:end], self._prefix)
        return answer[: again[0] if len(again) else end]

    def _need_codec(self) -> ActionCodec:
        if self.codec is None:
            raise SettingsError(
                "this tokenizer has no action tokens", field="tokenizer", fix="build with --tokenizer fast"
            )
        return self.codec

    def without_padded(self, sample: dict[str, np.ndarray], real: np.ndarray) -> dict[str, np.ndarray]:
        """A tokenised sample (as `tokenize` gives it, with targets) that steps which are not real [h] do not teach.

        Where a token stands for a value of one step (`codec.by_step`, binning), the tokens of padded steps are no
        targets. Where every token stands for the whole chunk (FAST's DCT, FSQ) none can be left out: padded steps hold
        the last real action, and `extra/target_weight` [] makes the row count as much as its share of real steps. To
        leave such rows out instead would mean to learn nothing from what the robot saw at the end of every episode.
        """
        codec = self._need_codec()
        if not getattr(codec, "by_step", False):
            return {**sample, "extra/target_weight": np.float32(real.mean())}
        targets = np.flatnonzero(sample["token_loss_mask"])
        actions = targets[len(self._prefix) : max(len(targets) - len(self._suffix), 0)]
        step = np.arange(len(actions)) * len(real) // max(len(actions), 1)
        loss = sample["token_loss_mask"].copy()
        loss[actions[~real[step]]] = False
        return {**sample, "token_loss_mask": loss}

    def save(self, assets: Path) -> None:
        """Write what the tokenizer learned, and its text model, under `assets/tokenizer/`."""
        folder = Path(assets) / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self.text.save(folder)
        if self.codec is not None:
            self.codec.save(folder)
            self.id_map.save(folder)


def _find(tokens: np.ndarray, pattern: np.ndarray) -> np.ndarray:
    """Places where `pattern` starts in `tokens`."""
    if len(tokens) < len(pattern):
        return np.zeros(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(pattern))
    return np.flatnonzero((windows == pattern).all(-1))


def open_tokenizer(chosen: Any, spec: Spec, assets: Path | None = None) -> Tokenizer:
    """The tokenizer of a variant.

    Args:
        chosen: `variant.parts["tokenizer"]` (`vla.compose.Chosen`).
        spec: the variant's shapes; `max_token_len` is used.
        assets: the `assets/` folder of a model directory, or None; what is stored there wins over the settings' rule.

    Raises:
        SettingsError: the text model is not found, or settings do not fit each other or what is stored.
        StoreError: stored files are damaged.
    """
    from vla.compose import load_object
    from vla.settings import fields_of

    folder = None if assets is None else Path(assets) / FOLDER
    if "text" not in chosen.inner:
        text = load_object(chosen.part.numpy, f"tokenizer {chosen.part.name!r}")(chosen.settings, folder)
        return Tokenizer(text, None, text.prompt, None, spec.max_token_len, spec.long_prompt)
    inner = chosen.inner["text"]
    text = load_object(inner.part.numpy, f"tokenizer {inner.part.name!r}")(inner.settings, folder)
    stored = folder is not None and os.path.lexists(folder / CODEC_FILE)
    settings = chosen.settings
    if stored and "source" in fields_of(type(settings)):  # a path that comes with a model is not followed
        settings = evolve(settings, source="")
    codec = load_object(chosen.part.numpy, f"tokenizer {chosen.part.name!r}")(settings)
    if stored:
        codec = codec.load(folder)
    if folder is not None and os.path.lexists(folder / ID_MAP_FILE):
        id_map = IdMap.load(folder)
    else:
        id_map = IdMap.from_end(text.vocab_size, codec.vocab_size, chosen.settings.skip)
    return Tokenizer(text, codec, "fast", id_map, spec.max_token_len, spec.long_prompt)
