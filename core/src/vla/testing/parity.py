"""Both frameworks on the same weights and the same input, part by part in the order in which a pass runs through them.

    batch = random_batch(variant)
    rows = compare(run("torch", variant, weights, batch), run("jax", variant, weights, batch))
    first = next((row for row in rows if not row.fine), None)      # the first part that differs

The two models have the same class and function names, so what is looked at (`stages`) is written once.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
from attrs import field, frozen

from vla.contracts import Actions, DecodeGrammar, Observation, Sampling
from vla.layout import attention_mask, positions
from vla.testing.closeness import relative
from vla.testing.frameworks import prompt_only

Weights = Mapping[str, np.ndarray]
Batch = tuple[Observation, Actions, Any, "np.ndarray | None"]  # as `vla.testing.batches.random_batch` gives it
OUTPUTS, GRADIENTS = 1e-5, 1e-4  # relative bounds in float32
# A key's bias moves all logits of a query alike, so in exact arithmetic its gradient is zero: rounding is all it has.
NO_GRADIENT = "attn.k.bias"


@frozen
class Run:
    """What one framework computed, in the order of the pass."""

    framework: str
    parts: Mapping[str, np.ndarray]  # name -> output
    losses: Mapping[str, np.ndarray]  # name -> [B]
    gradients: Mapping[str, np.ndarray]  # torch name -> gradient of the weighted sum of the losses
    sampled: Mapping[str, np.ndarray] = field(factory=dict)  # actions or tokens


@frozen
class Row:
    """One comparison: the largest difference, as a share of the largest magnitude."""

    what: str  # part | loss | gradient | sample
    name: str
    error: float
    bound: float

    @property
    def fine(self) -> bool:
        """Within the bound; a NaN is not."""
        return self.error <= self.bound


def run(
    framework: str,
    variant: Any,
    weights: Weights,
    batch: Batch,
    *,
    grammar: DecodeGrammar | None = None,
    dtype: str | None = None,
    parts: bool = True,
    sampling: bool = True,
) -> Run:
    """One framework on a batch of host arrays.

    Args:
        framework: "torch" or "jax".
        variant: a `vla.compose.Variant`.
        weights: torch name -> array.
        batch: observation, actions, training draws, sampling noise.
        grammar: for token heads.
        dtype: of matrix products, e.g. "bfloat16"; None: float32 everywhere.
        parts: also look at the output of every part.
        sampling: also sample, from the observation without its targets.
    """
    return {"torch": _run_torch, "jax": _run_jax}[framework](variant, weights, batch, grammar, dtype, parts, sampling)


def compare(
    got: Run, want: Run, *, outputs: float = OUTPUTS, gradients: float = GRADIENTS, samples: float | None = None
) -> list[Row]:
    """Every comparison in order: parts, losses, gradients (one per weight), samples (tokens must be equal).

    The bounds are relative to the largest magnitude of the array; for gradients at least to a millionth of the largest
    gradient in the model, below which there is rounding alone.
    """
    rows = [Row("part", k, relative(got.parts[k], v), outputs) for k, v in want.parts.items()]
    rows += [Row("loss", k, relative(got.losses[k], v), outputs) for k, v in want.losses.items()]
    largest = max((np.abs(g).max() for g in want.gradients.values()), default=0.0)
    for name, gradient in want.gradients.items():
        floor = largest * (1e-3 if name.endswith(NO_GRADIENT) else 1e-6)
        rows.append(Row("gradient", name, relative(got.gradients[name], gradient, floor), gradients))
    for name, array in want.sampled.items():
        bound = 0.0 if name == "tokens" else (outputs if samples is None else samples)
        rows.append(Row("sample", name, relative(got.sampled[name], array), bound))
    return rows


def stages(kit: Any, model: Any, obs: Observation, actions: Actions, draws: Any) -> dict[str, Any]:
    """Outputs of the parts in the order of a training pass, by name. `kit` is the framework's `model` module.

    Layers show themselves by their keys and values: layer 3 differs and layer 2 does not means that the end of layer 2
    or the start of layer 3 is at fault. With several draws per observation the pass is that of the prefix alone.
    """
    out: dict[str, Any] = {}
    vision = getattr(model.backbone, "vision", None)
    if vision is not None and obs.images:
        name, image = next(iter(obs.images.items()))
        out[f"vision ({name})"] = vision(image / 127.5 - 1 if "uint8" in str(image.dtype) else image)
    prefix = model.embed(obs)
    cameras = iter(obs.images)
    for t in prefix:
        out[f"projector ({next(cameras)})" if t.roles[0] == "image" else "embedder"] = t.x
    entry = model.head.enter(obs, actions, draws)
    for t in entry.tokens:
        out[f"head: tokens of {'/'.join(t.roles)}"] = t.x
    for expert, cond in entry.cond.items():
        out[f"head: condition of {expert}"] = cond
    whole = entry.draws == 1
    tokens = (*prefix, *entry.tokens) if whole else prefix
    roles, valid = model._roles_and_valid(tokens)
    outs, layers = model.backbone.llm(
        kit._streams(tokens),
        attention_mask(model.layout, roles, valid),
        positions(model.layout, roles, valid),
        styles=model._styles(entry.cond) if whole else {},
        reads=model.layout.reads([t.span for t in tokens]),
    )
    # PyTorch: a list of (keys, values); JAX: all keys and all values, stacked.
    pairs = layers if isinstance(layers, list) else list(zip(*layers[:2], strict=True))
    for i, pair in enumerate(pairs):
        out[f"layer {i}: keys"], out[f"layer {i}: values"] = (x * valid[:, :, None, None] for x in pair[:2])
    at = 0
    for expert, x in outs.items():  # nobody reads what comes of padding
        out[f"after the layers and the final norm of {expert}"] = x * valid[:, at : at + x.shape[1], None]
        at += x.shape[1]
    return out


def _run_torch(
    variant: Any,
    weights: Weights,
    batch: Batch,
    grammar: DecodeGrammar | None,
    dtype: str | None,
    parts: bool,
    sampling: bool,
) -> Run:
    import torch

    kit = import_module("vla.torch_kit.model")
    obs, actions, draws, noise = batch
    with torch.random.fork_rng(devices=[]):
        model = kit.build_model(variant)
    kit.load_weights(model, variant, weights)
    on_device = kit.observation_to(obs, "cpu")
    chunk = Actions(*(None if a is None else torch.as_tensor(a) for a in (actions.values, actions.mask)))
    low = torch.autocast("cpu", getattr(torch, dtype or "bfloat16"), enabled=dtype is not None)
    with low:
        with torch.no_grad():
            seen = stages(kit, model, on_device, chunk, kit.tree_to(draws, "cpu")) if parts else {}
        losses = model.loss(on_device, chunk, kit.tree_to(draws, "cpu"))
    model.total(losses).backward()
    gradients = {
        name: np.zeros(tuple(p.shape), np.float32) if p.grad is None else p.grad.numpy()
        for name, p in model.named_parameters()
    }
    sampled = {}
    if sampling:
        start = None if noise is None else torch.as_tensor(noise)
        with low:
            sampled = model.sample(kit.observation_to(prompt_only(obs), "cpu"), start, Sampling(grammar=grammar))

    def host(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {k: (v.float() if v.is_floating_point() else v).detach().numpy() for k, v in tree.items()}

    return Run("torch", host(seen), host(losses), gradients, host(sampled))


def _run_jax(
    variant: Any,
    weights: Weights,
    batch: Batch,
    grammar: DecodeGrammar | None,
    dtype: str | None,
    parts: bool,
    sampling: bool,
) -> Run:
    import jax

    kit = import_module("vla.jax_kit.model")
    autocast = import_module("vla.jax_kit.ops").autocast
    obs, actions, draws, noise = batch
    model = kit.abstract_model(variant)
    kit.load_weights(model, variant, weights)
    graph, params = kit.split(model)
    order: list[str] = []  # JAX sorts the keys of a dict

    def total(params: Any, obs: Any, actions: Any, draws: Any) -> tuple[Any, Any]:
        model = kit.merge(graph, params)
        with autocast(dtype):
            seen = stages(kit, model, obs, actions, draws) if parts else {}
            losses = model.loss(obs, actions, draws)
        order[:] = seen
        return model.total(losses), (tuple(seen.values()), losses)

    with jax.default_matmul_precision("highest"):
        gradients, (seen, losses) = jax.jit(jax.grad(total, has_aux=True))(params, obs, actions, draws)
        sampled = model.sample(prompt_only(obs), noise, Sampling(grammar=grammar), dtype=dtype) if sampling else {}

    def host(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {k: np.asarray(v, v.dtype if v.dtype.kind in "iu" else np.float32) for k, v in tree.items()}

    named = dict(zip(order, seen, strict=True))
    return Run("jax", host(named), host(losses), kit.weights_of(gradients, variant), host(sampled))


def random_weights(rows: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights for a part alone, from its name table: all random, none zero."""
    from vla.params import shapes

    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in shapes(rows).items():
        scale = np.float32(np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1)
        out[name] = rng.standard_normal(shape).astype(np.float32) * scale
    return out


