"""Everything that must be right before the first step: model, data, statistics, tokenizer, and whether they fit.

What is missing and can be had from the data is computed, and said: normalisation statistics, the fit of an action
tokenizer. What does not fit is one error, before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from attrs import asdict, field, frozen

from vla.compose import Variant, build
from vla.datasets import ways_out
from vla.embodiment import Embodiment, check_same, differences
from vla.errors import DataError, PartError, SettingsError
from vla.fitting import MisfitError
from vla.refit import stems_between
from vla.registry import listed
from vla.runs import checkpoint_state
from vla.store import ASSETS, STATS, check_finite
from vla.training.bad_frames import TRIES, unusable
from vla.training.config import TrainConfig, TrainingError
from vla.training.order import generator, split_episodes
from vla.training.start import Start, check_untrained, open_start, variant_of, with_codec_for
from vla.training.statistics import BASE, DATA, choose

MADE_OF = ("weights", "statistics")  # what the record of a run says about where it started
FIT_CHUNKS = 4096  # chunks an action tokenizer is fitted on


@frozen
class Prepared:
    """Model, data and what stands between them, ready for the first step."""

    variant: Variant
    dataset: Any
    stats: Any
    tokenizer: Any
    group: Any  # vla.transforms.Group
    weights: Mapping[str, np.ndarray] | None  # to start from
    train_index: np.ndarray
    val_index: np.ndarray
    digest: str
    shares: tuple[tuple[int, float], ...] = ()  # of a mixture: training frames and weight of each dataset
    cameras: tuple[str, ...] = ()  # of the model, that every frame has; a policy asks for them too
    source: Any = ""  # what opens the data again, see `vla.datasets.open_recorded`
    made_of: Mapping[str, Any] = field(factory=dict)  # where "weights" and "statistics" are from, for the record

    def facts(self) -> dict[str, Any]:
        """Plain facts about the data of this run, for its record."""
        frames = {"train_frames": len(self.train_index), "validation_frames": len(self.val_index)}
        return {"data": self.digest, **frames, "cameras": list(self.cameras)}

    @property
    def embodiment(self) -> dict[str, Any]:
        """The robot as the data names it, for the record of the model; see `vla.embodiment`."""
        return Embodiment.of(self.dataset.info).to_table()

    def write_assets(self, folder: Path) -> None:
        """Write statistics and tokenizer into a checkpoint."""
        from vla.transforms.stats import save_stats

        save_stats(self.stats, folder / STATS)
        (folder / ASSETS).mkdir(exist_ok=True)
        self.tokenizer.save(folder / ASSETS)


def prepare(
    model: Any,
    data: Any,
    config: TrainConfig,
    stats: Any | None = None,
    note: Callable[[str], None] = print,
    checkpoint: Path | None = None,
    allow_change: bool = False,
    yes_random: bool = False,
) -> Prepared:
    """Open and check everything. Statistics and tokenizer come from `checkpoint` when one is resumed.

    `stats`: "data" (also None), "base", a path, or statistics. With `yes_random` weights that were never trained may be
    frozen. With `allow_change` a model is fine-tuned on data of another robot than it was trained on; what differs is
    noted.

    Raises:
        TrainingError: `stats` are not those of the checkpoint, or weights that were never trained would be frozen.
        DataError: the dataset is empty, lacks a camera, is of another robot or of other widths, or has a bad frame; or
            the statistics do not fit it.
        StoreError, PartError, SettingsError: the model cannot be opened.
    """
    from vla.tokenizer import open_tokenizer
    from vla.transforms import build_group
    from vla.transforms.stats import load_stats

    # What a checkpoint holds is not read from the base again, which may be gone.
    start = open_start(model, config.seed) if checkpoint is None else Start(variant_of(model))
    check_rtc(start.variant, config)
    check_finite(start.weights or {}, start.origin.base)
    dataset = open_data(data, start.variant)
    variant = for_robot_of(start.variant, dataset, note)
    check_fit(variant, dataset, start.was)
    if checkpoint is None:
        check_same_robot(start.record, dataset, allow_change, note)
    train_episodes, val_episodes = split_episodes(config.seed, len(dataset.episodes), _held_out(config, dataset))
    if checkpoint is not None:
        made_of = {key: value for key, value in checkpoint_state(checkpoint).items() if key in MADE_OF}
        stored = load_stats(checkpoint / STATS)
        _check_same_stats(stats, stored, checkpoint, made_of)
        stats = stored
        tokenizer = open_tokenizer(variant.parts["tokenizer"], variant.spec, checkpoint / ASSETS)
        weights = None
        note(f"weights and statistics: of {checkpoint}")
    else:
        origin = check_untrained(start.origin, config, variant, yes_random)
        note(str(start.origin))
        # Statistics of the base are of values that another adapter has not converted.
        own = start.stats if variant is start.variant else None
        stats, source = choose(stats, own, variant, dataset, note)
        weights, made_of = start.weights, {"weights": origin.to_table(), "statistics": source}
        tokenizer = start.tokenizer or open_tokenizer(variant.parts["tokenizer"], variant.spec, None)
        check_vocabulary(variant, tokenizer, start.was)
        tokenizer = with_codec_for(tokenizer, variant, len(stats["actions"].mean), note)
    train_index = _frames(dataset, train_episodes)
    if tokenizer.codec is not None and not is_fitted(tokenizer):
        tokenizer = fit_tokenizer(variant, dataset, stats, tokenizer, train_index, config, note)
    group = build_group(variant, stats=stats, tokenizer=tokenizer)
    variant = with_room(variant, dataset, group, tokenizer, config, note if checkpoint is None else _silent)
    cameras = _probe(variant, group, _first_good(dataset, variant, train_index, config))
    val_index = _frames(dataset, val_episodes)
    digest, shares = dataset.digest(), mixture_shares(dataset, train_index)
    for part, (frames, weight) in zip(getattr(dataset, "datasets", ()), shares, strict=True):
        note(f"data: {weight:.0%} {part.info.source} ({frames} frames to train on)")
    return Prepared(
        variant, dataset, stats, tokenizer, group, weights, train_index, val_index, digest, shares,
        () if shares else cameras,  # the datasets of a mixture may have different ones
        _source(data, dataset), made_of,
    )  # fmt: skip


def check_rtc(variant: Variant, config: TrainConfig) -> None:
    """Refuse to train for real-time chunking what cannot learn it, or longer delays than a chunk has steps for.

    Raises:
        SettingsError: naming the head, or the delay.
    """
    delay, head, horizon = config.rtc.max_delay, variant.parts["head"], variant.spec.action_horizon
    if not delay:
        return
    if "trained" not in head.offers.get("chunking", ()):
        raise SettingsError(
            "this head cannot be trained to go on from a given beginning", field="train.rtc.max_delay",
            got=f"head {head.part.name!r}", fix="train a head that can, such as flow, or leave --rtc.max-delay out",
        )  # fmt: skip
    if delay >= horizon:
        raise SettingsError("a chunk goes on beyond what is given", field="train.rtc.max_delay", got=delay,
                            expected=f"less than spec.action_horizon = {horizon}")  # fmt: skip


def open_data(data: Any, variant: Variant) -> Any:
    """The dataset: an opened one as it is, else what a path or a name stands for."""
    if hasattr(data, "sample") and hasattr(data, "episodes"):
        return data
    from vla.datasets import open_dataset

    return open_dataset(data)


def _source(data: Any, dataset: Any) -> Any:
    """What opens the data again: a table where we opened it, else where the opened dataset says that it is from."""
    if data is not dataset:
        from vla.datasets import source_table

        return source_table(data)
    return str(getattr(dataset.info, "source", ""))


def for_robot_of(variant: Variant, dataset: Any, note: Callable[[str], None] = print) -> Variant:
    """The variant with the adapter of the dataset's robot in the place of `plain`; what was set of it is kept.

    Raises:
        SettingsError: the adapter has no such setting; one of the two would be lost.
        MisfitError: the adapter does not fit the variant.
    """
    theirs, mine = getattr(dataset.info, "robot", ""), variant.parts["robot"]
    if mine.part.name != "plain" or theirs == "plain" or not any(item.name == theirs for item in listed("robot")):
        return variant
    usual = asdict(mine.part.settings())
    changed = {name: value for name, value in asdict(mine.settings).items() if value != usual[name]}
    try:
        adapted = build(base=variant, robot=theirs, name=variant.name)
    except MisfitError as error:  # no other adapter is advised: the data is of this robot
        swaps = [change for change in error.swaps if change.path != "robot"]
        pairs = [pair for pair in error.pairs if "robot" not in (change.path for change in pair)]
        raise MisfitError(list(error.misfits), swaps, error.settings, pairs) from error
    offers = adapted.parts["robot"].offers
    changed = {name: value for name, value in changed.items() if offers.get(name) != value}  # its own widths
    try:
        sets = {f"robot.{name}": list(v) if isinstance(v, tuple) else v for name, v in changed.items()}
        adapted = build(base=adapted, set=sets, name=variant.name)
    except SettingsError as error:
        raise SettingsError(
            f"the data was recorded on {theirs!r}, and the adapter of that robot does not take these settings",
            field=", ".join(sets),
            got=", ".join(map(str, sets.values())),
            expected=f"settings of {theirs!r}: {', '.join(asdict(adapted.parts['robot'].settings))}",
            fix="leave them out; or, if this data needs no conversion, say so: --set data.robot=plain",
        ) from error
    note(f"robot adapter: {theirs} (the data was recorded on it)")
    return adapted


def check_fit(variant: Variant, dataset: Any, was: Variant | None = None) -> None:
    """Refuse data that the variant's robot adapter cannot read, as far as the dataset's own description tells.

    `was`: the variant of the weights that there are.

    Raises:
        DataError: no frames, another robot, too wide states or actions.
    """
    info, spec, robot = dataset.info, variant.spec, variant.parts["robot"]
    if not len(dataset) or not len(dataset.episodes):
        raise DataError(
            "the dataset is empty", field="data", got=f"{len(dataset.episodes)} episodes, {len(dataset)} frames"
        )
    mine, theirs = robot.part.name, getattr(info, "robot", "")
    if theirs and mine != "plain" and theirs != mine:
        known = any(item.name == theirs for item in listed("robot"))
        raise DataError(
            "the data was recorded on another robot than the variant is for",
            field="robot",
            got=f"dataset: {theirs}" + ("" if known else " (no adapter of this name is installed)"),
            expected=mine,
            fix=f"build the variant with --robot {theirs}, or choose other data"
            if known
            else f"choose other data; or, if it is in the units of {mine} all the same: --set data.robot={mine}",
        )
    widths = {key: robot.offers.get(key) or getattr(info, key) for key in ("state_dim", "action_dim")}
    if wide := {key: width for key, width in widths.items() if width > getattr(spec, key)}:
        raise DataError(
            f"the data is wider than the model: {', '.join(wide)}",
            field=", ".join(f"spec.{key}" for key in wide),
            got=", ".join(f"{key}: data {width}, model {getattr(spec, key)}" for key, width in wide.items()),
            fix="--fit-data, or "
            + _way_out(variant, {f"spec.{key}": width for key, width in wide.items()}, was),
        )


def check_vocabulary(variant: Variant, tokenizer: Any, was: Variant | None = None) -> None:
    """Refuse a tokenizer with more pieces than the model has.

    Raises:
        SettingsError: it has.
    """
    have = variant.parts["backbone"].offers.get("vocab_size")
    if have and tokenizer.vocab_size > have:
        sets = {"backbone.llm.vocab_size": tokenizer.vocab_size}
        raise SettingsError(
            "the tokenizer has more pieces than the model's vocabulary", field="backbone.llm.vocab_size", got=have,
            expected=f">= {tokenizer.vocab_size}", fix=_way_out(variant, sets, was) + "; or a smaller tokenizer",
        )  # fmt: skip


def _way_out(variant: Variant, sets: Mapping[str, Any], was: Variant | None) -> str:
    """Options of `vla train` that make these settings, weights included."""
    words = " ".join(f"--set {path}={value}" for path, value in sets.items())
    try:
        stems = stems_between(was, build(base=variant, set=sets)) if was else []
    except (PartError, SettingsError):  # this variant has no such setting
        stems = []
    return f"{words} --reinit {','.join(stems)}" if stems else words


def check_same_robot(
    record: Mapping[str, Any], dataset: Any, allow_change: bool, note: Callable[[str], None] = print
) -> None:
    """Compare data with the embodiment that a model has in its record; nothing to compare: nothing to say.

    Raises:
        DataError: names, units, widths, cameras or rate differ, and that is not allowed.
    """
    if not record.get("embodiment"):
        return
    mine = Embodiment.from_table(record["embodiment"])
    theirs = Embodiment.of(dataset.info)
    if not allow_change:
        way = ways_out(mine, theirs)
        fix = f"{way and f'if it means the same: {way}; '}to train for another robot: --allow-change"
        check_same(mine, theirs, "the model", "the data", fix)
    for difference in differences(mine, theirs):
        note(f"the model was trained for another robot: {difference} in the data")


def mixture_shares(dataset: Any, index: np.ndarray) -> tuple[tuple[int, float], ...]:
    """(training frames, weight) of each dataset of a `vla.datasets.Mixture`; () for a single dataset.

    Raises:
        DataError: a dataset of the mixture has no episode left to train on.
    """
    weights = getattr(dataset, "weights", None)
    if weights is None:
        return ()
    counts = np.diff(np.searchsorted(index, np.concatenate([[0], np.cumsum(dataset.sizes)])))
    if not counts.all():
        which = int(np.argmin(counts))
        raise DataError("all episodes of a dataset of the mixture are held out", field="train.val_episodes", got=which)
    return tuple(zip(map(int, counts), map(float, weights), strict=True))


def with_room(
    variant: Variant, dataset: Any, group: Any, tokenizer: Any, config: TrainConfig, note: Callable[[str], None]
) -> Variant:
    """The variant, whose prompts hold the data's samples; measured, without images.

    Raises:
        TrainingError: more than `config.max_cut` of the samples are too long, and `config.fit_lengths` is off.
    """
    from vla.token_lengths import ROUND, measure_token_lengths

    spec = variant.spec
    lengths = measure_token_lengths(
        dataset, group, tokenizer, spec.action_horizon, seed=config.seed, skip_bad=config.skip_bad > 0
    )
    share = lengths.over(spec.max_token_len)
    if share and config.fit_lengths:
        room = -(-lengths.fits // ROUND) * ROUND
        variant = build(base=variant, set={"spec.max_token_len": room}, name=variant.name)
        tokenizer.max_len = room
        note(f"{lengths.summary(spec.max_token_len)}, set to {room}")
        return variant
    note(lengths.summary(spec.max_token_len) + (f"; {share:.2%} of the samples are cut" if share else ""))
    if share > config.max_cut:
        raise TrainingError(
            "samples of the data are longer than the model's prompt: they would lose words and action tokens",
            field="spec.max_token_len",
            got=f"{spec.max_token_len}; {share:.1%} of the samples are longer, up to {lengths.longest} tokens",
            expected=f"at least {lengths.fits}",
            fix=f"--fit-lengths, or --set spec.max_token_len={lengths.fits}; to lose them: --max-cut "
            f"{np.ceil(100 * share) / 100:g}",
        )
    return variant


def is_fitted(tokenizer: Any) -> bool:
    """Whether the action codec has learned what it needs."""
    return bool(getattr(tokenizer.codec, "fitted", True))


def _check_same_stats(given: Any, stored: Mapping[str, Any], checkpoint: Path, made_of: Mapping[str, Any]) -> None:
    """Refuse other statistics than the checkpoint's: its weights were trained on numbers scaled by those."""
    from vla.transforms.stats import FIELDS, load_stats

    if given in (DATA, BASE):
        if given != made_of.get("statistics", given):
            raise TrainingError(
                "a run cannot go on with other normalisation statistics", field="stats", got=given,
                expected=made_of["statistics"], fix="leave --stats away when resuming, or start another run",
            )  # fmt: skip
        return
    given = load_stats(Path(given).expanduser()) if isinstance(given, str | Path) else given
    for name in given or {}:
        pairs = [(getattr(given[name], f), getattr(stored.get(name), f, None)) for f in FIELDS]
        if not all(np.array_equal(a, b) for a, b in pairs):
            raise TrainingError(
                "a run cannot go on with other normalisation statistics", field="stats", got=f"other {name!r}",
                expected=str(checkpoint / STATS), fix="leave --stats away when resuming, or start another run",
            )  # fmt: skip


