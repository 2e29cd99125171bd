"""The PyTorch engine: its update equals optax's AdamW with clipping and averaging; freezing, precision, recomputation."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for plugin in ("vla_head_flow", "vla_llm_gemma", "vla_vision_siglip", "vla_backbone_paligemma"):
    pytest.importorskip(plugin)

from vla.contracts import Actions, Observation  # noqa: E402
from vla.errors import SettingsError, StoreError  # noqa: E402
from vla.testing.closeness import close  # noqa: E402
from vla.training.config import TrainConfig  # noqa: E402
from vla.training.loader import Loader, Samples  # noqa: E402
from vla.training.torch_engine import TorchEngine  # noqa: E402

_spec = importlib.util.spec_from_file_location("training_world", Path(__file__).parent / "training_world.py")
world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world)


class Quadratic(torch.nn.Module):
    """loss = sum of (w - target)^2 c / 2 per row; the target is the row's action."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        self.unused = torch.nn.Parameter(torch.ones(2))

    def loss(self, obs, actions, draws):
        scale = torch.tensor([1.0, 10.0, 0.1])
        return {"q": ((self.w - actions.values[:, 0]) ** 2 * scale).sum(-1) / 2}

    def total(self, losses):
        return losses["q"].mean()


def quadratic_batch(values):
    values = np.asarray(values, np.float32)[:, None]
    return Observation({}, {}, np.zeros((len(values), 1), np.float32)), Actions(values), {}


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_the_update_is_optax_adamw_with_clipping(clip):
    optax = pytest.importorskip("optax")
    jnp = pytest.importorskip("jax.numpy")
    config = TrainConfig(clip=clip, ema_decay=0.9, weight_decay=0.1)
    engine = TorchEngine(None, config, model=Quadratic())
    adamw = optax.adamw(lambda k: 0.01 * (k + 1), b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
    theirs = optax.chain(optax.clip_by_global_norm(clip), adamw) if clip else adamw
    params = {"w": jnp.array([1.0, -2.0, 0.5]), "unused": jnp.ones(2)}
    state, ema = theirs.init(params), dict(params)
    rng = np.random.default_rng(0)
    for step in range(6):
        rows = rng.normal(size=(4, 3)).astype(np.float32)
        result = engine.read([engine.step([quadratic_batch(rows)], 0.01 * (step + 1), 0.9)])[0]
        grad = (params["w"] - rows.mean(0)) * jnp.array([1.0, 10.0, 0.1])
        assert result["grad_norm"] == pytest.approx(float(jnp.linalg.norm(grad)), rel=1e-5)
        updates, state = theirs.update({"w": grad, "unused": jnp.zeros(2)}, state, params)
        params = optax.apply_updates(params, updates)
        ema = {k: 0.9 * ema[k] + 0.1 * params[k] for k in ema}
        for name in params:
            close(engine.state()["params"][name], params[name], 1e-6)
            close(engine.state()["ema"][name], ema[name], 1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_step_that_is_not_finite_changes_nothing(value):
    engine = TorchEngine(None, TrainConfig(), model=Quadratic())
    engine.step([quadratic_batch(np.ones((2, 3)))], 0.01)
    before = {f"{p}/{n}": a.copy() for p, arrays in engine.state().items() for n, a in arrays.items()}
    result = engine.read([engine.step([quadratic_batch([[1, 2, 3], [1, value, 3]])], 0.01)])[0]
    assert result["bad"] == 1
    after = {f"{p}/{n}": a for p, arrays in engine.state().items() for n, a in arrays.items()}
    assert all(np.array_equal(before[k], after[k]) for k in before)
    assert engine.read([engine.step([quadratic_batch(np.ones((2, 3)))], 0.01)])[0]["bad"] == 0
    assert engine.updates_seen() == 2


def real_engine(**values):
    config = world.config(10, **values).planned()
    made = world.prepared(config)
    loader = Loader(
        Samples(made.dataset, made.group.inputs, 3, 1e9), made.train_index, made.variant, config
    )
    return TorchEngine(made.variant, config), loader


def test_frozen_parts_do_not_move_and_have_no_moments():
    engine, loader = real_engine(freeze=("backbone.vision", "backbone.llm.embedder"))
    before = {k: v.copy() for k, v in engine.state()["params"].items()}
    for k in range(3):
        engine.step(loader.batch(k).micro, 1e-2)
    after = engine.state()
    frozen = [n for n in before if n.startswith(("backbone.vision.", "backbone.llm.embedder."))]
    assert frozen and all(np.array_equal(before[n], after["params"][n]) for n in frozen)
    assert not any(np.array_equal(before[n], after["params"][n]) for n in before if n not in frozen and "action" in n)
    assert not any(n.split("/", 1)[-1] in frozen for n in after["optimizer"])
    assert set(engine.weights()) == set(before)


@pytest.mark.parametrize(
    ("freeze", "match"), [(("backbone.visio",), "backbone.vision"), (("backbone", "head"), "nothing is left")]
)
def test_a_wrong_freeze_says_what_there_is(freeze, match):
    with pytest.raises(SettingsError, match=match):
        real_engine(freeze=freeze)


def test_mixed_precision_keeps_float32_weights_and_is_close():
    losses = {}
    for precision in ("float32", "bfloat16"):
        engine, loader = real_engine(precision=precision)
        results = engine.read([engine.step(loader.batch(k).micro, 1e-3) for k in range(5)])
        losses[precision] = [r["loss"] for r in results]
        assert {a.dtype for part in ("params", "ema") for a in engine.state()[part].values()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.03)
    assert losses["bfloat16"] != losses["float32"]


def test_recomputed_layers_give_the_same_gradients():
    norms = []
    for recompute in (False, True):
        engine, loader = real_engine(checkpoint_activations=recompute)
        norms.append(
            [r["grad_norm"] for r in engine.read([engine.step(loader.batch(k).micro, 1e-3) for k in range(3)])]
        )
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-6)


def test_weights_start_from_the_seed_or_from_what_is_given():
    one, _ = real_engine(seed=1)
    same, _ = real_engine(seed=1)
    other, _ = real_engine(seed=2)
    name = "backbone.llm.embedder.weight"
    assert np.array_equal(one.weights()[name], same.weights()[name])
    assert not np.array_equal(one.weights()[name], other.weights()[name])
    given = TorchEngine(world.small_variant(), world.config(1), other.weights())
    assert np.array_equal(given.weights()[name], other.weights()[name])
    with pytest.raises(StoreError, match="missing"):
        TorchEngine(world.small_variant(), world.config(1), {k: v for k, v in other.weights().items() if k != name})


def test_evaluation_uses_the_average_and_leaves_no_trace():
    engine, loader = real_engine(ema_decay=0.5)
    batch = loader.batch(0).micro[0]
    for k in range(3):
        engine.step(loader.batch(k).micro, 1e-2, 0.5)
    before = {k: v.copy() for k, v in engine.state()["params"].items()}
    average = engine.evaluate(*batch)["loss"]
    assert all(np.array_equal(before[k], v) for k, v in engine.state()["params"].items())
    plain = TorchEngine(world.small_variant(), world.config(1, ema_decay=0), engine.weights()).evaluate(*batch)["loss"]
    assert average == pytest.approx(plain, rel=1e-6)
    raw = TorchEngine(world.small_variant(), world.config(1, ema_decay=0), before).evaluate(*batch)["loss"]
    assert average != pytest.approx(raw, rel=1e-6)
