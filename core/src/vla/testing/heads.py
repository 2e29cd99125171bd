"""The conformance kit of heads."""

from __future__ import annotations

from typing import Any

import numpy as np
from attrs import evolve

from vla.contracts import Actions, DecodeGrammar, Observation, Sampling, Spec, pack
from vla.draws import sampling_noise, training_draws
from vla.layout import BACKBONE, Layout, gradient_routes
from vla.testing.closeness import close
from vla.testing.frameworks import prompt_only
from vla.testing.models import BATCH, Bench, ModelChecks

GIVES = ("tokens", "chunk", "both")


class HeadConformance(ModelChecks):
    """A head: its layout, losses, gradients and sampler, in every framework it declares."""

    kind = "head"

    # ---- the layout -------------------------------------------------------------------------------------------------

    def test_layout_names_the_experts_there_are(self) -> None:
        layout, experts = self.variant.layout(), self.variant.experts()
        assert isinstance(layout, Layout)
        assert set(layout.experts) == {BACKBONE, *experts}, "an expert without a row is dead weight"
        assert layout.experts[0] == BACKBONE, "the backbone's rows come first"
        assert self.chosen.offers["own_expert"] == bool(experts)

    def test_layout_survives_its_text(self) -> None:
        layout = self.variant.layout()
        assert Layout.parse(str(layout)) == layout

    def test_images_and_prompt_do_not_look_ahead(self) -> None:
        """The prefix is cached before sampling, so it must not see what is sampled."""
        layout = self.variant.layout()
        for role in ("image", "prompt"):
            seen = influences(layout, role)
            assert seen <= {"image", "prompt"}, f"{role} sees {sorted(seen - {'image', 'prompt'})}"

    def test_losses_belong_to_roles(self) -> None:
        offers = self.chosen.offers
        assert offers["gives"] in GIVES and offers["losses"], f"gives: {offers['gives']}, losses: {offers['losses']}"
        for loss, role in offers["losses"].items():
            assert role in self.variant.layout().roles, f"loss {loss!r} is said to be of role {role!r}"

    def test_losses_are_those_it_offers(self, framework: str) -> None:
        bench = self.bench(framework)
        want = set(self.chosen.offers["losses"])
        assert set(bench.losses()) == want
        ones = {name: np.ones(1, np.float32) for name in want}
        assert np.isfinite(bench.model.total(ones)), "`weights()` has a weight for every loss"

    def test_random_numbers_come_from_the_generator(self) -> None:
        spec, head = self.variant.spec, self.variant.head
        for function in (training_draws, sampling_noise):
            a, b, c = (flat(function(head, spec, 3, np.random.default_rng(seed))) for seed in (0, 0, 1))
            assert all(np.array_equal(x, b[name]) for name, x in a.items()), "same seed, other numbers"
            assert not a or any(not np.array_equal(x, c[name]) for name, x in a.items()), "the seed changes nothing"
            for name, x in a.items():
                assert x.shape[0] == 3 and x.dtype in (np.float32, np.int32) and np.isfinite(x).all(), name

    # ---- what changes nothing ---------------------------------------------------------------------------------------

    def test_padded_steps_and_dims_change_nothing(self, framework: str) -> None:
        bench = self.bench(framework)
        mask = bench.actions.mask
        junk = np.where(mask, bench.actions.values, 99).astype(np.float32)
        before, after = bench.losses(), bench.losses(actions=Actions(junk, mask))
        for name in before:
            close(after[name], before[name], 1e-5, f"{name} under other padding")

    def test_real_actions_change_the_loss(self, framework: str) -> None:
        """The check above must be able to fail. A loss on tokens learns from the prompt's targets instead."""
        bench = self.bench(framework)
        other = Actions(bench.actions.values[:, ::-1].copy(), bench.actions.mask)
        ids = np.where(bench.obs.token_ar_mask == 1, 7, bench.obs.tokenized_prompt) if has_targets(bench) else None
        obs = bench.obs if ids is None else evolve(bench.obs, tokenized_prompt=ids.astype(np.int32))
        before, after = bench.losses(), bench.losses(obs, other)
        for name in before:
            assert not np.allclose(before[name], after[name], rtol=1e-4), f"{name} does not depend on the actions"

    def test_an_absent_camera_changes_nothing(self, framework: str) -> None:
        bench = self.bench(framework)
        last = self.variant.spec.cameras[-1]
        gone = {**bench.obs.image_masks, last: np.zeros(BATCH, bool)}
        absent = evolve(bench.obs, image_masks=gone)
        other = evolve(absent, images={**absent.images, last: -absent.images[last]})
        before, after = bench.losses(absent), bench.losses(other)
        for name in before:
            close(after[name], before[name], 1e-5, f"{name} with other pixels of an absent camera")

    def test_packing_changes_nothing(self, framework: str) -> None:
        """What callers do on the host: absent cameras and padding are not computed (`vla.contracts.pack`)."""
        bench = self.bench(framework)
        last = self.variant.spec.cameras[-1]
        absent = evolve(bench.obs, image_masks={**bench.obs.image_masks, last: np.zeros(BATCH, bool)})
        packed = pack(absent)
        assert last not in packed.images
        before, after = bench.losses(absent), bench.losses(packed)
        for name in before:
            close(after[name], before[name], 2e-5, f"{name} of the packed batch")

    def test_prompt_padding_changes_nothing(self, framework: str) -> None:
        bench = self.bench(framework)
        ids = np.where(bench.obs.tokenized_prompt_mask, bench.obs.tokenized_prompt, 17).astype(np.int32)
        before, after = bench.losses(), bench.losses(evolve(bench.obs, tokenized_prompt=ids))
        for name in before:
            close(after[name], before[name], 1e-5, f"{name} with other padding of the prompt")

    def test_inputs_count_where_the_layout_says(self, framework: str) -> None:
        """Per loss: an input that its role sees, even through others, changes it; one that it cannot see does not."""
        bench = self.bench(framework)
        layout, losses = self.variant.layout(), self.chosen.offers["losses"]
        before = bench.losses()
        for role, obs in changed_inputs(bench, self.variant.spec).items():
            after = bench.losses(obs)
            for name, reader in losses.items():
                if role in influences(layout, reader):
                    assert not np.allclose(after[name], before[name], rtol=1e-6), f"{name} does not see {role}"
                else:
                    close(after[name], before[name], 1e-6, f"{name}, which cannot see {role},")

    def test_state_counts_as_declared(self, framework: str) -> None:
        """`state = continuous` reads `obs.state`; `tokens` and `none` do not (tokens: it is in the prompt already)."""
        bench = self.bench(framework)
        before, after = bench.losses(), bench.losses(evolve(bench.obs, state=-bench.obs.state))
        moved = any(not np.allclose(before[name], after[name], rtol=1e-6) for name in before)
        assert moved == (self.chosen.offers["state"] == "continuous"), f"state: {self.chosen.offers['state']}"

    # ---- gradients --------------------------------------------------------------------------------------------------

    def test_gradients_flow_where_the_layout_says_and_nowhere_else(self, framework: str) -> None:
        """Exactly zero where the table cuts them, not zero where it does not, per loss and group of weights."""
        bench = self.bench(framework)
        routes = gradient_routes(self.variant.layout(), self.chosen.offers["losses"])
        for loss, to in routes.items():
            reached = {n for n, g in bench.gradients(loss)[1].items() if (g != 0).any()}
            for group, open_route in to.items():
                names = [n for n in bench.weights if group_of(n) == group]
                hit = sorted(reached & set(names))
                if open_route:
                    assert hit, f"{loss} does not reach {group}, which the layout lets it"
                else:
                    assert not hit, f"{loss} leaks into {group}: {hit[:3]}"
            if not to[BACKBONE]:
                assert "backbone.llm.embedder.weight" not in reached, f"{loss} leaks into the embedding"

    def test_a_row_counts_as_much_as_its_weight(self, framework: str) -> None:
        """Token losses: `extra["target_weight"]` is the share of a row's steps that lie within the episode."""
        losses = [name for name, role in self.chosen.offers["losses"].items() if role == "target"]
        if not losses:
            return
        bench = self.bench(framework)
        weight = np.linspace(0.0, 1.0, BATCH).astype(np.float32)
        before = bench.losses()
        after = bench.losses(evolve(bench.obs, extra={**bench.obs.extra, "target_weight": weight}))
        for name, value in before.items():
            close(after[name], value * (weight if name in losses else 1), 1e-5, f"{name} of weighted rows")

    # ---- sampling ---------------------------------------------------------------------------------------------------

    def sample(
        self, bench: Bench, obs: Observation | None = None, noise: Any = None, weights: Any = None
    ) -> dict[str, np.ndarray]:
        """A chunk, or tokens, for the batch."""
        gives = self.chosen.offers["gives"]
        return bench.model.sample(
            weights or bench.weights,
            prompt_only(obs or bench.obs),
            bench.noise if noise is None else noise,
            Sampling(grammar=grammar(self.variant))
            if gives == "tokens"
            else Sampling(num_steps=2, action_dim_mask=np.ones(self.variant.spec.action_dim, bool)),
        )

    def test_sample_gives_what_it_offers(self, framework: str) -> None:
        bench, spec = self.bench(framework), self.variant.spec
        out = self.sample(bench)
        if self.chosen.offers["gives"] == "tokens":
            rules = grammar(self.variant)
            length = dict(zip(rules.action_ids.tolist(), rules.lengths.tolist(), strict=True))
            for row in out["tokens"].tolist():
                ids = row[len(rules.prefix) : len(row) - row[::-1].index(rules.suffix[-1]) - len(rules.suffix)]
                assert tuple(row[: len(rules.prefix)]) == rules.prefix
                assert sum(length[i] for i in ids) == rules.total, "the answer stands for no whole chunk"
        else:
            assert set(out) == {"actions"}
            assert out["actions"].shape == (BATCH, spec.action_horizon, spec.action_dim)
            assert out["actions"].dtype == np.float32 and np.isfinite(out["actions"]).all()

    def test_broken_weights_give_no_answer(self, framework: str) -> None:
        """The largest of NaN logits is some token: a head that gives tokens says which rows are no answer."""
        bench = self.bench(framework)
        out = self.sample(bench, weights={name: np.full_like(w, np.nan) for name, w in bench.weights.items()})
        if self.chosen.offers["gives"] != "tokens":
            assert np.isnan(out["actions"]).any((1, 2)).all(), "NaN weights give actions that a robot would execute"
        else:
            assert "finite" in out, 'give {"tokens": [B n], "finite": [B]}: whether all logits of the row were finite'
            assert not out["finite"].any(), "tokens chosen from NaN logits pass as an answer"
            assert self.sample(bench)["finite"].all(), "a good answer does not pass"

    def test_sample_is_a_function_of_its_noise(self, framework: str) -> None:
        bench = self.bench(framework)
        first, second = self.sample(bench), self.sample(bench)
        for name, value in first.items():
            assert np.array_equal(value, second[name]), "the same noise gave another sample"
        if bench.noise is not None and self.chosen.offers["gives"] != "tokens":
            other = self.sample(bench, noise=bench.noise[::-1].copy())
            assert not np.allclose(other["actions"], first["actions"]), "the noise changes nothing"

    def test_sample_does_not_depend_on_neighbours(self, framework: str) -> None:
        bench = self.bench(framework)
        images = {k: v.copy() for k, v in bench.obs.images.items()}
        for image in images.values():
            image[0] = -image[0]
        ids = bench.obs.tokenized_prompt.copy()
        ids[0] = (ids[0] + 5) % 300 + 3
        before, after = self.sample(bench), self.sample(bench, evolve(bench.obs, images=images, tokenized_prompt=ids))
        for name, value in before.items():
            close(after[name][1:], value[1:], 1e-5, f"{name} of the other rows")

    def test_packing_does_not_change_a_sample(self, framework: str) -> None:
        bench = self.bench(framework)
        last = self.variant.spec.cameras[-1]
        absent = prompt_only(evolve(bench.obs, image_masks={**bench.obs.image_masks, last: np.zeros(BATCH, bool)}))
        before, after = self.sample(bench, absent), self.sample(bench, pack(absent))
        for name, value in before.items():
            close(after[name], value, 1e-4, f"{name} of the packed batch")

    def test_both_frameworks_give_the_same_sample(self) -> None:
        torch, jax = (self.sample(bench) for bench in self._both())
        for name, value in torch.items():
            close(jax[name], value, 1e-4, name)

    def test_sampling_compiles_once(self, framework: str) -> None:
        if framework == "torch":
            return self.test_compiles_once(framework)  # loss and sample on the meta device
        bench = self.bench(framework)
        self.sample(bench)
        before = dict(bench.model.traces)
        self.sample(bench, evolve(bench.obs, state=-bench.obs.state))
        assert bench.model.traces == before, "the same shapes were compiled again"


