"""The JAX engine: one optimiser update, and the training state as arrays. Mirror of `torch_engine.py`.

Weights, moments and the average are float32 always; `precision = bfloat16` computes in bfloat16 inside. One update is
one compiled function: losses, gradients, clipping, AdamW, averaging. A step whose loss or gradient is not finite is not
applied, without asking the device. State has the torch names, so a run may go on in the other framework.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax import numpy as jnp

from vla.contracts import Actions, Observation, Sampling
from vla.errors import SettingsError
from vla.jax_kit.lora import adapt
from vla.jax_kit.model import VLA, abstract_model, build_model, losses, merge, sample
from vla.jax_kit.ops import autocast
from vla.params import table, to_other, to_torch
from vla.store import check_names
from vla.training.config import TrainConfig
from vla.training.freezing import frozen_names
from vla.training.jax_devices import alike, any_of, fetch, leave, make_mesh, pick_device, put, put_rows, shard, whole
from vla.training.lora import adapters_of, first_values, frozen_by

Tree = dict[str, Array]  # nnx path joined by "/" -> array


class JaxEngine:
    """Holds the weights, their average and AdamW's moments as flat trees.

    Args:
        variant: a `vla.compose.Variant`.
        config: the run.
        weights: torch name -> array to start from; None: fresh weights from `config.seed`.
    """

    def __init__(self, variant: Any, config: TrainConfig, weights: Mapping[str, np.ndarray] | None = None):
        self.config, self.adapters = config, adapters_of(variant, config)
        own = [row for adapter in self.adapters for row in adapter.rows]
        self.rows = (*table(variant), *own)
        self.device = pick_device(config.device)
        self.cameras = variant.spec.cameras
        self.mesh = make_mesh(self.device, config)
        with jax.default_device(self.device):
            model = abstract_model(variant) if weights is not None else build_model(variant, config.seed)
            if config.checkpoint_activations:
                recompute_layers(model)
            adapt(model, self.adapters)
            self.graph, state = nnx.split(model)
            self.leaves = list(nnx.to_flat_state(state))  # (path, variable); their arrays are not used
            if weights is None:
                found = {_key(path): leaf.get_value() for path, leaf in self.leaves}
            else:
                found = self._to_tree(weights, table(variant), "the weights to start from")
            found |= self._to_tree(first_values(self.adapters, config.seed), own, "the adapters")
            self.leaves = [(path, leaf.replace(None)) for path, leaf in self.leaves]
            names = frozen_names([name for row in self.rows for name in row.names()], config.freeze)
            frozen = frozen_paths(self.rows, names | frozen_by(self.adapters, variant))
            self.trained_rows = [row for row in self.rows if row.path not in frozen]
            self.fixed: Tree = {k: v for k, v in found.items() if k in frozen}
            self.params: Tree = {k: v for k, v in found.items() if k not in frozen}
            self.ema: Tree = {k: jnp.array(v) for k, v in self.params.items()} if config.ema_decay else {}
            self.m: Tree = {k: jnp.zeros_like(v) for k, v in self.params.items()}
            self.v: Tree = {k: jnp.zeros_like(v) for k, v in self.params.items()}
            self.updates = jnp.zeros((), jnp.int32)
        self._place()

    # ---- one update --------------------------------------------------------------------------------------------------

    def step(
        self, micro_batches: Sequence[tuple[Observation, Actions, Any]], lr: float, keep: float = 0.0
    ) -> dict[str, Array]:
        """One update from equal micro-batches of host arrays (observation, actions, draws).

        `lr` is the learning rate; the average keeps `keep` of itself.

        Returns:
            0-d arrays on the device: `loss`, `loss/NAME`, `grad_norm` (before clipping), `bad` (1: not applied).
        """
        moving = (self.params, self.ema, self.m, self.v, self.updates)
        rates = np.float32(lr), np.float32(keep)
        micro = tuple(self._rows_apart(micro_batches))
        moving, result = self._update(moving, self.fixed, micro, *rates)
        self.params, self.ema, self.m, self.v, self.updates = moving
        return result

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def _update(self, moving: Any, fixed: Tree, micro: Any, lr: Array, keep: Array) -> tuple[Any, dict[str, Array]]:
        params, ema, m, v, updates = moving
        share = 1 / len(micro)
        grads: Any = None
        sums: dict[str, Array] = {}
        for batch in micro:
            (total, found), new = jax.value_and_grad(self._total, has_aux=True)(params, fixed, batch)
            grads = new if grads is None else jax.tree.map(jnp.add, grads, new)
            for name, value in {"loss": total, **{f"loss/{k}": x.mean() for k, x in found.items()}}.items():
                sums[name] = sums.get(name, 0) + value * share
        grads = jax.tree.map(lambda g: g * share, grads)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in grads.values()))
        bad = ~(jnp.isfinite(norm) & jnp.isfinite(sums["loss"]))
        new = self._adamw(params, ema, m, v, updates, grads, norm, lr, keep)
        moving = jax.tree.map(lambda old, new: jnp.where(bad, old, new), moving, new)
        return moving, {**sums, "grad_norm": norm, "bad": bad.astype(jnp.float32)}

    def _total(self, params: Tree, fixed: Tree, batch: Any) -> tuple[Array, dict[str, Array]]:
        model: VLA = merge(self.graph, self._state({**params, **fixed}))
        with autocast(self._dtype):
            found = model.loss(*batch)
        return model.total(found), found

    def _adamw(
        self,
        params: Tree,
        ema: Tree,
        m: Tree,
        v: Tree,
        updates: Array,
        grads: Tree,
        norm: Array,
        lr: Array,
        keep: Array,
    ) -> Any:
        """Clip, update, average: torch's AdamW, optax's clipping."""
        c = self.config
        scale = jnp.maximum(norm / c.clip, 1.0) if c.clip else jnp.ones_like(norm)
        updates = updates + 1
        t = updates.astype(jnp.float32)
        fast, slow = 1 - c.beta1**t, 1 - c.beta2**t
        new: tuple[Tree, Tree, Tree, Tree] = {}, {}, {}, {}
        for k, p in params.items():
            g = grads[k] / scale
            new[2][k] = m[k] + (1 - c.beta1) * (g - m[k])
            new[3][k] = c.beta2 * v[k] + (1 - c.beta2) * g * g
            change = (new[2][k] / fast) / (jnp.sqrt(new[3][k] / slow) + c.eps)
            new[0][k] = p * (1 - lr * c.weight_decay) - lr * change
            if k in ema:
                new[1][k] = ema[k] + (1 - keep) * (new[0][k] - ema[k])
        return (*new, updates)

    @staticmethod
    def read(results: Sequence[Mapping[str, Array]]) -> list[dict[str, float]]:
        """Results of `step` as numbers: one wait for the device."""
        return [{k: float(v) for k, v in r.items()} for r in fetch(list(results))]

    @property
    def reads_late(self) -> bool:
        """Whether waiting for a result stalls the device, so that the loop should read seldom."""
        return self.device.platform != "cpu"

    def agree(self, flag: bool) -> bool:
        """Whether any process raises this flag."""
        return any_of(flag)

    def close(self) -> None:
        """The end of the run, for all processes at once."""
        leave()

    # ---- looking at the model ----------------------------------------------------------------------------------------

    def evaluate(self, obs: Observation, actions: Actions, draws: Any) -> dict[str, np.ndarray]:
        """Losses [B] of the weights that would be saved, and their `total`."""
        state = self._state({**self.params, **self.ema, **self.fixed})
        found = losses(self.graph, state, obs, actions, draws, dtype=self._dtype)
        total = merge(self.graph, state).total(found)
        return fetch({"loss": total, **{f"loss/{k}": v for k, v in found.items()}})

    def sample(self, obs: Observation, noise: np.ndarray | None, sampling: Sampling) -> dict[str, np.ndarray]:
        """One chunk per row from the weights that would be saved."""
        state = self._state({**self.params, **self.ema, **self.fixed})
        out = sample(self.graph, state, obs, noise, sampling, dtype=self._dtype)
        return fetch(out)

    # ---- state -------------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, np.ndarray]:
        """The average where there is one, else the weights; adapters apart from what they adapt."""
        return self._to_torch({**self.params, **self.ema, **self.fixed}, self.rows)

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        """Everything that changes, by torch name: params, ema, optimizer."""
        rows = self.trained_rows
        moments = {f"m/{k}": v for k, v in self._to_torch(self.m, rows).items()}
        moments |= {f"v/{k}": v for k, v in self._to_torch(self.v, rows).items()}
        moments["updates"] = np.asarray(self.updates_seen(), np.int64)
        ema = {"ema": self._to_torch(self.ema, rows)} if self.ema else {}
        return {"params": self._to_torch({**self.params, **self.fixed}, self.rows), **ema, "optimizer": moments}

    def load_state(self, arrays: Mapping[str, Mapping[str, np.ndarray]], source: str = "the checkpoint") -> None:
        """Take up a state that `state` gave, of either engine.

        Raises:
            StoreError: names or shapes are not this model's.
        """
        found = self._to_tree(arrays["params"], self.rows, f"{source}: params")
        self.params = {k: found[k] for k in self.params}
        self.fixed = {k: found[k] for k in self.fixed}
        if self.ema:
            self.ema = self._to_tree(arrays.get("ema", {}), self.trained_rows, f"{source}: ema")
        for name in "mv":
            moments = {k[2:]: a for k, a in arrays["optimizer"].items() if k.startswith(f"{name}/")}
            setattr(self, name, self._to_tree(moments, self.trained_rows, f"{source}: optimizer {name}"))
        self.updates = jax.device_put(jnp.asarray(int(arrays["optimizer"]["updates"]), jnp.int32), self.device)
        self._place()

    def updates_seen(self) -> int:
        """Updates applied so far (steps that were skipped do not count)."""
        return int(self.updates)

    def _place(self) -> None:
        """With several devices: weights, moments and average to their shards (fsdp) or to every device (ddp)."""
        if self.mesh is None:
            return
        cut = self.config.distributed == "fsdp"

        def placed(tree: Tree) -> Tree:
            return {k: put(v, shard(self.mesh, v.shape) if cut else whole(self.mesh)) for k, v in tree.items()}

        self.params, self.fixed, self.ema, self.m, self.v = map(
            placed, (self.params, self.fixed, self.ema, self.m, self.v)
        )
        self.updates = put(self.updates, whole(self.mesh))

    def _rows_apart(self, micro_batches: Sequence[Any]) -> Sequence[Any]:
        """The rows of each micro-batch over the devices; the compiler derives all exchanges from where arrays are."""
        if self.mesh is None:
            return micro_batches
        if jax.process_count() > 1:
            micro_batches = alike(micro_batches, self.cameras)
        return [put_rows(batch, self.mesh) for batch in micro_batches]

    @property
    def _dtype(self) -> str | None:
        return None if self.config.precision == "float32" else self.config.precision

    def _state(self, tree: Mapping[str, Array]) -> Any:
        return nnx.from_flat_state([(path, leaf.replace(tree[_key(path)])) for path, leaf in self.leaves])

    def _to_tree(self, arrays: Mapping[str, np.ndarray], rows: Sequence[Any], source: str) -> Tree:
        expected = {name: row.shape(0) for row in rows for name in row.names()}
        check_names(expected, {k: tuple(a.shape) for k, a in arrays.items()}, source)
        found = to_other(rows, {k: np.asarray(a, np.float32) for k, a in arrays.items()})
        return {k: jax.device_put(v, self.device) for k, v in found.items()}

    @staticmethod
    def _to_torch(tree: Mapping[str, Array], rows: Sequence[Any]) -> dict[str, np.ndarray]:
        return to_torch(rows, fetch(dict(tree)))


def frozen_paths(rows: Sequence[Any], names: Set[str]) -> set[str]:
    """Paths of the arrays with these weights.

    Raises:
        SettingsError: the names are of some layers of a stack but not of all.
    """
    paths = set()
    for row in rows:
        mine = [name in names for name in row.names()]
        if any(mine) and not all(mine):
            fix = "freeze all layers of the stack, or train with --framework torch"
            raise SettingsError(
                "JAX keeps the layers of a stack in one array", field="train.freeze",
                got=f"{sum(mine)} of {len(mine)} layers of {row.torch.replace('{l}', '*')}", fix=fix,
            )  # fmt: skip
        if all(mine):
            paths.add(row.path)
    return paths


def recompute_layers(model: VLA) -> None:
    """Recompute transformer layers in the backward pass: sets `checkpointing` on every module that has this switch."""
    switches = [module for _, module in nnx.iter_modules(model) if hasattr(module, "checkpointing")]
    if not switches:
        raise SettingsError(
            "no part of this model can recompute its layers", field="train.checkpoint_activations", got=True
        )
    for module in switches:
        module.checkpointing = True


def _key(path: Sequence[Any]) -> str:
    return "/".join(map(str, path))
