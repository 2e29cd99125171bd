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
from vla.manifest import verify_folder  # noqa: E402
from vla.testing.closeness import close  # noqa: E402
from vla.training import checkpoints, loop  # noqa: E402
from vla.training.metrics import read_metrics  # noqa: E402

_path = Path(__file__).parent / "training_world.py"
_spec = importlib.util.spec_from_file_location("training_world", _path)
world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world)


def start_two(out, steps, mode, *more, framework="torch", flags=""):
    """Train in two processes and wait for both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}
    if framework == "torch":
        env |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        number = "RANK"
    else:
        env |= {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
        number = "JAX_PROCESS_ID"
    command = [sys.executable, str(_path), str(out), str(steps), framework, mode, *more]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, env={**env, number: r}, **pipes) for r in "01"]
    for process in both:
        _, err = process.communicate(timeout=400)
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
        largest = max(np.abs(array).max() for array in theirs[part].values())
        for name, array in theirs[part].items():
            assert ours[part][name].shape == array.shape
            close(ours[part][name], array, 1e-3, f"{part} {name}", scale=largest)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "flags"), [("ddp", ""), ("fsdp", ""), ("fsdp", "--xla_force_host_platform_device_count=2")]
)
def test_two_jax_processes_give_the_curve_of_one(tmp_path, mode, flags):
    """`jax.distributed` over gloo; with the flag each process has two devices. As for PyTorch: losses within 1e-5,
    gradient norms within 1e-4 over 6 steps, one checkpoint; a run resumed in two processes goes on as in one."""
    pytest.importorskip("jax")
    words = ("validate",) if flags else ("accumulate", "validate")  # rows of a micro-batch: one per device
    alone, out = tmp_path / "alone", tmp_path / "run"
    command = [sys.executable, str(_path), str(alone), "6", "jax", *words]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True, timeout=200)
    start_two(out, 4, mode, *words, framework="jax", flags=flags)
    assert checkpoints.checkpoint_steps(out) == [2, 4]
    start_two(out, 6, mode, *words, "--resume", framework="jax", flags=flags)
    np.testing.assert_allclose(curve(out), curve(alone), rtol=1e-5)
    np.testing.assert_allclose(curve(out, "grad_norm"), curve(alone, "grad_norm"), rtol=1e-4)
    (ours, *_), (theirs, *_) = ([r for r in read_metrics(o, "validation")][::-1] for o in (out, alone))
    assert ours["step"] == 6 and ours["action_error_mean"] == pytest.approx(theirs["action_error_mean"], rel=1e-4)
    ours, theirs = (checkpoints.load_checkpoint(o, 6).arrays for o in (out, alone))
    for part in theirs:
        assert ours[part].keys() == theirs[part].keys()
        largest = max(np.abs(array).max() for array in theirs[part].values())
        for name, array in theirs[part].items():
            close(ours[part][name], array, 1e-3, f"{part} {name}", scale=largest)
    verify_folder(out / "model")
    assert len(read_metrics(out, "start")) == 2  # one process speaks, in each of the two runs


def test_processes_agree_on_shapes_as_if_one_had_all_rows():
    """`pack` leaves out what no row of a process has; `widen` puts back what other processes need."""
    pytest.importorskip("jax")
    from vla.contracts import Observation, pack
    from vla.training.jax_devices import needs, widen

    rng, length = np.random.default_rng(0), np.array([40, 17, 5, 3])
    valid = np.arange(64) < length[:, None]
    target = valid & (np.arange(64) >= length[:, None] - np.array([20, 2, 1, 1])[:, None])
    masks = {"top": np.array([True, True, True, True]), "wrist": np.array([True, False, False, False])}

    def rows(part):
        return Observation(
            images={n: np.where(m[part, None, None, None], images[n][part], 0) for n, m in masks.items()},
            image_masks={n: m[part] for n, m in masks.items()},
            state=state[part],
            tokenized_prompt=np.where(valid, ids, 0)[part],
            tokenized_prompt_mask=valid[part],
            token_ar_mask=target[part].astype(np.int32),
            token_loss_mask=target[part],
        )

    images = {n: rng.integers(0, 255, (4, 8, 8, 3), dtype=np.uint8) for n in masks}
    state, ids = rng.normal(size=(4, 3)), rng.integers(1, 99, (4, 64))
    whole = pack(rows(slice(None)))
    parts = [pack(rows(p)) for p in (slice(0, 2), slice(2, 4))]
    assert parts[1].tokenized_prompt.shape[1] < 48 and list(parts[1].images) == ["top"]
    most = np.stack([needs(p, ("top", "other", "wrist")) for p in parts]).max(0)
    wide = [widen(p, most, ("top", "other", "wrist")) for p in parts]
    for field in ("tokenized_prompt", "tokenized_prompt_mask", "token_ar_mask", "token_loss_mask", "state"):
        np.testing.assert_array_equal(np.concatenate([getattr(p, field) for p in wide]), getattr(whole, field), field)
    for field in ("images", "image_masks", "extra"):
        joined = {k: np.concatenate([getattr(p, field)[k] for p in wide]) for k in getattr(wide[0], field)}
        assert joined.keys() == getattr(whole, field).keys()
        for name, array in joined.items():
            if name == "target_index":  # where there is no target, the position says nothing
                real = whole.extra["target_valid"]
                array, expected = array[real], whole.extra[name][real]
            else:
                expected = getattr(whole, field)[name]
            np.testing.assert_array_equal(array, expected, name)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "first"}, "not a number"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "not started with torchrun"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "cannot be joined"),
    ],
)
def test_jax_says_how_to_start(tmp_path, monkeypatch, environment, words):
    pytest.importorskip("jax")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=words):
        run(tmp_path / "run", world.config(2, distributed="fsdp", framework="jax"))
    assert not (tmp_path / "run").exists()


def test_it_says_how_to_start(tmp_path):
    with pytest.raises(SettingsError, match="torchrun"):
        run(tmp_path / "run", world.config(2, distributed="ddp"))
