"""A linear with a low-rank adapter beside it, in JAX. Mirror of `torch_kit/lora.py`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx
from jax import Array
from jax import numpy as jnp

from vla.errors import SettingsError
from vla.jax_kit.ops import Linear, linear, matmul
from vla.params import other_shapes

if TYPE_CHECKING:
    from vla.training.lora import Adapter


class Adapted(nnx.Module):
    """x W + bias + scale (x A) B, in the place of a linear whose kernel and bias it takes over under their paths.

    Multiplied one after the other: A B as a matrix, and its gradient, would be as large as the kernel. A and B are
    [in rank] and [rank out], with a leading layer axis in a stack.
    """

    def __init__(self, base: Linear, a: Any, b: Any, scale: float):
        self.kernel, self.bias, self.fan_out, self.scale = base.kernel, base.bias, base.fan_out, scale
        self.lora_a, self.lora_b = nnx.Param(a), nnx.Param(b)

    def __call__(self, x: Array) -> Array:
        """[... (in)] -> [... (out)]."""
        y = linear(x, self.kernel[...], self.bias[...] if self.bias is not None else None, self.fan_out)
        return y + self.scale * matmul(matmul(x, self.lora_a[...]), self.lora_b[...])

    def matrix(self) -> Array:
        """W + scale A B, shaped as the kernel."""
        return self.kernel[...] + self.scale * (self.lora_a[...] @ self.lora_b[...]).reshape(self.kernel.shape)


def adapt(model: nnx.Module, adapters: Iterable[Adapter]) -> None:
    """Put adapters on the linears of a model, which may be abstract; their values are shapes until they are filled.

    Raises:
        SettingsError: a module is not a `vla.jax_kit.ops.Linear`.
    """
    for adapter in adapters:
        path = adapter.linear.path.split("/")[:-1]
        parent: Any = model
        for key in path[:-1]:
            parent = _child(parent, key)
        found = _child(parent, path[-1])
        if type(found) is not Linear:
            raise SettingsError(
                "LoRA adapts vla.jax_kit.ops.Linear",
                field="train.lora.on",
                got=f"{'.'.join(path)} is a {type(found).__name__}",
            )
        a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in other_shapes(adapter.rows).values())
        new = Adapted(found, a, b, adapter.scale)
        if isinstance(parent, nnx.Dict):
            parent[path[-1]] = new
        else:
            setattr(parent, path[-1], new)


def _child(module: Any, key: str) -> Any:
    return module[key] if isinstance(module, nnx.Dict) else getattr(module, key)
