"""The JAX engine does what the PyTorch engine does: same curves, same state on disk, either resumes the other's run."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

for needed in ("jax", "torch", "vla_head_flow", "vla_llm_gemma", "vla_vision_siglip", "vla_backbone_paligemma"):
    pytest.importorskip(needed)

from vla.contracts import Sampling  # noqa: E402
from vla.errors import SettingsError  # noqa: E402
from vla.manifest import verify_folder  # noqa: E402
from vla.testing.closeness import close  # noqa: E402
from vla.training import checkpoints, loop  # noqa: E402
from vla.training.jax_engine import JaxEngine  # noqa: E402
from vla.training.loader import Loader, Samples  # noqa: E402
from vla.training.metrics import read_metrics  # noqa: E402
from vla.training.schedules import ema_decay, learning_rate  # noqa: E402
from vla.training.torch_engine import TorchEngine  # noqa: E402

_path = Path(__file__).parent / "training_world.py"
_spec = importlib.util.spec_from_file_location("training_world", _path)
world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world)
STEPS = 50


@pytest.fixture(scope="module")
def pair():
    """Both engines from the same weights, trained on the same 50 batches; and their curves."""
    config = world.config(STEPS, freeze=("backbone.vision",)).planned()
    made = world.prepared(config)
    samples = Samples(made.dataset, made.group.inputs, 3, 1e9)
    loader = Loader(samples, made.train_index, made.variant, config)
    torch = TorchEngine(made.variant, config)
    jax = JaxEngine(made.variant, config, {k: v.copy() for k, v in torch.weights().items()})
    curves = {"torch": [], "jax": []}
    for k in range(STEPS):
        batch = loader.batch(k)
        for name, engine in (("torch", torch), ("jax", jax)):
            results = engine.step(batch.micro, learning_rate(config, k), ema_decay(config, k))
            curves[name] += engine.read([results])
    return torch, jax, curves, loader


def test_the_curves_agree_step_by_step(pair):
    """float32, 50 steps, the same weights, order and noise: losses within 2e-5, gradient norms within 1e-4 (relative)."""
    _, _, curves, _ = pair
    for key, bound in (("loss", 2e-5), ("loss/actions", 2e-5), ("grad_norm", 1e-4)):
        ours, theirs = ([r[key] for r in curves[name]] for name in ("jax", "torch"))
        np.testing.assert_allclose(ours, theirs, rtol=bound, err_msg=key)


def test_the_state_has_the_same_names_and_values(pair):
    torch, jax, _, _ = pair
    ours, theirs = jax.state(), torch.state()
    assert {p: set(a) for p, a in ours.items()} == {p: set(a) for p, a in theirs.items()}
    for part in ours:
        largest = max(np.abs(array).max() for array in theirs[part].values())
        for name, array in ours[part].items():
            assert array.dtype == theirs[part][name].dtype and array.shape == theirs[part][name].shape
            # Adam divides by the size of the gradient, so weights whose gradient is noise drift by some learning rates
            close(array, theirs[part][name], 2e-3, f"{part} {name}", scale=largest)


def test_validation_and_sampling_agree(pair):
    torch, jax, _, loader = pair
    obs, actions, draws = loader.batch(3).micro[0]
    for engine in (torch, jax):
        engine.load_state({p: {k: v.copy() for k, v in a.items()} for p, a in torch.state().items()})
    one, two = (e.evaluate(obs, actions, draws) for e in (torch, jax))
    np.testing.assert_allclose(one["loss/actions"], two["loss/actions"], rtol=1e-4)
    noise = np.random.default_rng(0).normal(size=(4, 3, 4)).astype(np.float32)
    one, two = (e.sample(obs, noise, Sampling())["actions"] for e in (torch, jax))
    close(one, two, 2e-5)


def test_a_step_that_is_not_finite_changes_nothing(pair):
    _, engine, _, loader = pair
    before = {f"{p}/{n}": a.copy() for p, arrays in engine.state().items() for n, a in arrays.items()}
    obs, actions, draws = loader.batch(0).micro[0]
    actions.values[0, 0, 0] = np.inf
    result = engine.read([engine.step([(obs, actions, draws)], 1e-3, 0.9)])[0]
    assert result["bad"] == 1
    after = {f"{p}/{n}": a for p, arrays in engine.state().items() for n, a in arrays.items()}
    assert all(np.array_equal(before[k], after[k]) for k in before)


def test_layers_of_a_stack_freeze_together():
    with pytest.raises(SettingsError, match="one array"):
        JaxEngine(world.small_variant(**{"backbone.llm.depth": 2}), world.config(1, freeze=("backbone.llm.layers.0",)))
    both = world.config(1, freeze=("backbone.llm.layers.0", "backbone.llm.layers.1"))  # all of them, one by one
    engine = JaxEngine(world.small_variant(**{"backbone.llm.depth": 2}), both)
    assert not any("/llm/layers/" in path for path in engine.params)
    assert any("/llm/layers/" in path for path in engine.fixed)
    with pytest.raises(SettingsError, match="backbone.vision"):
        JaxEngine(world.small_variant(), world.config(1, freeze=("backbone.visio",)))


def run(out, config, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "prepare", lambda *a: world.prepared(config))
        return loop.train("world", "world", out=out, config=config, **options)


def test_either_framework_goes_on_with_the_others_run(tmp_path):
    plan = {"lr_decay_steps": 12, "lr_warmup": 2, "save_every": 6}
    run(tmp_path / "torch", world.config(12, **plan))
    run(tmp_path / "both", world.config(6, **plan))
    run(tmp_path / "both", world.config(12, framework="jax", **plan), resume=True, allow_change=True)
    ours, theirs = ([r["loss"] for r in read_metrics(tmp_path / n)] for n in ("both", "torch"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


@pytest.mark.slow
def test_killed_and_resumed_it_ends_the_same(tmp_path):
    """As for PyTorch: VLA_KILLS_JAX times (default 3; 50 for the record), at random moments of the first step, which
    compiles, of later steps and of saving. What was compiled is kept for the next process, or a start would cost twice."""
    kept = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env = {**os.environ, **kept, "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "OMP_NUM_THREADS": "1"}
    whole = tmp_path / "whole"
    world.survive(tmp_path / "uninterrupted", "jax", 0, env, lambda out: out.rename(whole))
    reference = checkpoints.load_checkpoint(whole, 20).arrays
    made, config = world.prepared(world.config(20)), world.config(20)
    expected = Loader(Samples(made.dataset, None, 3, 0), made.train_index, made.variant, config)

    def check(out):
        found = checkpoints.load_checkpoint(out, 20).arrays
        assert {p: set(a) for p, a in found.items()} == {p: set(a) for p, a in reference.items()}
        assert all(np.array_equal(found[p][k], reference[p][k]) for p in reference for k in reference[p])
        ours, theirs = ([(r["step"], r["loss"]) for r in read_metrics(o)] for o in (out, whole))
        assert ours == theirs
        assert world.ids_seen(out) == [expected.ids(k).tolist() for k in range(20)]
        verify_folder(out / "model")

    kills = int(os.environ.get("VLA_KILLS_JAX", "3"))
    print(world.survive(tmp_path, "jax", kills, env, check))
