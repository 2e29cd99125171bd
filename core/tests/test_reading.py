"""The one reader of files that anybody may have written."""

import io
import json
import os
import struct
import zipfile

import numpy as np
import pytest

from vla import reading
from vla.errors import DataError, VlaError


def refused(function, *arguments, **options):
    with pytest.raises(VlaError) as error:
        function(*arguments, **options)
    assert len(str(error.value)) < 1000
    return str(error.value)


def test_special_files_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening one for reading waits for a writer, for ever
    (tmp_path / "link").symlink_to("/dev/zero")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (tmp_path / "link", "a device"), (tmp_path, "a folder")):
        for read in (reading.read_text, reading.read_json, reading.read_npz, reading.safetensors_header):
            assert kind in refused(read, path)
        assert kind in refused(lambda p: list(reading.read_jsonl(p)), path)
    (tmp_path / "round").symlink_to(tmp_path / "round")
    assert "symbolic links" in refused(reading.read_text, tmp_path / "round")
    assert "missing" in refused(reading.read_text, tmp_path / "nothing")
    assert "null byte" in refused(reading.read_text, "a\0b")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def denied(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)  # the super-user may read everything
    (tmp_path / "a.json").write_text("{}")
    assert "Permission denied" in refused(reading.read_json, tmp_path / "a.json")


def test_limits_of_size_and_depth(tmp_path):
    file = tmp_path / "a.json"
    with file.open("wb") as stream:  # sparse: nothing of it is read
        stream.truncate(1 << 40)
    for read in (reading.read_json, reading.read_text):
        assert "larger" in refused(read, file)
    for text in ("[" * 100_000, '{"a":' * 70 + "1" + "}" * 70, "9" * 5000, '{"a": 1', "", "nul", "\N{BOM}{}"):
        assert "not valid JSON" in refused(reading.parse_json, text, "here")
    deep = '{"a":' * 60 + "{}" + "}" * 60
    assert reading.parse_json(deep, "here") == json.loads(deep)
    file.write_bytes(b'{"a": "\xff"}')
    assert "UTF-8" in refused(reading.read_json, file)
    assert "a table" in refused(reading.parse_json, "[]", "here")
    with pytest.raises(DataError):
        reading.parse_json("1", "here", error=DataError)


def test_toml_that_takes_square_time_is_refused():
    for text in (
        "a." * 100_000 + "b = 1",
        "[" + ".".join(["a"] * 50_000) + "]",
        '"a" . ' * 1000 + "b = 1",
        "x" * 300_000,
    ):
        assert "not valid TOML" in refused(reading.parse_toml, text, "here")
    for text in ("x = " + "[" * 50_000, "x = " + "[" * 100 + "]" * 100, "{a=" * 10_000, "a = 1\na = 2", "\0"):
        assert "not valid TOML" in refused(reading.parse_toml, text, "here")
    assert reading.parse_toml("a.b.c = [0.1, 1.5]\nd = 'x.y.z'", "here") == {
        "a": {"b": {"c": [0.1, 1.5]}},
        "d": "x.y.z",
    }


def test_rows(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [row["a"] for row in reading.read_jsonl(file)] == [1, 2]
    file.write_text('{"a": 1}\n[]\n')
    assert ":2" in refused(lambda: list(reading.read_jsonl(file)))
    monkeypatch.setattr(reading, "MOST_LINE", 100)
    file.write_text('{"a": "' + "x" * 200 + '"}')
    assert "larger" in refused(lambda: list(reading.read_jsonl(file)))
    file.write_text("{}\n" * 11)
    assert len(list(reading.read_jsonl(file, most=11))) == 11
    assert "at most 10" in refused(lambda: list(reading.read_jsonl(file, most=10)))


def npz(path, entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def npy(shape, dtype="<f4", data=b""):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": shape})
    return out.getvalue() + data


def test_arrays(tmp_path):
    file = tmp_path / "a.npz"
    good = {"a": np.arange(6.0).reshape(2, 3), "b": np.array(3, np.int32), "c": np.asfortranarray(np.eye(3)[:2])}
    np.savez_compressed(file, **good)
    read = reading.read_npz(file)
    assert all(np.array_equal(read[name], value) and read[name].dtype == value.dtype for name, value in good.items())
    assert list(reading.read_npz(file, only="b")) == ["b"]
    assert reading.npz_shapes(file) == {"a": (2, 3), "b": (), "c": (2, 3)}
    np.savez(file, a=np.array([{}], object))
    assert "plain numbers" in refused(reading.read_npz, file)
    for entry, says in (
        (npy((2**60,)), "more than"),
        (npy((2**40, 2**40)), "more than"),
        (npy((-1,)), "shape"),
        (npy((4,), data=b"1234"), "cut short"),
        (npy((0,) * 40), "shape"),
        (npy((1,), "<U4", b"x" * 16), "plain numbers"),
        (b"\x93NUMPY\x09\x00", "version"),
        (b"", "EOF|magic|header"),
        (b"x" * 100, "magic"),
    ):
        import re

        assert re.search(says, refused(reading.read_npz, npz(file, {"a.npy": entry})))
    npz(file, {"bomb.npy": npy((1 << 27,), "|u1", bytes(1 << 27))})  # 130 kB
    assert "more than" in refused(reading.read_npz, file, most=1 << 20)
    damaged = bytearray(file.read_bytes())
    damaged[200:220] = b"x" * 20
    file.write_bytes(damaged)
    refused(reading.read_npz, file)
    file.write_bytes(b"PK\x05\x06")
    refused(reading.read_npz, file)


def test_header_of_weights(tmp_path):
    from safetensors.numpy import save_file

    file = tmp_path / "w.safetensors"
    save_file({"a": np.zeros((2, 3), np.float32)}, file)
    rows, start = reading.safetensors_header(file)
    assert rows == {"a": ("F32", (2, 3), (0, 24))}
    assert file.stat().st_size == start + 24
    for head in (
        b"",
        b"12345678",
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 10**8) + b"{}",
        struct.pack("<Q", 2) + b"[]",
    ):
        file.write_bytes(head)
        refused(reading.safetensors_header, file)
    for table in ({"a": {}}, {"a": []}, {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}):
        text = json.dumps(table).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        refused(reading.safetensors_header, file)
