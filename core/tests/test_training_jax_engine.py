"""The JAX engine does what the PyTorch engine does: same curves, same state on disk, either resumes the other's run."""

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

for needed in ("jax", "torch", "vla_head_flow", "vla_llm_gemma", "vla_vision_siglip", "vla_backbone_paligemma"):
    pytest.importorskip(needed)

from vla.errors import SettingsError  # noqa: E402
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
    loader = Loader(samples, made.train_index, made.variant, config, made.collate)
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
        for name, array in ours[part].items():
            assert array.dtype == theirs[part][name].dtype and array.shape == theirs[part][name].shape
            # Adam divides by the size of the gradient, so weights whose gradient is noise drift by some learning rates
            np.testing.assert_allclose(array, theirs[part][name], atol=2e-3, err_msg=f"{part} {name}")


def test_validation_and_sampling_agree(pair):
    torch, jax, _, loader = pair
    obs, actions, draws = loader.batch(3).micro[0]
    for engine in (torch, jax):
        engine.load_state({p: {k: v.copy() for k, v in a.items()} for p, a in torch.state().items()})
    one, two = (e.evaluate(obs, actions, draws) for e in (torch, jax))
    np.testing.assert_allclose(one["loss/actions"], two["loss/actions"], rtol=1e-4)
    noise = np.random.default_rng(0).normal(size=(4, 3, 4)).astype(np.float32)
    one, two = (e.sample(obs, noise, None)["actions"] for e in (torch, jax))
    np.testing.assert_allclose(one, two, atol=2e-5)


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
    """As for PyTorch, with fewer kills (VLA_KILLS_JAX, default 1): a start costs seconds of compiling."""
    rng, env = random.Random(1), {**os.environ, "OMP_NUM_THREADS": "1"}
    out = tmp_path / "run"

    def start(where):
        again = ["--resume"] if checkpoints.checkpoint_steps(where) else []
        command = [sys.executable, str(_path), str(where), "20", "jax", *again]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    reference = start(tmp_path / "whole")
    for _ in range(int(os.environ.get("VLA_KILLS_JAX", "1"))):
        process = start(out)
        assert process.stdout.readline() == "training\n", process.stderr.read()
        deadline = time.monotonic() + 60  # compiled when the first step is on record
        while not (out / "metrics.jsonl").read_text().count('"step"') > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(rng.random() * 0.5)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    for process in (reference, start(out)):
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
    a, b = (checkpoints.load_checkpoint(o, 20).arrays for o in (tmp_path / "whole", out))
    assert all(np.array_equal(a[p][k], b[p][k]) for p in a for k in a[p])
    one, two = ([(r["step"], r["loss"]) for r in read_metrics(o)] for o in (tmp_path / "whole", out))
    assert one == two
