"""openpi's own numbers, from its own checkpoint files, in JAX at float32. Mirror of the test in PyTorch."""

import pytest

jax = pytest.importorskip("jax")

from golden_cases import Case, folders  # noqa: E402
from jax import numpy as jnp  # noqa: E402

from vla.contracts import Actions  # noqa: E402
from vla.jax_kit.model import abstract_model, load_weights, merge, split, weights_of  # noqa: E402

pytestmark = pytest.mark.goldens


@pytest.mark.parametrize("folder", folders())
def test_openpi_numbers(folder):
    case = Case(folder)
    model = abstract_model(case.variant)
    load_weights(model, case.variant, case.weights)
    obs, short = case.observation(), case.observation(tokens=-1)
    chunk, draws = Actions(jnp.asarray(case.inputs["actions"])), case.draws()
    graph, params = split(model)

    @jax.jit
    def everything(params, obs, short, chunk, draws):
        """What is compared, in one compiled function: the mean loss, the arrays, the gradients."""

        def loss(params):
            model, out = merge(graph, params), {}
            out["prefix_embeddings"] = jnp.concatenate([t.x for t in model.embed(obs)], 1)
            if case.kind == "pi0_fast":
                # openpi feeds all tokens but the last and predicts the ones after
                hidden = model._fused(model.embed(short), model.head.enter(short, chunk, {}))
                out["logits"] = hidden["prompt"] @ model.backbone.llm.unembed().T
                out["loss"] = model.loss(obs, chunk, {})["tokens"]
                return out["loss"].mean(), out
            entry = model.head.enter(obs, chunk, draws)
            hidden = model._fused(model.embed(obs), entry)
            out["velocity"] = model.head.velocity(hidden["action"])
            out["loss"] = model.head.squared_error(hidden, entry).mean((1, 3))
            return model.loss(obs, chunk, draws)["actions"].mean(), out

        (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return out, gradients

    with jax.default_matmul_precision("highest"):
        found, gradients = everything(params, obs, short, chunk, draws)
        for name, array in found.items():
            case.compare(name, array)
        if case.kind != "pi0_fast":
            case.compare("sampled_actions", model.sample(obs, case.inputs["noise"])["actions"])
    case.compare_gradients(weights_of(gradients, case.variant))
