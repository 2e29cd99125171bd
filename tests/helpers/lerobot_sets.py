"""Small LeRobot datasets by hand, to be bent in one place each: every picture says which frame it is.

The state of a frame is (episode, frame, 0, ...), and its picture codes the same two numbers in grey, so that `agrees`
can compare what lies side by side. Written with pyarrow and PyAV alone: the project's own writer writes nothing wrong.
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CAMERA = "observation.images.top"
SIZE = 32
FPS = 10
TASKS = ("push the block", "lift the cup")


def picture(episode: int, frame: int) -> np.ndarray:
    """uint8 [32 32 3]: the frame in the middle, the episode in a corner."""
    image = np.full((SIZE, SIZE, 3), min(255, 8 * frame + 3), np.uint8)
    image[:16, :16] = 24 * episode + 20
    return image


def code(image: np.ndarray) -> tuple[int, int]:
    """(episode, frame) that `picture` put in."""
    return round((image[2:12, 2:12].mean() - 20) / 24), round((image[20:, 20:].mean() - 3) / 8)


def agrees(dataset: Any) -> bool:
    """Whether every picture is the one that was taken with the state beside it."""
    for index in range(len(dataset)):
        sample = dataset.sample(index, 2)
        state = tuple(int(x) for x in sample["state"][:2])
        if any(code(image) != state for image in sample["images"].values()):
            return False
    return True


def film(
    path: Path, images: Sequence[np.ndarray], fps: float = FPS, start: float = 0.0, times: Sequence[float] = (),
    pix: str = "yuv420p",
) -> None:  # fmt: skip
    """An mp4 of these pictures at these times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    base = Fraction(1, 15360)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], pix
        stream.options = {"crf": "10", "g": "2", "bf": "0", "preset": "ultrafast"}
        stream.codec_context.time_base = base
        stream.thread_count = 1
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round((times[i] if len(times) else start + i / fps) / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def png(image: np.ndarray, mode: str | None = None) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image, mode).save(out, "PNG")
    return out.getvalue()


def vectors(values: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), pa.float32()), values.shape[1])


def rows(episode: int, frames: Sequence[int], index: int, task: int, fps: float, video: bool) -> pa.Table:
    """The rows of an episode with these frame numbers."""
    n, number = len(frames), np.asarray(frames, np.int64)
    state = np.stack([np.full(n, episode), number, np.zeros(n)], 1)
    columns = {
        "observation.state": vectors(state), "action": vectors(state[:, ::-1] + 0.5),
        "timestamp": pa.array(number / fps, pa.float32()), "frame_index": pa.array(number),
        "episode_index": pa.array(np.full(n, episode)), "index": pa.array(index + number),
        "task_index": pa.array(np.full(n, task)),
    }  # fmt: skip
    if not video:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns[CAMERA] = pa.array([{"bytes": png(picture(episode, int(i))), "path": None} for i in number], kind)
    return pa.table(columns)


