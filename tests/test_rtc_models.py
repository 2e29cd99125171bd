"""Chunks that go on from a prefix: guidance is the true vector-Jacobian product, what is given is given, both frameworks."""

import importlib.util

import numpy as np
import pytest
from attrs import evolve

torch = pytest.importorskip("torch")

import vla  # noqa: E402
from vla.contracts import Actions, Prefix, Sampling  # noqa: E402
from vla.rtc import forced, guidance, weights  # noqa: E402
from vla.testing.batches import random_batch  # noqa: E402
from vla.testing.closeness import close, relative  # noqa: E402
from vla.testing.frameworks import open_model, prompt_only, start_weights  # noqa: E402
from vla.torch_kit.model import observation_to, sampling_to  # noqa: E402

TYPES = {
    "pi05": {"type": "pi05"},
    "pi0": {"type": "pi0"},
    "pi0_adarms": {"type": "pi05", "set": ("head.state=continuous",)},
    "pi05_ki": {"type": "pi05_ki"},
}
MICRO = {"backbone.llm.depth": 2, "backbone.vision.depth": 1, "spec.cameras": ["base_0_rgb"]}
FRAMEWORKS = ["torch", *(["jax"] if importlib.util.find_spec("flax") else [])]


def make(name, framework="torch"):
    case = dict(TYPES[name])
    sets = dict(s.split("=") for s in case.pop("set", ()))
    variant = vla.build(preset="tiny", set={**MICRO, **sets}, **case)
    return variant, open_model(framework, variant), start_weights(variant), random_batch(variant)


def prefix_for(variant, mode, delays=(3, 0), overlap=6, **options):
    h, d = variant.spec.action_horizon, variant.spec.action_dim
    values = np.random.default_rng(7).uniform(-1, 1, (2, h, d)).astype(np.float32)
    values[:, overlap:] = 0
    held = np.stack([weights(h, delay, overlap) for delay in delays])
    return Prefix(values, held, np.asarray(delays, np.int32), mode, **options)


def test_guidance_equals_finite_differences_and_the_jacobian_matters():
    """One level: x moves by gain * J^T [(Y - clean) w]; LeRobot's modeling_rtc.py moves by the error alone."""
    variant, model, w, (obs, _, _, noise) = make("pi05")
    net = model.load(w).eval()
    head, o = net.head, observation_to(prompt_only(obs), "cpu")
    prefix = prefix_for(variant, "guided")
    seen = {}

    def watched(decode, step, signal, level, x, prefix):
        seen.update(decode=decode, step=step, signal=signal, level=level)
        return x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vla.torch_kit.model.Decoder.denoise", lambda self, *a: watched(self, *a))
        with torch.no_grad():
            head.sample(net, o, torch.as_tensor(noise), Sampling(num_steps=4))
    decode, step, gains = seen["decode"], seen["step"], guidance(seen["signal"], seen["level"], 5.0)
    decode = evolve(decode, in_place=False)
    x, i = torch.as_tensor(noise), 1
    y, held = torch.as_tensor(prefix.values), torch.as_tensor(prefix.weights)[..., None]
    with torch.no_grad():
        after, clean = step(decode, x, i)
        error = (y - clean) * held
    from vla.torch_kit.model import _guided

    moved = (_guided(step, decode, x, i, gains[i], sampling_to(Sampling(prefix=prefix), "cpu").prefix) - after) / gains[
        i
    ]
    rng = np.random.default_rng(0)
    for _ in range(3):
        u = torch.as_tensor(rng.standard_normal(x.shape).astype(np.float32))
        eps = 1e-2
        with torch.no_grad():
            up, down = (float((step(decode, x + s * eps * u, i)[1].double() * error).sum()) for s in (1, -1))
        close(float((moved * u).sum()), (up - down) / (2 * eps), 1e-2, scale=float(moved.norm() * u.norm()) * 0.1)
    assert relative(moved.numpy(), error.numpy()) > 0.1, "without its Jacobian guidance would be another"


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("mode", ["guided", "trained", "inpaint"])
def test_frameworks_agree_and_given_steps_are_given(name, mode):
    out = {}
    for framework in FRAMEWORKS:
        variant, model, w, (obs, _, _, noise) = make(name, framework)
        prefix = prefix_for(variant, mode)
        real = np.ones(variant.spec.action_dim, bool)
        asked = Sampling(num_steps=3, action_dim_mask=real)
        out[framework] = model.sample(w, prompt_only(obs), noise, evolve(asked, prefix=prefix))["actions"]
        if framework == "torch":
            free = model.sample(w, prompt_only(obs), noise, asked)["actions"]
    found = out["torch"]
    if mode != "guided":
        assert np.array_equal(found[0, :3], prefix.values[0, :3]), "the first steps are those given"
        assert relative(found[1], free[1]) < 1e-5, "a row that is given nothing is sampled as ever"
    else:
        pulled = [float(np.abs(x[0, :3] - prefix.values[0, :3]).mean()) for x in (found, free)]
        assert pulled[0] < pulled[1], pulled
    assert relative(found[0, 3:], free[0, 3:]) > 1e-3, "the rest goes on from them"
    if "jax" in out:
        close(out["jax"], found, 2e-4)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", ["pi05", "pi0", "pi0_adarms"])
