"""One policy, two frameworks: every model type gives the same outputs, gradients and actions in PyTorch and in JAX."""

import subprocess
import sys

import numpy as np
import pytest
from attrs import evolve

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

from vla.compose import build  # noqa: E402
from vla.contracts import DecodeGrammar, Sampling, pack  # noqa: E402
from vla.jax_kit import model as jax_model  # noqa: E402
from vla.params import count, shapes, table  # noqa: E402
from vla.testing.batches import random_batch  # noqa: E402
from vla.testing.closeness import close  # noqa: E402
from vla.testing.frameworks import prompt_only, start_weights  # noqa: E402
from vla.testing.parity import GRADIENTS, OUTPUTS, compare, relative, run, stages  # noqa: E402
from vla.torch_kit import model as torch_model  # noqa: E402

MICRO = {
    "backbone.llm.width": 32, "backbone.llm.depth": 2, "backbone.llm.mlp_dim": 48, "backbone.llm.num_heads": 4,
    "backbone.llm.head_dim": 8, "backbone.vision.width": 16, "backbone.vision.depth": 2, "backbone.vision.mlp_dim": 24,
    "backbone.vision.num_heads": 2, "backbone.llm.vocab_size": 300, "spec.image_size": [24, 24], "spec.max_token_len": 40,
}  # fmt: skip
TYPES = {
    "pi0": {"type": "pi0"},
    "pi05": {"type": "pi05"},
    "pi0_fast": {"type": "pi0_fast"},
    "pi05_ki": {"type": "pi05_ki"},
    "ar_binning": {"head": "ar", "tokenizer": "binning", "backbone": "paligemma", "set": {"spec.max_token_len": 72}},
    "pi05_ki_three_draws": {"type": "pi05_ki", "set": {"head.actions.draws": 3}},
    "pi05_continuous_state": {"type": "pi05", "set": {"head.state": "continuous"}},
    "pi05_three_draws": {"type": "pi05", "set": {"head.draws": 3}},
}
SLOW = {"pi05_continuous_state", "pi05_three_draws"}
GRAMMAR = DecodeGrammar((5, 6), np.arange(200, 220), np.array([1, 2, 3, 4] * 5), total=24, suffix=(7, 1))


def micro(name, **more):
    case = TYPES[name]
    return build(**{**case, "preset": "tiny", "set": {**MICRO, **case.get("set", {}), **more}})


def grammar_of(variant):
    return GRAMMAR if variant.parts["head"].offers["gives"] == "tokens" else None


def worst(rows):
    return [f"{r.what} {r.name}: {r.error:.2e} > {r.bound:.0e}" for r in rows if not r.fine]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in TYPES])
def test_every_model_type_is_the_same_in_both(name):
    """Parts, losses, gradients of every weight, actions or tokens; with an absent camera and padded prompts, steps, dims."""
    variant = micro(name)
    weights, batch = start_weights(variant), random_batch(variant)
    batch = (pack(batch[0]), *batch[1:]) if name == "pi05_ki" else batch  # as trainers and policies do
    want, got = (run(f, variant, weights, batch, grammar=grammar_of(variant)) for f in ("torch", "jax"))
    rows = compare(got, want)
    assert {r.what for r in rows} == {"part", "loss", "gradient", "sample"}
    assert len(got.parts) >= 8 and set(got.gradients) == set(weights)
    assert not worst(rows)
    assert max(np.abs(g).max() for g in want.gradients.values()) > 1e-3, "nothing was compared"


def test_the_first_part_that_differs_is_found():
    """Another value projection in layer 1 shows in that layer first, and in nothing before it."""
    variant = micro("pi05_ki")
    weights, batch = start_weights(variant), random_batch(variant)
    other = dict(weights)
    name = "backbone.llm.layers.1.action.v.weight"
    other[name] = weights[name] * 1.001
    want = run("torch", variant, weights, batch, sampling=False)
    got = run("jax", variant, other, batch, sampling=False)
    first = next(r for r in compare(got, want) if not r.fine)
    assert (first.what, first.name) == ("part", "layer 1: values")