def influences(layout: Layout, role: str) -> set[str]:
    """Roles whose tokens can change what is computed at tokens of `role`: itself and all it sees, through any look."""
    found, todo = {role}, [role]
    while todo:
        for look in layout.row(todo.pop()).sees:
            if look.role not in found:
                found.add(look.role)
                todo.append(look.role)
    return found


def group_of(name: str) -> str:
    """The weight group of the routes that a parameter belongs to: an expert, or "vision"; "" for all else."""
    words = name.split(".")
    if words[0] == "backbone" and words[1] != "llm":
        return "vision"
    if words[:3] == ["backbone", "llm", "layers"]:
        return words[4]
    return words[3] if words[:3] == ["backbone", "llm", "final_norm"] else ""


def changed_inputs(bench: Bench, spec: Spec) -> dict[str, Observation]:
    """Role -> the observation with other content in its tokens, and nothing else changed."""
    obs = bench.obs
    targets = obs.token_ar_mask == 1 if has_targets(bench) else np.zeros_like(obs.tokenized_prompt_mask)
    other = ((obs.tokenized_prompt * 5 + 13) % 300 + 3).astype(np.int32)
    out = {
        "image": evolve(obs, images={k: -v for k, v in obs.images.items()}),
        "prompt": evolve(obs, tokenized_prompt=np.where(targets, obs.tokenized_prompt, other)),
    }
    if targets.any():
        out["target"] = evolve(obs, tokenized_prompt=np.where(targets, other, obs.tokenized_prompt))
    return out


def has_targets(bench: Bench) -> bool:
    """Whether the batch has tokens to predict."""
    return bench.obs.token_ar_mask is not None


def grammar(variant: Any) -> DecodeGrammar:
    """Twenty action tokens that stand for one to four values each."""
    vocab, spec = variant.backbone.offers["vocab_size"], variant.spec
    ids = np.arange(vocab - 30, vocab - 10, dtype=np.int32)
    lengths = np.array([1, 2, 3, 4] * 5, np.int32)
    return DecodeGrammar((5, 6), ids, lengths, spec.action_horizon * spec.action_dim, (7, 1))


def flat(tree: Any, path: str = "noise") -> dict[str, np.ndarray]:
    """Nested dicts of arrays as one dict."""
    if tree is None:
        return {}
    if isinstance(tree, dict):
        return {name: x for key, value in tree.items() for name, x in flat(value, f"{path}.{key}").items()}
    return {path: tree}
