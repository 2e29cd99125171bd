"""The flow head's own maths in JAX: time features to the last digits, projections, Euler times."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
nnx = pytest.importorskip("flax.nnx")

import jax  # noqa: E402
from vla_head_flow import jax_impl, params, torch_impl  # noqa: E402
from vla_head_flow.config import Settings  # noqa: E402

from vla.contracts import Spec  # noqa: E402
from vla.jax_kit.ops import time_embedding  # noqa: E402
from vla.params import Site  # noqa: E402
from vla.testing.closeness import close  # noqa: E402
from vla.testing.parity import part_parity  # noqa: E402

SPEC = Spec(state_dim=5, action_dim=4, action_horizon=3)


def test_time_features_are_exact_although_float32():
    """250 turns: a plain float32 product would be off by 1e-4."""
    time = np.concatenate([np.random.default_rng(0).random(2000), [0, 0.001, 0.5, 1]]).astype(np.float32)
    period = 4e-3 * (4.0 / 4e-3) ** np.linspace(0, 1, 64)
    angle = time.astype(np.float64)[:, None] / period * 2 * np.pi
    want = np.concatenate([np.sin(angle), np.cos(angle)], -1)
    for function in (time_embedding, jax.jit(time_embedding, static_argnums=(1, 2, 3))):
        close(np.asarray(function(time, 128, 4e-3, 4.0)), want, 2e-6)


@pytest.mark.parametrize("time", ["adarms", "concat"])
@pytest.mark.parametrize("state", ["tokens", "continuous"])
def test_outputs_and_gradients(time, state):
    settings = Settings(width=8, mlp_dim=12, time=time, state=state)
    rng = np.random.default_rng(0)
    actions, when, robot = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 4), (2,), (2, 5))
    )  # fmt: skip

    def call(head, actions, when, robot):
        tokens = head.tokens(actions, when)[0].x
        out = [tokens, head.velocity(tokens), *head.condition(when).values()]
        return [*out, head.state_token(robot).x] if state == "continuous" else out

    found = part_parity(
        torch_impl.FlowHead(settings, SPEC, {}, {}),
        nnx.eval_shape(lambda: jax_impl.FlowHead(settings, SPEC, {}, {}, rngs=nnx.Rngs(0))),
        params.rows(Site(settings, SPEC, {}, {})),
        call,
        actions,
        abs(when),
        robot,
    )
    assert not [row for row in found if not row.fine]


@pytest.mark.parametrize("steps", [1, 7, 10])
def test_euler_times(steps):
    got, want = jax_impl.euler_times(steps), torch_impl.euler_times(steps, "cpu")
    close(got[0], want[0].numpy(), 1e-7)
    assert got[1] == want[1]
