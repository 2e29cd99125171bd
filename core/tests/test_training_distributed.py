"""Two processes (gloo, CPU) train as one: same curve, same checkpoint, and either goes on with the other's run."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

for needed in ("torch", "vla_head_flow", "vla_llm_gemma", "vla_vision_siglip", "vla_backbone_paligemma"):
    pytest.importorskip(needed)

from vla.errors import SettingsError  # noqa: E402
from vla.store import verify_folder  # noqa: E402
from vla.training import checkpoints, loop  # noqa: E402
from vla.training.metrics import read_metrics  # noqa: E402

_path = Path(__file__).parent / "training_world.py"
_spec = importlib.util.spec_from_file_location("training_world", _path)
world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world)


def start_two(out, steps, mode, *more):
    """Train in two processes and wait for both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, str(_path), str(out), str(steps), "torch", mode, *more]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, env={**env, "RANK": r, "LOCAL_RANK": r}, **pipes) for r in "01"]
    for process in both:
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err


def run(out, config, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "prepare", lambda *a: world.prepared(config))
        return loop.train("world", "world", out=out, config=config, **options)


def curve(out, key="loss"):
    return [r[key] for r in read_metrics(out)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone") / "run", world.config(8))


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_give_the_curve_of_one(tmp_path, alone, mode):
    """To rounding: losses within 1e-5, gradient norms within 1e-4, over 8 steps."""
    out = tmp_path / "run"
    start_two(out, 8, mode)
    np.testing.assert_allclose(curve(out), curve(alone.out), rtol=1e-5)
    np.testing.assert_allclose(curve(out, "grad_norm"), curve(alone.out, "grad_norm"), rtol=1e-4)
    ours, theirs = (checkpoints.load_checkpoint(o, 8).arrays for o in (out, alone.out))
    for part in theirs:
        assert ours[part].keys() == theirs[part].keys()
        for name, array in theirs[part].items():
            assert ours[part][name].shape == array.shape
            np.testing.assert_allclose(ours[part][name], array, atol=1e-3, err_msg=f"{part} {name}")
    verify_folder(out / "model")
    assert len(read_metrics(out, "start")) == 1  # one process speaks


@pytest.mark.slow
def test_a_run_may_change_its_number_of_processes(tmp_path, alone):
    out = tmp_path / "run"
    run(out, world.config(4, lr_decay_steps=8))
    start_two(out, 8, "fsdp", "--resume")
    np.testing.assert_allclose(curve(out), curve(alone.out), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fsdp", "ddp"])
def test_four_jax_devices_give_the_curve_of_one(tmp_path, mode):
    """Four forced host devices, one process: to rounding."""
    pytest.importorskip("jax")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    outs = {}
    for name, flags, words in (("one", "", ()), ("four", "--xla_force_host_platform_device_count=4", (mode,))):
        outs[name] = tmp_path / name
        command = [sys.executable, str(_path), str(outs[name]), "6", "jax", *words]
        process = subprocess.Popen(
            command, env={**env, "XLA_FLAGS": flags}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        outs[name, "process"] = process
    for name in ("one", "four"):
        _, err = outs[name, "process"].communicate(timeout=300)
        assert outs[name, "process"].returncode == 0, err.decode()
    np.testing.assert_allclose(curve(outs["four"]), curve(outs["one"]), rtol=1e-5)
    np.testing.assert_allclose(curve(outs["four"], "grad_norm"), curve(outs["one"], "grad_norm"), rtol=1e-4)
    ours, theirs = (checkpoints.load_checkpoint(outs[n], 6).arrays["params"] for n in ("four", "one"))
    assert all(ours[k].shape == theirs[k].shape for k in theirs)


def test_it_says_how_to_start(tmp_path):
    with pytest.raises(SettingsError, match="torchrun"):
        run(tmp_path / "run", world.config(2, distributed="ddp"))
