"""From a dataset to the batches of a run, prepared ahead in threads.

What a batch holds is a pure function of the step; threads only decide when it is ready. A prepared sample (decoded,
resized, tokenised) is kept in memory as long as there is room, so small data is prepared once and later epochs are
gathers. Threads and not processes: decoding, resizing and tokenising release the interpreter lock, and the samples
are shared without copies.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import cpu_count
from typing import Any

import numpy as np
from attrs import evolve, field, frozen

from vla.contracts import Actions, Observation, trim_prompt
from vla.draws import training_draws
from vla.errors import DataError
from vla.training.augment import augment
from vla.training.augment import draws as augment_draws
from vla.training.bad_frames import TRIES, unusable
from vla.training.config import TrainConfig
from vla.training.cuts import cut_samples, empty_losses
from vla.training.order import generator, mixture, sample_ids, stand_ins
from vla.transforms import batch

MicroBatch = tuple[Observation, Actions, Any]  # host arrays; the last are the head's draws


@frozen
class Batch:
    """One step's input on this process."""

    step: int
    ids: np.ndarray  # dataset indices of the rows, [b]
    micro: tuple[MicroBatch, ...]
    bad: Mapping[int, DataError] = field(factory=dict)  # frames that could not be used, for which others stand in
    cut: int = 0  # rows that lost tokens
    empty: tuple[str, ...] = ()  # losses without a target in one of the micro-batches


