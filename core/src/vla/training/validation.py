"""Validation on held-out episodes: losses, and how far sampled actions are from recorded ones, in the robot's units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vla.contracts import Observation
from vla.draws import sampling_noise, training_draws
from vla.errors import DataError, DecodeError
from vla.sampling import for_model
from vla.training.config import TrainConfig
from vla.training.loader import Loader, without_targets
from vla.training.order import generator, permuted
from vla.training.prepare import Prepared


class Validator:
    """The same frames with the same random numbers every time, so that two values differ only by the weights."""

    def __init__(self, loader: Loader, prepared: Prepared, config: TrainConfig):
        self.loader, self.prepared, self.config = loader, prepared, config
        self.bad: dict[int, DataError] = {}  # frames of the last run that could not be used

    def run(self, engine: Any) -> dict[str, Any]:
        """Mean losses, `action_error_mean`, and `action_error` per action dim (mean absolute, over real steps)."""
        p, c = self.prepared, self.config
        size = min(c.batch_size, len(p.val_index))
        sums: dict[str, float] = {}
        self.bad: dict[int, DataError] = {}
        errors, failures, count = [], 0, max(1, min(c.val_batches, len(p.val_index) // size))
        order = p.val_index[permuted(np.arange(len(p.val_index)), len(p.val_index), c.seed & (2**63 - 1))]
        head, spec = p.variant.parts["head"], p.variant.spec
        for b in range(count):
            ids = order[b * size : (b + 1) * size]
            _, samples, bad = self.loader.read(ids, b, p.val_index)
            self.bad |= bad
            drawn = training_draws(head, spec, size, generator(c.seed, "validation", b))
            obs, actions, drawn = self.loader.micro_batch(samples, drawn)
            for name, value in engine.evaluate(obs, actions, drawn).items():
                sums[name] = sums.get(name, 0.0) + float(np.mean(value)) / count
            noise = sampling_noise(head, spec, size, generator(c.seed, "validation", b, 1))
            for row, predicted in enumerate(self._sampled(engine, obs, noise)):
                if predicted is None:
                    failures += 1
                    continue
                real = np.asarray(actions.mask[row]).any(-1) if actions.mask is not None else slice(None)
                errors.append(np.abs(predicted - self._physical(actions.values[row], obs, row))[real])
        record: dict[str, Any] = dict(sums)
        if errors:
            per_dim = np.concatenate(errors).mean(0)
            record["action_error_mean"] = float(per_dim.mean())
            names = getattr(p.dataset.info, "action_names", None) or [str(d) for d in range(len(per_dim))]
            record["action_error"] = dict(zip(names, map(float, per_dim), strict=False))
        if failures:
            record["undecodable"] = failures / (count * size)
        return record

    def _sampled(self, engine: Any, obs: Observation, noise: np.ndarray | None) -> list[np.ndarray | None]:
        """Predicted chunks [t d] in the robot's units; None where the tokens stand for no chunk."""
        p = self.prepared
        out = engine.sample(without_targets(obs), noise, for_model(p.variant, p.group.codec_dim, p.tokenizer))
        rows: list[np.ndarray | None] = []
        for row in range(obs.batch):
            answer: Mapping[str, Any] = {k: v[row] for k, v in out.items() if k in ("actions", "tokens")}
            try:
                rows.append(np.asarray(p.group.outputs({**answer, "state": np.asarray(obs.state)[row]})["actions"]))
            except DecodeError:
                rows.append(None)
        return rows

    def _physical(self, values: np.ndarray, obs: Observation, row: int) -> np.ndarray:
        """A recorded chunk by the same way out as a predicted one."""
        return np.asarray(
            self.prepared.group.outputs({"actions": values, "state": np.asarray(obs.state)[row]})["actions"]
        )
