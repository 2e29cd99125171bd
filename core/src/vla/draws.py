"""Random numbers of a head, drawn on the host in numpy: both frameworks get the same, and nothing has to be saved."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from vla.contracts import Spec


def training_draws(head: Any, spec: Spec, batch: int, rng: np.random.Generator) -> dict[str, Any]:
    """The draws of one training step: {} for a head that draws nothing, else arrays by name (nested by slot)."""
    return importlib.import_module(head.part.draws).draws(head, spec, batch, rng) if head.part.draws else {}


def sampling_noise(head: Any, spec: Spec, batch: int, rng: np.random.Generator) -> np.ndarray | None:
    """What sampling starts from, [b t d] for a flow head; None for a head that draws nothing."""
    return importlib.import_module(head.part.draws).noise(head, spec, batch, rng) if head.part.draws else None
