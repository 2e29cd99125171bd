"""Random batches of a variant's shapes, in numpy, for tests, parity checks and benchmarks."""

from __future__ import annotations

from typing import Any

import numpy as np

from vla.contracts import Actions, Observation
from vla.draws import sampling_noise, training_draws


def random_batch(
    variant: Any, batch: int = 2, seed: int = 0, *, targets: bool | None = None
) -> tuple[Observation, Actions, dict[str, Any], np.ndarray | None]:
    """A made-up batch: observation, actions, training draws, sampling noise.

    Prompts differ in length and end in padding. With `targets` (default: if the layout has that role) the last third
    of each prompt's tokens are targets. The last camera is absent in the last row, and one step of one chunk and one
    dim of all chunks are padding.
    """
    rng = np.random.default_rng(seed)
    spec = variant.spec
    vocab = variant.parts["backbone"].offers["vocab_size"]
    if targets is None:
        targets = "target" in variant.layout().roles
    length = np.linspace(spec.max_token_len // 2, spec.max_token_len - 2, batch).astype(int)
    at = np.arange(spec.max_token_len)
    valid = at < length[:, None]
    is_target = (at >= (length * 2 // 3)[:, None]) & valid & targets
    masks = {name: np.ones(batch, bool) for name in spec.cameras}
    if len(spec.cameras) > 1 and batch > 1:
        masks[spec.cameras[-1]][-1] = False
    obs = Observation(
        images={name: rng.uniform(-1, 1, (batch, *spec.image_size, 3)).astype(np.float32) for name in spec.cameras},
        image_masks=masks,
        state=rng.uniform(-1, 1, (batch, spec.state_dim)).astype(np.float32),
        tokenized_prompt=np.where(valid, rng.integers(3, vocab, (batch, spec.max_token_len)), 0).astype(np.int32),
        tokenized_prompt_mask=valid,
        token_ar_mask=is_target.astype(np.int32) if targets else None,
        token_loss_mask=is_target if targets else None,
    )
    mask = np.ones((batch, spec.action_horizon, spec.action_dim), bool)
    mask[-1, -1] = False
    mask[:, :, -1] = False
    actions = Actions(rng.uniform(-1, 1, mask.shape).astype(np.float32), mask)
    head = variant.parts["head"]
    return obs, actions, training_draws(head, spec, batch, rng), sampling_noise(head, spec, batch, rng)
