"""Both directions against LeRobot itself, which needs an environment of its own (Python 3.12, another torch).

python check.py write DIR      here:       write sets with our writer
python check.py lerobot DIR    in LeRobot's environment (`pip install "lerobot[dataset]==0.6.1"`):
                               read ours and dump what it sees; write sets of its own and dump what went in
python check.py compare DIR    here:       every frame, chunk and mask must be equal
"""

import sys
from pathlib import Path

import numpy as np

from vla.testing.closeness import close

H, FPS, LENGTHS = 6, 10, (7, 5, 9)
KINDS = ("image", "video")
CAMERA = "observation.images.front"


def content():
    """(episode, image, state, action, task) of each frame; smooth images, so that video keeps them apart."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:48, :64]
    for episode, length in enumerate(LENGTHS):
        for step in range(length):
            image = np.stack([x * 3, y * 5, np.full_like(x, 25 * step)], -1).astype(np.uint8)
            state, action = rng.normal(size=3).astype(np.float32), rng.normal(size=2).astype(np.float32)
            yield episode, image, state, action, f"task {episode % 2}"


def features(kind):
    """LeRobot's description of the columns."""
    return {
        CAMERA: {"dtype": kind, "shape": (48, 64, 3), "names": ["height", "width", "channels"]},
        "observation.state": {"dtype": "float32", "shape": (3,), "names": ["x", "y", "z"]},
        "action": {"dtype": "float32", "shape": (2,), "names": ["a", "b"]},
    }


def fill(dataset):
    """Record the content with a writer of either side: they have the same methods."""
    last = 0
    for episode, image, state, action, task in content():
        if episode != last:
            dataset.save_episode()
            last = episode
        dataset.add_frame({CAMERA: image, "observation.state": state, "action": action, "task": task})
    dataset.save_episode()
    dataset.finalize()


def write(folder):
    """Our writer."""
    from vla_dataset_lerobot import LeRobotWriter

    for kind in KINDS:
        fill(LeRobotWriter.create(folder / f"ours_{kind}", FPS, features(kind), "toy"))


def lerobot(folder):
    """LeRobot writes, and reads both."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    for kind in KINDS:
        root, video = folder / f"theirs_{kind}", kind == "video"
        fill(LeRobotDataset.create("x/y", FPS, features(kind), root=root, use_videos=video))
    deltas = {"action": [i / FPS for i in range(H)]}
    for name in (f"{who}_{kind}" for who in ("ours", "theirs") for kind in KINDS):
        items = LeRobotDataset("x/y", root=folder / name, video_backend="pyav", delta_timestamps=deltas)
        seen = [items[i] for i in range(len(items))]
        stats = items.meta.stats["action"]
        np.savez(
            folder / f"{name}.npz",
            images=np.stack([(s[CAMERA].numpy() * 255).round().astype(np.uint8).transpose(1, 2, 0) for s in seen]),
            states=np.stack([s["observation.state"].numpy() for s in seen]),
            actions=np.stack([s["action"].numpy() for s in seen]),
            pads=np.stack([s["action_is_pad"].numpy() for s in seen]),
            tasks=np.array([s["task"] for s in seen]),
            mean=np.asarray(stats["mean"]),
        )


def compare(folder):
    """Our reader against what LeRobot saw."""
    from vla.datasets import open_dataset

    for name in (f"{who}_{kind}" for who in ("ours", "theirs") for kind in KINDS):
        theirs, data = np.load(folder / f"{name}.npz"), open_dataset(folder / name)
        seen = [data.sample(i, H) for i in range(len(data))]
        np.testing.assert_array_equal(np.stack([s["images"]["front"] for s in seen]), theirs["images"])
        np.testing.assert_array_equal(data.states(), theirs["states"])
        np.testing.assert_array_equal(np.stack([s["actions"] for s in seen]), theirs["actions"])
        np.testing.assert_array_equal(np.stack([s["actions_is_pad"] for s in seen]), theirs["pads"])
        assert data.prompts() == theirs["tasks"].tolist()
        close(data.actions().astype(float).mean(0), theirs["mean"], 1e-6)
        truth = list(content())
        error = max(np.abs(s["images"]["front"].astype(int) - t[1]).mean() for s, t in zip(seen, truth, strict=True))
        assert error == 0 or (name.endswith("video") and error < 6), error
        np.testing.assert_array_equal(data.states(), np.stack([t[2] for t in truth]))
        print(f"{name}: {len(data)} frames equal; largest mean error against what was recorded {error:.2f}")


if __name__ == "__main__":
    {"write": write, "lerobot": lerobot, "compare": compare}[sys.argv[1]](Path(sys.argv[2]).absolute())
