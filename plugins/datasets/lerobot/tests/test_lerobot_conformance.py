import numpy as np

from vla.datasets import DatasetInfo, create_dataset
from vla.testing import DatasetConformance


class TestLeRobot(DatasetConformance):
    name = "lerobot"

    def prepare(self, folder):
        rng = np.random.default_rng(0)
        info = DatasetInfo({"front": (12, 16), "wrist": (8, 8)}, state_dim=4, action_dim=3, hz=10)
        with create_dataset(folder / "data", info) as writer:
            for length, prompt in ((7, "push the block"), (4, "lift the block")):
                for _ in range(length):
                    images = {
                        name: rng.integers(0, 256, (*size, 3), dtype=np.uint8) for name, size in info.cameras.items()
                    }
                    state, action = rng.standard_normal(4), rng.standard_normal(3)
                    writer.add({"images": images, "state": state, "action": action, "prompt": prompt})
                writer.end_episode()
        return {"path": str(folder / "data")}
