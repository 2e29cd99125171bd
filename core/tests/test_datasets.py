"""The contract of datasets: chunks, mixtures, the frame cache, opening by name."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla.datasets import Dataset, DatasetInfo, Mixture, chunk, open_dataset, source_table
from vla.errors import DataError, PartError, StoreError
from vla.frame_cache import CachedFrames, cache_frames


class Toy:
    """Images that say which frame they are."""

    def __init__(self, lengths=(3, 4), first=0, cameras=("front",), robot="toy", broken=None):
        ends = np.cumsum(lengths)
        self.episodes = [range(int(e - n), int(e)) for e, n in zip(ends, lengths, strict=True)]
        self.info = DatasetInfo(
            {c: (6, 8) for c in cameras}, 1, 1, 10.0, robot, tasks=(f"task {first}",), source=f"toy {first}"
        )
        self.first, self.broken, self.decoded = first, broken, 0

    def __len__(self):
        return self.episodes[-1].stop

    def sample(self, index, horizon, cameras=None, images=True):
        self.decoded += 1
        if index == self.broken:
            raise DataError("an image cannot be decoded")
        episode = next(e for e, span in enumerate(self.episodes) if index in span)
        span = self.episodes[episode]
        actions, pad = chunk(self.actions(), index, span.stop, horizon)
        names = (self.info.cameras if cameras is None else cameras) if images else ()
        pixels = {c: np.full((6, 8, 3), self.first + index, np.uint8) for c in names}
        return {"images": pixels, "state": np.zeros(1, np.float32), "actions": actions, "actions_is_pad": pad,
                "prompt": self.info.tasks[0], "episode": episode, "frame": index - span.start}  # fmt: skip

    def states(self):
        return np.zeros((len(self), 1), np.float32)

    def actions(self):
        return self.first + np.arange(len(self), dtype=np.float32)[:, None]

    def prompts(self):
        return list(self.info.tasks) * len(self)

    def digest(self):
        return f"toy {self.first} {len(self)}"


@given(st.integers(1, 30), st.integers(0, 29), st.integers(1, 12))
def test_a_chunk_is_what_a_loop_would_give(end, index, horizon):
    index = index % end
    actions = np.arange(40, dtype=np.float32)[:, None]
    values, is_pad = chunk(actions, index, end, horizon)
    for step in range(horizon):
        inside = index + step < end
        assert is_pad[step] == (not inside)
        assert values[step, 0] == (index + step if inside else end - 1)


def test_a_mixture_is_its_datasets_end_to_end():
    a, b = Toy((3, 4)), Toy((2, 5), first=100, cameras=("front", "side"))
    mix = Mixture([(a, 3.0), (b, 1.0)])
    assert isinstance(mix, Dataset) and len(mix) == 14 and mix.sizes == [7, 7] and mix.weights == [0.75, 0.25]
    assert [len(e) for e in mix.episodes] == [3, 4, 2, 5] and mix.episodes[2] == range(7, 9)
    assert [mix.locate(i) for i in (0, 6, 7, 13, -1)] == [(0, 0), (0, 6), (1, 0), (1, 6), (1, 6)]
    sample = mix.sample(9, 3)
    assert (sample["dataset"], sample["episode"], sample["frame"]) == (1, 3, 0)
    np.testing.assert_array_equal(sample["actions"][:, 0], mix.actions()[9:12, 0])
    assert mix.sample(0, 1, cameras=["front", "side"])["images"].keys() == {"front"}
    assert mix.prompts()[6:8] == ["task 0", "task 100"] and mix.info.tasks == ("task 0", "task 100")
    assert mix.digest() != Mixture([(a, 1.0), (b, 1.0)]).digest()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "no datasets"),
        ([(Toy(), 0.0)], "must be positive"),
        ([(Toy(), 1.0), (Toy(robot="other"), 1.0)], "differ in robot(.|\n)*'other'"),
    ],
)
def test_a_wrong_mixture_is_refused(parts, message):
    with pytest.raises(DataError, match=message):
        Mixture(parts)


def test_frames_are_decoded_once(tmp_path):
    data = Toy(cameras=("front", "side"))
    frames = cache_frames(data, ["side", "front"], (4, 4), tmp_path)
    assert frames.shape == (7, 2, 4, 4, 3) and data.decoded == 7
    # 6 x 8 into 4 x 4: three rows of the image in its proportions, and a black one.
    assert (frames[5, 0, 2] == 5).all() and (frames[5, 0, 3] == 0).all()
    again = cache_frames(data, ["side", "front"], (4, 4), tmp_path, threads=1)
    np.testing.assert_array_equal(again, frames)
    assert data.decoded == 7 and not frames.flags.writeable
    cache_frames(data, ["front"], (4, 4), tmp_path)
    cache_frames(Toy(first=1), ["front"], (4, 4), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3  # other cameras and other data have files of their own
    cached = CachedFrames(data, ["front"], (4, 4), tmp_path)
    before = data.decoded
    sample = cached.sample(5, 2)
    np.testing.assert_array_equal(sample["images"]["front"], frames[5, 1])
    assert (
        isinstance(cached, Dataset) and data.decoded == before + 1 and cached.sample(5, 2, images=False)["images"] == {}
    )


def test_a_frame_cache_is_whole_or_absent(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="cannot be decoded"):
        cache_frames(Toy(broken=4), ["front"], (4, 4), tmp_path)
    assert not list(tmp_path.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreError, match="No space left"):
        cache_frames(Toy(), ["front"], (4, 4), tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="no such camera"):
        cache_frames(Toy(), ["top"], (4, 4), tmp_path)


def test_unknown_readers_are_named():
    with pytest.raises(PartError, match="rlds"):
        open_dataset({"part": "rlds", "path": "x"})


@pytest.mark.parametrize("name", ["lerobot/aloha_sim_insertion", "tabletop/blocks", "lerobots/x", "data/metaworlds"])
def test_a_hub_name_may_resemble_a_part(name):
    assert source_table(name) == {"part": "lerobot", "path": name}
    with pytest.raises(DataError, match=r"no such dataset folder"):
        open_dataset(name)


def test_a_folder_with_the_name_of_a_part_is_told_apart(tmp_path, monkeypatch):
    pytest.importorskip("vla_dataset_tabletop")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tabletop").mkdir()
    assert source_table("tabletop") == {"part": "tabletop"}  # a folder of something else
    (tmp_path / "tabletop/meta").mkdir()
    (tmp_path / "tabletop/meta/info.json").write_text("{}")
    with pytest.raises(PartError, match=r"dataset part(.|\n)*./tabletop(.|\n)*tabletop:"):
        source_table("tabletop")
    folder = {"part": "lerobot", "path": str(tmp_path / "tabletop")}
    assert source_table("./tabletop") == source_table(Path("tabletop")) == folder
    assert source_table("tabletop:") == {"part": "tabletop"}
