"""A linear with a low-rank adapter beside it, in PyTorch. `jax_kit/lora.py` mirrors this file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from vla.errors import SettingsError

if TYPE_CHECKING:
    from vla.training.lora import Adapter


class Adapted(nn.Module):
    """W x + bias + scale B (A x), in the place of a linear whose weight and bias it takes over under their names.

    Multiplied one after the other: B A as a matrix, and its gradient, would be as large as the weight.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight, linear.bias, scale
        self.lora_a = nn.Parameter(linear.weight.new_zeros(rank, linear.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """[... in] -> [... out]."""
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)

    def matrix(self) -> Tensor:
        """W + scale B A, [out in]."""
        return self.weight + self.scale * (self.lora_b @ self.lora_a)


def matrix(linear: nn.Module) -> Tensor:
    """The whole matrix [out in] of a linear that may have an adapter. Whoever bypasses `forward` asks here."""
    return linear.matrix() if isinstance(linear, Adapted) else linear.weight  # type: ignore[return-value]


def adapt(model: nn.Module, adapters: Iterable[Adapter]) -> None:
    """Put adapters, zero so far, on the linears of a model.

    Raises:
        SettingsError: a module is not an `nn.Linear`.
    """
    for adapter in adapters:
        for name in adapter.modules():
            linear = model.get_submodule(name)
            if type(linear) is not nn.Linear:
                raise SettingsError(
                    "LoRA adapts nn.Linear", field="train.lora.on", got=f"{name} is a {type(linear).__name__}"
                )
            model.set_submodule(name, Adapted(linear, adapter.rank, adapter.scale))
