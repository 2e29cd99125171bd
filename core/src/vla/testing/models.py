"""Checks that every part with weights must pass, in each framework and between the two.

The part stands in a small variant of the reference parts; see `vla.testing.partners`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import evolve

from vla.contracts import Actions, Observation, Sampling
from vla.params import cover, from_jax, table, to_jax
from vla.store import read_weights, write_weights
from vla.testing.batches import random_batch
from vla.testing.closeness import close
from vla.testing.frameworks import name_tables, open_model, start_weights
from vla.testing.parts import PartConformance

BATCH = 3
MOST_WEIGHTS = 5_000_000  # of a variant with tiny presets


class Bench:
    """A variant in one framework with weights and a batch; what several checks need is computed once."""

    def __init__(self, variant: Any, framework: str):
        self.variant = variant
        self.model = open_model(framework, variant)
        self.weights = start_weights(variant)
        self.obs, self.actions, self.draws, self.noise = random_batch(variant, BATCH)
        self.names = tuple(variant.head.offers["losses"])
        self._gradients: dict[str | None, tuple[Any, Any]] = {}

    def losses(
        self, obs: Observation | None = None, actions: Actions | None = None, weights: Any = None, draws: Any = None
    ) -> dict[str, np.ndarray]:
        """Losses of the batch, or of a changed one. Same shapes as `gradients`, so JAX compiles one function less."""
        given = (weights or self.weights, obs or self.obs, actions or self.actions, draws or self.draws)
        same_shapes = obs is None or list(obs.images) == list(self.obs.images)
        if self.model.framework == "jax" and same_shapes:
            return self.model.gradients(*given)[0]
        return self.model.losses(*given)

    def gradients(self, loss: str | None = None) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Losses and gradients of the batch; `loss` None: of the weighted sum."""
        if loss not in self._gradients:
            self._gradients[loss] = self.model.gradients(self.weights, self.obs, self.actions, self.draws, loss)
        return self._gradients[loss]


@functools.cache
def bench_of(cls: type, framework: str) -> Bench:
    """The bench of one conformance class."""
    return Bench(cls().variant, framework)


