"""`RUN/run.json`: what a run is made of, written before its first step, so that going on with it needs nothing else.

vla train --out runs/mine --resume
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import asdict, field, frozen

from vla.compose import variant_from_toml
from vla.errors import SettingsError, StoreError
from vla.files import write_text
from vla.reading import read_json
from vla.runs import RUN
from vla.training.config import TrainConfig, TrainingError, config_from
from vla.training.start import Changed

FORMAT = 1  # the "vla" of the file


@frozen
class SavedRun:
    """What a run is made of, as plain values.

    Attributes:
        variant: the text of its `variant.toml`.
        config: `TrainConfig` as a table.
        data: what opens the data, see `vla.datasets.open_dataset`; "": it was opened by the caller.
        base: the model whose weights it started from; "": new weights.
        reinit: weights of the base that were made anew.
        stats: "data", "base", or a path; "": numbers that the caller gave.
        yes_random, allow_change: whether frozen random weights, and data of another robot, were allowed.
        typed: the options of the command line that are not in `config`, as they were typed.
    """

    variant: str
    config: Mapping[str, Any]
    data: Any = ""
    base: str = ""
    reinit: tuple[str, ...] = field(default=(), converter=tuple)
    stats: str = ""
    yes_random: bool = False
    allow_change: bool = False
    typed: Mapping[str, Any] = field(factory=dict)

    def model(self) -> Any:
        """What training started from, for `vla.training.start.open_start`."""
        variant = variant_from_toml(self.variant, RUN)
        return Changed(self.base, variant, self.reinit) if self.base else variant

    def train_config(self) -> TrainConfig:
        """The run's settings."""
        return config_from(self.config)

    def given(self, stats: Any) -> Any:
        """The statistics to use, where there is no checkpoint that has them.

        Raises:
            TrainingError: they were numbers, which the file does not keep.
        """
        if stats is None and not self.stats:
            raise TrainingError("the run was given statistics as numbers: give them again", field="stats")
        return self.stats if stats is None else stats

    def check_typed(self, options: Mapping[str, Any]) -> None:
        """Refuse options that are given again and differ; one that is left out is as it was.

        Raises:
            SettingsError: names the option, with both values.
        """
        for name, value in options.items():
            before = self.typed.get(name, type(value)())
            if value and _words(value) != _words(before):
                raise SettingsError(
                    "the run that goes on was started with another value", field=name, got=_shown(value),
                    expected=_shown(before) or "not given", fix=f"leave {name} out: the run knows its own",
                )  # fmt: skip


def save_run(out: Path, run: SavedRun) -> None:
    """Write it; whole or not at all."""
    table = {"vla": FORMAT, **asdict(run)}
    write_text(out / RUN, json.dumps(table, indent=1, default=str) + "\n")


def read_run(out: Path) -> SavedRun | None:
    """What is stored in a run directory; None: it was made before runs stored themselves, or is none.

    Raises:
        StoreError: the file is damaged, or of another version.
    """
    file = out / RUN
    if not file.is_file():
        return None
    what, fix = "this is no record of a run, or a damaged one", "choose another --out, or move the file away"
    table = read_json(file, what)
    if table.pop("vla", None) != FORMAT:
        raise StoreError(what, field=str(file), expected=f"vla = {FORMAT}", fix=fix)
    try:
        return SavedRun(**table)
    except TypeError as error:
        raise StoreError(what, field=str(file), got=str(error), fix=fix) from error


def _words(value: Any) -> Any:
    """A value so that equal ones compare equal: a path by where it leads, a list as it stands."""
    if isinstance(value, list | tuple):
        return [_words(one) for one in value]
    if not isinstance(value, str) or not (path := Path(os.path.expanduser(value))).exists():
        return value
    return str(path.absolute())


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
