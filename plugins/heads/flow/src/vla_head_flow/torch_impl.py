"""Flow matching with an action expert, in PyTorch. `jax_impl.py` mirrors this file.

t = 1 is noise and t = 0 is data: x_t = t * noise + (1 - t) * actions, and the target velocity is u = noise - actions
(openpi `pi0.py`; the papers count the other way). Sampling integrates from t = 1 to 0 with Euler steps.

Axes: B batch (observations), K draws per observation, H horizon, A action dims, W width of the action expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from attrs import evolve
from torch import Tensor, nn
from torch.nn import functional as F

from vla.contracts import Actions, Observation, Sampling, Spec
from vla.torch_kit.model import Decoder, Entry, Tokens
from vla.torch_kit.ops import masked_mean, time_embedding
from vla_head_flow.config import Settings


class FlowHead(nn.Module):
    """Projections into and out of the action expert; the expert itself is run by the LLM core."""

    def __init__(self, settings: Settings, spec: Spec, backbone: Mapping[str, Any], inner: Mapping[str, Any]):
        super().__init__()
        s = self.settings = settings
        self.spec = spec
        self.action_in_proj = nn.Linear(spec.action_dim, s.width)
        self.action_out_proj = nn.Linear(s.width, spec.action_dim)
        if s.state == "continuous":
            self.state_proj = nn.Linear(spec.state_dim, s.width)
        if s.time == "concat":
            self.action_time_mlp_in = nn.Linear(2 * s.width, s.width)
            self.action_time_mlp_out = nn.Linear(s.width, s.width)
        else:
            self.time_mlp_in = nn.Linear(s.width, s.width)
            self.time_mlp_out = nn.Linear(s.width, s.width)
        for p in self.parameters():
            nn.init.normal_(p, std=p.shape[1] ** -0.5) if p.ndim == 2 else nn.init.zeros_(p)

    def weights(self) -> dict[str, float]:
        """Loss name -> weight."""
        return {"actions": 1.0}

    def enter(self, obs: Observation, actions: Actions, draws: Mapping[str, Tensor]) -> Entry:
        """Noisy actions as tokens; those that are `given`, clean. draws: noise [B K H A], time [B K]."""
        noise, time = draws["noise"], draws["time"]
        k = time.shape[1]
        a, mask = actions.values[:, None], None  # [B 1 H A]
        if actions.mask is not None and self.settings.mask_padding:
            mask = actions.mask[:, None]
            a = torch.where(mask, a, 0)
        when = time[..., None]  # [B K 1], or [B K H]
        if actions.given is not None:  # clean, so at t = 0, and not learned
            later = torch.arange(a.shape[2], device=a.device) >= actions.given[:, None]  # [B H]
            when = torch.where(later[:, None], when, 0)
            later = later[:, None, :, None]
            learned = later if mask is None else mask & later
        else:
            learned = mask
        t = when[..., None]
        x_t = t * noise + (1 - t) * a
        when = when.flatten() if when.shape[2] == 1 else when.flatten(0, 1)  # [BK], or [BK H]
        tokens = self.tokens(x_t.flatten(0, 1), when)
        if mask is not None:  # no real step looks at a padded one
            real = mask.any(-1).expand(-1, k, -1).flatten(0, 1)
            tokens = tuple(evolve(run, valid=real) for run in tokens)
        if self.settings.state == "continuous":
            tokens = (self.state_token(obs.state.repeat_interleave(k, 0)), *tokens)
            if when.ndim == 2:
                when = torch.cat([time.flatten()[:, None], when], 1)
        return Entry(
            tokens=tokens,
            cond=self.condition(when),
            outputs=("action",),
            notes={"velocity": noise - a, "mask": learned},
            draws=k,
        )

    def losses(self, model: Any, hidden: Mapping[str, Tensor], entry: Entry) -> dict[str, Tensor]:
        """{"actions": [B]}: the squared error of the velocity, averaged over draws, steps and dims that are real."""
        return {"actions": masked_mean(self.squared_error(hidden, entry), entry.notes["mask"])}

    def squared_error(self, hidden: Mapping[str, Tensor], entry: Entry) -> Tensor:
        """(v - u)^2 for every draw, step and dim: [B K H A] float32."""
        target = entry.notes["velocity"]
        return (self.velocity(hidden["action"]).view(target.shape) - target).square()

    def velocity(self, hidden: Tensor) -> Tensor:
        """Hidden states of the action tokens [B H W] -> velocity [B H A], float32."""
        return self.action_out_proj(hidden).float()

    def suffix(self, obs: Observation, x_t: Tensor, time: Tensor) -> tuple[Tokens, ...]:
        """The state, where it is continuous, and noisy actions [B H A] at time [B] (or [1]), or [B H]."""
        state = (self.state_token(obs.state),) if self.settings.state == "continuous" else ()
        return (*state, *self.tokens(x_t, time))

    def tokens(self, x_t: Tensor, time: Tensor) -> tuple[Tokens, ...]:
        """Noisy actions [B H A] at time [B] (or [1]), or [B H], as tokens of the action expert."""
        x = self.action_in_proj(x_t)
        if self.settings.time == "concat":
            t = self.time_features(time if time.ndim == 2 else time[:, None]).to(x.dtype).expand(*x.shape[:2], -1)
            x = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(torch.cat([x, t], -1))))
        return (Tokens(("action",), "action", x, torch.ones_like(x[..., 0], dtype=torch.bool)),)

    def state_token(self, state: Tensor) -> Tokens:
        """The continuous state [B S] as one token of the action expert."""
        x = self.state_proj(state)[:, None]
        return Tokens(("state",), "action", x, torch.ones_like(x[..., 0], dtype=torch.bool))

    def condition(self, time: Tensor) -> dict[str, Tensor]:
        """The condition of adaRMS [B W] from time [B], or [B E W] from [B E]; nothing when time is concatenated."""
        if self.settings.time == "concat":
            return {}
        return {"action": F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(self.time_features(time)))))}

    def time_features(self, time: Tensor) -> Tensor:
        """Sinusoids of t, [...] -> [... W]."""
        return time_embedding(time, self.settings.width, self.settings.min_period, self.settings.max_period)

    def sample(self, model: Any, obs: Observation, noise: Tensor, sampling: Sampling) -> dict[str, Tensor]:
        """Euler from noise [B H A] over the cached prefix: {"actions": [B H A]} float32, normalised.

        Training leaves padded dims out of the loss, so their velocity is not learned; but it is known: they go from
        noise to 0 along u = noise. With `action_dim_mask` [A] the network sees them exactly as in training.
        """
        steps = sampling.num_steps or self.settings.num_steps
        times, dt = euler_times(steps, noise.device)
        if sampling.trained:
            times = torch.cat([times, times.new_zeros(1)])  # the level of actions that are given
        known = sampling.action_dim_mask if self.settings.mask_padding else None

        def step(decode: Decoder, x: Tensor, i: Any) -> tuple[Tensor, Tensor]:
            t = times[i] if isinstance(i, Tensor) else times[i : i + 1]
            v = self.velocity(decode(self.suffix(obs, x, t), self.rows(i))["action"])
            v = v if known is None else torch.where(known, v, noise)
            return x + dt * v, x - t[..., None] * v

        suffix = self.suffix(obs, noise, times[:1])
        decode = model.decoder(obs, suffix, cond=self.condition(times), varying=("action",))
        level = np.arange(steps, -1, -1) / steps
        return {"actions": decode.denoise(step, 1 - level, level, noise, sampling.prefix)}

    def rows(self, i: Any) -> Any:
        """Rows of the condition for all tokens of the expert: a state goes with the actions that are not given."""
        if not isinstance(i, Tensor) or self.settings.state != "continuous":
            return i
        return torch.cat([i.amin(1, keepdim=True), i], 1)


def euler_times(steps: int, device: torch.device) -> tuple[Tensor, float]:
    """Times [steps] from 1 down, float32, and the step -1 / steps."""
    dt = -1.0 / steps
    return 1.0 + dt * torch.arange(steps, dtype=torch.float32, device=device), dt
