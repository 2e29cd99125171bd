"""Demonstrations of the scripted expert: recorded on first use, then read."""

from __future__ import annotations

from vla import recording
from vla.datasets import Dataset
from vla_dataset_tabletop.config import DatasetSettings

# Raised when the scene, the expert or the recording changes: the cache is named by it.
REVISION = 2


def demonstrations(settings: DatasetSettings) -> Dataset:
    """The dataset with these settings; see `vla.recording.demonstrations`."""
    return recording.demonstrations("tabletop", settings, REVISION)
