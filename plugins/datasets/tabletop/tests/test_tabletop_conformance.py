import numpy as np

from vla.datasets import DatasetInfo, create_dataset
from vla.testing import DatasetConformance


class TestTabletop(DatasetConformance):
    """Demonstrations that were recorded before; recording them is tested elsewhere."""

    name = "tabletop"
    excuse = {"test_a_wrong_path_is_a_clear_error": "a path without data is where demonstrations are recorded"}

    def prepare(self, folder):
        rng = np.random.default_rng(0)
        info = DatasetInfo({"front": (16, 16), "wrist": (16, 16)}, state_dim=8, action_dim=7, hz=10, robot="tabletop")
        with create_dataset(folder / "data", info) as writer:
            for prompt in ("touch the red block", "touch the blue block"):
                for _ in range(5):
                    images = {name: rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for name in info.cameras}
                    frame = {"images": images, "state": rng.standard_normal(8), "action": rng.standard_normal(7)}
                    writer.add({**frame, "prompt": prompt})
                writer.end_episode()
        return {"path": str(folder / "data")}
