"""What training loses without a sound: samples that are cut, and losses that have nothing to learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla.training.config import TrainConfig, TrainingError

FEWEST = 10  # cut samples before a share of them says anything
TOKEN_ROLE = "target"  # the role whose loss learns from tokens; all others learn from actions


def cut_samples(samples: Sequence[Mapping[str, Any]]) -> int:
    """How many of the samples lost tokens (see `vla.transforms.text.Tokenize`)."""
    return sum(bool(sample.get("tokens_cut", 0)) for sample in samples)


def empty_losses(samples: Sequence[Mapping[str, Any]], losses: Mapping[str, str]) -> tuple[str, ...]:
    """The losses (name -> role) that have no target in any of the samples of a micro-batch."""

    def has(name: str, role: str) -> bool:
        key = "token_loss_mask" if role == TOKEN_ROLE else "actions_mask"
        return any(key not in sample or np.any(sample[key]) for sample in samples)

    return tuple(name for name, role in losses.items() if not has(name, role))


class Cuts:
    """Counts over a run, for every metrics record; refuses when they pass their limits."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.rows = self.cut = 0  # of the whole run
        self.since = {"samples_cut": 0, "batches_without_targets": 0}  # since the last record
        self.in_a_row = 0

    def add(self, step: int, rows: int, cut: int, empty: Sequence[str]) -> None:
        """One step's batch.

        Raises:
            TrainingError: more than twice the allowed share of the samples was cut, or a loss had no target for many
                steps in a row.
        """
        self.rows, self.cut = self.rows + rows, self.cut + cut
        self.since["samples_cut"] += cut
        self.since["batches_without_targets"] += bool(empty)
        self.in_a_row = self.in_a_row + 1 if empty else 0
        if self.cut >= FEWEST and self.cut > 2 * self.config.max_cut * self.rows:
            raise TrainingError(
                "too many samples lose tokens because they are longer than the model's prompt",
                field="spec.max_token_len",
                got=f"{self.cut} of {self.rows} samples were cut",
                expected=f"at most twice --max-cut {self.config.max_cut:g}",
                fix="start again with --fit-lengths, or allow it: --max-cut "
                f"{min(1.0, np.ceil(100 * self.cut / self.rows) / 100):g}",
            )
        if self.in_a_row >= self.config.max_bad_steps:
            raise TrainingError(
                f"{self.in_a_row} batches in a row had nothing to learn from",
                field=f"step {step}: loss {', '.join(empty)}",
                got="no target in the batch",
                fix="look at the data: are all actions padding, or do all targets fall off the end of the prompt? "
                "Then: --fit-lengths",
            )

    def state(self) -> dict[str, int]:
        """The counts as a checkpoint keeps them."""
        return {"rows": self.rows, "cut": self.cut, "in_a_row": self.in_a_row, **self.since}

    def load(self, state: Mapping[str, int]) -> None:
        """Go on from a checkpoint."""
        self.rows, self.cut, self.in_a_row = (int(state.get(k, 0)) for k in ("rows", "cut", "in_a_row"))
        self.since = {name: int(state.get(name, 0)) for name in self.since}

    def record(self) -> dict[str, int]:
        """The counts since the last record."""
        out = dict(self.since)
        self.since = dict.fromkeys(out, 0)
        return out
