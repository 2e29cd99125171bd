"""Every family against transformers itself, at tiny random sizes: hidden states, logits, greedy text, cache, padding."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from vla_llm_hf.config import FAMILIES, TINY, Settings  # noqa: E402
from vla_llm_hf.params import decoder_names  # noqa: E402
from vla_llm_hf.torch_impl import HuggingFace  # noqa: E402

from vla.layout import BACKBONE  # noqa: E402
from vla.parts import Expert  # noqa: E402
from vla.testing.parity import relative  # noqa: E402

B, T, PREFIX = 2, 12, 7
families = pytest.mark.parametrize("family", FAMILIES)


def pair(family, **experts):
    """Ours and theirs with the same random weights, norms included."""
    torch.manual_seed(0)
    settings = Settings(**TINY[family])
    ours = HuggingFace(settings, experts).eval()
    values = settings.values
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    with torch.no_grad():
        for name, there, _ in decoder_names(settings):
            mine[name].copy_(torch.randn_like(mine[name]) * 0.3)
            other[there].copy_(mine[name])
    return ours, theirs


def causal(b=B, t=T):
    return torch.ones(t, t, dtype=torch.bool).tril()[None].expand(b, -1, -1), torch.arange(t)[None].expand(b, -1)


def some_ids(b=B, t=T):
    return torch.from_numpy(np.random.default_rng(1).integers(3, 4000, (b, t)))


@families
def test_hidden_states_and_logits(family):
    ours, theirs = pair(family)
    with torch.no_grad():
        hidden = ours({BACKBONE: ours.embed(some_ids())}, *causal())[0][BACKBONE]
        want = theirs(some_ids(), output_hidden_states=True)
    assert relative(hidden.numpy(), want.hidden_states[-1].numpy()) < 1e-5
    assert relative((hidden @ ours.unembed().detach().T).numpy(), want.logits.numpy()) < 1e-5


@families
def test_greedy_text(family):
    """Token by token over the cache, as heads decode, against `generate`."""
    ours, theirs = pair(family)
    ids, steps = some_ids(1), 6
    mask, where = causal(1, T + steps)
    with torch.no_grad():
        out, cache = ours({BACKBONE: ours.embed(ids)}, mask[:, :T, :T], where[:, :T])
        cache = ours.room(cache, steps)
        found, hidden = [], out[BACKBONE][:, -1:]
        for i in range(steps):
            found.append(int((hidden @ ours.unembed().T).argmax()))
            here = slice(T + i, T + i + 1)
            x = ours.embed(torch.tensor([[found[-1]]]))
            out, cache = ours({BACKBONE: x}, mask[:, here], where[:, here], cache=cache, write_at=T + i, in_place=True)
            hidden = out[BACKBONE]
        want = theirs.generate(ids, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)[0, T:].tolist()
    assert found == want


@families
def test_a_cached_prefix_with_an_expert_equals_one_pass(family):
    """Prefix, then the expert over its cache: what the sampler does; with and without gradient, and for two draws."""
    ours, _ = pair(family, action=Expert(32, 64))
    x = {BACKBONE: torch.randn(B, PREFIX, 64), "action": torch.randn(B, T - PREFIX, 32)}
    mask = torch.ones(B, T, T, dtype=torch.bool)
    mask[:, :PREFIX, PREFIX:] = False
    where = causal()[1]
    whole = ours(x, mask, where)[0]["action"]
    prefix = {BACKBONE: x[BACKBONE]}
    cache = ours(prefix, mask[:, :PREFIX, :PREFIX], where[:, :PREFIX], outputs=())[1]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            roomy = ours.room(cache, T - PREFIX)
            options = {"cache": roomy, "write_at": PREFIX, "in_place": not grad}
            after = ours({"action": x["action"]}, mask[:, PREFIX:], where[:, PREFIX:], **options)
        assert relative(after[0]["action"].detach().numpy(), whole.detach().numpy()) < 1e-5


@families
def test_a_padded_batch_equals_single_rows(family):
    """Two prompts of different lengths, the shorter padded in front and masked, each as it is alone."""
    ours, _ = pair(family)
    long, short = some_ids(1), some_ids(1, 8)
    ids = torch.cat([long, torch.nn.functional.pad(short, (T - 8, 0))])
    valid = torch.ones(2, T, dtype=torch.bool)
    valid[1, : T - 8] = False
    where = valid.long().cumsum(1) - 1
    mask = causal(2)[0] & valid[:, None]
    with torch.no_grad():
        both = ours({BACKBONE: ours.embed(ids)}, mask, where.clamp(min=0))[0][BACKBONE]
        alone = [ours({BACKBONE: ours.embed(i)}, *causal(1, i.shape[1]))[0][BACKBONE][0] for i in (long, short)]
    assert relative(both[0].numpy(), alone[0].numpy()) < 1e-5
    assert relative(both[1, T - 8 :].numpy(), alone[1].numpy()) < 1e-5


@families
def test_no_gradient_through_a_stop(family):
    """Knowledge insulation: exactly zero where the layout stops, not zero where it does not."""
    from vla.layout import Read

    ours, _ = pair(family, action=Expert(32, 64))
    x = {BACKBONE: torch.randn(B, PREFIX, 64), "action": torch.randn(B, T - PREFIX, 32)}
    mask = torch.ones(B, T, T, dtype=torch.bool)
    mask[:, :PREFIX, PREFIX:] = False
    stops = (Read(0, PREFIX, ()), Read(PREFIX, T, ((0, PREFIX),)))
    for reads, reached in ((stops, False), ((), True)):
        ours.zero_grad(set_to_none=True)
        ours(x, mask, causal()[1], reads=reads)[0]["action"].square().sum().backward()
        got = [n for n, p in ours.named_parameters() if ".backbone." in n and p.grad is not None and p.grad.any()]
        assert bool(got) == reached, (family, got[:3])
        assert all(p.grad is not None and p.grad.any() for n, p in ours.named_parameters() if ".action.q." in n)


@families
def test_windows_are_respected(family):
    """With a window, a token far away changes nothing in the first layer that has one."""
    settings = Settings(**TINY[family])
    window = settings.values.get("sliding_window")
    if not window:
        pytest.skip("a family without windows")
    config = settings.values | {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    if family == "mistral":
        del config["layer_types"]
    import json

    torch.manual_seed(0)
    ours = HuggingFace(Settings(config=json.dumps(config)), {}).eval()
    x = torch.randn(1, T, 64)
    other = x.clone()
    other[:, 0] += 1
    with torch.no_grad():
        a, b = (ours({BACKBONE: y}, *causal(1))[0][BACKBONE] for y in (x, other))
    moved = (a - b).abs().amax(-1)[0] > 0
    assert moved[:window].all() and not moved[window:].any()
