"""Reading LeRobotDataset: every version, images and video, chunks, workers, and what goes wrong."""

import json
import multiprocessing
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shared_data import SHARED, needs

from vla.datasets import Dataset, DatasetInfo, create_dataset, open_dataset
from vla.errors import DataError, SettingsError

WRITTEN, GR00T = SHARED / "data/lerobot_written", SHARED / "data/robot/gr00t_picknplace"
INFO = DatasetInfo(cameras={"front": (32, 48), "wrist": (32, 48)}, state_dim=3, action_dim=2, hz=10, robot="toy")
needs_shared = needs(WRITTEN, GR00T)


def _image(value: int) -> np.ndarray:
    """A smooth image that tells frames apart, also after video compression."""
    y, x = np.mgrid[:32, :48]
    return np.stack([(x * 4 + value * 9) % 200 // 4 * 4, np.full_like(x, value * 5 % 250), y * 6], -1).astype(np.uint8)


def write(path: Path, video: bool = False, lengths=(5, 7, 4)) -> Path:
    rng = np.random.default_rng(0)
    with create_dataset(path, INFO, video=video) as writer:
        count = 0
        for episode, length in enumerate(lengths):
            for _ in range(length):
                images = {"front": _image(count), "wrist": 255 - _image(count)}
                state, action = rng.normal(size=3), np.array([count, -count], np.float32)
                writer.add({"images": images, "state": state, "action": action, "prompt": f"task {episode % 2}"})
                count += 1
            writer.end_episode()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_chunks_repeat_the_last_action_and_say_so(folder):
    data = open_dataset(folder)
    assert isinstance(data, Dataset) and len(data) == 16 and data.episodes == [range(0, 5), range(5, 12), range(12, 16)]
    for index in range(len(data)):
        end = next(span.stop for span in data.episodes if index in span)
        sample = data.sample(index, 6, images=False)
        steps = np.arange(index, index + 6)
        np.testing.assert_array_equal(sample["actions"][:, 0], np.minimum(steps, end - 1))
        np.testing.assert_array_equal(sample["actions_is_pad"], steps >= end)
        assert sample["actions"].dtype == sample["state"].dtype == np.float32
    assert data.prompts() == ["task 0"] * 5 + ["task 1"] * 7 + ["task 0"] * 4
    assert data.sample(-1, 1)["frame"] == 3 and data.sample(5, 1)["episode"] == 1


def test_only_the_cameras_asked_for_are_decoded(folder, copy):
    data = open_dataset(folder)
    assert data.sample(0, 1, cameras=["wrist"])["images"].keys() == {"wrist"}
    assert data.sample(0, 1, images=False)["images"] == {}
    renamed = open_dataset(folder, {"cameras": ["base=front"]})
    assert renamed.info.cameras == {"base": (32, 48)}
    np.testing.assert_array_equal(renamed.sample(3, 1)["images"]["base"], data.sample(3, 1)["images"]["front"])
    # Spoil the bytes of one camera: the other is still readable, so it was never touched.
    _edit_rows(copy, "observation.images.front", lambda rows: [{"bytes": b"no image", "path": r["path"]} for r in rows])
    data = open_dataset(copy)
    data.sample(0, 1, cameras=["wrist"])
    with pytest.raises(DataError, match=r"cannot be decoded(.|\n)*front of frame 0"):
        data.sample(0, 1)


@needs_shared
@pytest.mark.parametrize("where", [GR00T, WRITTEN / "v30_video"])
def test_every_frame_by_time_is_the_frame_that_playing_shows(where):
    data = open_dataset(where)
    name, key = next(iter(data._cameras.items()))
    rng = np.random.default_rng(0)
    for episode in (0, len(data.episodes) - 1):
        span, clip = data.episodes[episode], data._meta.clips[key][episode]
        with av.open(str(clip.path)) as container:
            played = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        first = round(clip.start * data.info.hz)
        picks = [*rng.integers(0, len(span), 12), *range(6), len(span) - 1, len(span) - 2, 0]
        for i in map(int, picks):  # forwards, backwards, far and near
            image = data.sample(span.start + i, 1, cameras=[name])["images"][name]
            np.testing.assert_array_equal(image, played[first + i])


@needs_shared
def test_sets_of_all_versions_declare_what_is_in_them():
    gr00t, v21, images, video = (
        open_dataset(p) for p in (GR00T, *(WRITTEN / n for n in ("v21_image", "v30_image", "v30_video")))
    )
    assert (gr00t.info.state_dim, gr00t.info.hz, gr00t.info.robot) == (44, 20.0, "GR1ArmsOnly")
    assert gr00t.info.cameras == {"ego_view": (256, 256)}  # `egoview` is declared there, but has no file
    assert len(gr00t.info.tasks) == 5 and "valid" not in gr00t.info.tasks and gr00t.info.action_names[0] == "motor_0"
    assert (len(v21), len(v21.episodes), v21.info.tasks, v21.info.cameras) == (60, 3, ("do it",), {})
    for data in (images, video):
        assert data.info.cameras == {"cam0": (224, 224), "cam1": (224, 224)}
        assert data.prompts()[60] == "task 1" and data.info.action_names == tuple(f"a{i}" for i in range(7))
    one = pq.read_table(WRITTEN / "v30_image" / "data/chunk-000/file-000.parquet", columns=["action"])[
        "action"
    ].to_pylist()
    np.testing.assert_array_equal(images.actions(), np.array(one, np.float32))
    assert len({d.digest() for d in (gr00t, v21, images, video)}) == 4


def test_old_layouts_read_the_same(folder, tmp_path):
    new = open_dataset(folder)
    old = open_dataset(_as_v21(folder, tmp_path / "old"))
    np.testing.assert_array_equal(old.states(), new.states())
    assert old.prompts() == new.prompts() and old.episodes == new.episodes
    for i in (0, 6, 15):
        np.testing.assert_array_equal(old.sample(i, 2)["images"]["wrist"], new.sample(i, 2)["images"]["wrist"])


def test_a_small_image_cache_changes_nothing(folder):
    few, many = open_dataset(folder, {"cache_mb": 0}), open_dataset(folder)
    for i in (0, 15, 6, 0):
        np.testing.assert_array_equal(few.sample(i, 1)["images"]["front"], many.sample(i, 1)["images"]["front"])
    assert len(few._images._kept) == 1 and len(many._images._kept) > 1


def test_hub_cache_folders_are_found_without_a_network(folder, tmp_path, monkeypatch):
    cached = tmp_path / "hub" / "datasets--org--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / "abc").symlink_to(folder)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert open_dataset("org/name").digest() == open_dataset(cached).digest() == open_dataset(folder).digest()
    with pytest.raises(DataError, match="no such dataset folder"):
        open_dataset("org/other")


def _frames(data, indices):
    return [data.sample(int(i), 1)["images"]["front"] for i in indices]


def _in_child(data, indices, pipe):
    pipe.send(_frames(data, indices))


@pytest.mark.parametrize("video", [False, True])
def test_threads_forks_and_copies_see_the_same_frames(tmp_path, video):
    data = open_dataset(write(tmp_path / "set", video))
    order = np.random.default_rng(0).integers(0, len(data), 60)
    expected = _frames(data, order)
    with ThreadPoolExecutor(4) as pool:
        threads = [f for part in pool.map(lambda part: _frames(data, part), np.split(order, 6)) for f in part]
    np.testing.assert_array_equal(threads, expected)
    np.testing.assert_array_equal(_frames(pickle.loads(pickle.dumps(data)), order), expected)
    here, there = multiprocessing.Pipe()
    # Forked while this process has its decoders open and in the middle of a file.
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(data, order, there))
    child.start()
    np.testing.assert_array_equal(here.recv(), expected)
    child.join()
    np.testing.assert_array_equal(_frames(data, order[:5]), expected[:5])


def test_the_digest_is_of_the_data(folder, copy, tmp_path):
    before = open_dataset(folder).digest()
    assert open_dataset(copy).digest() == before == open_dataset(folder).digest()
    assert open_dataset(folder, {"prompt": "do this"}).digest() != before
    _edit_rows(copy, "action", lambda rows: [[r[0], r[1] + 1e-3] for r in rows])
    assert open_dataset(copy).digest() != before


# --- what goes wrong


def _edit_rows(folder: Path, column: str, change) -> None:
    file = folder / "data/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    at = table.column_names.index(column)
    new = pa.array(change(table[column].to_pylist()), table.schema.field(column).type)
    pq.write_table(table.set_column(at, table.schema.field(column), new), file)


def _edit_info(folder: Path, **values) -> None:
    file = folder / "meta" / "info.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def _as_v21(folder: Path, out: Path) -> Path:
    info = json.loads((folder / "meta" / "info.json").read_text())
    (out / "meta").mkdir(parents=True)
    (out / "data" / "chunk-000").mkdir(parents=True)
    table = pq.read_table(folder / "data/chunk-000/file-000.parquet")
    episodes = table["episode_index"].to_numpy()
    names = pq.read_table(folder / "meta" / "tasks.parquet").to_pylist()
    lengths = np.bincount(episodes)
    for e in range(len(lengths)):
        pq.write_table(table.filter(pa.array(episodes == e)), out / f"data/chunk-000/episode_{e:06d}.parquet")
    rows = [json.dumps({"episode_index": e, "tasks": [], "length": int(n)}) for e, n in enumerate(lengths)]
    (out / "meta" / "episodes.jsonl").write_text("\n".join(rows))
    (out / "meta" / "tasks.jsonl").write_text("\n".join(json.dumps(row) for row in names))
    path = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    (out / "meta" / "info.json").write_text(json.dumps({**info, "codebase_version": "v2.1", "data_path": path}))
    return out


def _nan(folder):
    _edit_rows(folder, "observation.state", lambda rows: [*rows[:7], [0.0, float("nan"), 0.0], *rows[8:]])


def _truncate(file: Path, keep: float = 0.5) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])


