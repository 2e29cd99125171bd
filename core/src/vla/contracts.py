"""The contract between data and model: `Spec`, `Observation`, `Actions`, `Sampling`, `DecodeGrammar`.

Importing this module imports no array library. The records hold arrays of numpy, torch or JAX alike.
Axes: b batch, h height, w width, s state_dim, l max_token_len, t action_horizon, d action_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from attrs import evolve, field, fields, frozen

from vla.errors import DataError
from vla.settings import size

Array = Any
Options = TypeVar("Options")
GUARD = 5.0  # how far beyond what was recorded an action may lie, in widths of that range
NORMS = ("quantile", "zscore")
LONG_PROMPTS = ("error", "shorten")
MOST_STEPS = 1000  # of denoising in one sample
MOST_CAMERAS, MOST_PIXELS, MOST_DIMS = 64, 2048, 8192  # ceilings of the shapes, far above any robot


@frozen
class Spec:
    """Shapes at the border between data and model: the `[spec]` table of a variant.

    `state_dim` and `action_dim` are what the model sees, after padding; a robot may have fewer. `norm` is `quantile`
    (1st to 99th percentile onto [-1, 1]; openpi's choice for pi05 and pi0_fast) or `zscore` (its choice for pi0).
    `long_prompt` says what happens to an instruction that is too long for `max_token_len`: `error`, or `shorten` (its
    last words are dropped; the state never is).
    """

    cameras: tuple[str, ...] = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    image_size: tuple[int, int] = size((224, 224), most=MOST_PIXELS)  # height, width
    state_dim: int = size(32, most=MOST_DIMS)
    action_dim: int = size(32, most=MOST_DIMS)
    action_horizon: int = size(50, most=4096)
    max_token_len: int = size(200, most=32_768)
    norm: str = "quantile"
    long_prompt: str = "error"


@frozen
class Observation:
    """What a policy sees. Fields as in openpi's `Observation`; `extra` lets a new head bring inputs of its own."""

    images: Mapping[str, Array]  # camera -> [b h w 3] float32 in [-1, 1], or uint8
    image_masks: Mapping[str, Array]  # camera -> [b] bool; False: this row has no such camera
    state: Array  # [b s] float32, normalised and padded
    tokenized_prompt: Array | None = None  # [b l] int32
    tokenized_prompt_mask: Array | None = None  # [b l] bool; False: padding (always at the end)
    token_ar_mask: Array | None = None  # [b l] int32; 1: the token is a target, 0: it is prompt
    token_loss_mask: Array | None = None  # [b l] bool; True: the token is predicted
    extra: Mapping[str, Array] = field(factory=dict)

    @property
    def batch(self) -> int:
        """Rows in the batch."""
        return self.state.shape[0]


@frozen
class Actions:
    """A chunk of actions. `mask` is True where a step and a dim are real, False where they are padding."""

    values: Array  # [b t d] float32, normalised and padded
    mask: Array | None = None  # [b t d] bool; None: all real
    given: Array | None = None  # [b] int32; in training: so many first steps are shown as they are and not learned


@frozen
class DecodeGrammar:
    """Which token sequences stand for a chunk: what a token head may emit, as tables a device can read.

    A well-formed answer is `prefix`, then action tokens whose `lengths` add up to exactly `total`, then `suffix`.
    FAST: a token stands for one or more DCT coefficients, total = horizon * dim. Binning: every length is 1.
    """

    prefix: tuple[int, ...]  # text ids before the actions, e.g. of "Action: "
    action_ids: Array  # [v] int32: text-vocabulary id of each codec token
    lengths: Array  # [v] int32: values each codec token stands for; 0: never allowed
    total: int
    suffix: tuple[int, ...]  # text ids after the actions, e.g. of "|" and end of text

    @property
    def max_tokens(self) -> int:
        """The longest answer, prefix and suffix included."""
        return len(self.prefix) + self.total + len(self.suffix)

    @property
    def end(self) -> int | None:
        """The id that ends an answer, as the tokenizer says; None: nothing does."""
        return self.suffix[-1] if self.suffix else None


@frozen
class Prefix:
    """What a chunk goes on from: the rest of the previous one (real-time chunking, `vla.rtc`).

    Modes: `guided` pulls the chunk towards it while denoising (arXiv 2506.07339), `inpaint` writes its first steps into
    every level of denoising, `trained` gives them to a head that learned to go on from them (2512.05964), `forced`
    decodes the other tokens behind theirs.
    """

    values: Array  # [b t d] float32, normalised and padded; 0 behind its end
    weights: Array  # [b t] float32: how strongly `guided` holds each step
    delay: Array  # [b] int32: so many first steps are executed whatever the chunk says
    mode: str = "guided"
    limit: float = 5.0  # of the guidance (beta)
    tokens: Array | None = None  # [b n] int32 codec ids of `forced`; -1: free


@frozen
class Sampling:
    """How to sample: the options of one call, passed whole to the head, which reads those that concern it.

    A head's own options are in `extra`, by name, as its part declares them (`Part.sampling`); `vla.sampling.options`
    makes the record from plain values and refuses what no one knows. In JAX plain values are compiled in, arrays not.
    """

    num_steps: int | None = None  # of denoising; None: the head's setting
    temperature: float = 0.0  # of token sampling; 0 is greedy
    grammar: DecodeGrammar | None = None  # which token sequences stand for a chunk (token heads)
    action_dim_mask: Array | None = None  # [d] bool, the action dims that the robot has; None: all
    prefix: Prefix | None = None  # what the chunk goes on from
    extra: Mapping[str, Any] = field(factory=dict)

    @property
    def trained(self) -> bool:
        """Whether the first steps are given to a head that learned it: each action has a level of its own."""
        return self.prefix is not None and self.prefix.mode == "trained"

    def read(self, declared: type[Options]) -> Options:
        """A head's own options as the record that its part declares; those not given have their default."""
        return declared(**{a.name: self.extra[a.name] for a in fields(declared) if a.name in self.extra})  # type: ignore[arg-type]


DEFAULT_SAMPLING = Sampling()


def observation_from(batch: Mapping[str, Any]) -> Observation:
    """The record from a batched model-input dict (keys are the field names; other keys are ignored)."""
    for key in ("images", "state"):
        if key not in batch:
            raise DataError("the model input is incomplete", field=key, got=sorted(batch), fix=f"provide {key!r}")
    names = ("tokenized_prompt", "tokenized_prompt_mask", "token_ar_mask", "token_loss_mask")
    return Observation(
        images=dict(batch["images"]),
        image_masks=dict(batch["image_masks"]),
        state=batch["state"],
        extra=dict(batch.get("extra", {})),
        **{name: batch.get(name) for name in names},
    )


def drop_absent_cameras(obs: Observation) -> Observation:
    """The same observation without the cameras that no row has (host-side arrays: reads the masks).

    An absent camera then costs nothing. The result of the model is unchanged: masked tokens take no position and
    nobody sees them.
    """
    seen = [name for name, mask in obs.image_masks.items() if bool(mask.any())]
    return evolve(obs, images={n: obs.images[n] for n in seen}, image_masks={n: obs.image_masks[n] for n in seen})


def trim_prompt(obs: Observation, multiple: int = 16) -> Observation:
    """The same observation with the prompt cut to the longest row, rounded up to `multiple` (few compiled shapes)."""
    if obs.tokenized_prompt is None or obs.tokenized_prompt_mask is None:
        return obs
    longest = int(obs.tokenized_prompt_mask.sum(-1).max())
    keep = min(obs.tokenized_prompt.shape[1], max(1, -(-longest // multiple)) * multiple)

    def cut(a: Array) -> Array:
        return None if a is None else a[:, :keep]

    return evolve(
        obs,
        tokenized_prompt=cut(obs.tokenized_prompt),
        tokenized_prompt_mask=cut(obs.tokenized_prompt_mask),
        token_ar_mask=cut(obs.token_ar_mask),
        token_loss_mask=cut(obs.token_loss_mask),
    )


def pack(obs: Observation) -> Observation:
    """What a caller does on the host before the device: nothing absent or padded is computed.

    Drops absent cameras, trims the prompt, and lists the positions with a target, so that logits are computed there
    alone: `extra["target_index"]` [b k] int32 (the token at index + 1 is predicted) and `extra["target_valid"]` [b k].
    Needs numpy arrays (it reads the masks).
    """
    import numpy as np

    obs = trim_prompt(drop_absent_cameras(obs))
    if obs.token_loss_mask is None:
        return obs
    wanted = np.asarray(obs.token_loss_mask)[:, 1:]
    most = -(-max(1, int(wanted.sum(-1).max())) // 16) * 16
    index = np.argsort(~wanted, axis=-1, kind="stable")[:, :most].astype(np.int32)
    valid = np.take_along_axis(wanted, index, axis=-1)
    return evolve(obs, extra={**obs.extra, "target_index": index, "target_valid": valid})


def check_observation(obs: Observation, spec: Spec, vocab_size: int | None = None) -> None:
    """Refuse an observation that the model would misread. Call it on the host, on numpy arrays.

    Raises:
        DataError: a camera is unknown or there is none, an image, the state or the prompt has a wrong shape, a value is
            not finite, or a token id is beyond the vocabulary. The message names field, value and expectation.
    """
    import numpy as np

    b = obs.batch
    if unknown := set(obs.images) - set(spec.cameras):
        raise DataError(
            "an image of a camera that this policy does not know",
            field="images",
            got=sorted(unknown),
            expected=f"any of {list(spec.cameras)}",
            fix="rename the camera in the robot adapter, or build with --set spec.cameras=[...]",
        )
    if not obs.images:
        raise DataError("the observation has no camera image", field="images", expected=f"one of {list(spec.cameras)}")
    for name, image in obs.images.items():
        want = (b, *spec.image_size, 3)
        if tuple(image.shape) != want:
            raise DataError(
                "an image has the wrong shape",
                field=f"images[{name!r}]",
                got=tuple(image.shape),
                expected=want,
                fix="resize to spec.image_size, height x width x RGB",
            )
        if image.dtype != np.uint8 and not np.isfinite(image).all():
            raise DataError("an image has NaN or infinite values", field=f"images[{name!r}]", fix="drop this frame")
        if name not in obs.image_masks or tuple(obs.image_masks[name].shape) != (b,):
            raise DataError("an image lacks its mask", field=f"image_masks[{name!r}]", expected=(b,))
    if tuple(obs.state.shape) != (b, spec.state_dim):
        raise DataError(
            "the state has the wrong width",
            field="state",
            got=tuple(obs.state.shape),
            expected=(b, spec.state_dim),
            fix="pad the state, or build with --set spec.state_dim=N",
        )
    if not np.isfinite(obs.state).all():
        bad = np.argwhere(~np.isfinite(np.asarray(obs.state)))[0]
        raise DataError(
            "the state has NaN or infinite values",
            field=f"state[{bad[0]}, {bad[1]}]",
            got=float(obs.state[tuple(bad)]),
            fix="check the sensor or drop this frame",
        )
    if obs.tokenized_prompt is not None:
        ids = np.asarray(obs.tokenized_prompt)
        if obs.tokenized_prompt_mask is None or obs.tokenized_prompt_mask.shape != ids.shape:
            raise DataError("the prompt lacks its mask", field="tokenized_prompt_mask", expected=ids.shape)
        if ids.size and (ids.min() < 0 or (vocab_size is not None and ids.max() >= vocab_size)):
            bad_id = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise DataError(
                "a token id is outside the vocabulary",
                field="tokenized_prompt",
                got=bad_id,
                expected=f"0 .. {(vocab_size or 0) - 1}",
                fix="the tokenizer and the backbone must share one vocabulary (backbone.llm.vocab_size)",
            )