def test_training_shows_given_steps_clean_and_learns_the_rest(framework, name):
    variant, model, w, (obs, actions, draws, _) = make(name, framework)

    def loss(given, draws=draws, values=actions.values):
        chunk = Actions(values, np.ones_like(actions.mask), given)
        return model.losses(w, obs, chunk, draws)["actions"]

    plain = loss(None)
    assert relative(loss(np.zeros(2, np.int32)), plain) < 1e-6
    given = np.array([0, 3], np.int32)
    found = loss(given)
    assert relative(found[0], plain[0]) < 1e-6 and relative(found[1], plain[1]) > 1e-5
    noisy = {**draws, "noise": draws["noise"].copy()}
    noisy["noise"][1, :, :3] = 9
    assert relative(loss(given, noisy), found) < 1e-6, "given steps have no noise"
    other = actions.values.copy()
    other[1, :3] += 1
    assert relative(loss(given, values=other)[1], found[1]) > 1e-5, "given steps are seen"
    assert relative(loss(given, values=other)[0], found[0]) < 1e-6


@pytest.mark.skipif("jax" not in FRAMEWORKS, reason="needs JAX")
def test_training_with_given_steps_has_the_same_gradients_in_both_frameworks():
    found = {}
    for framework in FRAMEWORKS:
        _, model, w, (obs, actions, draws, _) = make("pi0_adarms", framework)
        found[framework] = model.gradients(w, obs, evolve(actions, given=np.array([2, 5], np.int32)), draws)[1]
    for name, want in found["torch"].items():
        scale = max(float(np.abs(want).max()), 1e-5)
        assert np.abs(found["jax"][name] - want).max() / scale < 2e-3, name


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_tokens_are_forced_and_the_grammar_is_kept(framework):
    from vla.tokenizer import open_tokenizer

    variant = vla.build(head="ar", tokenizer="binning", preset="tiny", set={**MICRO, "spec.action_horizon": 4})
    model, w = open_model(framework, variant), start_weights(variant)
    obs = prompt_only(random_batch(variant)[0])
    tokenizer = open_tokenizer(variant.parts["tokenizer"], variant.spec).fit(
        np.random.default_rng(0).uniform(-1, 1, (9, 4, 3))
    )
    grammar = tokenizer.grammar(4, 3)
    prefix = forced(tokenizer, [np.full((3, 3), 0.5), None], [2, 0], variant.spec)
    free, held = (model.sample(w, obs, None, Sampling(grammar=grammar, prefix=p))["tokens"] for p in (None, prefix))
    chunks = [[tokenizer.decode(row, 4, 3) for row in tokens] for tokens in (free, held)]
    close(chunks[1][0][:2], np.full((2, 3), 0.5), 0.02, scale=1)
    assert np.array_equal(held[1], free[1]) and not np.array_equal(held[0], free[0])


def small_policy(head="flow", tokenizer="paligemma", **record):
    from vla.policy import untrained
    from vla.tokenizer import open_tokenizer
    from vla.transforms.stats import Stats

    sets = {**MICRO, "spec.action_horizon": 8, "robot.state_dim": 4, "robot.action_dim": 3}
    variant = vla.build(head=head, tokenizer=tokenizer, preset="tiny", set=sets)
    rng = np.random.default_rng(0)
    scale = {key: rng.uniform(1, 3, n) for key, n in (("state", 4), ("actions", 3))}
    stats = {key: Stats(s, s, -2 * s, 3 * s) for key, s in scale.items()}
    made = open_tokenizer(variant.parts["tokenizer"], variant.spec)
    policy = untrained(variant, stats, made.fit(rng.uniform(-1, 1, (9, 8, 3))) if made.codec else made)
    policy.model = evolve(policy.model, record=record)
    torch.manual_seed(0)
    with torch.no_grad():  # fresh gates are closed, so that no action would look at another
        for p in policy.runner.model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return policy


def seen(seed=0):
    rng = np.random.default_rng(seed)
    images = {"base_0_rgb": rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)}
    return {"images": images, "state": rng.uniform(-1, 1, 4).astype(np.float32), "prompt": "go"}


