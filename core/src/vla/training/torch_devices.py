"""Several processes for the PyTorch engine: DDP (weights replicated) or FSDP2 (weights sharded), started with torchrun.

Each process computes its rows of the same global batch with the same draws, so the loss curve is that of one device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vla.errors import SettingsError


class Devices:
    """Where the weights live. `mode` is none, ddp or fsdp."""

    def __init__(self, mode: str, device: torch.device):
        self.mode, self.device, self.world, self.opened = mode, device, 1, False
        if mode == "none":
            return
        if "RANK" not in os.environ:
            fix = "start with: torchrun --nproc-per-node N --no-python vla train ..."
            raise SettingsError(
                "training on several devices needs torchrun", field="train.distributed", got=mode, fix=fix
            )
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            self.opened = True
        self.world = dist.get_world_size()
        if device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)

    def spread(self, model: nn.Module) -> Callable[..., Mapping[str, Tensor]]:
        """Wrap or shard the model; gives the function that computes its losses."""
        self.model, self.ddp = model, None
        if self.mode == "ddp":
            self.ddp = nn.parallel.DistributedDataParallel(_Loss(model), find_unused_parameters=True)
            return self.ddp
        if self.mode == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

            mesh = init_device_mesh(self.device.type, (self.world,))
            # What is called without its layer gathers itself: the modulations of a stack depend on time alone.
            for name, module in model.named_modules():
                if name.endswith(".modulation"):
                    fully_shard(module, mesh=mesh)
            for layer in layers_of(model):
                fully_shard(layer, mesh=mesh)
                if hasattr(layer, "room"):
                    register_fsdp_forward_method(layer, "room")  # packs the layer's weights for decoding
            fully_shard(model, mesh=mesh)
            for method in ("loss", "sample"):
                register_fsdp_forward_method(model, method)
        return model.loss

    def gathering(self, last: bool) -> AbstractContextManager[Any]:
        """Around one micro-batch: gradients are exchanged after the last only."""
        if self.mode == "ddp" and not last:
            return self.ddp.no_sync()
        if self.mode == "fsdp":
            self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def close(self) -> None:
        """Leave the group together; a process that just goes away takes the others down with it."""
        if self.opened:
            dist.barrier()
            dist.destroy_process_group()

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Mean of 0-d values over the processes, in one exchange."""
        if self.world == 1:
            return values
        table = torch.stack(list(values.values()))
        dist.all_reduce(table)
        return dict(zip(values, (table / self.world).unbind(), strict=True))

    def norm(self, norm: Tensor) -> Tensor:
        """Norm over all shards from the norm over mine."""
        if self.mode != "fsdp":
            return norm
        square = norm.square()
        dist.all_reduce(square)
        return square.sqrt()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.world == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value)
        return bool(value > 0)


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """Every transformer layer: members of module lists `layers` and `blocks`.

    Of a plain dict of modules, which nobody calls, its members.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.rsplit(".", 1)[-1] in ("layers", "blocks"):
            for layer in module:
                yield from layer.values() if type(layer) is nn.ModuleDict else (layer,)


class _Loss(nn.Module):
    """DDP listens to `forward`; ours is called `loss`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *batch: Any) -> Mapping[str, Tensor]:
        return self.model.loss(*batch)  # type: ignore[operator]


@torch.no_grad()
def mine(tensor: Tensor) -> Tensor:
    """The shard of a weight or gradient that this process holds; the tensor itself when it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole(shard: Tensor, like: Tensor) -> Tensor:
    """The full tensor from everyone's shard, cut as `like` is. Every process must call it."""
    if not isinstance(like, DTensor):
        return shard
    full = DTensor.from_local(shard, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return full.full_tensor()


@torch.no_grad()
def shard_of(full: Tensor, like: Tensor) -> Tensor:
    """My shard of a full tensor, cut as `like` is."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None).to_local()


@contextmanager
def exchanged(shards: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Any:
    """Values of `others` in the place of the shards, for as long as the block lasts."""

    def swap() -> None:
        with torch.no_grad():
            for name, other in others.items():
                kept = shards[name].clone()
                shards[name].copy_(other)
                other.copy_(kept)

    swap()
    try:
        yield
    finally:
        swap()