class ModelChecks(PartConformance):
    """Weights, names, gradients, parity."""

    def bench(self, framework: str) -> Bench:
        """Model, weights and batch."""
        return bench_of(type(self), framework)

    @property
    def own(self) -> str:
        """What the names of the part's own weights start with."""
        return {"vision": "backbone.vision.", "llm": "backbone.llm."}.get(self.kind, f"{self.kind}.")

    def _both(self) -> tuple[Bench, Bench]:
        from vla.testing.frameworks import installed

        for framework in ("torch", "jax"):
            if framework not in self.variant.frameworks():
                pytest.skip(f"the part does not declare {framework}")
            if not installed(framework):
                pytest.skip(f"{framework} is not installed")
        return self.bench("torch"), self.bench("jax")

    # ---- weights and their names ------------------------------------------------------------------------------------

    def test_name_table_covers_every_weight(self, framework: str) -> None:
        bench = self.bench(framework)
        cover(name_tables(self.variant, framework), bench.model.shapes(), f"the {framework} model and its name table")

    def test_weights_go_through_both_layouts_unchanged(self) -> None:
        weights = start_weights(self.variant)
        back = from_jax(self.variant, to_jax(self.variant, weights))
        assert list(back) == list(weights)
        for name, value in weights.items():
            assert np.array_equal(back[name], value), name

    def test_fresh_weights_are_finite(self, framework: str) -> None:
        weights = self.bench(framework).model.fresh()
        assert {n: w.shape for n, w in weights.items()} == {n: w.shape for n, w in start_weights(self.variant).items()}
        for name, value in weights.items():
            assert np.isfinite(value).all() and np.abs(value).max(initial=0) < 100, name

    def test_tiny_is_tiny(self) -> None:
        """Presets named `tiny` are for tests and CPUs; a part without one is tested at its default size."""
        count = sum(int(np.prod(row.shape(0))) * (row.layers or 1) for row in table(self.variant))
        assert count <= MOST_WEIGHTS, f"{count:,} weights: give the part a preset 'tiny'"

    def test_saved_weights_give_the_same_losses_bit_for_bit(self, framework: str, tmp_path: Path) -> None:
        bench = self.bench(framework)
        write_weights(tmp_path / "model.safetensors", bench.weights)
        again = read_weights(tmp_path / "model.safetensors")
        before, after = bench.losses(), bench.losses(weights=dict(again))
        assert all(np.array_equal(before[name], after[name]) for name in before)

    # ---- learning ---------------------------------------------------------------------------------------------------

    def test_losses_are_finite_and_one_per_row(self, framework: str) -> None:
        for name, value in self.bench(framework).losses().items():
            assert value.shape == (BATCH,), f"{name} has shape {value.shape}, not [batch]"
            assert value.dtype == np.float32 and np.isfinite(value).all(), f"{name}: {value}"

    def test_every_weight_of_it_learns(self, framework: str) -> None:
        """Some loss has a gradient into each of the part's own weights; one that has none is dead, or cut off."""
        reached: set[str] = set()
        bench = self.bench(framework)
        for loss in bench.names:
            reached |= {name for name, g in bench.gradients(loss)[1].items() if (g != 0).any()}
        dead = [n for n in bench.weights if n.startswith(self.own) and n not in reached and not self._may_rest(n)]
        assert not dead, f"no loss reaches {dead}"

    def _may_rest(self, name: str) -> bool:
        """Weights without gradient by nature: the backbone's last layer gives later tokens keys and values alone."""
        depth = self.variant.backbone.offers["depth"]
        last = f"layers.{depth - 1}.backbone." in name or "final_norm.backbone" in name or "embedder" in name
        bias_of_keys = name.endswith("k.bias")  # softmax does not change when all logits of a query move together
        return bias_of_keys or (name.startswith("backbone.") and last)

    def test_gradients_are_finite(self, framework: str) -> None:
        for name, gradient in self.bench(framework).gradients()[1].items():
            assert np.isfinite(gradient).all(), name

    def test_a_few_steps_learn_a_batch(self, framework: str) -> None:
        """Adam on one batch: the total loss falls by a tenth at least."""
        bench = self.bench(framework)
        weights = {name: value.copy() for name, value in bench.weights.items()}
        m = {name: np.zeros_like(w) for name, w in weights.items()}
        v = {name: np.zeros_like(w) for name, w in weights.items()}
        totals = []
        for step in range(1, 13):
            found, grads = bench.model.gradients(dict(weights), bench.obs, bench.actions, bench.draws)
            totals.append(bench.model.total(found))
            for name, g in grads.items():
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.95 * v[name] + 0.05 * g * g
                scaled = m[name] / (1 - 0.9**step) / (np.sqrt(v[name] / (1 - 0.95**step)) + 1e-8)
                weights[name] = (weights[name] - 0.01 * scaled).astype(np.float32)
        assert min(totals[-3:]) < 0.9 * totals[0], f"total loss: {[round(t, 4) for t in totals]}"

    def test_rows_of_a_batch_do_not_meet(self, framework: str) -> None:
        """Everything in row 0 changes, and the losses of the other rows do not."""
        bench = self.bench(framework)
        rng = np.random.default_rng(5)
        images = {k: v.copy() for k, v in bench.obs.images.items()}
        ids, state = bench.obs.tokenized_prompt.copy(), bench.obs.state.copy()
        for image in images.values():
            image[0] = rng.uniform(-1, 1, image[0].shape)
        ids[0] = (ids[0] * 7 + 11) % 300 + 3
        state[0] = -state[0]
        values = bench.actions.values.copy()
        values[0] = -values[0]
        obs = evolve(bench.obs, images=images, tokenized_prompt=ids, state=state)
        before, after = bench.losses(), bench.losses(obs, Actions(values, bench.actions.mask))
        for name in before:
            close(after[name][1:], before[name][1:], 1e-5, f"{name} of the other rows")
            assert not np.allclose(after[name][0], before[name][0], rtol=1e-6), f"{name} reads nothing"

    # ---- compiling, and the other framework -------------------------------------------------------------------------

    def test_compiles_once(self, framework: str) -> None:
        """JAX: new values of the same shapes compile nothing. PyTorch: no value is looked at, so no graph is cut.

        In PyTorch the model runs on the meta device, which has no values.
        """
        bench = self.bench(framework)
        if framework == "torch":
            bench.model.abstract(bench.obs, bench.actions, bench.draws, bench.noise, self._sampling())
            return
        bench.losses()
        before = dict(bench.model.traces)
        obs, actions, draws, _ = random_batch(self.variant, BATCH, seed=9)
        bench.losses(obs, actions, start_weights(self.variant, 1), draws)
        assert bench.model.traces == before, "the same shapes were compiled again"

    def _sampling(self) -> Sampling | None:
        """Options of `sample` on the meta device; None: leave it out (decoding ends when every row has its answer)."""
        return Sampling(num_steps=2) if self.variant.head.offers["gives"] != "tokens" else None

    def test_both_frameworks_give_the_same_losses(self) -> None:
        torch, jax = (bench.gradients()[0] for bench in self._both())
        assert set(torch) == set(jax)
        for name, value in torch.items():
            close(jax[name], value, 2e-5, name)

    def test_both_frameworks_give_the_same_gradients(self) -> None:
        torch, jax = (bench.gradients()[1] for bench in self._both())
        for name, value in torch.items():
            scale = max(float(np.abs(value).max(initial=0)), 1e-5)
            worst = float(np.abs(jax[name] - value).max(initial=0)) / scale
            assert worst < 2e-3, f"gradient of {name}: {worst:.1e} of its largest element apart"
