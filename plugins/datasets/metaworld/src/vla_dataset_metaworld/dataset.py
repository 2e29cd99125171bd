"""Demonstrations of Meta-World's experts: recorded on first use, then read without a simulator."""

from __future__ import annotations

from vla import recording
from vla.datasets import Dataset
from vla_dataset_metaworld.config import DatasetSettings

# Raised when the scenes, the experts or the recording change: the cache is named by it.
REVISION = 1


def demonstrations(settings: DatasetSettings) -> Dataset:
    """The dataset with these settings; see `vla.recording.demonstrations`."""
    return recording.demonstrations("metaworld", settings, REVISION)