def normalised_chunks(variant: Variant, dataset: Any, stats: Any, index: np.ndarray) -> np.ndarray:
    """Action chunks [n h d] as the tokenizer will see them: after robot, delta and normalisation, not padded."""
    from vla.transforms import build_group

    group = build_group(variant, stats=stats, tokenizer=None)
    horizon = variant.spec.action_horizon
    chunks = []
    for i in index:
        done = group.inputs(dataset.sample(int(i), horizon, images=False), until="normalize")
        chunks.append(done["actions"])
    return np.stack(chunks)


def _held_out(config: TrainConfig, dataset: Any) -> int:
    if config.val_episodes and config.val_episodes >= len(dataset.episodes):
        raise DataError(
            "no episode is left to train on",
            field="train.val_episodes",
            got=config.val_episodes,
            expected=f"fewer than the {len(dataset.episodes)} episodes of the dataset",
        )
    return config.val_episodes


def _frames(dataset: Any, episodes: np.ndarray) -> np.ndarray:
    runs = [dataset.episodes[int(e)] for e in episodes]
    return np.concatenate([np.arange(r.start, r.stop) for r in runs]) if runs else np.zeros(0, np.int64)


def fit_tokenizer(
    variant: Variant,
    dataset: Any,
    stats: Any,
    tokenizer: Any,
    index: np.ndarray,
    config: TrainConfig,
    note: Callable[[str], None],
) -> Any:
    """The action tokenizer, fitted on chunks of these frames."""
    chosen = np.sort(generator(config.seed, "sample").permutation(index)[:FIT_CHUNKS])
    name = variant.parts["tokenizer"].part.name
    note(f"the {name} tokenizer is not fitted yet: fitted on {len(chosen)} chunks of the training data")
    return tokenizer.fit(normalised_chunks(variant, dataset, stats, chosen))


