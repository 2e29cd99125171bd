"""The model directory: whole or absent, and every damaged byte is found before use."""

import errno
import json
import os
import resource
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla import files, manifest, store
from vla.errors import StoreError


class FakeVariant:
    """Only what `write_model` asks of a variant."""

    def to_toml(self):
        return 'vla = 1\nname = "fake"\n'


class FakeTokenizer:
    def save(self, assets):
        (assets / "tokenizer").mkdir()
        (assets / "tokenizer" / "codec.json").write_text("{}")


def weights():
    rng = np.random.default_rng(0)
    return {
        "backbone.llm.layers.0.backbone.q.weight": rng.normal(size=(8, 4)).astype(np.float32),
        "head.scale": np.float32(3.0).reshape(()),
        "head.half": rng.normal(size=(5,)).astype(ml_dtypes.bfloat16),
        "ids": np.arange(6, dtype=np.int64).reshape(2, 3),
        "empty": np.zeros((0, 4), np.float32),
    }


def saved(folder, **more):
    return store.save_model(folder, FakeVariant(), weights(), None, FakeTokenizer(), record={"steps": 3}, **more)


def leftovers(folder):
    return [p.name for p in folder.iterdir() if p.name.startswith((".tmp", ".old"))]


def test_what_is_written_is_read_back_bit_for_bit(tmp_path):
    folder = saved(tmp_path / "model")
    manifest.verify_folder(folder)
    back = store.read_weights(folder / "model.safetensors")
    assert set(back) == set(weights())
    for name, array in weights().items():
        assert back[name].dtype == array.dtype and back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()
    assert store.read_header(folder / "model.safetensors")["head.half"] == ("BF16", (5,))
    assert sorted(json.loads((folder / "manifest.json").read_text())["files"]) == [
        "assets/tokenizer/codec.json", "model.safetensors", "record.json", "variant.toml",
    ]  # fmt: skip
    assert leftovers(tmp_path) == []


def test_weights_may_be_changed_in_memory_without_changing_the_file(tmp_path):
    folder = saved(tmp_path / "model")
    store.read_weights(folder / "model.safetensors")["ids"][:] = 7
    manifest.verify_folder(folder)


def test_equal_weights_give_equal_bytes(tmp_path):
    one, two = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    store.write_weights(one, weights())
    store.write_weights(two, dict(reversed(weights().items())))
    assert one.read_bytes() == two.read_bytes()


def test_a_transposed_array_is_saved_as_it_reads(tmp_path):
    array = np.arange(6.0).reshape(2, 3).T
    store.write_weights(tmp_path / "w.safetensors", {"a": array})
    np.testing.assert_array_equal(store.read_weights(tmp_path / "w.safetensors")["a"], array)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_flipped_bit_and_every_cut_is_found(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flip") / "model"
    saved(folder)
    listed = sorted(p for p in folder.rglob("*") if p.is_file())
    file = data.draw(st.sampled_from(listed))
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    file.write_bytes(content)
    with pytest.raises(StoreError) as caught:
        manifest.verify_folder(folder)
    # A flip inside the manifest may read as another digest for some file; the message names that file.
    assert file.name in str(caught.value) or file.name == "manifest.json"


def test_a_missing_file_is_named(tmp_path):
    folder = saved(tmp_path / "model")
    (folder / "assets/tokenizer/codec.json").unlink()
    with pytest.raises(StoreError, match=r"missing[\s\S]*codec\.json"):
        manifest.verify_folder(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"missing[\s\S]*manifest\.json"):
        manifest.verify_folder(folder)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path):
    folder = saved(tmp_path / "model")
    (folder / "manifest.json").write_text(manifest._manifest_text({"../secret": {"size": 1, "sha256": "0"}}))
    with pytest.raises(StoreError, match="outside"):
        manifest.verify_folder(folder)


def test_nothing_is_overwritten_without_permission(tmp_path):
    folder = saved(tmp_path / "model")
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(StoreError, match="--overwrite"):
        saved(folder)
    assert (folder / "manifest.json").read_bytes() == before
    saved(folder, overwrite=True)
    manifest.verify_folder(folder)
    assert leftovers(tmp_path) == []


