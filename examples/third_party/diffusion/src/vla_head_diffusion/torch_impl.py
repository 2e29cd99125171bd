"""Diffusion over action chunks in PyTorch. `jax_impl.py` mirrors this file.

Axes: B batch, H horizon, A action dims, W width of the action expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla.contracts import Actions, Observation, Sampling, Spec
from vla.torch_kit.model import Decoder, Entry, Tokens
from vla.torch_kit.ops import masked_mean, time_embedding
from vla_head_diffusion.config import Options, Settings, ddim_steps, kept, levels


class DiffusionHead(nn.Module):
    """Projections into and out of the action expert, and the embedding of the step."""

    def __init__(self, settings: Settings, spec: Spec, backbone: Mapping[str, Any], inner: Mapping[str, Any]):
        super().__init__()
        s = self.settings = settings
        self.spec = spec
        self.noisy_proj = nn.Linear(spec.action_dim, s.width)
        self.noise_proj = nn.Linear(s.width, spec.action_dim)
        self.step_mlp_in = nn.Linear(s.width, s.width)
        self.step_mlp_out = nn.Linear(s.width, s.width)

    def weights(self) -> dict[str, float]:
        """Loss name -> weight."""
        return {"actions": 1.0}

    def enter(self, obs: Observation, actions: Actions, draws: Mapping[str, Tensor]) -> Entry:
        """Actions with noise as tokens. draws: noise [B H A], step [B]."""
        noise, step = draws["noise"], draws["step"].long()
        values, mask = actions.values, actions.mask
        if mask is not None:
            values = torch.where(mask, values, 0)
        left = torch.tensor(kept(self.settings.train_steps), device=noise.device)[step][:, None, None]
        x = left.sqrt() * values + (1 - left).sqrt() * noise
        # No real step looks at a padded one.
        valid = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask.any(-1)
        return Entry(
            tokens=self.tokens(x, valid),
            cond={"action": self.condition(step)},
            outputs=("action",),
            notes={"noise": noise, "mask": mask},
        )

    def losses(self, model: Any, hidden: Mapping[str, Tensor], entry: Entry) -> dict[str, Tensor]:
        """{"actions": [B]}: the squared error of the noise over real steps and dims."""
        error = (self.noise_proj(hidden["action"]).float() - entry.notes["noise"]).square()  # [B H A]
        return {"actions": masked_mean(error, entry.notes["mask"])}

    def tokens(self, x: Tensor, valid: Tensor) -> tuple[Tokens, ...]:
        """Noisy actions [B H A] as tokens of the action expert."""
        return (Tokens(("action",), "action", self.noisy_proj(x), valid),)

    def condition(self, step: Tensor) -> Tensor:
        """The condition [B W] of the expert's norms from the step [B]."""
        t = time_embedding(step.float() / self.settings.train_steps, self.settings.width, 4e-3, 4.0)
        return F.silu(self.step_mlp_out(F.silu(self.step_mlp_in(t))))

    def sample(self, model: Any, obs: Observation, noise: Tensor, sampling: Sampling) -> dict[str, Tensor]:
        """DDIM from noise [B H A] over the cached prefix: {"actions": [B H A]} float32, normalised.

        The noise in padded dims is known, so they go where training left them: to 0.
        """
        s, real = self.settings, sampling.action_dim_mask
        noise = noise * sampling.read(Options).noise_scale
        plan = ddim_steps(s.train_steps, sampling.num_steps or s.num_steps)
        ks = torch.tensor([k for k, _, _ in plan], device=noise.device)
        valid = torch.ones_like(noise[..., 0], dtype=torch.bool)

        def step(decode: Decoder, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
            _, here, there = plan[i]
            e = self.noise_proj(decode(self.tokens(x, valid), i)["action"]).float()
            e = e if real is None else torch.where(real, e, noise)
            clean = ((x - (1 - here) ** 0.5 * e) / here**0.5).clamp(-s.clip, s.clip)
            return there**0.5 * clean + (1 - there) ** 0.5 * e, clean

        decode = model.decoder(obs, self.tokens(noise, valid), cond={"action": self.condition(ks)})
        return {"actions": decode.denoise(step, *levels(plan), noise, sampling.prefix)}
