"""Properties of every model type in PyTorch, at tiny sizes: gradients obey the layout, nothing unseen matters."""

import numpy as np
import pytest
from attrs import evolve

torch = pytest.importorskip("torch")

from vla.compose import build  # noqa: E402
from vla.contracts import Actions, DecodeGrammar, Sampling, pack  # noqa: E402
from vla.layout import attention_mask, gradient_routes, positions  # noqa: E402
from vla.testing.batches import random_batch  # noqa: E402
from vla.testing.closeness import close  # noqa: E402
from vla.torch_kit.model import _streams, build_model, observation_to, tree_to  # noqa: E402
from vla.torch_kit.ops import token_nll  # noqa: E402

TYPES = {
    "pi0": {"type": "pi0"},
    "pi05": {"type": "pi05"},
    "pi0_fast": {"type": "pi0_fast"},
    "pi05_ki": {"type": "pi05_ki"},
    "pi05_joint": {"type": "pi05_ki", "set": ("head.insulate=false",)},
    "pi0_adarms": {"type": "pi05", "set": ("head.state=continuous",)},
}


def make(name, seed=0, **changes):
    """A tiny model with no weight at zero, so that nothing hides, and a batch for it."""
    variant = build(preset="tiny", **{**TYPES[name], **changes})
    torch.manual_seed(seed)
    model = build_model(variant)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return variant, model, random_batch(variant, seed=seed)


def chunk_of(actions):
    return Actions(torch.as_tensor(actions.values), torch.as_tensor(actions.mask))


def losses(model, obs, actions, draws):
    return model.loss(observation_to(obs, "cpu"), chunk_of(actions), tree_to(draws, "cpu"))


def sample(model, obs, noise, **options):
    start = None if noise is None else torch.as_tensor(noise)
    return model.sample(observation_to(obs, "cpu"), start, Sampling(**options))


def prompt_only(obs):
    """The observation as it is at inference: no targets."""
    if obs.token_ar_mask is None:
        return obs
    prompt = obs.tokenized_prompt_mask & (obs.token_ar_mask == 0)
    return evolve(obs, tokenized_prompt_mask=prompt, token_ar_mask=None, token_loss_mask=None)


def grammar():
    return DecodeGrammar((5, 6), np.arange(3000, 3020), np.array([1, 2, 3, 4] * 5), total=24, suffix=(7, 1))


def group(name):
    """Which weight group of the routes a parameter belongs to: an expert, or vision."""
    parts = name.split(".")
    if parts[0] == "backbone" and parts[1] in ("vision", "projector"):
        return "vision"
    if parts[:3] == ["backbone", "llm", "layers"]:
        return parts[4]
    if parts[:3] == ["backbone", "llm", "final_norm"]:
        return parts[3]
    return "backbone" if parts[0] == "backbone" else "action"


def dead_end(parameter, loss):
    """The backbone's last layer gives later tokens its keys and values alone."""
    if loss != "actions":
        return False
    last = "layers.3.backbone." in parameter and not any(part in parameter for part in (".k.", ".v.", "norm_attn"))
    return last or "final_norm.backbone" in parameter


@pytest.mark.parametrize("name", TYPES)
def test_gradients_flow_where_the_layout_says_and_nowhere_else(name):
    variant, model, (obs, actions, draws, _) = make(name)
    routes = gradient_routes(variant.layout(), variant.parts["head"].offers["losses"])
    for loss, to in routes.items():
        model.zero_grad()
        losses(model, obs, actions, draws)[loss].mean().backward()
        for parameter, p in model.named_parameters():
            moved = p.grad is not None and bool((p.grad != 0).any())
            if not to.get(group(parameter), False):
                assert not moved, f"{loss} leaks into {parameter}"
            elif not parameter.endswith("attn.k.bias") and not dead_end(parameter, loss):
                assert moved, f"{loss} does not reach {parameter}"


def test_ki_velocity_ignores_targets_bit_for_bit():
    _, model, (obs, actions, draws, _) = make("pi05_ki")

    def velocity(o):
        o = observation_to(o, "cpu")
        entry = model.head.enter(o, Actions(torch.as_tensor(actions.values)), tree_to(draws, "cpu"))
        return model.head.actions.velocity(model._fused(model.embed(o), entry)["action"])

    targets = obs.token_ar_mask == 1
    other_ids = np.where(targets, (obs.tokenized_prompt + 17) % 4000, obs.tokenized_prompt).astype(np.int32)
    normal = velocity(obs)
    assert torch.equal(normal, velocity(evolve(obs, tokenized_prompt=other_ids)))
    assert torch.equal(normal, velocity(evolve(obs, tokenized_prompt_mask=obs.tokenized_prompt_mask & ~targets)))


