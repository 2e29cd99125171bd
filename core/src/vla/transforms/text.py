"""Steps on words and tokens: the prompt, tokenising it with state and actions, reading actions back from tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from attrs import frozen

from vla.codecs import check_text
from vla.errors import DataError
from vla.transforms.group import Flat

TOKEN_KEYS = ("tokenized_prompt", "tokenized_prompt_mask", "token_ar_mask", "token_loss_mask", "tokens_cut")


def as_text(value: Any, name: str = "prompt") -> str:
    """An instruction as str: from str, bytes (UTF-8), or an array that holds one of them.

    Raises:
        DataError: it is no text, or says nothing: a policy that was trained on instructions would act on none.
    """
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0]
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError("the prompt is not UTF-8", field=name, got=value[:40]) from error
    if not isinstance(value, str):
        raise DataError("the prompt is no text", field=name, got=type(value).__name__, expected="str")
    check_text(value, name)
    if not value.replace("_", " ").strip():  # prompt formats write "_" as a blank
        raise DataError(
            "the instruction is empty", field=name, got=repr(value)[:60],
            fix="send prompt=..., give a default prompt, or name the task in the dataset",
        )  # fmt: skip
    return str(value)


@frozen
class InjectDefaultPrompt:
    """The default instruction for samples that bring none."""

    prompt: str | None
    reads: ClassVar = ("prompt?",)
    writes: ClassVar = ("prompt?",)

    def __call__(self, data: Flat) -> Flat:
        return data if self.prompt is None or "prompt" in data else {**data, "prompt": self.prompt}


@frozen
class ReadPrompt:
    """The prompt as str; a sample without one is refused."""

    reads: ClassVar = ("prompt?",)
    writes: ClassVar = ("prompt",)

    def __call__(self, data: Flat) -> Flat:
        if "prompt" not in data:
            raise DataError(
                "the sample has no instruction",
                field="prompt",
                got=sorted(data),
                fix="send prompt=..., give a default prompt, or name the task in the dataset",
            )
        return {**data, "prompt": as_text(data["prompt"])}


def hold(actions: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Actions [t d] in which steps that are not real repeat the last real one, whatever the data has there."""
    actions = np.asarray(actions)
    if real.all() or not real.any():
        return actions
    last = np.maximum.accumulate(np.where(real, np.arange(len(real)), -1))
    return actions[np.where(last < 0, int(np.argmax(real)), last)]


def _real(data: Flat) -> np.ndarray:
    """Which steps [t] of the chunk lie within the episode."""
    steps = len(np.asarray(data["actions"]))
    is_pad = np.asarray(data.get("actions_is_pad", np.zeros(steps)), bool)
    if is_pad.shape != (steps,):
        raise DataError(
            "actions_is_pad does not fit the chunk", field="actions_is_pad", got=is_pad.shape, expected=(steps,)
        )
    return ~is_pad


def targets_of(data: Flat) -> np.ndarray:
    """The actions [t d] of a training sample as they are tokenised."""
    return hold(data["actions"], _real(data))


@frozen(eq=False, repr=False)
class Tokenize:
    """Prompt, normalised state and (in training) normalised actions, none of them padded -> the token arrays.

    With actions, what does not fit is cut and counted in `tokens_cut`; without, at inference, it is an error.
    Steps past the end of an episode (`actions_is_pad`) are no targets: see `Tokenizer.without_padded`.
    """

    tokenizer: Any
    reads: ClassVar = ("prompt", "state", "actions?", "actions_is_pad?")
    writes: ClassVar = ("tokenized_prompt*", "token_*", "tokens_cut", "extra/target_weight?")

    @property
    def shapes(self) -> str:
        """Text for the table."""
        return f"each [{getattr(self.tokenizer, 'max_len', 'l')}]"

    def __call__(self, data: Flat) -> Flat:
        training = "actions" in data
        if not training or self.tokenizer.codec is None:
            return {**data, **self.tokenizer.tokenize(data["prompt"], data["state"], None, cut=training)}
        real = _real(data)
        out = self.tokenizer.tokenize(data["prompt"], data["state"], hold(data["actions"], real), cut=True)
        return {**data, **self.tokenizer.without_padded(out, real)}

    def many(self, rows: list[Flat]) -> list[Flat]:
        """All rows in one call, so that the codec encodes them as a batch."""
        with_actions = {"actions" in row for row in rows}
        if len(with_actions) > 1:
            raise DataError("some samples of a batch have actions and some have none", field="actions")
        actions = (
            np.stack([hold(row["actions"], _real(row)) for row in rows])
            if True in with_actions and self.tokenizer.codec is not None
            else None
        )
        out = self.tokenizer.tokenize_batch(
            [row["prompt"] for row in rows], [row["state"] for row in rows], actions, cut=True in with_actions
        )
        done = [{k: v[i] for k, v in out.items()} for i in range(len(rows))]
        if actions is not None:
            done = [self.tokenizer.without_padded(one, _real(row)) for one, row in zip(done, rows, strict=True)]
        return [{**row, **one} for row, one in zip(rows, done, strict=True)]


@frozen(eq=False, repr=False)
class Detokenize:
    """Tokens of the answer -> normalised actions [t a]; an answer that already has actions passes."""

    tokenizer: Any
    horizon: int
    dim: int
    reads: ClassVar = ("tokens?", "actions?")
    writes: ClassVar = ("actions",)

    @property
    def shapes(self) -> str:
        """Text for the table."""
        return f"actions [{self.horizon} {self.dim}]"

    def __call__(self, data: Flat) -> Flat:
        if "actions" in data:
            return data
        if "tokens" not in data:
            raise DataError("the answer has neither actions nor tokens", field="actions", got=sorted(data))
        return {**data, "actions": self.tokenizer.decode(np.asarray(data["tokens"]), self.horizon, self.dim)}
