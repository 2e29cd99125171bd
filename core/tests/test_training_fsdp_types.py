"""FSDP2 with models whose layers are not called as a whole: adaRMS modulations ahead of them, a dict around them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

for needed in ("torch", "vla_head_flow", "vla_head_ar", "vla_llm_gemma", "vla_llm_gemma_fast", "vla_vision_siglip"):
    pytest.importorskip(needed)

from vla.training.metrics import read_metrics  # noqa: E402

_path = Path(__file__).parent / "training_world.py"
WORKER = """
import importlib.util, sys
import numpy as np
import vla
spec = importlib.util.spec_from_file_location("training_world", sys.argv[1])
world = importlib.util.module_from_spec(spec)
spec.loader.exec_module(world)
type, plain, inputs = sys.argv[2], world.prepared, world.Group.inputs
sets = {k: v for k, v in world.SHAPES.items() if type != "pi0_fast" or not k.startswith("head.")}
variant = vla.build(type=type, preset="tiny", set={**sets, "backbone.llm.depth": 2})
def with_targets(sample):
    row = inputs(sample)
    if type == "pi0_fast":
        row["token_ar_mask"] = np.array([0, 1, 1, 0], np.int32)
        row["token_loss_mask"] = np.array([False, True, True, False])
    return row
world.Group.inputs = staticmethod(with_targets)
world.prepared = lambda config: plain(config, variant=variant)
world.main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("type", ["pi05", "pi0_fast"])
def test_two_processes_give_the_curve_of_one(tmp_path, type):
    """Losses within 1e-5 and gradient norms within 1e-4 (relative), over 4 steps."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}

    def start(name, mode, **more):
        command = [sys.executable, "-c", WORKER, str(_path), type, str(tmp_path / name), "4", "torch", mode]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env={**env, **more}, **pipes)

    processes = [start("two", "fsdp", **world, RANK=r, LOCAL_RANK=r) for r in "01"] + [start("one", "none")]
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    for key, bound in (("loss", 1e-5), ("grad_norm", 1e-4)):
        one, two = ([r[key] for r in read_metrics(tmp_path / name)] for name in ("one", "two"))
        assert len(one) == 4 and min(one) > 0
        np.testing.assert_allclose(two, one, rtol=bound)