@pytest.mark.parametrize("name", ["pi0", "pi05", "pi05_ki", "pi0_adarms"])
def test_training_velocity_equals_velocity_over_the_cached_prefix(name):
    _, model, (obs, actions, draws, _) = make(name)
    head, own = getattr(model.head, "actions", model.head), tree_to(draws.get("actions", draws), "cpu")
    chunk, inference = Actions(torch.as_tensor(actions.values)), observation_to(prompt_only(obs), "cpu")
    training_obs = observation_to(obs, "cpu")
    with torch.no_grad():
        entry = model.head.enter(training_obs, chunk, tree_to(draws, "cpu"))
        training = head.velocity(model._fused(model.embed(training_obs), entry)["action"])
        time = own["time"][:, 0]
        t = time[:, None, None]
        x_t = t * own["noise"][:, 0] + (1 - t) * chunk.values
        suffix = head.suffix(inference, x_t, time)
        decode = model.decoder(inference, suffix, varying=("action",), cond=head.condition(time))
        cached = torch.cat([head.velocity(decode(suffix, i)["action"])[i : i + 1] for i in range(len(time))])
    close(training, cached, 1e-5)


@pytest.mark.parametrize("name", ["pi0", "pi05_ki"])
def test_shared_prefix_draws_equal_repeated_observations(name):
    setting = "head.actions.draws=3" if name == "pi05_ki" else "head.draws=3"
    _, model, (obs, actions, draws, _) = make(name, set=(setting,))
    together = losses(model, obs, actions, draws)
    with torch.no_grad():  # as validation runs it
        close(losses(model, obs, actions, draws)["actions"], together["actions"], 1e-5)
    together["actions"].mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    own, singles = draws.get("actions", draws), []
    for k in range(3):
        one = {key: value[:, k : k + 1] for key, value in own.items()}
        singles.append(losses(model, obs, actions, {**draws, "actions": one} if "actions" in draws else one)["actions"])
    mean = torch.stack(singles).mean(0)
    mean.mean().backward()
    close(together["actions"], mean, 1e-5)
    largest = max(float(g.abs().max()) for g in grads.values())
    for n, p in model.named_parameters():
        if n in grads and p.grad is not None:
            close(grads[n], p.grad, 2e-4, n, scale=1e-3 * largest)


@pytest.mark.parametrize("name", ["pi0", "pi05_ki", "pi0_fast"])
def test_absent_cameras_and_padding_change_nothing(name):
    variant, model, (obs, actions, draws, noise) = make(name)
    last = variant.spec.cameras[-1]
    absent = evolve(obs, image_masks={**obs.image_masks, last: np.zeros(2, bool)})
    packed = pack(absent)
    assert last not in packed.images
    other_pixels = evolve(absent, images={**absent.images, last: absent.images[last] * 0})
    with torch.no_grad():
        full, lean, other = (losses(model, o, actions, draws) for o in (absent, packed, other_pixels))
    for key, value in full.items():
        close(value, lean[key], 1e-5)
        close(value, other[key], 1e-6)
    options = {"grammar": grammar()} if name == "pi0_fast" else {}
    a = sample(model, prompt_only(absent), noise, **options)
    b = sample(model, pack(prompt_only(absent)), noise, **options)
    for key, value in a.items():
        close(value, b[key], 1e-5)


@pytest.mark.parametrize("name", ["pi0", "pi05_ki", "pi0_fast"])
def test_a_row_gives_the_same_alone_and_in_a_padded_batch(name):
    _, model, (obs, _, _, noise) = make(name)
    obs = prompt_only(obs)
    options = {"grammar": grammar()} if name == "pi0_fast" else {}
    both = sample(model, obs, noise, **options)
    for i in range(2):
        here = slice(i, i + 1)
        alone = evolve(
            obs,
            images={k: v[here] for k, v in obs.images.items()},
            image_masks={k: v[here] for k, v in obs.image_masks.items()},
            state=obs.state[here],
            tokenized_prompt=obs.tokenized_prompt[here],
            tokenized_prompt_mask=obs.tokenized_prompt_mask[here],
        )
        for key, value in sample(model, pack(alone), noise[here], **options).items():
            close(value[0], both[key][i], 1e-5)


@pytest.mark.parametrize("name", ["pi0", "pi05_ki"])
def test_padded_steps_and_dims_change_nothing(name):
    _, model, (obs, actions, draws, _) = make(name)
    junk = Actions(np.where(actions.mask, actions.values, 99).astype(np.float32), actions.mask)
    same = losses(model, obs, actions, draws)["actions"]
    assert torch.equal(same, losses(model, obs, junk, draws)["actions"])
    assert (losses(model, obs, Actions(junk.values, np.ones_like(junk.mask)), draws)["actions"] > same + 1).all()


def test_padded_dims_follow_their_known_path_in_sampling():
    """They end at 0, and the real dims are those of a model whose padded velocity is exact."""
    variant, model, (obs, _, _, noise) = make("pi05")
    real = torch.arange(variant.spec.action_dim) < 5
    chunk = sample(model, obs, noise, action_dim_mask=real)["actions"]
    close(chunk[..., 5:], 0, 1e-5, scale=np.abs(noise).max())
    assert not torch.equal(chunk[..., :5], sample(model, obs, noise)["actions"][..., :5])


