"""Demonstrations of Meta-World's experts: recorded on first use, then read."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from attrs import asdict

from vla.datasets import Dataset, open_dataset
from vla.errors import StoreError
from vla_dataset_metaworld.config import DatasetSettings

# Part of the cache's name: raised when the scenes, the experts or the recording change.
REVISION = 1


def demonstrations(settings: DatasetSettings) -> Dataset:
    """The dataset with these settings, from its folder when it is there (no simulator needed), else recorded now.

    The folder is `settings.path`, or a folder named by a digest of the settings below `$VLA_CACHE` (~/.cache/vla).

    Raises:
        PartError: nothing is recorded yet, and Meta-World is not installed.
        VlaError: rendering does not work here, or the folder cannot be written.
    """
    from vla.recording import record

    folder = Path(settings.path).expanduser() if settings.path else default_folder(settings)
    if not recorded(folder):
        table = {"part": "metaworld", **asdict(settings.env())}
        try:
            record(table, folder, settings.episodes, seed=settings.seed, noise=settings.noise, workers=settings.workers)
        except StoreError:
            # Someone else recorded the same folder meanwhile: theirs is as good.
            if not recorded(folder):
                raise
    return open_dataset(folder.absolute(), {"robot": "metaworld"})


def recorded(folder: Path) -> bool:
    """Whether a dataset is there."""
    return (folder / "meta" / "info.json").is_file()


def default_folder(settings: DatasetSettings) -> Path:
    """Where demonstrations with these settings are kept when no path is given."""
    facts = {k: v for k, v in asdict(settings).items() if k not in ("path", "workers")}
    name = hashlib.sha256(json.dumps([REVISION, facts], sort_keys=True).encode()).hexdigest()[:16]
    return Path(os.environ.get("VLA_CACHE", "~/.cache/vla")).expanduser() / "metaworld" / name
