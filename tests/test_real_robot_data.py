"""All four model types on recorded robot demonstrations: the losses of the two frameworks agree, and fall.

The study with 50 steps, its tables and its curves: benchmarks/bench_real_data.py.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from shared_data import needs

for needed in ("torch", "jax", "av", "vla_dataset_lerobot", "vla_head_ki", "vla_tokenizer_fast"):
    pytest.importorskip(needed)

_path = Path(__file__).parents[1] / "benchmarks" / "bench_real_data.py"
_spec = importlib.util.spec_from_file_location("bench_real_data", _path)
study = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(study)

pytestmark = needs(study.DATA)
ONE_LAYER = {"backbone.vision.depth": 1, "backbone.llm.depth": 1}
STEPS, ALONE = 8, 40


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return study.open_data(tmp_path_factory.mktemp("frames"))


@pytest.mark.parametrize("type", [pytest.param(t, marks=() if t == "pi0" else pytest.mark.slow) for t in study.TYPES])
def test_both_frameworks_learn_alike_from_recorded_demonstrations(data, type):
    """8 steps in both, PyTorch on to 40. One layer: JAX compiles for longer than it trains."""
    config = study.run_config(STEPS, lr_decay_steps=ALONE)
    records, _, _ = study.train_in_both(type, data, config, torch_steps=ALONE, sets=ONE_LAYER)
    ours, theirs = records["jax"], records["torch"]
    assert (len(ours), len(theirs)) == (STEPS, ALONE) and not any(r["bad"] for r in ours + theirs)
    for key in [k for k in theirs[0] if k.startswith("loss")]:
        np.testing.assert_allclose([r[key] for r in ours], [r[key] for r in theirs[:STEPS]], rtol=study.LOSS_BOUND)
        first, last = study.fall(theirs, key)
        assert last < 0.9 * first, key
    assert study.difference(ours, theirs, "grad_norm") < study.NORM_BOUND
    assert np.mean([r["loss"] for r in ours[-3:]]) < np.mean([r["loss"] for r in ours[:3]])
