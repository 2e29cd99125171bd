"""A model directory opened for inference: what a robot saw goes in, a chunk of actions in the robot's units comes out.

    policy = vla.open("runs/demo/model")
    chunk = policy.infer({"images": {...}, "state": ..., "prompt": "touch the red block"})["actions"]   # [t a]

Every observation is checked before the model sees it, and no chunk with NaN or infinite values, or far beyond what was
recorded, is ever returned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from attrs import evolve

from vla.compose import build
from vla.contracts import GUARD, Observation, Prefix
from vla.draws import sampling_noise
from vla.embodiment import Embodiment
from vla.errors import ActionError, DataError, SettingsError
from vla.rtc import check_prefix, forced, prefix_of, refusal, trained_delay
from vla.sampling import for_model, options
from vla.store import ModelDir, not_finite, open_model
from vla.transforms.group import as_array
from vla.transforms.text import as_text

FRAMEWORKS = ("torch", "jax")
_LABELS = ("actions", "actions_is_pad")  # of a dataset's sample: the answer, which a policy must not see


class Acts(Protocol):
    """What evaluation and serving need of a policy; baselines and remote policies are such too."""

    name: str

    def infer_batch(
        self, rows: Sequence[Mapping[str, Any]], *, seeds: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """One {"actions": [t a], ...} per observation; the same observations and seeds give the same chunks."""
        ...

    def reset(self) -> None:
        """Forget earlier calls."""
        ...


class Policy:
    """Inference with one model; made by `open`.

    Args:
        model: the opened model directory.
        runner: the model in a framework (`vla.torch_kit.runner`, `vla.jax_kit.runner`).
        seed: what noise follows from when a call gives neither noise nor seeds.
        default_prompt: the instruction for observations that have none.
        sampling: options by name, for every call: `num_steps`, `temperature`, and the head's own.
        guard: a chunk with an action further beyond the recorded range (1st to 99th percentile) than this many times
            its width is refused; None: none is. `refused` counts the chunks that were not returned.
    """

    def __init__(
        self,
        model: ModelDir,
        runner: Any,
        *,
        seed: int = 0,
        default_prompt: str | None = None,
        sampling: Mapping[str, Any] | None = None,
        guard: float | None = GUARD,
    ):
        from vla.transforms import build_group

        self.model, self.runner, self.variant = model, runner, model.variant
        self.name = self.variant.name
        self.seed = seed
        self._options = {"default_prompt": default_prompt, "sampling": sampling, "guard": guard}
        self.group = build_group(
            self.variant, stats=model.stats, tokenizer=model.tokenizer, default_prompt=default_prompt, guard=guard
        )
        self.refused = 0
        self.broken: list[str] = []  # weights with NaN or infinite values: no answer is one
        self._calls = 0
        always = for_model(self.variant, self.group.codec_dim, model.tokenizer)
        self.sampling = options(self.variant.parts["head"], sampling or {}, always)

    def __repr__(self) -> str:
        where = f", {self.model.folder}" if self.model.folder != Path() else ""
        return f"<Policy {self.name!r}: {self.framework}{where}>"

    @property
    def framework(self) -> str:
        """The framework it runs in."""
        return "torch" if ".torch_kit." in type(self.runner).__module__ else "jax"

    def __reduce__(self) -> tuple[Any, ...]:
        """With its weights, so that it opens where the folder is not; on the accelerator of that place, if any."""
        model = evolve(self.model, reader=None)
        state = {"seed": self.seed, "name": self.name, "_calls": self._calls, "refused": self.refused}
        precision = getattr(self.runner, "precision", "float32")
        return _unpickled, (model, self.runner.weights(), self.framework, precision, self._options, state)

    @property
    def metadata(self) -> dict[str, Any]:
        """Plain facts about the policy: name, parts, shapes, and the digest that identifies its weights."""
        spec = self.variant.spec
        return {
            "name": self.name,
            "parts": {path: chosen.part.name for path, chosen in self.variant.walk()},
            "cameras": list(spec.cameras),
            "action_horizon": spec.action_horizon,
            "digest": self.model.digest,
            "record": dict(self.model.record),
        }

    @property
    def embodiment(self) -> Embodiment:
        """The robot as the data named it that the policy was trained on; empty where the record does not say."""
        return Embodiment.from_table(self.model.record.get("embodiment"))

    def reset(self, seed: int | None = None) -> None:
        """Start the stream of noise anew."""
        self.seed, self._calls = self.seed if seed is None else seed, 0

    def infer(
        self,
        obs: Mapping[str, Any],
        *,
        noise: np.ndarray | None = None,
        seed: int | None = None,
        sampling: Mapping[str, Any] | None = None,
        prefix: np.ndarray | None = None,
        delay: int = 0,
        rtc: str = "",
    ) -> dict[str, Any]:
        """A chunk for one observation; see `infer_batch`. noise: [t d] of the model; prefix: [p a] of the robot."""
        rows = None if noise is None else as_array(noise, "noise", numbers=True)[None]
        return self.infer_batch([obs], noise=rows, seeds=None if seed is None else [seed], sampling=sampling,
                                prefixes=[prefix], delays=[delay], rtc=rtc)[0]  # fmt: skip

    def infer_batch(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        noise: np.ndarray | None = None,
        seeds: Sequence[int] | None = None,
        sampling: Mapping[str, Any] | None = None,
        prefixes: Sequence[np.ndarray | None] | None = None,
        delays: Sequence[int] | None = None,
        rtc: str = "",
    ) -> list[dict[str, Any]]:
        """Chunks for several observations at once (one forward pass).

        Args:
            rows: observations in the robot's own names and units: `{"images": {camera: uint8 [h w 3]}, "state": [s],
                "prompt": str}`. Recorded actions in them are ignored.
            noise: what sampling starts from, [b t d] normalised; wins over `seeds`.
            seeds: one number per row from which its noise follows, whatever the other rows are.
            sampling: options of this call by name, over those of the policy.
            prefixes: real-time chunking (docs/rtc.md): per row the rest of the previous chunk [p a], in the robot's
                units and from the step of this observation on, or None; the new chunk goes on from it.
            delays: per row how many of those steps will be executed before the new chunk arrives.
            rtc: `guided`, `trained`, `inpaint` or `forced`; default: the first of `trained`, `guided`, `forced` that
                this model can do.

        Returns:
            Per row: "actions" float64 [t a] in the robot's units; "tokens" [n] of token heads; "policy_timing" with
            `infer_ms` (the model, for the whole batch) and `total_ms`.

        Raises:
            DataError: an observation lacks a camera, has a state of another width, values that are not finite, or no
                instruction.
            ActionError: the model's weights, its logits or its chunk have NaN or infinite values, or the chunk lies
                further beyond what was recorded than the guard allows.
            DecodeError: the model's tokens stand for no chunk.
        """
        if isinstance(rows, Mapping) or not isinstance(rows, Sequence):
            raise DataError("a batch is a list of observations", field="rows", got=type(rows).__name__)
        if not rows:
            return []
        if self.broken:  # not left to the results: a fused attention kernel takes a row of NaN for an empty one
            self.refused += len(rows)
            raise ActionError(
                "the model's weights have NaN or infinite values; it gives no actions",
                field=self.broken[0],
                got=f"NaN or infinite values in {len(self.broken)} arrays",
                fix="open an earlier checkpoint, RUN@STEP",
            )
        check_seed(self.seed, "seed")
        began = time.perf_counter()
        chosen = options(self.variant.parts["head"], sampling, self.sampling) if sampling else self.sampling
        if prefixes is not None and any(prefix is not None for prefix in prefixes):
            chosen = evolve(chosen, prefix=self._prefix(rows, prefixes, delays, rtc))
        inputs = [self._input(row) for row in rows]
        obs = self._observation(inputs)
        start = self._noise(len(rows), noise, seeds)
        ready = time.perf_counter()
        out = self.runner.sample(obs, start, chosen)
        done = time.perf_counter()
        try:
            answers = [self._answer(out, i, np.asarray(obs.state)[i]) for i in range(len(rows))]
        except ActionError:
            self.refused += 1
            raise
        total = (time.perf_counter() - began) * 1e3
        for answer in answers:
            answer["policy_timing"] = {"infer_ms": (done - ready) * 1e3, "total_ms": total}
        return answers

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _input(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(row, Mapping):
            raise DataError("an observation is a dict", field="observation", got=type(row).__name__, expected="dict")
        done = self.group.inputs({k: v for k, v in row.items() if k not in _LABELS})
        needed = self.model.record.get("cameras", [])
        if lacking := [name for name in needed if name not in done["images"]]:
            raise DataError(
                "the observation lacks a camera that this policy was trained with",
                field="images",
                got=sorted(row["images"]) if isinstance(row.get("images"), Mapping) else sorted(row),
                expected=f"what the robot adapter {self.variant.parts['robot'].part.name!r} turns into {lacking}",
                fix="send every camera in every observation",
            )
        return done

    def _prefix(
        self, rows: Sequence[Mapping[str, Any]], prefixes: Sequence[Any], delays: Sequence[Any] | None, mode: str
    ) -> Prefix:
        """What the chunks go on from, as the model sees actions: through the robot's adapter, relative, normalised."""
        delays = [0] * len(rows) if delays is None else delays
        counted = [len(given) if hasattr(given, "__len__") else repr(given) for given in (prefixes, delays)]
        if counted != [len(rows)] * 2:
            raise DataError("one prefix and one delay per observation", field="prefixes, delays",
                            got=f"{counted[0]}, {counted[1]}", expected=len(rows))  # fmt: skip
        spec, chunks, counts = self.variant.spec, [], []
        for row, prefix, delay in zip(rows, prefixes, delays, strict=True):
            if prefix is None:
                chunks.append(None)
                counts.append(0)
                continue
            values, count = check_prefix(prefix, delay, self.group.codec_dim)
            seen = {k: v for k, v in row.items() if k not in _LABELS}
            chunks.append(self.group.inputs({**seen, "actions": values}, until="normalize")["actions"])
            counts.append(count)
        mode = self._mode(mode, max(counts))
        for chunk, count in zip(chunks, counts, strict=True):
            if chunk is not None and (
                why := refusal(mode, count, len(chunk), spec.action_horizon, trained_delay(self.model.record))
            ):
                raise DataError("a chunk cannot go on from this prefix", field="delay", got=count, fix=why)
        if mode == "forced":
            return forced(self.model.tokenizer, chunks, counts, spec)
        dim = spec.action_dim
        padded = [None if c is None else np.pad(c, ((0, 0), (0, dim - c.shape[1]))) for c in chunks]
        return prefix_of(padded, counts, (spec.action_horizon, dim), mode)

    @property
    def chunking(self) -> tuple[str, ...]:
        """The ways of real-time chunking that `infer` can do: the head's, `trained` only where it was trained."""
        can = self.variant.parts["head"].offers.get("chunking", ())
        return tuple(m for m in can if m != "trained" or trained_delay(self.model.record))

    def _mode(self, mode: str, delay: int) -> str:
        """The mode asked for, or the best that the head has."""
        can, usable = self.variant.parts["head"].offers.get("chunking", ()), self.chunking
        trained = trained_delay(self.model.record)
        if not mode:
            best = [m for m in ("trained", "guided", "forced") if m in usable]
            mode = next((m for m in best if m != "trained" or delay <= trained), "")
        if mode not in usable:
            others = "train with --rtc.max-delay" if mode == "trained" and mode in can else "play chunks with rtc=blend"
            raise SettingsError("this policy's chunks cannot go on from a prefix in this way", field="rtc",
                                got=mode or None, expected=usable, fix=others)  # fmt: skip
        return mode

    def _observation(self, inputs: list[dict[str, Any]]) -> Observation:
        from vla.transforms import batch

        return batch(inputs, self.variant.spec, self.variant.parts["backbone"].offers.get("vocab_size"))[0]

    def _noise(self, batch: int, noise: np.ndarray | None, seeds: Sequence[int] | None) -> np.ndarray | None:
        head, spec = self.variant.parts["head"], self.variant.spec
        if noise is None and seeds is None:
            self._calls += 1
            return sampling_noise(head, spec, batch, np.random.default_rng([self.seed, self._calls]))
        if noise is None:
            assert seeds is not None
            if isinstance(seeds, str | bytes) or not hasattr(seeds, "__len__") or len(seeds) != batch:
                raise DataError("one seed per observation", field="seeds", got=seeds, expected=f"{batch} numbers")
            checked = [check_seed(s, f"seeds[{i}]") for i, s in enumerate(seeds)]
            drawn = [sampling_noise(head, spec, 1, np.random.default_rng(s)) for s in checked]
            return None if drawn[0] is None else np.concatenate(drawn)
        usual = sampling_noise(head, spec, batch, np.random.default_rng(0))
        noise = as_array(noise, "noise", numbers=True).astype(np.float32)
        if usual is None or noise.shape != usual.shape:
            want = "none: this head draws nothing" if usual is None else usual.shape
            raise DataError("the noise has the wrong shape", field="noise", got=noise.shape, expected=want)
        if not np.isfinite(noise).all():
            raise DataError("the noise has NaN or infinite values", field="noise")
        return noise

    def _answer(self, out: Mapping[str, np.ndarray], row: int, state: np.ndarray) -> dict[str, Any]:
        mine = {k: v[row] for k, v in out.items() if k in ("actions", "tokens")}
        if "finite" in out and not out["finite"][row]:
            raise ActionError(
                "the model's logits have NaN or infinite values, and its tokens are no answer; they are not returned",
                field=f"tokens[{row}]",
                got=mine["tokens"][:8].tolist(),
                fix="use precision float32, or an earlier checkpoint",
            )
        if "actions" in mine and not np.isfinite(mine["actions"]).all():
            at = np.argwhere(~np.isfinite(mine["actions"]))[0]
            raise ActionError(
                "the model produced a chunk with NaN or infinite values; it is not returned",
                field=f"actions[{row}, {at[0]}, {at[1]}]",
                got=float(mine["actions"][tuple(at)]),
                fix="use precision float32, or an earlier checkpoint",
            )
        done = self.group.outputs({**mine, "state": state})
        actions = np.asarray(done["actions"], np.float64)
        if not np.isfinite(actions).all():
            raise ActionError(
                "the chunk has NaN or infinite values in the robot's units; it is not returned",
                field=f"actions[{row}]",
                fix="look at norm_stats.json: a range may be infinite",
            )
        return {"actions": actions, **({"tokens": mine["tokens"]} if "tokens" in mine else {})}


def open(
    folder: str | Path,
    framework: str = "torch",
    *,
    device: str | None = None,
    precision: str = "float32",
    seed: int = 0,
    default_prompt: str | None = None,
    num_steps: int | None = None,
    temperature: float = 0.0,
    sampling: Mapping[str, Any] | None = None,
    guard: float | None = GUARD,
    verify: bool = True,
    robot: Mapping[str, Any] | None = None,
) -> Policy:
    """Open a model directory for inference.

    Args:
        folder: the model directory; a training run stands for its model, `RUN@STEP` for one of its checkpoints.
        framework: "torch" or "jax"; the weights serve both.
        device: e.g. "cpu", "cuda"; default: an accelerator when there is one.
        precision: "float32" or "bfloat16" (compute; weights stay float32).
        seed, default_prompt, guard: see `Policy`.
        num_steps: denoising steps of chunk heads; default: the head's setting.
        temperature: of token heads; 0 is greedy.
        sampling: these and the head's own options by name, for every call.
        verify: check the digest of every file first.
        robot: settings of the robot adapter that win over the model's, e.g. {"cameras": ["base_0_rgb=top"]}.

    Raises:
        StoreError: the directory is damaged or the weights are not those of the variant.
        PartError: a part is not installed; the message names the distribution.
        SettingsError: a framework that is unknown, not installed, or that a part does not run in.
    """
    model = open_model(folder, verify=verify)
    if robot:
        model = evolve(model, variant=with_robot(model.variant, robot))
    named = {} if num_steps is None else {"num_steps": num_steps}
    if temperature != 0 or "temperature" not in (sampling or {}):
        named["temperature"] = temperature
    if twice := sorted(named.keys() & (sampling or {}).keys()):
        raise SettingsError("an option of sampling is given twice", field=twice[0], fix="give it once")
    options = {"default_prompt": default_prompt, "guard": guard, "sampling": {**(sampling or {}), **named}}
    return _policy(model, model.read, framework, device, precision, seed=seed, **options)


def with_robot(variant: Any, settings: Mapping[str, Any]) -> Any:
    """The variant with other settings of its robot adapter.

    Raises:
        SettingsError, PartError: the adapter does not take them.
    """
    sets = {f"robot.{name}": value for name, value in settings.items()}
    return build(base=variant, set=sets, name=variant.name) if sets else variant


def untrained(
    variant: Any, stats: Any, tokenizer: Any, framework: str = "torch", *, seed: int = 0, device: str | None = None
) -> Policy:
    """A policy with fresh weights: what training has to beat."""
    model = ModelDir(Path(), variant, Path(), stats, tokenizer, {}, "untrained")
    policy = _policy(model, lambda: None, framework, device, "float32", seed=seed, guard=None)
    policy.name = f"{policy.name} (untrained)"
    return policy


def _unpickled(
    model: ModelDir, weights: Mapping[str, np.ndarray], framework: str, precision: str, options: Mapping[str, Any],
    state: Mapping[str, Any],
) -> Policy:  # fmt: skip
    policy = _policy(model, lambda: weights, framework, None, precision, seed=state["seed"], **options)
    for name, value in state.items():
        setattr(policy, name, value)
    return policy


def _policy(
    model: ModelDir, read: Callable[[], Mapping[str, np.ndarray] | None], framework: str, device: str | None,
    precision: str, *, sampling: Mapping[str, Any] | None = None, **others: Any,
) -> Policy:  # fmt: skip
    if framework not in FRAMEWORKS:
        raise SettingsError("unknown framework", field="framework", got=framework, expected=list(FRAMEWORKS))
    if precision not in ("float32", "bfloat16"):
        raise SettingsError("unknown precision", field="precision", got=precision, expected=["float32", "bfloat16"])
    check_options(**others)
    options(model.variant.parts["head"], sampling or {})  # refused before weights are read
    if framework not in model.variant.frameworks():
        lacking = [p for p, c in model.variant.walk() if c.part.frameworks() and framework not in c.part.frameworks()]
        raise SettingsError(
            f"not every part of this variant runs in {framework}", field="framework", got=lacking,
            expected=list(model.variant.frameworks()),
        )  # fmt: skip
    try:
        if framework == "torch":
            from vla.torch_kit.runner import load
        else:
            from vla.jax_kit.runner import load
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("torch", "jax", "flax"):
            raise
        raise SettingsError(
            f"{framework} is not installed",
            field="framework",
            got=error.name,
            fix=f"pip install 'vla-core[{framework}]'",
        ) from error
    source, weights = str(model.weights), read()
    runner = load(model.variant, weights, device=device, precision=precision, seed=others["seed"], source=source)
    policy = Policy(model, runner, sampling=sampling, **others)
    policy.broken = not_finite(weights or {})
    return policy


def check_options(
    *,
    seed: Any = 0,
    default_prompt: Any = None,
    guard: Any = None,
) -> None:
    """Refuse options of a policy that mean nothing.

    Raises:
        SettingsError: naming the option, its value and what it may be.
    """
    check_seed(seed, "seed")
    number = isinstance(guard, int | float | np.number) and not isinstance(guard, bool)
    if guard is not None and (not number or not 0 <= guard < np.inf):
        raise SettingsError("no such guard", field="guard", got=guard, expected="a number of spans >= 0, or None")
    if default_prompt is not None:
        try:
            as_text(default_prompt)
        except DataError as error:
            raise SettingsError(error.what, field="default_prompt", got=ascii(default_prompt)[:60]) from error


def check_seed(seed: Any, field: str) -> int:
    """A seed as an int.

    Raises:
        SettingsError: it is no whole number, or negative.
    """
    if not _is_whole(seed) or seed < 0:
        raise SettingsError("a seed is a whole number", field=field, got=repr(seed), expected=">= 0")
    return int(seed)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