def make(
    root: Path, version: str = "v3.0", lengths: Mapping[int, int] | Sequence[int] = (8, 6, 7), *, video: bool = True,
    fps: float = FPS, order: Sequence[int] | None = None, file_of: Mapping[int, int] | None = None,
    film_of: Mapping[int, int] | None = None, change: Callable[[pa.Table, int], pa.Table] | None = None,
    episode: Callable[[dict[str, Any]], Any] | None = None, info: Mapping[str, Any] | None = None,
    gap: float = 0.0,
) -> Path:  # fmt: skip
    """A dataset.

    Args:
        lengths: frames of each episode, by number.
        order: in which the episodes are stored (v3.0).
        file_of, film_of: data file and video file of each episode (v3.0).
        change: (rows of an episode, its number) -> rows to write.
        episode: bends the row of an episode in the table of episodes, in place.
        info: put into info.json.
        gap: seconds of foreign pictures after each episode in a shared video (v3.0).
    """
    lengths = dict(lengths) if isinstance(lengths, Mapping) else dict(enumerate(lengths))
    order = list(order or lengths)
    file_of, film_of = file_of or dict.fromkeys(lengths, 0), film_of or file_of or dict.fromkeys(lengths, 0)
    new = version == "v3.0"
    (root / "meta").mkdir(parents=True)
    tables: dict[Path, list[pa.Table]] = {}
    films: dict[Path, list[np.ndarray]] = {}
    listed, index = [], 0
    for e in order if new else sorted(lengths):
        n = lengths[e]
        table = rows(e, range(n), index, e % len(TASKS), fps, video)
        table = change(table, e) if change else table
        name = f"data/chunk-000/file-{file_of[e]:03d}.parquet" if new else f"data/chunk-000/episode_{e:06d}.parquet"
        tables.setdefault(root / name, []).append(table)
        row: dict[str, Any] = {"episode_index": e, "tasks": [TASKS[e % len(TASKS)]], "length": len(table)}
        if new:
            row |= {"data/chunk_index": 0, "data/file_index": file_of[e]}
            row |= {"dataset_from_index": index, "dataset_to_index": index + len(table)}
        if video:
            name = f"{CAMERA}/chunk-000/file-{film_of[e]:03d}" if new else f"chunk-000/{CAMERA}/episode_{e:06d}"
            shown = films.setdefault(root / f"videos/{name}.mp4", [])
            begin, length = len(shown) / fps, n / fps
            shown += [picture(e, i) for i in range(n)] + [picture(9, 25)] * round(gap * fps)
            if new:
                places = {"chunk_index": 0, "file_index": film_of[e], "from_timestamp": begin}
                places["to_timestamp"] = begin + length
                row |= {f"videos/{CAMERA}/{key}": value for key, value in places.items()}
        if episode:
            episode(row)
        listed.append(row)
        index += n
    for path, parts in tables.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(path, parts[0].schema) as writer:
            for part in parts:
                writer.write_table(part)
    for path, shown in films.items():
        if shown:
            film(path, shown, fps)
    _meta(root, version, listed, video, {"fps": fps, **(info or {})})
    return root


def _meta(root: Path, version: str, listed: list[dict[str, Any]], video: bool, info: Mapping[str, Any]) -> None:
    meta = root / "meta"
    number = {"dtype": "int64", "shape": [1], "names": None}
    features = {
        "observation.state": {"dtype": "float32", "shape": [3], "names": None},
        "action": {"dtype": "float32", "shape": [3], "names": None},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        **dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), number),
        CAMERA: {"dtype": "video" if video else "image", "shape": [SIZE, SIZE, 3], "names": ["height", "width", "channel"]},
    }  # fmt: skip
    if version == "v3.0":
        paths = ("data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
                 "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4")  # fmt: skip
        (meta / "episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(listed), meta / "episodes/chunk-000/file-000.parquet")
        pq.write_table(pa.table({"task_index": [0, 1], "task": list(TASKS)}), meta / "tasks.parquet")
    else:
        paths = ("data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
                 "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4")  # fmt: skip
        (meta / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
        tasks = [json.dumps({"task_index": i, "task": task}) + "\n" for i, task in enumerate(TASKS)]
        (meta / "tasks.jsonl").write_text("".join(tasks))
    base = {"codebase_version": version, "robot_type": "so100", "chunks_size": 1000, "features": features}
    base |= {"data_path": paths[0], "video_path": paths[1] if video else None}
    (meta / "info.json").write_text(json.dumps({**base, **info}))


def put(table: pa.Table, name: str, values: Any) -> pa.Table:
    """The table with other values in a column, or with a new column."""
    array = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, array)
    return table.append_column(name, array)


def edit_info(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Bend info.json in place."""
    file = root / "meta/info.json"
    info = json.loads(file.read_text())
    change(info)
    file.write_text(json.dumps(info))
