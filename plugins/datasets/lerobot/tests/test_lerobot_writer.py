"""Writing LeRobotDataset v3.0: exact round trips, the same files as LeRobot's, and nothing left after a failure."""

import errno
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from shared_data import SHARED, needs
from vla_dataset_lerobot import LeRobotWriter
from vla_dataset_lerobot import writer as writer_module

from vla.datasets import DatasetInfo, create_dataset, open_dataset
from vla.errors import DataError, StoreError
from vla.testing.closeness import close

WRITTEN = SHARED / "data" / "lerobot_written"
needs_shared = needs(WRITTEN)
NUMBERS = {
    "observation.state": {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
    "action": {"dtype": "float32", "shape": [1], "names": None},
}
CAMERA = {"dtype": "image", "shape": [16, 24, 3], "names": ["height", "width", "channels"]}


def _frame(i: int, **more) -> dict:
    return {"observation.state": [i, -i], "action": [i / 2], "task": "go", **more}


def test_what_is_written_is_read_back(tmp_path):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (9, 16, 24, 3), dtype=np.uint8)
    with LeRobotWriter.create(tmp_path / "d", 12.5, {"observation.images.top": CAMERA, **NUMBERS}, "arm") as writer:
        for i, image in enumerate(frames):
            writer.add_frame(_frame(i, **{"observation.images.top": image}) | {"task": f"task {i // 6}"})
            if i in (3, 8):
                writer.save_episode()
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    data = open_dataset(tmp_path / "d")
    assert (data.info.hz, data.info.robot, data.info.state_names, data.info.action_dim) == (12.5, "arm", ("x", "y"), 1)
    assert data.prompts() == ["task 0"] * 6 + ["task 1"] * 3 and [len(e) for e in data.episodes] == [4, 5]
    for i in range(9):
        np.testing.assert_array_equal(data.sample(i, 1)["images"]["top"], frames[i])
    np.testing.assert_array_equal(data.actions()[:, 0], np.arange(9) / 2)


@pytest.mark.parametrize("size", [(16, 24), (15, 25)])
def test_video_frames_come_back_close_and_in_order(tmp_path, size):
    info = DatasetInfo({"top": size}, 1, 1, 30)
    y, x = np.mgrid[: size[0], : size[1]]
    frames = [np.stack([x * 8, y * 9, np.full_like(x, 20 * i)], -1).astype(np.uint8) for i in range(12)]
    with create_dataset(tmp_path / "d", info, video=True) as writer:
        for i, image in enumerate(frames):
            writer.add({"images": {"top": image}, "state": [0], "action": [0], "prompt": "go"})
            if i % 4 == 3:
                writer.end_episode()
    data = open_dataset(tmp_path / "d")
    for i in (11, 0, 4, 5, 3, 8):
        error = np.abs(data.sample(i, 1)["images"]["top"].astype(int) - frames[i]).mean()
        assert error < 5, (i, error)  # neighbours differ by 20 in one channel of three


def test_full_files_are_rolled(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "DATA_MB", 0)
    monkeypatch.setattr(writer_module, "VIDEO_MB", -1)
    monkeypatch.setattr(writer_module, "CHUNK_FILES", 2)
    features = {"observation.images.top": {**CAMERA, "dtype": "video"}, **NUMBERS}
    with LeRobotWriter.create(tmp_path / "d", 10, features) as writer:
        for e in range(5):
            for i in range(2):
                writer.add_frame(
                    _frame(10 * e + i, **{"observation.images.top": np.full((16, 24, 3), 40 * e, np.uint8)})
                )
            writer.save_episode()
    names = sorted(str(p.relative_to(tmp_path / "d")) for p in (tmp_path / "d").glob("data/*/*"))
    assert names == [f"data/chunk-{c:03d}/file-{f:03d}.parquet" for c, f in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]]
    data = open_dataset(tmp_path / "d")
    np.testing.assert_array_equal(data.actions()[::2, 0], np.arange(5) * 5)
    for e in range(5):
        assert abs(int(data.sample(2 * e + 1, 1)["images"]["top"].mean()) - 40 * e) < 4


