"""L1 regression from action queries in the backbone, in PyTorch. `jax_impl.py` mirrors this file.

Axes: B batch, H horizon, A action dims, Q queries (H or H A), D width of the backbone, W hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vla.contracts import Actions, Observation, Sampling, Spec
from vla.layout import BACKBONE
from vla.torch_kit.model import Entry, Tokens
from vla.torch_kit.ops import masked_mean
from vla_head_l1.config import Settings, queries_per_step


class Block(nn.Module):
    """LayerNorm, one layer with ReLU, residual (OFT's MLPResNet)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[... W] -> [... W]."""
        return x + self.fc(self.norm(x)).relu()


class L1Head(nn.Module):
    """Queries, and the MLP that reads actions off them."""

    def __init__(self, settings: Settings, spec: Spec, backbone: Mapping[str, Any], inner: Mapping[str, Any]):
        super().__init__()
        s, width = settings, backbone["width"]
        self.settings, self.spec = settings, spec
        self.per_step = queries_per_step(s, spec)
        self.queries = nn.Parameter(torch.randn(spec.action_horizon * self.per_step, width) * width**-0.5)
        if s.state == "continuous":
            self.state_proj = nn.Linear(spec.state_dim, width)
        self.norm_in = nn.LayerNorm(self.per_step * width, eps=1e-6)
        self.fc_in = nn.Linear(self.per_step * width, s.hidden)
        self.blocks = nn.ModuleList(Block(s.hidden) for _ in range(s.blocks))
        self.norm_out = nn.LayerNorm(s.hidden, eps=1e-6)
        self.fc_out = nn.Linear(s.hidden, spec.action_dim)

    def weights(self) -> dict[str, float]:
        """Loss name -> weight."""
        return {"actions": 1.0}

    def enter(self, obs: Observation, actions: Actions, draws: Mapping[str, Tensor]) -> Entry:
        """The queries; nothing of the actions goes in."""
        return Entry(tokens=self.tokens(obs), notes={"values": actions.values, "mask": actions.mask})

    def losses(self, model: Any, hidden: Mapping[str, Tensor], entry: Entry) -> dict[str, Tensor]:
        """{"actions": [B]}: mean absolute error over real steps and dims."""
        error = (self.actions(hidden["query"]) - entry.notes["values"]).abs()  # [B H A]
        return {"actions": masked_mean(error, entry.notes["mask"])}

    def tokens(self, obs: Observation) -> tuple[Tokens, ...]:
        """The state, where it is continuous, and the queries."""
        runs = [("query", self.queries.expand(obs.batch, -1, -1))]
        if self.settings.state == "continuous":
            runs.insert(0, ("state", self.state_proj(obs.state)[:, None]))
        return tuple(Tokens((role,), BACKBONE, x, torch.ones_like(x[..., 0], dtype=torch.bool)) for role, x in runs)

    def actions(self, hidden: Tensor) -> Tensor:
        """Hidden states of the queries [B Q D] -> actions [B H A] float32."""
        x = hidden.reshape(len(hidden), self.spec.action_horizon, -1)  # [B H (Q/H D)]
        x = self.fc_in(self.norm_in(x)).relu()
        for block in self.blocks:
            x = block(x)
        return self.fc_out(self.norm_out(x)).float()

    def sample(self, model: Any, obs: Observation, noise: Tensor | None, sampling: Sampling) -> dict[str, Tensor]:
        """{"actions": [B H A]} float32, normalised: one pass, no loop."""
        tokens = self.tokens(obs)
        chunk = self.actions(model.decoder(obs, tokens)(tokens)["query"])
        real = sampling.action_dim_mask
        return {"actions": chunk if real is None else torch.where(real, chunk, 0)}