def part_parity(torch_part: Any, jax_part: Any, rows: Any, call: Any, *inputs: np.ndarray) -> list[Row]:
    """A part alone in both frameworks, on the same random weights: its outputs and the gradients of its weights.

    Args:
        torch_part, jax_part: the two modules; the JAX one may be abstract (`nnx.eval_shape`).
        rows: the part's name table.
        call: (module, *inputs) -> list of arrays, in operations that both frameworks have.
        inputs: numpy arrays.
    """
    import jax
    import torch
    from flax import nnx

    kit = import_module("vla.jax_kit.model")
    rows = tuple(rows)
    weights = random_weights(rows)
    torch_part.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()})
    want = call(torch_part, *map(torch.tensor, inputs))
    rng = np.random.default_rng(1)
    looks = [rng.standard_normal(tuple(x.shape)).astype(np.float32) for x in want]  # a random reading of every output
    sum((x * torch.from_numpy(look)).sum() for x, look in zip(want, looks, strict=True)).backward()
    kit.fill(jax_part, rows, weights)
    graph, params = nnx.split(jax_part)

    def read(params: Any, *inputs: Any) -> tuple[Any, Any]:
        found = call(nnx.merge(graph, params), *inputs)
        return sum((x * look).sum() for x, look in zip(found, looks, strict=True)), found

    with jax.default_matmul_precision("highest"):
        gradients, got = jax.jit(jax.grad(read, has_aux=True))(params, *inputs)
    mine = {n: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for n, p in torch_part.named_parameters()}

    def as_run(framework: str, outputs: Any, gradients: Weights) -> Run:
        return Run(framework, {f"output {i}": np.asarray(x) for i, x in enumerate(outputs)}, {}, gradients)

    return compare(as_run("jax", got, kit.named(gradients, rows)), as_run("torch", [x.detach() for x in want], mine))
