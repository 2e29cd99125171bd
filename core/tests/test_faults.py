"""Killed, or out of space, at every file-system call: what was whole stays whole, and a second try ends the same.

The calls are those of the whole process, safetensors' and Arrow's included: a shim in C stands before them (`LD_PRELOAD`).
The fast lane takes every few calls; the slow lane every one, and kills whole training runs.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc")

pytestmark = pytest.mark.skipif(
    not (sys.platform == "linux" and COMPILER), reason="the shim needs Linux and a C compiler"
)


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    library = tmp_path_factory.mktemp("shim") / "fs_shim.so"
    command = [COMPILER, "-shared", "-fPIC", "-O1", "-o", library, HERE / "fs_shim.c", "-ldl"]
    subprocess.run([str(word) for word in command], check=True)
    return library


@pytest.fixture
def folder(tmp_path):
    """In memory where there is such a place: the disk's speed is nobody's question here."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    place = memory / f"vla-faults-{os.getpid()}"
    yield place
    shutil.rmtree(place, ignore_errors=True)


def fail_at_calls(part, folder, shim, every):
    """The lines of `fault_world.py`, one per operation."""
    command = [sys.executable, "-W", "ignore:os.fork:RuntimeWarning", str(HERE / "fault_world.py"), part, folder, every]
    env = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(w) for w in command], env=env, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return done.stdout.splitlines()


def needs(part):
    plugins = (
        ["vla_dataset_lerobot", "pyarrow", "PIL"] if part == "data" else ["vla_head_flow", "vla_backbone_paligemma"]
    )
    for name in [*plugins, *(["flax"] if part.endswith("jax") else ["torch"])]:
        pytest.importorskip(name)


@pytest.mark.parametrize(("part", "every", "operations"), [("run-torch", 8, 4), ("data", 60, 3)])
def test_at_some_calls(part, every, operations, folder, shim):
    needs(part)
    assert len(fail_at_calls(part, folder, shim, every)) == operations


@pytest.mark.slow
@pytest.mark.parametrize("part", ["run-torch", "run-jax", "data"])
def test_at_every_call(part, folder, shim):
    """Save, prune, export, sweep with the state of either engine; datasets, tokenizers, single files."""
    needs(part)
    fail_at_calls(part, folder, shim, 1)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["whole-torch", "whole-jax"])
def test_of_whole_runs(part, folder, shim):
    """Killed or out of space at every 20th call of a whole run (VLA_EVERY), then resumed."""
    needs(part)
    fail_at_calls(part, folder, shim, int(os.environ.get("VLA_EVERY", "20")))
