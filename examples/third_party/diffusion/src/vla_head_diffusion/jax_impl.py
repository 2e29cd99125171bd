"""Diffusion over action chunks in JAX. Mirror of `torch_impl.py`.

Axes: B batch, H horizon, A action dims, W width of the action expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax import Array, lax
from jax import numpy as jnp

from vla.contracts import Actions, Observation, Spec
from vla.jax_kit.model import Entry, Tokens
from vla.jax_kit.ops import Linear, time_embedding
from vla_head_diffusion.config import Settings, ddim_steps, kept


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
        mask = entry.notes["mask"]
        if mask is None:
            return {"actions": error.mean((1, 2))}
        real = mask.astype(error.dtype)
        return {"actions": (error * real).sum((1, 2)) / jnp.maximum(real.sum((1, 2)), 1)}

    def tokens(self, x: Array, valid: Array) -> tuple[Tokens, ...]:
        """Noisy actions [B H A] as tokens of the action expert."""
        return (Tokens(("action",), "action", self.noisy_proj(x), valid),)

    def condition(self, step: Array) -> Array:
        """The condition [B W] of the expert's norms from the step [B]."""
        t = time_embedding(step.astype(jnp.float32) / self.settings.train_steps, self.settings.width, 4e-3, 4.0)
        return jax.nn.silu(self.step_mlp_out(jax.nn.silu(self.step_mlp_in(t))))

    def sample(
        self,
        model: Any,
        obs: Observation,
        noise: Array,
        *,
        num_steps: int | None = None,
        grammar: object = None,
        temperature: float = 0.0,
        real_dims: Array | None = None,
    ) -> dict[str, Array]:
        """DDIM from noise [B H A] over the cached prefix: {"actions": [B H A]} float32, normalised.

        The noise in padded dims is known, so they go where training left them: to 0.
        """
        s = self.settings
        plan = ddim_steps(s.train_steps, num_steps or s.num_steps)
        ks, here, there = (jnp.array(column) for column in zip(*plan, strict=True))
        valid = jnp.ones(noise.shape[:2], bool)
        cache = model.prefill(model.embed(obs))
        look = model.look(cache, self.tokens(noise, valid))
        cache = model.room(cache, look[0].shape[1])
        llm = model.backbone.llm
        styles = llm.styles("action", self.condition(ks))

        def step(i: Array, x: Array) -> Array:
            now = {"action": llm.style_at(styles, i)}
            hidden, _ = model.extend(cache, self.tokens(x, valid), look, now)
            e = self.noise_proj(hidden["action"]).astype(jnp.float32)
            e = e if real_dims is None else jnp.where(real_dims, e, noise)
            clean = jnp.clip((x - jnp.sqrt(1 - here[i]) * e) / jnp.sqrt(here[i]), -s.clip, s.clip)
            return jnp.sqrt(there[i]) * clean + jnp.sqrt(1 - there[i]) * e

        return {"actions": lax.fori_loop(0, len(plan), step, noise)}
