"""A dataset that vla wrote is known to be as it was written, or refused; another's needs no manifest."""

import subprocess

import numpy as np
import pytest

from vla.cli import main
from vla.datasets import DatasetInfo, create_dataset, open_dataset
from vla.errors import VlaError
from vla.pixels import pixel_digest

INFO = DatasetInfo(cameras={"front": (8, 10)}, state_dim=2, action_dim=3, hz=10.0)


def record(path, video=False, change=0):
    rng = np.random.default_rng(0)
    with create_dataset(path, INFO, video=video, overwrite=True) as writer:
        for episode in range(2):
            for _ in range(4):
                image = rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)
                image[0, 0, 0] += change
                state, action = rng.normal(size=2).astype(np.float32), rng.normal(size=3).astype(np.float32)
                writer.add({"images": {"front": image}, "state": state, "action": action, "prompt": f"go {episode}"})
            writer.end_episode()
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return record(tmp_path_factory.mktemp("written") / "d")


@pytest.fixture
def copy(written, tmp_path):
    import shutil

    return shutil.copytree(written, tmp_path / "d")


def read_all(path):
    dataset = open_dataset(path)
    return [dataset.sample(i, 2) for i in range(len(dataset))]


def test_a_flipped_bit_in_a_page_is_found_by_reading(copy):
    file = copy / "data/chunk-000/file-000.parquet"
    before, found = file.read_bytes(), 0
    places = np.linspace(4, len(before) - 8, 60).astype(int)
    good = read_all(copy)
    for place in places:
        data = bytearray(before)
        data[place] ^= 1
        file.write_bytes(data)
        try:
            same = all(
                np.array_equal(a["images"]["front"], b["images"]["front"])
                and np.array_equal(a["actions"], b["actions"])
                for a, b in zip(read_all(copy), good, strict=True)
            )
        except VlaError:
            found += 1
        else:
            assert same, f"byte {place}: other values, in silence"
    assert found > 20  # the rest is of columns that are not read, or names in page headers


def test_the_verb_reads_every_byte(copy, capsys):
    assert main(["data", "check", str(copy)]) == 0
    assert "every byte is as it was written" in capsys.readouterr().out
    for file in sorted(p for p in copy.rglob("*") if p.is_file() and p.name != "manifest.json"):
        before = file.read_bytes()
        file.write_bytes(before[:-20] + bytes([before[-20] ^ 1]) + before[-19:])
        assert main(["data", "check", str(copy)]) == 2
        assert file.name in capsys.readouterr().err
        file.write_bytes(before)
    assert main(["data", "check", str(copy)]) == 0


def test_a_file_that_came_is_said_and_the_way_out_works(copy, capsys):
    (copy / "data" / "chunk-000" / "file-001.parquet").write_bytes(b"more")
    assert len(read_all(copy)) == 8  # whoever changes a dataset on purpose may
    assert main(["data", "check", str(copy)]) == 2
    said = capsys.readouterr().err
    assert "file-001.parquet" in said
    subprocess.run(said.split("on purpose: ")[1], shell=True, check=True)
    assert main(["data", "check", str(copy)]) == 0
    assert "no manifest" in capsys.readouterr().out


def test_a_manifest_of_another_program_is_nobodys_business(copy):
    (copy / "manifest.json").write_text('{"name": "a web page"}')
    assert len(read_all(copy)) == 8


def test_the_digest_over_pixels(written, tmp_path, capsys):
    digest = pixel_digest(open_dataset(written))
    assert digest == pixel_digest(open_dataset(record(tmp_path / "again")), threads=3)
    assert digest != pixel_digest(open_dataset(record(tmp_path / "other", change=1)))
    assert main(["data", "check", str(written), "--pixels"]) == 0
    assert f"pixels: {digest}" in capsys.readouterr().out
