"""Nothing of a user is replaced or removed that vla did not write; what a killed process leaves goes."""

import json
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from vla import files, manifest, store
from vla.errors import StoreError


def folder_of(path, kind="model", text="1", **options):
    with files.atomic_folder(path, kind, **options) as temp:
        (temp / "a.txt").write_text(text)
        (temp / "inner").mkdir()
        (temp / "inner" / "b.txt").write_text(text)
    return path


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- what --overwrite replaces --------------------------------------------------------------------------------------


def add_file(folder):
    (folder / "notes.txt").write_text("mine")


def add_hidden_file_below(folder):
    (folder / "inner" / ".secret").write_text("mine")


def add_link(folder):
    (folder / "photos").symlink_to(folder.parent)


def edit(folder):
    (folder / "a.txt").write_text("2")


def edit_manifest(folder):
    (folder / "manifest.json").write_text('{"name": "a web page", "icons": []}')


def lose_file(folder):
    (folder / "a.txt").unlink()


def of_before_there_were_kinds(folder):
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    (folder / "manifest.json").write_text(manifest._manifest_text(listed))
    manifest.verify_folder(folder)  # it still opens


@pytest.mark.parametrize(
    "change",
    [add_file, add_hidden_file_below, add_link, edit, edit_manifest, lose_file, of_before_there_were_kinds],
    ids=lambda f: f.__name__,
)
def test_only_a_folder_that_is_as_we_wrote_it_is_replaced(tmp_path, change):
    folder = folder_of(tmp_path / "x")
    change(folder)
    before = tree(folder)
    with pytest.raises(StoreError, match=r"will not be replaced[\s\S]*rm -r") as caught:
        folder_of(folder, overwrite=True)
    assert tree(folder) == before and os.listdir(tmp_path) == ["x"]
    subprocess.run(str(caught.value).split("yourself: ")[1].splitlines()[0], shell=True, check=True)  # the way out
    folder_of(folder, text="2", overwrite=True)
    assert (folder / "a.txt").read_text() == "2"


def test_a_folder_of_another_kind_is_not_replaced(tmp_path):
    folder = folder_of(tmp_path / "x")
    with pytest.raises(StoreError, match="a folder of kind model"):
        folder_of(folder, "report", overwrite=True)
    folder_of(folder, "model", "2", overwrite=True)
    assert tree(folder).keys() == {"a.txt", "inner/b.txt", "manifest.json"}


def test_a_file_that_arrives_while_we_write_is_kept(tmp_path):
    folder = folder_of(tmp_path / "x")
    with files.atomic_folder(folder, "model", overwrite=True):
        (folder / "mine.txt").write_text("mine")
    (kept,) = tmp_path.glob(".gone-x-*")
    assert tree(kept) == {"mine.txt": b"mine"} and tree(folder).keys() == {"manifest.json"}


def test_a_link_is_followed_and_never_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "x")  # to nothing yet
    for text in ("1", "2"):
        folder_of(tmp_path / "out", text=text, overwrite=True)
        assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "x" / "a.txt").read_text() == text
    (tmp_path / "file").symlink_to(tmp_path / "disk" / "f.txt")
    for text in ("1", "2"):
        files.write_text(tmp_path / "file", text)
        assert (tmp_path / "file").is_symlink() and (tmp_path / "disk" / "f.txt").read_text() == text
    assert sorted(os.listdir(tmp_path)) == ["disk", "file", "out"]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder_of("~/x")
    assert files.write_text("~/y.txt", "1") == tmp_path / "y.txt"
    assert sorted(os.listdir(tmp_path)) == ["x", "y.txt"]
    with pytest.raises(StoreError, match="no path"):
        folder_of("~nobody-of-this-name/x")


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o022, 0o002])
def test_modes_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        with files.atomic_folder(tmp_path / "model", "model") as temp:
            store.write_weights(temp / "w.safetensors", {"a": np.zeros(3)})
            (temp / "a.txt").write_text("1")
        files.write_text(tmp_path / "x.txt", "1")
        files.open_own(tmp_path / "y.jsonl").close()
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*") if p.is_file()}
    assert modes == {0o666 & ~mask} and stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o777 & ~mask


def test_a_file_of_a_user_is_not_replaced_by_one_of_ours(tmp_path):
    files.write_text(tmp_path / "a.svg", "<svg 1", ours=b"<svg")
    files.write_text(tmp_path / "a.svg", "<svg 2", ours=b"<svg")
    (tmp_path / "a.svg").write_text("a letter")
    with pytest.raises(StoreError, match="did not write"):
        files.write_text(tmp_path / "a.svg", "<svg 3", ours=b"<svg")
    assert tree(tmp_path) == {"a.svg": b"a letter"}


