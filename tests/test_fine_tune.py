"""Fine-tuning a model of one's own: what may change, where weights and statistics come from, and the run directory."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

for needed in ("torch", "vla_dataset_lerobot", "vla_head_flow", "vla_tokenizer_paligemma"):
    pytest.importorskip(needed)

import vla  # noqa: E402
from vla.datasets import open_dataset  # noqa: E402
from vla.errors import StoreError  # noqa: E402
from vla.runs import find_model  # noqa: E402
from vla.store import open_model  # noqa: E402
from vla.training.checkpoints import checkpoint_folder  # noqa: E402
from vla.training.loop import train  # noqa: E402

_spec = importlib.util.spec_from_file_location("end_to_end", Path(__file__).parent / "test_train_end_to_end.py")
world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world)
SMALL = {**world.SIZES, "backbone.vision.posemb": "learn", "head.width": 32, "head.mlp_dim": 32}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return world.write(tmp_path_factory.mktemp("data") / "walk", episodes=3, frames=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory, data):
    """A run of a small pi05: three checkpoints and a model."""
    variant = vla.build(type="pi05", preset="tiny", set=SMALL)
    config = world.config(3, save_every=1, keep_last=3)
    return train(variant, str(data), out=tmp_path_factory.mktemp("base") / "run", config=config).out


def test_a_run_and_its_checkpoints_open_as_models(base, data, tmp_path):
    assert find_model(base) == base / "model" == open_model(base).folder
    assert find_model(f"{base}@2") == checkpoint_folder(base, 2)
    seen = open_dataset(str(data)).sample(0, 8)
    last, whole = (vla.open(where).infer(seen, seed=1)["actions"] for where in (f"{base}@3", base))
    assert np.array_equal(last, whole)  # the last checkpoint holds the weights of the model
    middle = vla.open(f"{base}@2")
    assert middle.metadata["record"]["steps"] == 2 and not np.array_equal(middle.infer(seen, seed=1)["actions"], last)
    assert vla.read_variant(f"{base}@2").to_toml() == vla.read_variant(base).to_toml()
    running = tmp_path / "running"  # as it looks before the run has ended
    (running / "checkpoints").mkdir(parents=True)
    with pytest.raises(StoreError, match="no model and no checkpoint yet"):
        vla.open(running)
    (running / "checkpoints" / "step-00000002").symlink_to(checkpoint_folder(base, 2))
    assert vla.open(running).metadata["record"]["steps"] == 2
    with pytest.raises(StoreError, match="no checkpoint of this step") as caught:
        vla.open(f"{base}@9")
    assert f"{base}@3" in str(caught.value) and "[1, 2, 3]" in str(caught.value)
