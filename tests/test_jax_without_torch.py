"""An environment with JAX and no PyTorch: weights are made, trained and sampled; torch cannot be imported there."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import vla
from vla.interop.start import _fresh_in_jax
from vla.params import shapes, table

pytest.importorskip("flax")
for needed in ("vla_backbone_paligemma", "vla_head_flow", "vla_dataset_lerobot"):
    pytest.importorskip(needed)

NO_TORCH = "import sys; sys.modules['torch'] = None; from vla.cli import main; sys.exit(main(sys.argv[1:]))"


def test_fresh_weights_made_by_jax_are_all_there():
    variant = vla.build(type="pi05", preset="tiny", set={"spec.image_size": [32, 32], "backbone.llm.depth": 1})
    made = _fresh_in_jax(variant, 3)
    assert {n: a.shape for n, a in made.items()} == dict(shapes(table(variant)))
    assert all(a.dtype == np.float32 and np.isfinite(a).all() for a in made.values())
    other = _fresh_in_jax(variant, 4)
    assert not np.array_equal(made["head.action_in_proj.weight"], other["head.action_in_proj.weight"])


def without_torch(folder, *words):
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *words], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"vla {' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


@pytest.mark.slow
def test_from_paligemma_to_actions(tmp_path):
    from vla.datasets import DatasetInfo, create_dataset

    spec = importlib.util.spec_from_file_location("init", Path(__file__).parent / "test_init_paligemma.py")
    init = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(init)
    init.big_vision(tmp_path / "pt.npz")
    (tmp_path / "v").mkdir()
    (tmp_path / "v/variant.toml").write_text(init.variant(**{"spec.cameras": ["top"]}).to_toml())
    info = DatasetInfo({"top": (16, 16)}, state_dim=4, action_dim=5, hz=10)
    rng = np.random.default_rng(0)
    with create_dataset(tmp_path / "data", info) as writer:
        for _ in range(6):
            image = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            frame = {"images": {"top": image}, "state": rng.normal(size=4), "action": rng.normal(size=5)}
            writer.add({**frame, "prompt": "go"})
        writer.end_episode()
    said = without_torch(tmp_path, "build", "--base", "v/variant.toml", "--init", "paligemma:pt.npz", "--out", "started")
    assert "wrote started" in said
    small = ["--type", "pi05", "--preset", "tiny", "--set", "spec.image_size=[32,32]", "--set", "backbone.llm.depth=1"]
    small += ["--set", 'spec.cameras=["top"]', "--data", "data", "--framework", "jax"]
    without_torch(tmp_path, "train", *small, "--steps", "1", "--batch-size", "2", "--out", "run")
    assert '"actions"' in without_torch(tmp_path, "sample", "run", "--data", "data", "--framework", "jax", "--json")
