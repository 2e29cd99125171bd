"""L1 regression from action queries in the backbone, in JAX. Mirror of `torch_impl.py`.

Axes: B batch, H horizon, A action dims, Q queries (H or H A), D width of the backbone, W hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax import Array
from jax import numpy as jnp

from vla.contracts import Actions, Observation, Sampling, Spec
from vla.jax_kit.model import Entry, Tokens
from vla.jax_kit.ops import Linear, layer_norm, masked_mean
from vla.layout import BACKBONE
from vla_head_l1.config import Settings, queries_per_step


class Block(nnx.Module):
    """LayerNorm, one layer with ReLU, residual (OFT's MLPResNet)."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm = layer_norm(width, rngs)
        self.fc = Linear(width, width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[... W] -> [... W]."""
        return x + jax.nn.relu(self.fc(self.norm(x)))


class L1Head(nnx.Module):
    """Queries, and the MLP that reads actions off them."""

    def __init__(
        self, settings: Settings, spec: Spec, backbone: Mapping[str, Any], inner: Mapping[str, Any], *, rngs: nnx.Rngs
    ):
        s, width = settings, backbone["width"]
        self.settings, self.spec = settings, spec
        self.per_step = queries_per_step(s, spec)
        shape = (spec.action_horizon * self.per_step, width)
        self.queries = nnx.Param(jax.random.normal(rngs.params(), shape) * width**-0.5)
        if s.state == "continuous":
            self.state_proj = Linear(spec.state_dim, width, rngs=rngs)
        self.norm_in = layer_norm(self.per_step * width, rngs)
        self.fc_in = Linear(self.per_step * width, s.hidden, rngs=rngs)
        self.blocks = nnx.List([Block(s.hidden, rngs=rngs) for _ in range(s.blocks)])
        self.norm_out = layer_norm(s.hidden, rngs)
        self.fc_out = Linear(s.hidden, spec.action_dim, rngs=rngs)

    def weights(self) -> dict[str, float]:
        """Loss name -> weight."""
        return {"actions": 1.0}

    def enter(self, obs: Observation, actions: Actions, draws: Mapping[str, Array]) -> Entry:
        """The queries; nothing of the actions goes in."""
        return Entry(tokens=self.tokens(obs), notes={"values": actions.values, "mask": actions.mask})

    def losses(self, model: Any, hidden: Mapping[str, Array], entry: Entry) -> dict[str, Array]:
        """{"actions": [B]}: mean absolute error over real steps and dims."""
        error = jnp.abs(self.actions(hidden["query"]) - entry.notes["values"])  # [B H A]
        return {"actions": masked_mean(error, entry.notes["mask"])}

    def tokens(self, obs: Observation) -> tuple[Tokens, ...]:
        """The state, where it is continuous, and the queries."""
        runs = [("query", jnp.broadcast_to(self.queries[...], (obs.batch, *self.queries[...].shape)))]
        if self.settings.state == "continuous":
            runs.insert(0, ("state", self.state_proj(obs.state)[:, None]))
        return tuple(Tokens((role,), BACKBONE, x, jnp.ones(x.shape[:2], bool)) for role, x in runs)

    def actions(self, hidden: Array) -> Array:
        """Hidden states of the queries [B Q D] -> actions [B H A] float32."""
        x = hidden.reshape(len(hidden), self.spec.action_horizon, -1)  # [B H (Q/H D)]
        x = jax.nn.relu(self.fc_in(self.norm_in(x)))
        for block in self.blocks:
            x = block(x)
        return self.fc_out(self.norm_out(x)).astype(jnp.float32)

    def sample(self, model: Any, obs: Observation, noise: Array | None, sampling: Sampling) -> dict[str, Array]:
        """{"actions": [B H A]} float32, normalised: one pass, no loop."""
        tokens = self.tokens(obs)
        chunk = self.actions(model.decoder(obs, tokens)(tokens)["query"])
        real = sampling.action_dim_mask
        return {"actions": chunk if real is None else jnp.where(real, chunk, 0)}
