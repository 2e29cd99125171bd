"""Knowledge insulation in PyTorch. `jax_impl.py` mirrors this file.

The two halves do the work; this head only joins them in one pass. The insulation itself is in the layout: the action
expert's looks at the backbone carry a stop (arXiv 2505.23705 eq. 5-6).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import evolve
from torch import Tensor, nn

from vla.contracts import Actions, Observation, Sampling, Spec
from vla.torch_kit.model import Entry
from vla_head_ki.config import Settings


class KIHead(nn.Module):
    """A token head and a chunk head in one pass."""

    def __init__(self, settings: Settings, spec: Spec, backbone: Mapping[str, Any], inner: Mapping[str, nn.Module]):
        super().__init__()
        self.settings = settings
        self.tokens, self.actions = inner["tokens"], inner["actions"]

    def weights(self) -> dict[str, float]:
        """Loss name -> weight: the halves' own, times those of the settings."""
        s = self.settings
        tokens = {name: w * s.token_weight for name, w in self.tokens.weights().items()}
        return {**tokens, **{name: w * s.action_weight for name, w in self.actions.weights().items()}}

    def enter(self, obs: Observation, actions: Actions, draws: Mapping[str, Any]) -> Entry:
        """What both halves bring."""
        tokens = self.tokens.enter(obs, actions, draws["tokens"])
        chunk = self.actions.enter(obs, actions, draws["actions"])
        return evolve(
            chunk,
            tokens=(*tokens.tokens, *chunk.tokens),
            cond={**tokens.cond, **chunk.cond},
            outputs=tuple(dict.fromkeys((*tokens.outputs, *chunk.outputs))),
            notes={"tokens": tokens, "actions": chunk},
        )

    def losses(self, model: Any, hidden: Mapping[str, Tensor], entry: Entry) -> dict[str, Tensor]:
        """{"tokens": [B], "actions": [B]}."""
        return {
            **self.tokens.losses(model, hidden, entry.notes["tokens"]),
            **self.actions.losses(model, hidden, entry.notes["actions"]),
        }

    def sample(self, model: Any, obs: Observation, noise: Tensor, sampling: Sampling) -> dict[str, Tensor]:
        """The chunk half alone: {"actions": [B H A]}."""
        return self.actions.sample(model, obs, noise, sampling)