@needs_shared
@pytest.mark.parametrize("kind", ["v30_image", "v30_video"])
def test_files_are_built_like_lerobots_own(tmp_path, kind):
    theirs = WRITTEN / kind
    data = open_dataset(theirs)
    info = json.loads((theirs / "meta/info.json").read_text())
    features = {k: f for k, f in info["features"].items() if k not in writer_module.AUTO}
    with LeRobotWriter.create(tmp_path / "d", info["fps"], features, info["robot_type"]) as writer:
        for span in data.episodes[:2]:
            for i in span:
                sample = data.sample(i, 1)
                images = {f"observation.images.{name}": image for name, image in sample["images"].items()}
                frame = {
                    **images,
                    "observation.state": sample["state"],
                    "action": sample["actions"][0],
                    "task": sample["prompt"],
                }
                writer.add_frame(frame)
            writer.save_episode()
    ours = tmp_path / "d"

    mine = json.loads((ours / "meta/info.json").read_text())
    assert list(mine) == list(info) and list(mine["features"]) == list(info["features"])
    for key in ("codebase_version", "fps", "data_path", "video_path", "robot_type", "chunks_size"):
        assert mine[key] == info[key], key
    for key, feature in info["features"].items():
        assert mine["features"][key].keys() == feature.keys(), key
        assert mine["features"][key].get("info", {}).keys() == feature.get("info", {}).keys()

    made = {p.relative_to(ours) for p in ours.rglob("*")} - {Path("manifest.json")}
    assert made == {p.relative_to(theirs) for p in theirs.rglob("*")}
    for file in ("data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet", "meta/tasks.parquet"):
        a, b = pq.ParquetFile(ours / file).schema_arrow, pq.ParquetFile(theirs / file).schema_arrow
        assert a.remove_metadata().equals(b.remove_metadata()), file
        assert set(a.metadata or {}) == set(b.metadata or {})
        for name in a.metadata or {}:
            described = [json.loads(s.metadata[name]) for s in (a, b)]
            keys = ("info",) if name == b"huggingface" else ("index_columns", "columns", "column_indexes")
            assert [described[0][k] for k in keys] == [described[1][k] for k in keys]
    assert pq.ParquetFile(ours / "data/chunk-000/file-000.parquet").metadata.num_row_groups == 2

    # Statistics of an episode. Of images LeRobot looks at every other pixel; ours are exact.
    rows = [pq.read_table(f / "meta/episodes/chunk-000/file-000.parquet").to_pylist()[1] for f in (ours, theirs)]
    for name in rows[1]:
        if not name.startswith("stats/"):
            assert rows[0][name] == rows[1][name], name
        elif name.split("/")[-1] in ("min", "max", "mean", "std", "count") and (
            "images" not in name or kind == "v30_image"
        ):
            close(rows[0][name], rows[1][name], 6e-3 if "images" in name else 1e-6, name, scale=float("images" in name))
    whole = json.loads((ours / "meta/stats.json").read_text())
    states = open_dataset(ours).states().astype(np.float64)
    np.testing.assert_allclose(whole["observation.state"]["q99"], np.quantile(states, 0.99, axis=0), rtol=1e-12)
    pixels = np.stack([open_dataset(ours).sample(i, 1)["images"]["cam0"] for i in range(120)]) / 255
    if kind == "v30_image":
        np.testing.assert_allclose(np.ravel(whole["observation.images.cam0"]["std"]), pixels.std((0, 1, 2)), rtol=1e-9)
        close(np.ravel(whole["observation.images.cam0"]["q10"]), np.quantile(pixels, 0.1, (0, 1, 2)), 1e-9)


def test_nothing_is_left_after_a_failure(tmp_path):
    with (
        pytest.raises(RuntimeError, match="robot fell over"),
        LeRobotWriter.create(tmp_path / "d", 10, NUMBERS) as writer,
    ):
        writer.add_frame(_frame(0))
        writer.save_episode()
        raise RuntimeError("the robot fell over")
    with pytest.raises(DataError, match="nothing was recorded"), LeRobotWriter.create(tmp_path / "d", 10, NUMBERS):
        pass
    with (
        pytest.raises(DataError, match="last episode was not saved"),
        LeRobotWriter.create(tmp_path / "d", 10, NUMBERS) as writer,
    ):
        writer.add_frame(_frame(0))
    writer = LeRobotWriter.create(tmp_path / "d", 10, NUMBERS)
    writer.abort()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["frames", "metadata"])
def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch, moment):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer_module.pq.ParquetWriter, "write_table", full) if moment == "frames" else None
    monkeypatch.setattr(writer_module, "tasks_table", full) if moment == "metadata" else None
    with (
        pytest.raises(StoreError, match="the disk is full"),
        LeRobotWriter.create(tmp_path / "d", 10, NUMBERS) as writer,
    ):
        writer.add_frame(_frame(0))
        writer.save_episode()
    assert not list(tmp_path.iterdir())


def test_a_taken_path_is_refused_unless_asked(tmp_path):
    def write(value, overwrite=False):
        with LeRobotWriter.create(tmp_path / "d", 10, NUMBERS, overwrite=overwrite) as writer:
            writer.add_frame(_frame(value))
            writer.save_episode()

    write(1)
    with pytest.raises(StoreError, match="already there"):
        write(2)
    assert open_dataset(tmp_path / "d").states()[0, 0] == 1
    write(2, overwrite=True)
    assert open_dataset(tmp_path / "d").states()[0, 0] == 2 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"action": [0.0], "task": "go"}, "exactly the declared features"),
        (
            _frame(0) | {"observation.state": [1, 2, 3]},
            r"wrong shape(.|\n)*observation.state(.|\n)*\(3,\)(.|\n)*\(2,\)",
        ),
        (_frame(0) | {"action": [np.nan]}, "not finite(.|\n)*action"),
        (_frame(0) | {"task": ""}, "needs its instruction"),
    ],
)
def test_a_wrong_frame_is_refused_when_it_comes(tmp_path, frame, message):
    writer = LeRobotWriter.create(tmp_path / "d", 10, NUMBERS)
    with pytest.raises(DataError, match=message):
        writer.add_frame(frame)
    writer.abort()
