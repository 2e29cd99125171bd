"""openpi's own numbers, from its own checkpoint files, in PyTorch at float32."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from golden_cases import Case, folders  # noqa: E402

from vla.contracts import Actions  # noqa: E402
from vla.torch_kit.model import build_model, observation_to, tree_to  # noqa: E402

pytestmark = pytest.mark.goldens


@pytest.mark.parametrize("folder", folders())
def test_openpi_numbers(folder):
    case = Case(folder)
    model = build_model(case.variant)
    model.load_state_dict({name: torch.tensor(np.asarray(w)) for name, w in case.weights.items()})
    obs, chunk = observation_to(case.observation(), "cpu"), Actions(torch.tensor(case.inputs["actions"]))
    draws = tree_to(case.draws(), "cpu")

    if case.kind == "pi0_fast":
        # openpi feeds all tokens but the last and predicts the ones after
        short = observation_to(case.observation(tokens=-1), "cpu")
        prefix = model.embed(short)
        hidden = model._fused(prefix, model.head.enter(short, chunk, {}))
        logits = hidden["prompt"] @ model.backbone.llm.unembed().T
        case.compare("prefix_embeddings", torch.cat([t.x for t in model.embed(obs)], 1).detach())
        case.compare("logits", logits.detach())
        loss = model.loss(obs, chunk, {})["tokens"]
        case.compare("loss", loss.detach())
    else:
        case.compare("prefix_embeddings", torch.cat([t.x for t in model.embed(obs)], 1).detach())
        entry = model.head.enter(obs, chunk, draws)
        hidden = model._fused(model.embed(obs), entry)
        case.compare("velocity", model.head.velocity(hidden["action"]).detach())
        case.compare("loss", model.head.squared_error(hidden, entry).mean((1, 3)).detach())
        case.compare("sampled_actions", model.sample(obs, torch.tensor(case.inputs["noise"]))["actions"])
        loss = model.loss(obs, chunk, draws)["actions"]

    loss.mean().backward()
    zero = {name: np.zeros(p.shape, np.float32) for name, p in model.named_parameters()}
    case.compare_gradients({**zero, **{n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}})