def _first_good(dataset: Any, variant: Variant, index: np.ndarray, config: TrainConfig) -> dict[str, Any]:
    """The first raw sample that can be read; without a budget for bad frames that is the first of all."""
    for i in index[:: max(1, len(index) // TRIES)] if config.skip_bad else index[:1]:
        try:
            return dataset.sample(int(i), variant.spec.action_horizon)
        except DataError as error:
            last = unusable(error, int(i), len(dataset))
    raise last


def _probe(variant: Variant, group: Any, raw: dict[str, Any]) -> tuple[str, ...]:
    """Send one real frame all the way: what is missing or misshapen shows here and not in a worker at step 1.

    Gives the cameras it has.
    """
    from vla.transforms import batch

    obs, actions = batch([group.inputs(raw)], variant.spec, variant.parts["backbone"].offers.get("vocab_size"))
    if actions is None:
        raise DataError("the dataset gives no actions", field="actions", fix="choose a dataset of demonstrations")
    want = (1, variant.spec.action_horizon, variant.spec.action_dim)
    if tuple(actions.values.shape) != want:
        raise DataError(
            "the action chunk has the wrong shape", field="actions", got=actions.values.shape, expected=want
        )
    return tuple(obs.images)


def _silent(text: str) -> None:
    """Nothing: a resumed run has been told."""
