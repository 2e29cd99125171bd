"""How long prompts and action tokens are, measured over the data before the first step; no image is decoded.

A prompt that does not fit loses words, a chunk that does not fit loses its end, and a policy trained on that never
learns to finish a chunk. So the lengths are known, and said, before anything is trained.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from attrs import field, frozen

from vla.errors import DataError
from vla.training.bad_frames import unusable
from vla.transforms.text import targets_of

MEASURED = 4096  # frames looked at, at most; all of a smaller dataset
ROUND = 16  # prompts are padded to multiples of this (`vla.contracts.trim_prompt`)
_AT_ONCE = 256


@frozen(eq=False)
class TokenLengths:
    """Tokens of each measured frame, as they would be without a limit.

    Attributes:
        prompts: of instruction and state [n].
        targets: of the action chunk with what opens and closes it [n]; 0 where actions are no tokens.
        frames: of the data; more than n where only a share was measured.
    """

    prompts: np.ndarray = field()
    targets: np.ndarray = field()
    frames: int = field()

    @property
    def longest(self) -> int:
        """Tokens of the longest frame that was measured."""
        return int((self.prompts + self.targets).max())

    @property
    def fits(self) -> int:
        """A spec.max_token_len that holds the data: the longest measured; of a share, the longest parts together."""
        whole = len(self.prompts) == self.frames
        return self.longest if whole else int(self.prompts.max() + self.targets.max())

    def over(self, limit: int) -> float:
        """The share of frames that are longer than `limit`."""
        return float((self.prompts + self.targets > limit).mean())

    def summary(self, limit: int) -> str:
        """One line of numbers."""
        whole = self.prompts + self.targets
        frames = f"{len(whole)} of {self.frames} frames" if len(whole) < self.frames else f"all {len(whole)} frames"
        parts = f" (prompt {self.prompts.max()}, action tokens {self.targets.max()})" if self.targets.any() else ""
        return (
            f"tokens per sample, over {frames}: {np.median(whole):.0f} in the middle, {self.longest} at most{parts}; "
            f"spec.max_token_len = {limit}"
        )


def measure_token_lengths(
    dataset: Any,
    group: Any,
    tokenizer: Any,
    horizon: int,
    *,
    seed: int = 0,
    most: int = MEASURED,
    skip_bad: bool = False,
) -> TokenLengths:
    """Lengths over a dataset as a policy would see it.

    Args:
        dataset: `vla.datasets.Dataset`.
        group: the policy's transforms (`vla.transforms.build_group` with this tokenizer).
        tokenizer: `vla.tokenizer.Tokenizer`, fitted; its own limit does not matter.
        horizon: steps per chunk.
        seed: which frames are taken where there are more than `most`: of every instruction one, the longest first,
            then others at random.
        most: frames to look at.
        skip_bad: leave out frames that cannot be read.

    Raises:
        DataError: a frame cannot be read, or has no instruction.
        SettingsError: the action codec is not fitted.
    """
    chosen = _frames(dataset, most, seed)
    prompts, targets = [], []
    for start in range(0, len(chosen), _AT_ONCE):
        rows = []
        for i in chosen[start : start + _AT_ONCE]:
            try:
                rows.append(group.inputs(dataset.sample(int(i), horizon, images=False), until="prompt"))
            except DataError as error:
                if not skip_bad or (i == chosen[-1] and not rows and not prompts):
                    raise unusable(error, int(i), len(dataset)) from error
        if not rows:
            continue
        actions = np.stack([targets_of(row) for row in rows]) if tokenizer.codec is not None else None
        ids = tokenizer.ids([row["prompt"] for row in rows], [row["state"] for row in rows], actions)
        prompts += [len(prefix) for prefix, _ in ids]
        targets += [len(end) for _, end in ids]
    return TokenLengths(np.array(prompts), np.array(targets), len(dataset))


def _frames(dataset: Any, most: int, seed: int) -> np.ndarray:
    count = len(dataset)
    if count <= most:
        return np.arange(count)
    first: dict[str, int] = {}
    for i, prompt in enumerate(dataset.prompts()):
        first.setdefault(str(prompt), i)
    texts = np.array([first[p] for p in sorted(first, key=len, reverse=True)][: most // 2], np.int64)
    others = np.random.default_rng(seed).permutation(np.setdiff1d(np.arange(count), texts))
    return np.sort(np.concatenate([texts, others[: most - len(texts)]]))