class Samples:
    """Prepared samples by dataset index, kept while they fit.

    Args:
        dataset: see docs/architecture.md.
        prepare: raw sample -> model input (`Group.inputs`).
        horizon: steps of an action chunk.
        cache_bytes: how much to keep.
    """

    def __init__(
        self, dataset: Any, prepare: Callable[[dict[str, Any]], Mapping[str, Any]], horizon: int, cache_bytes: float
    ):
        self.dataset, self.prepare, self.horizon = dataset, prepare, horizon
        self.room = cache_bytes
        self.kept: dict[int, dict[str, Any]] = {}
        self.bad: dict[int, DataError] = {}  # decoded once, not at every epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The model input of one frame.

        Raises:
            DataError: the frame cannot be read, or its state or actions are not finite.
        """
        found = self.kept.get(index)
        if found is not None:
            return found
        if index in self.bad:
            raise self.bad[index]
        try:
            sample = self._read(index)
        except DataError as error:
            self.bad[index] = unusable(error, index, len(self.dataset))
            raise self.bad[index] from error
        size = _bytes(sample)
        if size <= self.room:
            self.room -= size
            self.kept[index] = sample
        return sample

    def _read(self, index: int) -> dict[str, Any]:
        sample = dict(self.prepare(self.dataset.sample(index, self.horizon)))
        for key in ("state", "actions"):
            if key in sample and not np.isfinite(sample[key]).all():
                dims = sorted({int(d) for d in np.argwhere(~np.isfinite(sample[key]))[:, -1]})
                raise DataError(
                    "the data has NaN or infinite values",
                    field=f"{key}, dims {dims}",
                    fix="repair or drop this episode",
                )
        return sample


class Loader:
    """Batches of a run in step order, prepared ahead.

    Args:
        samples: the prepared samples.
        index: the dataset indices that are trained on.
        shares: of a mixture: how many entries of `index` each dataset has, and its weight; () for one dataset.
        variant: for the head's draws and the shapes.
        config: the run.
        rows: which rows of the global batch this process computes; None: all.
    """

    def __init__(
        self,
        samples: Samples,
        index: np.ndarray,
        variant: Any,
        config: TrainConfig,
        rows: slice | None = None,
        shares: Sequence[tuple[int, float]] = (),
    ):
        self.samples, self.index, self.variant, self.config = samples, index, variant, config
        self.rows = rows or slice(0, config.batch_size)
        self.shares = shares
        self.waited = 0.0  # seconds that training stood still for data

    def ids(self, step: int) -> np.ndarray:
        """Dataset indices of the whole global batch of a step."""
        c = self.config
        if self.shares:
            sizes, weights = zip(*self.shares, strict=True)
            return self.index[mixture(c.seed, step, c.batch_size, sizes, weights)]
        return self.index[sample_ids(c.seed, step, c.batch_size, len(self.index))]

    def batch(self, step: int) -> Batch:
        """The batch of a step, computed here and now."""
        c = self.config
        ids, samples, bad = self.read(self.ids(step)[self.rows], step)
        if c.augment:
            drawn = augment_draws(c.seed, step, c.batch_size)[self.rows]
            samples = [{**s, "images": augment(s["images"], d)} for s, d in zip(samples, drawn, strict=True)]
        drawn = training_draws(
            self.variant.parts["head"], self.variant.spec, c.batch_size, generator(c.seed, "draws", step)
        )
        drawn = take(drawn, self.rows)
        given = None
        if c.rtc.max_delay:
            delays = generator(c.seed, "rtc", step).integers(0, c.rtc.max_delay + 1, c.batch_size, dtype=np.int32)
            given = delays[self.rows]
        share = len(samples) // c.accumulate
        micro, empty = [], []
        losses = self.variant.parts["head"].offers.get("losses") or {}
        for i in range(c.accumulate):
            part = slice(i * share, (i + 1) * share)
            micro.append(self.micro_batch(samples[part], take(drawn, part), None if given is None else given[part]))
            empty += empty_losses(samples[part], losses)
        return Batch(step, ids, tuple(micro), bad, cut_samples(samples), tuple(dict.fromkeys(empty)))

    def read(
        self, ids: np.ndarray, step: int, pool: np.ndarray | None = None
    ) -> tuple[np.ndarray, list[dict[str, Any]], dict[int, DataError]]:
        """(ids, samples, bad frames): with a budget, others stand in for frames that cannot be used.

        Args:
            pool: where the others come from; None: the training frames, in a mixture those of the same dataset.

        Raises:
            DataError: a frame cannot be used and there is no budget, or all that might stand in are bad too.
        """
        out, samples, bad = ids.copy(), [], {}
        for row, index in enumerate(map(int, ids)):
            others = None
            for attempt in range(TRIES + 1):
                try:
                    samples.append(self.samples[index])
                    break
                except DataError as error:
                    bad[index] = error
                    if not self.config.skip_bad or attempt == TRIES:
                        raise
                if others is None:
                    those = self._like(index) if pool is None else pool
                    others = those[stand_ins(self.config.seed, step, self.rows.start + row, len(those), TRIES)]
                if attempt == len(others):
                    raise bad[index]
                index = int(others[attempt])
            out[row] = index
        return out, samples, bad

    def _like(self, index: int) -> np.ndarray:
        """The training frames of the dataset that a frame is of."""
        start = 0
        for size, _ in self.shares:
            if index <= self.index[start + size - 1]:
                return self.index[start : start + size]
            start += size
        return self.index

    def micro_batch(
        self, samples: Sequence[Mapping[str, Any]], drawn: Any, given: np.ndarray | None = None
    ) -> MicroBatch:
        """Samples as one batch (`vla.transforms.batch`), with the draws of its rows; `given`: see `Actions`."""
        obs, actions = batch(samples, self.variant.spec, self.variant.parts["backbone"].offers.get("vocab_size"))
        assert actions is not None  # one frame was looked at before the first step
        return obs, evolve(actions, given=given), drawn

    def stream(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches of steps start .. stop - 1, prepared ahead by threads; an error surfaces at its own step."""
        workers = self.config.workers or max(1, min(8, (cpu_count() or 2) - 1))
        with ThreadPoolExecutor(workers, thread_name_prefix="vla-data") as pool:
            ahead: deque[Future[Batch]] = deque()
            todo = iter(range(start, stop))
            try:
                for step in range(start, stop):
                    while len(ahead) < max(self.config.prefetch, workers) and (new := next(todo, None)) is not None:
                        ahead.append(pool.submit(self.batch, new))
                    began = time.perf_counter()
                    batch = ahead.popleft().result()
                    self.waited += time.perf_counter() - began
                    assert batch.step == step
                    yield batch
            finally:
                for future in ahead:
                    future.cancel()


def take(tree: Any, rows: slice) -> Any:
    """These rows of nested dicts of arrays."""
    if isinstance(tree, Mapping):
        return {k: take(v, rows) for k, v in tree.items()}
    return tree[rows]


def without_targets(obs: Observation) -> Observation:
    """The observation as inference sees it: target tokens taken out of the prompt."""
    if obs.tokenized_prompt is None or obs.token_ar_mask is None:
        return obs
    prompt = np.asarray(obs.token_ar_mask) == 0
    return trim_prompt(
        evolve(
            obs,
            tokenized_prompt_mask=np.asarray(obs.tokenized_prompt_mask) & prompt,
            token_ar_mask=np.zeros_like(obs.token_ar_mask),
            token_loss_mask=np.zeros_like(obs.token_loss_mask),
            extra={k: v for k, v in obs.extra.items() if not k.startswith("target_")},
        )
    )


def _bytes(sample: Mapping[str, Any]) -> int:
    total = 1024  # the dict itself
    for value in sample.values():
        total += _bytes(value) if isinstance(value, Mapping) else getattr(value, "nbytes", 64)
    return total