DATA_FILE = "data/chunk-000/file-000.parquet"
MISHAPS = {
    "nan": (_nan, {}, r"not finite(.|\n)*observation.state\[1\] in row 7"),
    "truncated parquet": (lambda f: _truncate(f / DATA_FILE), {}, "parquet file is damaged(.|\n)*file-000.parquet"),
    "missing parquet": (lambda f: (f / DATA_FILE).unlink(), {}, "parquet file of the dataset is missing(.|\n)*file-000"),
    "git-lfs": (lambda f: (f / DATA_FILE).write_text("version https://git-lfs.github.com/spec/v1\n"), {}, "git lfs pull"),
    "other version": (lambda f: _edit_info(f, codebase_version="v1.6"), {}, "not supported(.|\n)*v1.6(.|\n)*v2.0, v2.1, v3.0"),
    "no info": (lambda f: (f / "meta/info.json").unlink(), {}, "no meta/info.json"),
    "broken info": (lambda f: (f / "meta/info.json").write_text("{"), {}, "cannot be read(.|\n)*info.json"),
    "no fps": (lambda f: _edit_info(f, fps=0), {}, "incomplete(.|\n)*fps"),
    "wrong fps": (lambda f: _edit_info(f, fps=25), {}, "do not follow the declared rate(.|\n)*check_fps"),
    "no tasks": (lambda f: (f / "meta/tasks.parquet").unlink(), {}, "missing(.|\n)*tasks.parquet"),
    "unknown task": (lambda f: _edit_rows(f, "task_index", lambda rows: [9] * len(rows)), {}, "does not list(.|\n)*9"),
    "other episodes": (lambda f: _edit_rows(f, "episode_index", lambda rows: [r // 2 for r in range(16)]), {}, "an episode that the metadata does not list(.|\n)*row 6(.|\n)*got:      3"),
    "fewer frames": (lambda f: pq.write_table(pq.read_table(f / DATA_FILE).slice(0, 9), f / DATA_FILE), {}, "got:      4 frames(.|\n)*expected: 7(.|\n)*data.exclude='1-2'"),
    "missing camera": (None, {"cameras": ["side"]}, r"no such camera(.|\n)*side(.|\n)*\['front', 'wrist'\]"),
    "missing column": (None, {"state_key": "observation.pose"}, "no such column(.|\n)*observation.pose"),
    "leads outside": (lambda f: _edit_info(f, data_path="../{chunk_index}{file_index}"), {}, "leads out of the dataset"),
}  # fmt: skip


@pytest.mark.parametrize("mishap", MISHAPS)
def test_one_clear_error_for_each_mishap(copy, mishap):
    spoil, settings, message = MISHAPS[mishap]
    if spoil:
        spoil(copy)
    with pytest.raises(DataError, match=message):
        open_dataset(copy, settings)


def test_misuse_is_named(folder, tmp_path):
    data = open_dataset(folder)
    with pytest.raises(DataError, match=r"no such camera(.|\n)*\['front', 'wrist'\]"):
        data.sample(0, 1, cameras=["side"])
    with pytest.raises(DataError, match=r"no such frame(.|\n)*0 to 15"):
        data.sample(16, 1)
    with pytest.raises(DataError, match="no such dataset folder"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match="which dataset"):
        open_dataset({"part": "lerobot"})
    with pytest.raises(SettingsError, match="cameras"):
        open_dataset(folder, {"cameras": ["=front"]})


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "too short"])
def test_a_broken_video_is_named_with_its_episode(tmp_path, how):
    folder = write(tmp_path / "set", video=True)
    file = folder / "videos/observation.images.front/chunk-000/file-000.mp4"
    data = open_dataset(folder)
    if how == "missing":
        file.unlink()
        file.parent.mkdir(exist_ok=True)
    elif how == "truncated":
        _truncate(file)
    elif how == "flipped":
        raw = bytearray(file.read_bytes())
        start, end = raw.index(b"mdat") + 4, raw.index(b"moov")
        raw[start:end] = bytes(b ^ 0x5A for b in raw[start:end])
        file.write_bytes(raw)
    else:
        shutil.copy(
            write(tmp_path / "short", video=True, lengths=(2,))
            / "videos/observation.images.front/chunk-000/file-000.mp4",
            file,
        )
    with pytest.raises(
        DataError, match=r"video (file is missing|is damaged)(.|\n)*file-000.mp4(.|\n)*'front', frame 3 of episode 2"
    ):
        data.sample(15, 1, cameras=["front"])
    assert data.sample(15, 1, cameras=["wrist"])["images"]["wrist"].shape == (32, 48, 3)