def test_a_policy_goes_on_from_a_prefix_in_the_robots_units():
    policy = small_policy()
    rest = policy.infer(seen(), seed=1)["actions"][2:]
    rows, seeds = [seen(1), seen(2)], [5, 6]
    plain = [a["actions"] for a in policy.infer_batch(rows, seeds=seeds)]
    found = [
        a["actions"] for a in policy.infer_batch(rows, seeds=seeds, prefixes=[rest, None], delays=[3, 0], rtc="inpaint")
    ]
    close(found[0][:3], rest[:3], 1e-5)
    assert relative(found[0][3:], plain[0][3:]) > 1e-3 and relative(found[1], plain[1]) < 1e-5
    best = policy.infer(seen(1), seed=5, prefix=rest, delay=3)["actions"]
    told = policy.infer(seen(1), seed=5, prefix=rest, delay=3, rtc="guided")["actions"]
    assert np.array_equal(best, told), "the best that a model can do which was not trained for it"


def test_the_trained_mode_goes_by_the_record():
    policy = small_policy(config={"rtc": {"max_delay": 2}})
    rest = policy.infer(seen(), seed=1)["actions"][2:]
    best, told = (policy.infer(seen(1), seed=5, prefix=rest, delay=2, rtc=m)["actions"] for m in ("", "trained"))
    assert np.array_equal(best, told) and relative(best[:2], rest[:2]) < 1e-5
    with pytest.raises(vla.VlaError, match="at most 2 steps"):
        policy.infer(seen(1), prefix=rest, delay=3, rtc="trained")
    assert np.isfinite(policy.infer(seen(1), seed=5, prefix=rest, delay=3)["actions"]).all()  # guided


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("rtc", {"rtc": "trained"}),
        ("rtc", {"rtc": "magic"}),
        ("only 1 are left", {"delay": 2, "prefix": np.zeros((1, 3))}),
        ("delay", {"delay": -1}),
        ("prefix", {"prefix": np.zeros((4, 7))}),
        ("prefix", {"prefix": np.full((4, 3), np.nan)}),
        ("prefix cannot be read as an array", {"prefix": [[1, 2, 3], [4]]}),
        ("prefix must be numbers", {"prefix": [["a", "b", "c"]]}),
        ("prefix must be numbers", {"prefix": b"abc"}),
        ("prefix must be numbers", {"prefix": {}}),
        ("prefix must be numbers", {"prefix": np.zeros((4, 3)) + 1j}),
    ],
)
def test_what_cannot_be_gone_on_from_is_refused(words, options):
    policy = small_policy()
    with pytest.raises(vla.VlaError, match=words):
        policy.infer(seen(), **{"prefix": np.zeros((4, 3)), "delay": 1, **options})
    with pytest.raises(vla.VlaError, match="one prefix and one delay per observation"):
        policy.infer_batch([seen()], prefixes=[np.zeros((4, 3))], delays=1)


def test_an_evaluation_leaves_something_to_go_on_from():
    from vla.evaluation.rollout import _Plan

    with pytest.raises(vla.VlaError, match="nothing is left") as caught:
        _Plan("guided", latency=0, execute=0, overlap=0, max_delay=0).steps(6)
    assert "--execute 3" in caught.value.fix
    assert _Plan("guided", latency=0, execute=3, overlap=0, max_delay=0).steps(6) == 3
    assert _Plan("guided", latency=2, execute=0, overlap=0, max_delay=0).steps(6) == 4


def test_a_token_policy_forces_the_tokens_of_the_first_steps():
    policy = small_policy("ar", "binning")
    rest = policy.infer(seen(), seed=1)["actions"][2:]
    found = policy.infer(seen(1), seed=5, prefix=rest, delay=3)["actions"]
    close(found[:3], rest[:3], 0.02)
    with pytest.raises(vla.VlaError, match="whole chunks"):
        small_policy("ar", "fast").infer(seen(), prefix=rest, delay=1)


def test_training_for_it_needs_a_head_that_can():
    from vla.training.config import Rtc, TrainConfig
    from vla.training.prepare import check_rtc

    flow = vla.build(preset="tiny")
    check_rtc(flow, TrainConfig(rtc=Rtc(4)))
    with pytest.raises(vla.VlaError, match="action_horizon"):
        check_rtc(flow, TrainConfig(rtc=Rtc(flow.spec.action_horizon)))
    with pytest.raises(vla.VlaError, match="head 'ar'"):
        check_rtc(vla.build(head="ar", tokenizer="binning", preset="tiny"), TrainConfig(rtc=Rtc(2)))
    with pytest.raises(vla.VlaError, match="not negative"):
        Rtc(-1)
