import numpy as np

from vla.datasets import DatasetInfo, create_dataset
from vla.testing import DatasetConformance


class TestMetaWorld(DatasetConformance):
    """Demonstrations that were recorded before, so no simulator is needed; recording them is tested elsewhere."""

    name = "metaworld"
    excuse = {"test_a_wrong_path_is_a_clear_error": "a path without data is where demonstrations are recorded"}

    def prepare(self, folder):
        rng = np.random.default_rng(0)
        info = DatasetInfo({"front": (16, 16), "wrist": (16, 16)}, state_dim=4, action_dim=4, hz=80, robot="metaworld")
        with create_dataset(folder / "data", info) as writer:
            for prompt in ("open the drawer", "press the button on top of the box"):
                for _ in range(5):
                    images = {name: rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for name in info.cameras}
                    frame = {"images": images, "state": rng.standard_normal(4), "action": rng.standard_normal(4)}
                    writer.add({**frame, "prompt": prompt})
                writer.end_episode()
        return {"path": str(folder / "data")}
