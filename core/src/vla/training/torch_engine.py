"""The PyTorch engine: one optimiser update, and the training state as arrays.

Weights, moments and the average are float32 always; `precision = bfloat16` computes under autocast. A step whose loss
or gradient is not finite is not applied, without asking the device: the fused AdamW takes the verdict as a tensor (as
it does from a gradient scaler), the average moves by weight 0. So the loop may read results late.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla.contracts import Actions, Observation, Sampling
from vla.errors import SettingsError
from vla.store import check_names
from vla.torch_kit.lora import adapt
from vla.torch_kit.model import VLA, build_model, observation_to, sampling_to, tree_to
from vla.training.config import TrainConfig
from vla.training.freezing import frozen_names
from vla.training.lora import adapters_of, first_values, frozen_by
from vla.training.torch_devices import Devices, exchanged, mine, shard_of, whole


class TorchEngine:
    """Holds the model, its average and AdamW.

    Args:
        variant: a `vla.compose.Variant`.
        config: the run.
        weights: torch name -> array to start from; None: fresh weights from `config.seed`.
        model: an already built model (tests); None builds the variant's.
    """

    def __init__(
        self,
        variant: Any,
        config: TrainConfig,
        weights: Mapping[str, np.ndarray] | None = None,
        model: nn.Module | None = None,
    ):
        self.config = config
        self.devices = Devices(config.distributed, pick_device(config.device))
        self.device = self.devices.device
        if model is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                model = build_model(variant)
        self.model: VLA = model.float().to(self.device).train()  # type: ignore[assignment]
        self.adapters = adapters_of(variant, config)
        adapt(self.model, self.adapters)
        names = [name for name, _ in self.model.named_parameters()]
        for name in frozen_names(names, config.freeze) | frozen_by(self.adapters, variant):
            self.model.get_parameter(name).requires_grad_(False)
        if config.checkpoint_activations:
            recompute_layers(self.model)
        if config.compile:
            compile_layers(self.model)
        self.loss = self.devices.spread(self.model)
        self.params = dict(self.model.named_parameters())
        # What this process holds of each weight: all of it, or its shard. Moments and average are cut alike.
        self.shards = {name: mine(p) for name, p in self.params.items()}
        start = first_values(self.adapters, config.seed)
        if start:
            self._fill({name: self.shards[name] for name in start}, start, "the adapters")
        if weights is not None:
            base = {name: shard for name, shard in self.shards.items() if name not in start}
            self._fill(base, weights, "the weights to start from")
        self.trained = {name: nn.Parameter(self.shards[name]) for name, p in self.params.items() if p.requires_grad}
        self.ema = {name: p.detach().clone() for name, p in self.trained.items()} if config.ema_decay else {}
        self.optimizer = torch.optim.AdamW(
            list(self.trained.values()),
            lr=torch.tensor(0.0, device=self.device) if self.device.type == "cuda" else 0.0,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        for p in self.trained.values():
            self._moments(p, torch.zeros_like(p), torch.zeros_like(p), 0)

    # ---- one update --------------------------------------------------------------------------------------------------

    def step(
        self, micro_batches: Sequence[tuple[Observation, Actions, Any]], lr: float, keep: float = 0.0
    ) -> dict[str, Tensor]:
        """One update from equal micro-batches of host arrays (observation, actions, draws).

        `lr` is the learning rate; the average keeps `keep` of itself.

        Returns:
            0-d tensors on the device: `loss`, `loss/NAME`, `grad_norm` (before clipping), `bad` (1: not applied).
        """
        share = 1 / len(micro_batches)
        sums: dict[str, Tensor] = {}
        for i, (obs, actions, draws) in enumerate(micro_batches):
            with self.devices.gathering(last=i == len(micro_batches) - 1):
                losses = self._losses(obs, actions, draws)
                total = self.model.total(losses)
                (total * share).backward()
            found = {"loss": total.detach(), **{f"loss/{k}": v.detach().mean() for k, v in losses.items()}}
            for name, value in found.items():
                sums[name] = sums.get(name, 0) + value.float() * share
        sums = self.devices.mean(sums)
        for name, p in self.trained.items():
            grad = self.params[name].grad
            # As in JAX, no gradient is a gradient of zero, so that all moments age alike.
            p.grad = torch.zeros_like(p) if grad is None else mine(grad)
            self.params[name].grad = None
        norms = torch._foreach_norm([p.grad for p in self.trained.values()])
        norm = self.devices.norm(torch.linalg.vector_norm(torch.stack(norms)))
        bad = (~(torch.isfinite(norm) & torch.isfinite(sums["loss"]))).float()
        self._apply(lr, keep, norm, bad)
        return {**sums, "grad_norm": norm, "bad": bad}

    def _losses(self, obs: Observation, actions: Actions, draws: Any) -> dict[str, Tensor]:
        obs = observation_to(obs, self.device)
        chunk = Actions(
            *(
                None if a is None else torch.as_tensor(a, device=self.device)
                for a in (actions.values, actions.mask, actions.given)
            )
        )
        with self._autocast():
            return self.loss(obs, chunk, tree_to(draws, self.device))

    def _apply(self, lr: float, keep: float, norm: Tensor, bad: Tensor) -> None:
        """Clip, update, average; nothing of it when `bad` is 1."""
        clip = self.config.clip
        group = self.optimizer.param_groups[0]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
        # The kernel divides gradients by grad_scale: max(1, norm / clip) is optax's clipping, without another pass.
        self.optimizer.grad_scale = torch.clamp(norm / clip, min=1.0) if clip else torch.ones_like(norm)
        self.optimizer.found_inf = bad
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            move = (1 - keep) * (1 - bad)
            kept, new = list(self.ema.values()), [p.detach() for p in self.trained.values()]
            if self.device.type == "cpu":
                torch._foreach_lerp_(kept, new, float(move))
            else:
                torch._foreach_add_(kept, torch._foreach_mul(torch._foreach_sub(new, kept), move))

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @staticmethod
    def read(results: Sequence[Mapping[str, Tensor]]) -> list[dict[str, float]]:
        """Results of `step` as numbers: one wait for the device."""
        if not results:
            return []
        names = list(results[0])
        table = torch.stack([torch.stack([r[n].float() for n in names]) for r in results]).tolist()
        return [dict(zip(names, row, strict=True)) for row in table]

    @property
    def reads_late(self) -> bool:
        """Whether waiting for a result stalls the device, so that the loop should read seldom."""
        return self.device.type != "cpu"

    def agree(self, flag: bool) -> bool:
        """Whether any process raises this flag; every process must ask."""
        return self.devices.any(flag)

    def close(self) -> None:
        """Leave the other processes; every process must call it."""
        self.devices.close()

    # ---- looking at the model ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, obs: Observation, actions: Actions, draws: Any) -> dict[str, np.ndarray]:
        """Losses [B] of the weights that would be saved, and their `total`."""
        with self._averaged():
            losses = self._losses(obs, actions, draws)
            total = self.model.total(losses)
        return {
            "loss": total.float().cpu().numpy(),
            **{f"loss/{k}": v.float().cpu().numpy() for k, v in losses.items()},
        }

    @torch.no_grad()
    def sample(self, obs: Observation, noise: np.ndarray | None, sampling: Sampling) -> dict[str, np.ndarray]:
        """One chunk per row from the weights that would be saved."""
        with self._averaged(), self._autocast():
            start = None if noise is None else torch.as_tensor(noise, device=self.device)
            out = self.model.sample(observation_to(obs, self.device), start, sampling_to(sampling, self.device))
        return {k: (v.float() if v.is_floating_point() else v).cpu().numpy() for k, v in out.items()}

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones, for as long as the block lasts."""
        self.model.eval()
        try:
            with exchanged(self.shards, self.ema):
                yield
        finally:
            self.model.train()

    # ---- state -------------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, np.ndarray]:
        """The average where there is one, else the weights; adapters apart from what they adapt."""
        return self._whole({**self.shards, **self.ema})

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        """Everything that changes, by torch name: params, ema, optimizer. Views where possible: write them at once."""
        m, v = (
            self._whole({name: self.optimizer.state[p][key] for name, p in self.trained.items()})
            for key in ("exp_avg", "exp_avg_sq")
        )
        moments = {**{f"m/{k}": a for k, a in m.items()}, **{f"v/{k}": a for k, a in v.items()}}
        moments["updates"] = np.asarray(self.updates_seen(), np.int64)
        ema = {"ema": self._whole(self.ema)} if self.ema else {}
        return {"params": self._whole(self.shards), **ema, "optimizer": moments}

    def load_state(self, arrays: Mapping[str, Mapping[str, np.ndarray]], source: str = "the checkpoint") -> None:
        """Take up a state that `state` gave.

        Raises:
            StoreError: names or shapes are not this model's.
        """
        self._fill(self.shards, arrays["params"], f"{source}: params")
        if self.ema:
            self._fill(self.ema, arrays.get("ema", {}), f"{source}: ema")
        updates = int(arrays["optimizer"]["updates"])
        moments = {k: v for k, v in arrays["optimizer"].items() if k != "updates"}
        for key in "mv":
            held = {name: torch.zeros_like(p) for name, p in self.trained.items()}
            self._fill(held, {k[2:]: a for k, a in moments.items() if k[0] == key}, f"{source}: optimizer {key}")
            for name, p in self.trained.items():
                self.optimizer.state[p]["exp_avg" if key == "m" else "exp_avg_sq"] = held[name]
        for p in self.trained.values():
            self.optimizer.state[p]["step"].fill_(updates)

    def updates_seen(self) -> int:
        """Updates applied so far (steps that were skipped do not count)."""
        return int(next(iter(self.optimizer.state.values()))["step"])

    def _moments(self, p: nn.Parameter, m: Tensor, v: Tensor, updates: int) -> None:
        step = torch.tensor(float(updates), device=self.device)
        self.optimizer.state[p] = {"step": step, "exp_avg": m, "exp_avg_sq": v}

    def _whole(self, shards: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        return {n: whole(t.detach(), self.params[n]).detach().cpu().numpy() for n, t in shards.items()}

    def _fill(self, shards: Mapping[str, Tensor], arrays: Mapping[str, np.ndarray], source: str) -> None:
        expected = {name: tuple(self.params[name].shape) for name in shards}
        check_names(expected, {k: tuple(a.shape) for k, a in arrays.items()}, source)
        with torch.no_grad():
            for name, shard in shards.items():
                full = torch.from_numpy(np.asarray(arrays[name], np.float32))
                shard.copy_(shard_of(full, self.params[name]))


def pick_device(name: str) -> torch.device:
    """The device a config asks for."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(
            "unknown device", field="train.device", got=name, expected="auto, cpu, cuda, cuda:N"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError("PyTorch finds no CUDA device here", field="train.device", got=name, fix="use --device cpu")
    return device


def recompute_layers(model: nn.Module) -> None:
    """Recompute transformer layers in the backward pass: sets `checkpointing` on every module that has this switch."""
    switches = [m for m in model.modules() if hasattr(m, "checkpointing")]
    if not switches:
        raise SettingsError(
            "no part of this model can recompute its layers", field="train.checkpoint_activations", got=True
        )
    for module in switches:
        module.checkpointing = True


def compile_layers(model: nn.Module) -> None:
    """torch.compile each transformer layer (members of module lists `layers` and `blocks`).

    Layers of one stack share their compiled code, so this takes seconds where a whole model takes minutes, and what
    surrounds them (dicts of cameras, roles, losses) stays plain Python.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.rsplit(".", 1)[-1] in ("layers", "blocks"):
            for layer in module:
                layer.compile()