def test_a_pipe_and_a_device_are_written_to(tmp_path):
    files.write_text("/dev/null", "1")
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE)
    files.write_text(tmp_path / "pipe", "hello")
    assert reader.communicate(timeout=20)[0] == b"hello" and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


# ---- files that we keep in a folder that others may write to ---------------------------------------------------------


@pytest.mark.parametrize("what", ["link", "link to nothing", "second name", "pipe", "folder", "device"])
def test_a_kept_file_is_a_regular_file_of_ours(tmp_path, what):
    mine, place = tmp_path / "thesis.tex", tmp_path / "run.lock"
    mine.write_text("years of work")
    {
        "link": lambda: place.symlink_to(mine),
        "link to nothing": lambda: place.symlink_to(tmp_path / "new"),
        "second name": lambda: os.link(mine, place),
        "pipe": lambda: os.mkfifo(place),
        "folder": lambda: place.mkdir(),
        "device": lambda: place.symlink_to("/dev/null"),
    }[what]()
    with pytest.raises(StoreError, match="something else is in the place"):
        files.open_own(place)
    assert mine.read_text() == "years of work" and not (tmp_path / "new").exists()


# ---- what a killed process leaves ------------------------------------------------------------------------------------


def test_what_is_being_written_is_not_swept_and_what_was_left_is(tmp_path):
    script = textwrap.dedent(
        """
        import os, sys
        from vla.files import atomic_folder
        with atomic_folder(sys.argv[1], "model") as temp:
            (temp / "half.txt").write_text("half")
            print("writing", flush=True)
            sys.stdin.readline()
            os._exit(137)
        """
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "x")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "writing\n"
    files.sweep(tmp_path, "x")
    assert [p.name for p in tmp_path.glob(".tmp-x-*/*")] == ["half.txt"]  # its process lives
    other.communicate("\n", timeout=20)
    folder_of(tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"]


# ---- what is read is listed ------------------------------------------------------------------------------------------


def test_a_file_that_is_read_and_not_listed_is_refused(tmp_path):
    folder = folder_of(tmp_path / "x")
    (folder / "README.md").write_text("mine: nobody reads it")
    manifest.verify_folder(folder, ("a.txt", "inner", "record.json"))
    for name in ("inner/more.json", "record.json"):
        (folder / name).write_text("{}")
        with pytest.raises(StoreError, match=rf"not in the manifest[\s\S]*{Path(name).name}"):
            manifest.verify_folder(folder, ("a.txt", "inner", "record.json"))
        (folder / name).unlink()


def test_a_fitted_tokenizer_is_read_as_it_was_written(tmp_path):
    from vla.codecs import read_codec, write_codec

    with files.atomic_folder(tmp_path / "codec", "tokenizer") as temp:
        write_codec(temp, "toy", {"scale": 10}, {"table": np.arange(3)})
    assert read_codec(tmp_path / "codec", "toy")[0]["scale"] == 10
    file = tmp_path / "codec" / "codec.json"
    file.write_text(file.read_text().replace("10", "11"))
    with pytest.raises(StoreError, match=r"some of its bytes changed[\s\S]*codec.json"):
        read_codec(tmp_path / "codec", "toy")


# ---- where a path is taken ------------------------------------------------------------------------------------------


def test_home_is_expanded_wherever_a_path_is_taken(tmp_path, monkeypatch, capsys):
    from vla.cli import main
    from vla.compose import read_variant
    from vla.runs import find_model
    from vla.training.metrics import read_metrics
    from vla.transforms.stats import identity_stats, load_stats, save_stats

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    store.write_weights(tmp_path / "w.safetensors", {"a": np.zeros(3)})
    assert store.read_weights("~/w.safetensors").keys() == {"a"}
    save_stats(identity_stats(2, 2), "~/norm_stats.json")
    assert load_stats("~/norm_stats.json").keys() == load_stats("~").keys() == {"state", "actions"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"event": "step", "step": 1}\n')
    assert read_metrics("~/run") == [{"event": "step", "step": 1}]
    assert find_model("~/w.safetensors") == tmp_path / "w.safetensors"
    for path in ("~/none", "~nobody-of-this-name/none"):
        with pytest.raises(StoreError, match="none"):
            read_variant(path)
        assert main(["train", path, "--data=~/none", "--out=~/out"]) == 2
        assert main(["show", path]) == 2
    assert "none" in capsys.readouterr().err
    assert not (tmp_path / "~").exists()