def test_a_stranger_s_folder_is_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match="file that vla did not write|no manifest of vla"):
        saved(tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="a file is in the way"):
        saved(tmp_path / "file", overwrite=True)


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "model").mkdir()
    manifest.verify_folder(saved(tmp_path / "model"))


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_error_inside_leaves_nothing_and_keeps_the_old(tmp_path, overwrite):
    target = tmp_path / "model"
    if overwrite:
        saved(target)
    with pytest.raises(RuntimeError, match="boom"), files.atomic_folder(target, "model", overwrite=overwrite) as temp:
        (temp / "half").write_text("x")
        raise RuntimeError("boom")
    assert leftovers(tmp_path) == []
    assert target.exists() == overwrite
    if overwrite:
        manifest.verify_folder(target)


def test_a_full_disk_is_one_clear_error_at_every_write(tmp_path, monkeypatch):
    """Fail the k-th sync with ENOSPC, for every k that a save has."""
    saved(tmp_path / "model")
    real, calls = os.fsync, []

    for k in range(100):
        calls.clear()

        def failing(handle, k=k):
            calls.append(handle)
            if len(calls) == k + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(handle)

        monkeypatch.setattr(os, "fsync", failing)
        new = tmp_path / f"new{k}"
        try:
            saved(new)
        except StoreError as error:
            assert "disk is full" in str(error) and str(new) in str(error)
            assert leftovers(tmp_path) == []
        else:
            break
    assert k > 5  # every file and the folders were synced
    monkeypatch.setattr(os, "fsync", real)
    manifest.verify_folder(tmp_path / "model")


def test_a_real_write_limit_leaves_nothing(tmp_path):
    """A real failed write inside the weight file, made with a file-size limit in a process of its own."""
    script = textwrap.dedent(
        """
        import resource, sys, numpy as np
        from vla import files, store
        from vla.errors import StoreError
        class V:
            def to_toml(self): return "x = 1"
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            store.save_model(sys.argv[1], V(), {"w": np.zeros(50_000, np.float32)}, None, None)
        except StoreError as error:
            print(error); sys.exit(2)
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "model")], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "nothing was left behind" in done.stdout and "ulimit" in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20_000


def test_a_read_only_place_is_one_clear_error(tmp_path, monkeypatch):
    def no(self, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", no)
    with pytest.raises(StoreError, match="read-only"):
        saved(tmp_path / "model")


def test_an_error_of_the_caller_is_not_blamed_on_the_disk(tmp_path):
    with pytest.raises(ZeroDivisionError), files.atomic_folder(tmp_path / "x", "model"):
        _ = 1 / 0
    with pytest.raises(FileNotFoundError), files.atomic_folder(tmp_path / "deep" / "x", "model"):
        (tmp_path / "nowhere").read_text()
    assert list((tmp_path / "deep").iterdir()) == []


def test_weights_that_do_not_fit_are_listed():
    with pytest.raises(StoreError) as caught:
        store.check_names({"a": (2,), "b": (3,), "c": (1,)}, {"a": (2,), "b": (4,), "d": (1,)}, "m.safetensors")
    text = str(caught.value)
    assert (
        "missing (1): c" in text and "unknown (1): d" in text and "b (4,) != (3,)" in text and "m.safetensors" in text
    )
    store.check_names({"a": (2,)}, {"a": (2,)}, "m.safetensors")


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x10" + b"\0" * 7 + b"{}"])
def test_a_file_that_is_not_safetensors_is_one_clear_error(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(StoreError, match="w.safetensors"):
        store.read_weights(tmp_path / "w.safetensors")


def test_opening_something_else_says_what_it_is(tmp_path):
    with pytest.raises(StoreError, match="no such model directory"):
        store.open_model(tmp_path / "none")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(StoreError, match="not a model directory"):
        store.open_model(tmp_path)
    (tmp_path / "variant.toml").write_text("vla = 1\n")
    with pytest.raises(StoreError, match="no weights yet"):
        store.open_model(tmp_path)


def test_one_file_is_written_whole(tmp_path):
    files.write_text(tmp_path / "deep" / "a.json", "1")
    files.write_text(tmp_path / "deep" / "a.json", "2")
    assert (tmp_path / "deep" / "a.json").read_text() == "2" and len(list((tmp_path / "deep").iterdir())) == 1