def test_decoding_is_always_well_formed():
    """Untrained weights, every temperature: each row's tokens stand for exactly `total` values."""
    _, model, (obs, _, _, noise) = make("pi0_fast")
    rules = grammar()
    length = dict(zip(rules.action_ids.tolist(), rules.lengths.tolist(), strict=True))
    for temperature in (0.0, 1.0, 10.0):
        tokens = sample(model, prompt_only(obs), noise, grammar=rules, temperature=temperature)["tokens"]
        for row in tokens.tolist():
            row = row[: len(row) - row[::-1].index(1)]
            assert row[:2] == [5, 6] and row[-2:] == [7, 1]
            assert sum(length[t] for t in row[2:-2]) == rules.total


def test_decoding_without_grammar_stops_at_the_limit():
    _, model, (obs, _, _, noise) = make("pi0_fast", set=("head.constrained=false", "head.max_decode=9"))
    assert sample(model, prompt_only(obs), noise)["tokens"].shape == (2, 9)


@pytest.mark.parametrize("convention", ["training", "openpi"])
def test_greedy_decoding_follows_teacher_forcing(convention):
    """Decoding picks what one pass over prompt and answer would pick; openpi's positions are one further."""
    options = (f"head.positions={convention}", "head.max_decode=6", "head.constrained=false")
    _, model, (obs, _, _, _) = make("pi0_fast", set=options)
    obs = prompt_only(obs)
    tokens = sample(model, obs, None)["tokens"]
    ones, o = torch.ones_like(tokens), observation_to(obs, "cpu")
    with torch.no_grad():
        everything = (*model.embed(o), model.text(tokens, ones.bool(), ones))
        roles, valid = model._roles_and_valid(everything)
        where = positions(model.layout, roles, valid)
        where[:, -6:] += convention == "openpi"
        hidden, _ = model.backbone.llm(_streams(everything), attention_mask(model.layout, roles, valid), where)
        text = hidden["backbone"][:, -(obs.tokenized_prompt.shape[1] + 6) :]
        logits = text @ model.backbone.llm.unembed().T
    last = obs.tokenized_prompt_mask.sum(1) - 1
    for i in range(2):
        assert tokens[i].tolist() == [int(logits[i, last[i]].argmax()), *logits[i, -6:-1].argmax(-1).tolist()]


def test_gemma_fast_equals_gemma():
    results, weights = [], None
    for llm in ("gemma", "gemma_fast"):
        _, model, (obs, actions, draws, noise) = make("pi0_fast", set=(f"backbone.llm={llm}",))
        if weights is not None:
            model.load_state_dict(weights)
        weights = model.state_dict()
        with torch.no_grad():
            loss = losses(model, obs, actions, draws)["tokens"]
        results.append((loss, sample(model, prompt_only(obs), noise, grammar=grammar())["tokens"]))
    close(results[0][0], results[1][0], 1e-5)
    assert torch.equal(results[0][1], results[1][1])


def test_chunked_cross_entropy_equals_the_direct_one():
    torch.manual_seed(0)
    hidden, table = torch.randn(37, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets, weights = torch.randint(50, (37,)), torch.rand(37)
    direct, chunked = token_nll(hidden, table, targets), token_nll(hidden, table, targets, chunk_elements=200)
    close(direct, chunked, 1e-5)
    want = torch.autograd.grad((direct * weights).sum(), (hidden, table))
    got = torch.autograd.grad((chunked * weights).sum(), (hidden, table))
    for a, b in zip(want, got, strict=True):
        close(a, b, 1e-5)


@pytest.mark.parametrize("name", ["pi05", "pi0_fast"])
def test_checkpointing_changes_memory_not_numbers(name):
    _, model, (obs, actions, draws, _) = make(name)
    results = []
    for on in (False, True):
        model.backbone.llm.checkpointing = on
        model.zero_grad()
        model.total(losses(model, obs, actions, draws)).backward()
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    largest = max(float(g.abs().max()) for g in results[0])
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-5, "gradient", scale=1e-3 * largest)


@pytest.mark.parametrize(
    ("kind", "count"), [("pi0", 3_238_048_528), ("pi05", 3_353_433_872), ("pi0_fast", 2_923_335_408)]
)
def test_full_size_parameter_counts(kind, count):
    """Equal to openpi's (meta device: no memory)."""
    with torch.device("meta"):
        model = build_model(build(type=kind))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("vision", ["siglip", "vit"])
def test_vision_is_swappable_and_pools(vision):
    for pool in {"siglip": ("none", "gap", "map", "tok"), "vit": ("none", "patches", "cls", "mean")}[vision]:
        settings = (f"backbone.vision={vision}", f"backbone.vision.pool={pool}")
        variant = build(type="pi05", preset="tiny", set=settings)
        model = build_model(variant)
        obs, actions, draws, _ = random_batch(variant)
        value = losses(model, obs, actions, draws)["actions"]
        assert value.shape == (2,) and torch.isfinite(value).all()


@pytest.mark.parametrize("name", TYPES)
def test_tiny_presets_stay_small(name):
    with torch.device("meta"):
        model = build_model(build(preset="tiny", **TYPES[name]))
    assert sum(p.numel() for p in model.parameters()) <= 5_000_000
