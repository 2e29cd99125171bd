"""One face for both frameworks, so that every check is written once.

A `Model` is a variant in one framework, as pure functions of numpy arrays: weights go by their torch names, batches are
those of `vla.testing.batches`. Plugin authors may use it for tests of their own:

    model = open_model("jax", variant)
    losses = model.losses(weights, obs, actions, draws)          # {name: [B]}
    losses, gradients = model.gradients(weights, obs, actions, draws, loss="actions")
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from attrs import evolve

from vla.contracts import DEFAULT_SAMPLING, Actions, Observation, Sampling
from vla.params import JAX, shapes, table

Weights = Mapping[str, np.ndarray]
NEEDS = {"torch": ("torch",), "jax": ("jax", "flax")}
# XLA spends most of a tiny model's time on optimising it.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def installed(framework: str) -> bool:
    """Whether a framework can be imported here (it is not imported)."""
    return all(importlib.util.find_spec(name) is not None for name in NEEDS[framework])


def open_model(framework: str, variant: Any) -> TorchModel | JaxModel:
    """The variant in one framework."""
    return {"torch": TorchModel, "jax": JaxModel}[framework](variant)


def start_weights(variant: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights for tests, from the name tables alone: all of them random, none zero, so that nothing hides."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in shapes(table(variant)).items():
        noise = rng.standard_normal(shape).astype(np.float32)
        out[name] = noise * np.float32(np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1)
        if "norm" in name and name.endswith("weight") and len(shape) == 1:
            out[name] += 1  # LayerNorm
    return out


def prompt_only(obs: Observation) -> Observation:
    """The observation as it is at inference: no targets."""
    if obs.token_ar_mask is None or obs.tokenized_prompt_mask is None:
        return obs
    mask = obs.tokenized_prompt_mask & (obs.token_ar_mask == 0)
    return evolve(obs, tokenized_prompt_mask=mask, token_ar_mask=None, token_loss_mask=None)


class TorchModel:
    """A variant in PyTorch, on the CPU, in float32."""

    framework = "torch"

    def __init__(self, variant: Any):
        import torch

        from vla.torch_kit.model import build_model

        self.variant = variant
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = build_model(variant).float()
        self._given: Weights | None = None

    def fresh(self) -> dict[str, np.ndarray]:
        """Weights as the parts initialise them, with a fixed seed."""
        return {name: p.detach().numpy().copy() for name, p in self.model.named_parameters()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all that a checkpoint would hold, by name."""
        return {name: tuple(x.shape) for name, x in self.model.state_dict().items()}

    def load(self, weights: Weights) -> Any:
        """The module with these weights."""
        import torch

        if weights is not self._given:
            with torch.no_grad():
                for name, p in self.model.named_parameters():
                    p.copy_(torch.from_numpy(np.array(weights[name], np.float32)))
            self._given = weights
        return self.model

    def losses(self, weights: Weights, obs: Observation, actions: Actions, draws: Any) -> dict[str, np.ndarray]:
        """{name: [B]}."""
        import torch

        with torch.no_grad():
            return {k: v.numpy() for k, v in self.load(weights).loss(*self._batch(obs, actions, draws)).items()}

    def gradients(
        self, weights: Weights, obs: Observation, actions: Actions, draws: Any, loss: str | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """{name: [B]}, and {weight: gradient} of the batch mean of one loss (None: of the weighted sum)."""
        model = self.load(weights)
        model.zero_grad(set_to_none=True)
        found = model.loss(*self._batch(obs, actions, draws))
        value = model.total(found) if loss is None else found[loss].mean()
        if value.requires_grad:
            value.backward()
        gradients = {
            name: np.zeros(tuple(p.shape), np.float32) if p.grad is None else p.grad.numpy().copy()
            for name, p in model.named_parameters()
        }
        return {k: v.detach().numpy() for k, v in found.items()}, gradients

    def total(self, losses: Mapping[str, np.ndarray]) -> float:
        """The number that training minimises."""
        import torch

        return float(self.model.total({k: torch.as_tensor(v) for k, v in losses.items()}))

    def sample(
        self, weights: Weights, obs: Observation, noise: np.ndarray | None, sampling: Sampling = DEFAULT_SAMPLING
    ) -> dict[str, np.ndarray]:
        """What `VLA.sample` gives."""
        import torch

        from vla.torch_kit.model import observation_to, sampling_to

        start = None if noise is None else torch.as_tensor(noise)
        out = self.load(weights).sample(observation_to(obs, "cpu"), start, sampling_to(sampling, "cpu"))
        return {k: v.numpy() for k, v in out.items()}

    def call(self, weights: Weights, function: Callable[..., Any], *arrays: Any) -> Any:
        """function(module, *tensors) without gradients; trees of arrays in and out."""
        import torch

        with torch.no_grad():
            return _map(function(self.load(weights), *_map(arrays, torch.as_tensor)), lambda x: x.numpy())

    def abstract(
        self, obs: Observation, actions: Actions, draws: Any, noise: np.ndarray | None, options: Sampling | None
    ) -> None:
        """Loss and sample on the meta device, where any look at a value fails, as it would cut a compiled graph."""
        import torch

        from vla.torch_kit.model import build_model, observation_to, tree_to

        with torch.device("meta"):
            model = build_model(self.variant)
        chunk = Actions(torch.as_tensor(actions.values, device="meta"), torch.as_tensor(actions.mask, device="meta"))
        model.loss(observation_to(obs, "meta"), chunk, tree_to(draws, "meta"))
        if options is not None:
            start = None if noise is None else torch.as_tensor(noise, device="meta")
            model.sample(observation_to(prompt_only(obs), "meta"), start, options)

    def _batch(self, obs: Observation, actions: Actions, draws: Any) -> tuple[Any, Any, Any]:
        import torch

        from vla.torch_kit.model import observation_to, tree_to

        chunk = (None if a is None else torch.as_tensor(a) for a in (actions.values, actions.mask, actions.given))
        return observation_to(obs, "cpu"), Actions(*chunk), tree_to(draws, "cpu")


class JaxModel:
    """A variant in JAX, on the CPU, in float32. `traces` counts how often a function was compiled."""

    framework = "jax"

    def __init__(self, variant: Any):
        import jax

        from vla.jax_kit.model import abstract_model, merge, split

        self.variant = variant
        self.traces: dict[str, int] = {"losses": 0, "gradients": 0, "sample": 0}
        self._given: Weights | None = None
        self._params: Any = None
        self._graph, self._shapes = split(abstract_model(variant))

        def count(name: str) -> None:  # runs while a function is traced, so once per compilation
            self.traces[name] += 1

        def losses(params: Any, obs: Any, actions: Any, draws: Any) -> Any:
            count("losses")
            return merge(self._graph, params).loss(obs, actions, draws)

        def gradients(params: Any, chosen: Any, obs: Any, actions: Any, draws: Any) -> Any:
            count("gradients")

            def total(params: Any) -> Any:
                found = merge(self._graph, params).loss(obs, actions, draws)
                return sum(chosen[name] * value.mean() for name, value in found.items()), found

            (_, found), grads = jax.value_and_grad(total, has_aux=True)(params)
            return found, grads

        def sample(params: Any, obs: Any, noise: Any, sampling: Sampling) -> Any:
            count("sample")
            model = merge(self._graph, params)
            return model.head.sample(model, obs, noise, sampling)

        self._losses = jax.jit(losses, compiler_options=QUICK)
        self._gradients = jax.jit(gradients, compiler_options=QUICK)
        self._sample = jax.jit(sample, compiler_options=QUICK)
        self._calls: dict[Any, Any] = {}

    def fresh(self) -> dict[str, np.ndarray]:
        """Weights as the parts initialise them, with a fixed seed."""
        import jax

        from vla.jax_kit.model import build_model, split, weights_of

        params = jax.jit(lambda: split(build_model(self.variant))[1], compiler_options=QUICK)()
        return weights_of(params, self.variant)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters, by nnx path."""
        from flax import nnx

        return {
            "/".join(map(str, path)): tuple(leaf.get_value().shape) for path, leaf in nnx.to_flat_state(self._shapes)
        }

    def load(self, weights: Weights) -> Any:
        """The parameters as a pytree."""
        from vla.jax_kit.model import abstract_model, load_weights, split

        if weights is not self._given:
            model = abstract_model(self.variant)
            load_weights(model, self.variant, weights)
            self._params = split(model)[1]
            self._given = weights
        return self._params

    def losses(self, weights: Weights, obs: Observation, actions: Actions, draws: Any) -> dict[str, np.ndarray]:
        """{name: [B]}."""
        return _map(self._losses(self.load(weights), obs, actions, draws), np.asarray)

    def gradients(
        self, weights: Weights, obs: Observation, actions: Actions, draws: Any, loss: str | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """{name: [B]}, and {weight: gradient} of the batch mean of one loss (None: of the weighted sum)."""
        from vla.jax_kit.model import weights_of

        parts = self._weights()
        chosen = {name: np.float32(w if loss is None else name == loss) for name, w in parts.items()}
        found, grads = self._gradients(self.load(weights), chosen, obs, actions, draws)
        return _map(found, np.asarray), weights_of(grads, self.variant)

    def total(self, losses: Mapping[str, np.ndarray]) -> float:
        """The number that training minimises."""
        return float(sum(weight * losses[name].mean() for name, weight in self._weights().items()))

    def _weights(self) -> dict[str, float]:
        from vla.jax_kit.model import merge

        return merge(self._graph, self._shapes).head.weights()

    def sample(
        self, weights: Weights, obs: Observation, noise: np.ndarray | None, sampling: Sampling = DEFAULT_SAMPLING
    ) -> dict[str, np.ndarray]:
        """What `VLA.sample` gives."""
        return _map(self._sample(self.load(weights), obs, noise, sampling), np.asarray)

    def call(self, weights: Weights, function: Callable[..., Any], *arrays: Any) -> Any:
        """function(module, *arrays), compiled; trees of arrays in and out."""
        import jax

        from vla.jax_kit.model import merge

        if function not in self._calls:
            self._calls[function] = jax.jit(
                lambda params, *a: function(merge(self._graph, params), *a), compiler_options=QUICK
            )
        return _map(self._calls[function](self.load(weights), *arrays), np.asarray)


def name_tables(variant: Any, framework: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape that the parts' tables promise for one framework."""
    from vla.params import other_shapes

    rows = table(variant, JAX)
    return shapes(rows) if framework == "torch" else other_shapes(rows)


def _map(tree: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(tree, Mapping):
        return {k: _map(v, function) for k, v in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(_map(v, function) for v in tree)
    return tree if tree is None or isinstance(tree, (int, float, str)) else function(tree)