@pytest.mark.parametrize("insulate", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_insulation_is_exactly_zero_in_both(insulate):
    variant = micro("pi05_ki", **{"head.insulate": insulate, "head.token_weight": 0.0})
    weights, batch = start_weights(variant), random_batch(variant)
    for framework in ("torch", "jax"):
        gradients = run(framework, variant, weights, batch, parts=False, sampling=False).gradients
        backbone = [g for n, g in gradients.items() if n.startswith("backbone.") and ".action." not in n]
        action = [g for n, g in gradients.items() if n.startswith("head.") or ".action." in n]
        assert all((g == 0).all() for g in backbone) is insulate
        assert all((g != 0).any() for g in action)


def test_token_loss_never_reaches_the_action_expert():
    variant = micro("pi05_ki", **{"head.action_weight": 0.0})
    weights, batch = start_weights(variant), random_batch(variant)
    for framework in ("torch", "jax"):
        gradients = run(framework, variant, weights, batch, parts=False, sampling=False).gradients
        assert all((g == 0).all() for n, g in gradients.items() if n.startswith("head.") or ".action." in n)
        assert (gradients["backbone.llm.layers.0.backbone.q.weight"] != 0).any()


@pytest.mark.parametrize("name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("pi0", "pi0_fast")), "pi05_ki"])
def test_bfloat16_differs_by_rounding_alone(name):
    """The two round in different orders, so each is compared with float32: one bfloat16 rounding is 2^-9 = 0.2 % of a
    value, a loss passes some 40 of them (10 products in each of 4 layers), which add up like a random walk: 6 x 0.2 %.
    And JAX must not be further from float32 than three times PyTorch, plus one rounding."""
    variant = micro(name)
    weights, batch = start_weights(variant), random_batch(variant)
    exact = run("torch", variant, weights, batch, parts=False, sampling=False)
    low = {f: run(f, variant, weights, batch, dtype="bfloat16", parts=False, sampling=False) for f in ("torch", "jax")}
    one = 2.0**-9
    for k, want in exact.losses.items():
        error = {f: relative(r.losses[k], want) for f, r in low.items()}
        assert max(error.values()) <= 6 * one, (k, error)
        assert error["jax"] <= 3 * error["torch"] + one, (k, error)
    for k, want in exact.gradients.items():
        if k.endswith("attn.k.bias"):
            continue
        cosine = {f: float(np.vdot(r.gradients[k], want) / np.linalg.norm(r.gradients[k]) / np.linalg.norm(want))
                  for f, r in low.items() if np.linalg.norm(want)}  # fmt: skip
        assert all(c > 0.99 for c in cosine.values()), (k, cosine)


def test_sampling_again_compiles_nothing(monkeypatch):
    variant = micro("pi05")
    model = jax_model.build_model(variant)
    seen = []
    head = type(model.head)
    once = head.velocity
    monkeypatch.setattr(head, "velocity", lambda self, x: (seen.append(1), once(self, x))[1])
    obs, _, _, noise = random_batch(variant)
    first = model.sample(obs, noise)["actions"]
    traced = len(seen)
    assert traced > 0
    again = model.sample(evolve(obs, state=obs.state + 1), noise)["actions"]
    other = jax_model.build_model(variant, seed=7)
    assert not np.array_equal(other.sample(obs, noise)["actions"], first)
    assert len(seen) == traced, "the second call, or another model of the variant, was traced anew"
    assert np.array_equal(again, first), "pi05 reads its state from the prompt"
    model.sample(obs, noise, Sampling(num_steps=3))
    assert len(seen) > traced


def test_loops_are_on_the_device():
    """One Euler step in the program however many are taken, and one decoded token; no callback to the host."""
    for name, steps in (("pi05", 10), ("pi0_fast", None)):
        variant = micro(name)
        model = jax_model.abstract_model(variant)
        obs, _, _, noise = random_batch(variant)
        parts, obs = jax_model.split(model), prompt_only(obs)
        sampling = Sampling(num_steps=steps, grammar=grammar_of(variant))
        program = jax_model.sample.lower(*parts, obs, noise, sampling).as_text()
        assert "callback" not in program and program.count("stablehlo.while") in range(3, 8)
        if name == "pi05":
            longer = jax_model.sample.lower(*parts, obs, noise, Sampling(num_steps=20))
            assert abs(len(longer.as_text()) - len(program)) < 200


def test_cameras_keep_their_order_through_jit():
    """JAX sorts the keys of dicts; the order of the cameras is part of the positions."""
    variant = build(type="pi05", preset="tiny", set={**MICRO, "spec.cameras": ["zebra", "aisle"]})
    weights, batch = start_weights(variant), random_batch(variant)
    want, got = (run(f, variant, weights, batch) for f in ("torch", "jax"))
    assert not worst(compare(got, want))
    leaves, tree = jax.tree.flatten(batch[0])
    assert list(jax.tree.unflatten(tree, leaves).images) == ["zebra", "aisle"]


@pytest.mark.parametrize(
    ("kind", "number"), [("pi0", 3_238_048_528), ("pi05", 3_353_433_872), ("pi0_fast", 2_923_335_408)]
)
def test_full_size_parameter_counts(kind, number):
    """Equal to openpi's and to the PyTorch ones, without memory."""
    variant = build(type=kind)
    model = jax_model.abstract_model(variant)
    assert sum(int(np.prod(p.shape)) for p in jax.tree.leaves(jax_model.split(model)[1])) == number == count(variant)


def saved(kit, variant, weights, path):
    from vla.store import write_weights

    model = kit.build_model(variant)
    kit.load_weights(model, variant, weights)
    write_weights(path, kit.weights_of(model, variant))
    return path.read_bytes()


@pytest.mark.parametrize("name", ["pi0", "pi0_fast", "pi05_ki"])
def test_one_file_for_both(name, tmp_path):
    """torch -> file -> JAX -> file -> torch -> file: three times the same bytes."""
    from vla.store import read_weights

    variant = micro(name)
    weights = start_weights(variant)
    by_torch = saved(torch_model, variant, weights, tmp_path / "torch.safetensors")
    by_jax = saved(jax_model, variant, read_weights(tmp_path / "torch.safetensors"), tmp_path / "jax.safetensors")
    again = saved(torch_model, variant, read_weights(tmp_path / "jax.safetensors"), tmp_path / "again.safetensors")
    assert by_torch == by_jax == again


def test_wrong_weights_are_listed_in_both():
    from vla.errors import StoreError

    variant = micro("pi05")
    weights = start_weights(variant)
    gone = "head.action_in_proj.bias"
    wrong = {**{k: v for k, v in weights.items() if k != gone}, "head.extra": weights[gone]}
    for kit in (torch_model, jax_model):
        with pytest.raises(StoreError, match="1 missing, 1 unknown") as error:
            kit.load_weights(kit.build_model(variant), variant, wrong)
        assert gone in str(error.value) and "head.extra" in str(error.value)


@pytest.mark.parametrize("name", ["pi0", "pi05_ki", "pi0_fast"])
@pytest.mark.parametrize("vision", ["siglip", "vit"])
def test_fresh_weights_have_the_same_spread(name, vision):
    """Not the same numbers, the same distributions: mean and deviation of every weight, up to sampling error."""
    case = TYPES[name]
    variant = build(**case, preset="tiny", set={"backbone.vision": vision})
    torch.manual_seed(0)
    ours = torch_model.weights_of(torch_model.build_model(variant), variant)
    theirs = jax_model.weights_of(jax_model.build_model(variant), variant)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()} == shapes(table(variant))
    for k, want in ours.items():
        got, deviation, n = theirs[k], want.std(), want.size
        assert abs(got.std() - deviation) <= 6 * deviation / np.sqrt(2 * n), k
        assert abs(got.mean() - want.mean()) <= 8 * deviation / np.sqrt(n), k
        assert np.abs(got).max() <= 2 * np.abs(want).max() + 1e-9, k


def test_fresh_weights_follow_the_seed():
    variant = micro("pi05")
    a, b, c = (jax_model.weights_of(jax_model.build_model(variant, seed=s), variant) for s in (0, 0, 1))
    name = "backbone.llm.layers.1.action.q.weight"
    assert np.array_equal(a[name], b[name]) and not np.array_equal(a[name], c[name])
    assert not np.array_equal(a[name], a[name.replace("layers.1", "layers.0")])


def test_checkpointing_changes_memory_not_numbers():
    variant = micro("pi05_ki")
    obs, actions, draws, _ = random_batch(variant)
    found = []
    for on in (False, True):
        model = jax_model.build_model(variant)
        model.backbone.llm.checkpointing = on
        graph, params = jax_model.split(model)
        found.append(jax_model.loss_and_gradients(graph, params, obs, actions, draws))
    one, two = map(jax.tree.leaves, found)
    largest = max(float(abs(x).max()) for x in one)
    for a, b in zip(one, two, strict=True):
        close(a, b, 1e-4, "loss or gradient", scale=1e-3 * largest)


def test_gemma_fast_equals_gemma_in_jax():
    results = []
    for llm in ("gemma", "gemma_fast"):
        variant = micro("pi0_fast", **{"backbone.llm": llm})
        results.append(run("jax", variant, start_weights(variant), random_batch(variant), grammar=GRAMMAR, parts=False))
    rows = compare(*results, outputs=OUTPUTS, gradients=GRADIENTS)
    assert not worst(rows)


def test_decoding_at_a_temperature_is_the_same_and_well_formed():
    variant = micro("pi0_fast")
    weights, (obs, _, _, noise) = start_weights(variant), random_batch(variant)
    length = dict(zip(GRAMMAR.action_ids.tolist(), GRAMMAR.lengths.tolist(), strict=True))
    tokens = {}
    for kit in (torch_model, jax_model):
        model = kit.build_model(variant)
        kit.load_weights(model, variant, weights)
        o = prompt_only(obs) if kit is jax_model else torch_model.observation_to(prompt_only(obs), "cpu")
        n = noise if kit is jax_model else torch.as_tensor(noise)
        tokens[kit] = np.asarray(model.sample(o, n, Sampling(grammar=GRAMMAR, temperature=1.0))["tokens"])
    assert np.array_equal(tokens[torch_model], tokens[jax_model])
    for row in tokens[jax_model].tolist():
        row = row[: len(row) - row[::-1].index(1)]
        assert row[:2] == [5, 6] and row[-2:] == [7, 1]
        assert sum(length[t] for t in row[2:-2]) == GRAMMAR.total
    assert len({tuple(r) for r in tokens[jax_model].tolist()}) == 2, "the rows draw their own numbers"


@pytest.mark.parametrize("convention", ["training", "openpi"])
def test_decoding_without_a_grammar_is_the_same(convention):
    variant = micro("pi0_fast", **{"head.constrained": False, "head.max_decode": 9, "head.positions": convention})
    weights, batch = start_weights(variant), random_batch(variant)
    want, got = (run(f, variant, weights, batch) for f in ("torch", "jax"))
    assert got.sampled["tokens"].shape == (2, 9)
    assert np.array_equal(got.sampled["tokens"], want.sampled["tokens"])


def test_padded_dims_follow_their_known_path_in_both():
    variant = micro("pi05")
    weights, (obs, _, _, noise) = start_weights(variant), random_batch(variant)
    real = np.arange(variant.spec.action_dim) < 5
    found = []
    for kit in (torch_model, jax_model):
        model = kit.build_model(variant)
        kit.load_weights(model, variant, weights)
        o, n, r = (obs, noise, real) if kit is jax_model else (
            torch_model.observation_to(obs, "cpu"), torch.as_tensor(noise), torch.as_tensor(real),
        )  # fmt: skip
        found.append(np.asarray(model.sample(o, n, Sampling(action_dim_mask=r))["actions"]))
    assert relative(found[1], found[0]) < OUTPUTS
    close(found[1][..., 5:], 0, 1e-5, scale=np.abs(noise).max())


def test_uint8_images_are_normalised_on_the_device():
    variant = micro("pi05")
    obs = random_batch(variant)[0]
    raw = {k: np.uint8((v + 1) * 127.5) for k, v in obs.images.items()}
    model = jax_model.build_model(variant)
    a = model.embed(evolve(obs, images=raw))[0].x
    b = model.embed(evolve(obs, images={k: v.astype(np.float32) / 127.5 - 1 for k, v in raw.items()}))[0].x
    close(a, b, 1e-5)


ALONE = """
import sys
import numpy as np
from vla.compose import build
from vla.testing.batches import random_batch
variant = build(type="pi05_ki", preset="tiny", set={sets!r})
obs, actions, draws, noise = random_batch(variant)
{body}
assert sorted(weights) == sorted(__import__("vla.params", fromlist=["x"]).shapes(__import__("vla.params", fromlist=["x"]).table(variant)))
from vla.store import save_model
save_model({folder!r}, variant, weights, None, None)
assert out.shape == noise.shape and np.isfinite(out).all()
forbidden = {forbidden!r}
assert not forbidden & {{name.partition(".")[0] for name in sys.modules}}, "the other framework was imported"
"""
JAX_ALONE = """
import jax
from vla.jax_kit.model import build_model, loss_and_gradients, split, weights_of
model = build_model(variant)
graph, params = split(model)
_, _, gradients = loss_and_gradients(graph, params, obs, actions, draws)
step = jax.jit(lambda params, gradients: jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradients))
weights = weights_of(step(params, gradients), variant)
out = np.asarray(model.sample(obs, noise)["actions"])
"""
TORCH_ALONE = """
import torch
from vla.contracts import Actions
from vla.torch_kit.model import build_model, observation_to, tree_to, weights_of
model = build_model(variant)
chunk = Actions(torch.as_tensor(actions.values), torch.as_tensor(actions.mask))
model.total(model.loss(observation_to(obs, "cpu"), chunk, tree_to(draws, "cpu"))).backward()
torch.optim.Adam(model.parameters(), 1e-3).step()
weights = weights_of(model, variant)
out = model.sample(observation_to(obs, "cpu"), torch.as_tensor(noise))["actions"].numpy()
"""


@pytest.mark.parametrize(
    ("body", "forbidden"),
    [(JAX_ALONE, {"torch", "torchvision", "transformers"}), (TORCH_ALONE, {"jax", "jaxlib", "flax", "optax"})],
    ids=["jax", "torch"],
)
def test_each_framework_works_without_the_other(body, forbidden, tmp_path):
    """Build, a training step, save and sample, with the other framework not even imported."""
    code = ALONE.format(sets=MICRO, body=body, folder=str(tmp_path / "model"), forbidden=forbidden)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_stages_name_every_part_in_order():
    variant = micro("pi05_ki")
    model = torch_model.build_model(variant)
    obs, actions, draws, _ = random_batch(variant)
    chunk = evolve(actions, values=torch.as_tensor(actions.values), mask=torch.as_tensor(actions.mask))
    names = list(
        stages(torch_model, model, torch_model.observation_to(obs, "cpu"), chunk, torch_model.tree_to(draws, "cpu"))
    )
    kinds = [n.partition(" ")[0].rstrip(":") for n in names]
    assert list(dict.fromkeys(kinds)) == ["vision", "projector", "embedder", "head", "layer", "after"]
