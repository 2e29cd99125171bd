"""Diffusion over action chunks in JAX. Mirror of `torch_impl.py`.

Axes: B batch, H horizon, A action dims, W width of the action expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax import Array
from jax import numpy as jnp

from vla.contracts import Actions, Observation, Sampling, Spec
from vla.jax_kit.model import Decoder, Entry, Tokens
from vla.jax_kit.ops import Linear, masked_mean, time_embedding
from vla_head_diffusion.config import Options, Settings, ddim_steps, kept, levels


class DiffusionHead(nnx.Module):
    """Projections into and out of the action expert, and the embedding of the step."""

    def __init__(
        self, settings: Settings, spec: Spec, backbone: Mapping[str, Any], inner: Mapping[str, Any], *, rngs: nnx.Rngs
    ):
        s = self.settings = settings
        self.spec = spec
        self.noisy_proj = Linear(spec.action_dim, s.width, rngs=rngs)
        self.noise_proj = Linear(s.width, spec.action_dim, rngs=rngs)
        self.step_mlp_in = Linear(s.width, s.width, rngs=rngs)
        self.step_mlp_out = Linear(s.width, s.width, rngs=rngs)

    def weights(self) -> dict[str, float]:
        """Loss name -> weight."""
        return {"actions": 1.0}

    def enter(self, obs: Observation, actions: Actions, draws: Mapping[str, Array]) -> Entry:
        """Actions with noise as tokens. draws: noise [B H A], step [B]."""
        noise, step = draws["noise"], draws["step"]
        values, mask = actions.values, actions.mask
        if mask is not None:
            values = jnp.where(mask, values, 0)
        left = jnp.array(kept(self.settings.train_steps), jnp.float32)[step][:, None, None]
        x = jnp.sqrt(left) * values + jnp.sqrt(1 - left) * noise
        # No real step looks at a padded one.
        valid = jnp.ones(x.shape[:2], bool) if mask is None else mask.any(-1)
        return Entry(
            tokens=self.tokens(x, valid),
            cond={"action": self.condition(step)},
            outputs=("action",),
            notes={"noise": noise, "mask": mask},
        )

    def losses(self, model: Any, hidden: Mapping[str, Array], entry: Entry) -> dict[str, Array]:
        """{"actions": [B]}: the squared error of the noise over real steps and dims."""
        error = jnp.square(self.noise_proj(hidden["action"]).astype(jnp.float32) - entry.notes["noise"])  # [B H A]
        return {"actions": masked_mean(error, entry.notes["mask"])}

    def tokens(self, x: Array, valid: Array) -> tuple[Tokens, ...]:
        """Noisy actions [B H A] as tokens of the action expert."""
        return (Tokens(("action",), "action", self.noisy_proj(x), valid),)

    def condition(self, step: Array) -> Array:
        """The condition [B W] of the expert's norms from the step [B]."""
        t = time_embedding(step.astype(jnp.float32) / self.settings.train_steps, self.settings.width, 4e-3, 4.0)
        return jax.nn.silu(self.step_mlp_out(jax.nn.silu(self.step_mlp_in(t))))

    def sample(self, model: Any, obs: Observation, noise: Array, sampling: Sampling) -> dict[str, Array]:
        """DDIM from noise [B H A] over the cached prefix: {"actions": [B H A]} float32, normalised.

        The noise in padded dims is known, so they go where training left them: to 0.
        """
        s, real = self.settings, sampling.action_dim_mask
        noise = noise * sampling.read(Options).noise_scale
        plan = ddim_steps(s.train_steps, sampling.num_steps or s.num_steps)
        ks, here, there = (jnp.array(column) for column in zip(*plan, strict=True))
        valid = jnp.ones(noise.shape[:2], bool)

        def step(decode: Decoder, x: Array, i: Array) -> tuple[Array, Array]:
            e = self.noise_proj(decode(self.tokens(x, valid), i)["action"]).astype(jnp.float32)
            e = e if real is None else jnp.where(real, e, noise)
            clean = jnp.clip((x - jnp.sqrt(1 - here[i]) * e) / jnp.sqrt(here[i]), -s.clip, s.clip)
            return jnp.sqrt(there[i]) * clean + jnp.sqrt(1 - there[i]) * e, clean

        decode = model.decoder(obs, self.tokens(noise, valid), cond={"action": self.condition(ks)})
        return {"actions": decode.denoise(step, *levels(plan), noise, sampling.prefix)}
