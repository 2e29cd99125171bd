"""The conformance kit of LLM cores."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from attrs import evolve

from vla.compose import build
from vla.layout import BACKBONE, gradient_routes
from vla.testing.batches import random_batch
from vla.testing.closeness import close
from vla.testing.frameworks import open_model, start_weights
from vla.testing.heads import group_of
from vla.testing.models import BATCH, ModelChecks
from vla.testing.vision import merged

T, PREFIX = 8, 5  # tokens in all, and of them in the prefix


def fused(model: Any, x: Any, mask: Any, positions: Any) -> Any:
    """All tokens in one pass."""
    return model.backbone.llm({BACKBONE: x}, mask, positions)[0][BACKBONE]


def cached(model: Any, x: Any, mask: Any, positions: Any) -> Any:
    """The prefix first, then the rest over its cache."""
    llm = model.backbone.llm
    _, layers = llm({BACKBONE: x[:, :PREFIX]}, mask[:, :PREFIX, :PREFIX], positions[:, :PREFIX], outputs=())
    layers = llm.room(layers, T - PREFIX)
    outs, _ = llm({BACKBONE: x[:, PREFIX:]}, mask[:, PREFIX:], positions[:, PREFIX:], cache=layers, write_at=PREFIX)
    return outs[BACKBONE]


def one_by_one(model: Any, x: Any, mask: Any, positions: Any) -> Any:
    """The prefix, then one token after the other, as in decoding."""
    llm = model.backbone.llm
    _, layers = llm({BACKBONE: x[:, :PREFIX]}, mask[:, :PREFIX, :PREFIX], positions[:, :PREFIX], outputs=())
    layers = llm.room(layers, T - PREFIX)
    found = []
    for i in range(PREFIX, T):
        here = slice(i, i + 1)
        outs, layers = llm({BACKBONE: x[:, here]}, mask[:, here], positions[:, here], cache=layers, write_at=i)
        found.append(outs[BACKBONE])
    return found


def words(model: Any, ids: Any) -> Any:
    """Embedding of token ids, and the output table."""
    return model.backbone.llm.embed(ids), model.backbone.llm.unembed()


def only_cache(model: Any, x: Any, mask: Any, positions: Any) -> Any:
    """What is computed when no result is wanted: nothing but the cache."""
    outs, _ = model.backbone.llm({BACKBONE: x}, mask, positions, outputs=())
    return dict(outs)


def style_rows(model: Any, cond: Any) -> Any:
    """The last row of the styles of a condition, and the styles of its last row."""
    llm = model.backbone.llm
    return llm.style_at(llm.styles("action", cond), 1), llm.styles("action", cond[1:2])


def style_tokens(model: Any, cond: Any, rows: Any) -> Any:
    """The styles of a row of the condition for every token, and those of a condition that has a row for every token."""
    llm = model.backbone.llm
    return llm.style_at(llm.styles("action", cond), rows), llm.styles("action", cond[rows])


class LlmConformance(ModelChecks):
    """An LLM core: embeddings, masked attention, prefix cache and what it offers, in every framework it declares."""

    kind = "llm"

    def inputs(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x [B T D], a mask (the prefix sees itself whole, what follows is causal), positions [B T]."""
        width = self.chosen.offers["width"]
        x = np.random.default_rng(seed).standard_normal((2, T, width)).astype(np.float32)
        mask = np.tril(np.ones((T, T), bool))
        mask[:PREFIX, :PREFIX] = True
        return x, np.repeat(mask[None], 2, 0), np.repeat(np.arange(T, dtype=np.int32)[None], 2, 0)

    def run(self, framework: str, function: Any, *arrays: Any) -> Any:
        """A function of the module on arrays."""
        bench = self.bench(framework)
        return bench.model.call(bench.weights, function, *arrays)

    def test_hidden_states_keep_width_and_dtype(self, framework: str) -> None:
        x, mask, positions = self.inputs()
        out = self.run(framework, fused, x, mask, positions)
        assert out.shape == x.shape and out.dtype == np.float32 and np.isfinite(out).all()

    def test_the_module_holds_its_settings(self, framework: str) -> None:
        model = self.bench(framework).model
        llm = model.model.backbone.llm if framework == "torch" else merged(model).backbone.llm
        offers = self.chosen.offers
        width = getattr(getattr(llm, "settings", None), "width", None)
        assert width == offers["width"], "a backbone reads `llm.settings.width` for its projector"

    def test_tables_have_the_offered_sizes(self, framework: str) -> None:
        offers = self.chosen.offers
        ids = np.array([[0, 1, offers["vocab_size"] - 1]], np.int32)
        x, table = self.run(framework, words, ids)
        assert x.shape == (1, 3, offers["width"])
        if offers["decodes"]:
            assert table.shape == (offers["vocab_size"], offers["width"])
        assert not np.allclose(x[0, 0], x[0, 1]), "two tokens have one embedding"

    def test_nobody_sees_behind_the_mask(self, framework: str) -> None:
        x, mask, positions = self.inputs()
        other = x.copy()
        other[:, PREFIX:] = self.inputs(1)[0][:, PREFIX:]
        before, after = (self.run(framework, fused, y, mask, positions) for y in (x, other))
        close(after[:, :PREFIX], before[:, :PREFIX], 1e-6, "the prefix, which cannot see what changed,")
        assert not np.allclose(after[:, -1], before[:, -1])

    def test_what_the_mask_shows_counts(self, framework: str) -> None:
        x, mask, positions = self.inputs()
        other = x.copy()
        other[:, 0] = -other[:, 0]
        before, after = (self.run(framework, fused, y, mask, positions) for y in (x, other))
        assert not np.isclose(before, after).all(-1).any(), "some token does not see the first"

    def test_positions_count(self, framework: str) -> None:
        x, mask, positions = self.inputs()
        before, after = (self.run(framework, fused, x, mask, p) for p in (positions, positions[:, ::-1].copy()))
        assert not np.allclose(before, after), "the order of tokens is not seen"

    def test_a_token_that_sees_nobody_is_finite(self, framework: str) -> None:
        x, mask, positions = self.inputs()
        mask = mask.copy()
        mask[:, 3] = False
        assert np.isfinite(self.run(framework, fused, x, mask, positions)).all()

    def test_rows_do_not_meet(self, framework: str) -> None:
        x, mask, positions = self.inputs()
        other = x.copy()
        other[0] = -other[0]
        before, after = (self.run(framework, fused, y, mask, positions) for y in (x, other))
        close(after[1], before[1], 1e-6, "the other row")

    def test_a_cached_prefix_gives_the_same(self, framework: str) -> None:
        inputs = self.inputs()
        whole, rest = self.run(framework, fused, *inputs), self.run(framework, cached, *inputs)
        close(rest, whole[:, PREFIX:], 2e-5, "the pass over the cache")

    def test_decoding_one_by_one_gives_the_same(self, framework: str) -> None:
        inputs = self.inputs()
        whole, rest = self.run(framework, fused, *inputs), self.run(framework, one_by_one, *inputs)
        close(np.concatenate(rest, 1), whole[:, PREFIX:], 2e-5, "decoding")

    def test_nothing_wanted_nothing_computed(self, framework: str) -> None:
        assert self.run(framework, only_cache, *self.inputs()) == {}

    def test_both_frameworks_give_the_same_hidden_states(self) -> None:
        torch, jax = (bench.model.call(bench.weights, fused, *self.inputs()) for bench in self._both())
        close(jax, torch, 2e-5, "hidden states")

    # ---- what it may offer ------------------------------------------------------------------------------------------

    def test_gradients_stop_where_the_layout_says(self, framework: str) -> None:
        """`insulates`: with every look of the action expert stopped, its loss leaves the backbone alone, exactly."""
        if not (self.chosen.offers["insulates"] and self.chosen.offers["multi_expert"]):
            pytest.skip("the part does not offer to insulate")
        model, loss, variant = insulated(type(self), framework)
        batch = random_batch(variant, BATCH)[:3]
        weights = start_weights(variant)
        reached = {n for n, g in model.gradients(weights, *batch, loss)[1].items() if (g != 0).any()}
        routes = gradient_routes(variant.layout(), variant.head.offers["losses"])[loss]
        assert not routes[BACKBONE] and routes["action"]
        assert {group_of(name) for name in reached} <= {"action", ""}, "gradient leaks through a stop"
        assert any(group_of(name) == "action" for name in reached)

    def test_styles_can_be_cut_by_rows(self, framework: str) -> None:
        """`adarms`: the styles of many times are computed at once, and taken row by row."""
        if not self.chosen.offers["adarms"] or "action" not in self.variant.experts():
            pytest.skip("the part does not offer adaRMS")
        width = self.variant.experts()["action"].width
        cond = np.random.default_rng(0).standard_normal((3, width)).astype(np.float32)
        cut, alone = self.run(framework, style_rows, cond)
        for a, b in zip(cut, alone, strict=True):
            close(a, b, 1e-5, "styles of one row")

    def test_styles_can_differ_by_token(self, framework: str) -> None:
        """`adarms`: a row of the condition for every token, as in chunks that go on from given steps."""
        if not self.chosen.offers["adarms"] or "action" not in self.variant.experts():
            pytest.skip("the part does not offer adaRMS")
        width = self.variant.experts()["action"].width
        cond = np.random.default_rng(0).standard_normal((3, width)).astype(np.float32)
        cut, alone = self.run(framework, style_tokens, cond, np.array([[2, 0], [1, 1]]))
        for a, b in zip(cut, alone, strict=True):
            close(a, b, 1e-5, "styles of every token")

    def test_recomputing_changes_no_gradient(self, framework: str) -> None:
        """`checkpointing = True` trades time for memory, and nothing else."""
        bench = self.bench(framework)
        if framework == "jax":
            pytest.skip("checked in PyTorch; JAX recomputes by a transformation of the same function")
        llm = bench.model.model.backbone.llm
        assert hasattr(llm, "checkpointing"), "trainers set `llm.checkpointing`"
        before = bench.gradients()[1]
        llm.checkpointing = True
        try:
            after = bench.model.gradients(bench.weights, bench.obs, bench.actions, bench.draws)[1]
        finally:
            llm.checkpointing = False
        largest = max(np.abs(gradient).max() for gradient in before.values())
        for name, value in before.items():
            close(after[name], value, 1e-5, f"gradient of {name}", scale=1e-3 * largest)


@cache
def insulated(cls: type, framework: str) -> tuple[Any, str, Any]:
    """A model of the class's variant whose head has every look at the backbone stopped; its loss; the variant."""
    variant = cls().variant
    part = variant.head.part
    insulating = evolve(part, layout=lambda settings, inner: part.layout(settings, inner).insulated())
    table = {**variant.head.table(), "part": insulating}
    table.pop("from", None)
    other = build(base=variant, head=table)
    return open_model(framework, other), next(iter(variant.head.offers["losses"])), other
