"""The corpus: 1,700 inputs that nobody honest made, by bending the honest ones of the lab. Here: models."""

import io
import json
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from hostile import MODELS, OBSERVATION, Case

import vla
from vla.cli import main

Bend = Callable[[Path], None]


# ---- what is done with an input -------------------------------------------------------------------------------------


def sign(folder: Path) -> None:
    """A stranger's manifest is always right."""
    from vla.manifest import write_manifest

    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_size > 1 << 30:
            return  # a file that claims to be huge need not be summed
    (folder / "manifest.json").unlink(missing_ok=True)
    write_manifest(folder, "model")


def use(folder: Path) -> None:
    """Open a model and ask it for a chunk."""
    vla.open(folder).infer(OBSERVATION)


def verb(*words: str) -> Callable[[Path], object]:
    return lambda folder: main([word.replace("IT", str(folder)) for word in words])


def read_data(folder: Path) -> None:
    """Open a dataset and look at every frame."""
    from vla.datasets import open_dataset

    data = open_dataset(folder)
    str(data.info)
    for index in range(min(len(data), 12)):
        data.sample(index, 4)
    data.digest()


# ---- ways to bend ---------------------------------------------------------------------------------------------------


def put(name: str, content: bytes | str) -> Bend:
    def bend(folder: Path) -> None:
        file = folder / name
        if file.is_symlink() or file.exists():
            file.unlink()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))

    return bend


def replaced(name: str, old: str, new: str) -> Bend:
    def bend(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text, (name, old)
        put(name, text.replace(old, new, 1))(folder)

    return bend


def special(name: str) -> Iterator[tuple[str, Bend]]:
    """What stands where a file should be."""

    def there(make: Callable[[Path], object]) -> Bend:
        def bend(folder: Path) -> None:
            file = folder / name
            file.unlink(missing_ok=True)
            make(file)

        return bend

    def huge(file: Path) -> None:
        with file.open("wb") as stream:
            stream.truncate(1 << 40)

    yield "a pipe", there(os.mkfifo)
    yield "a device", there(lambda f: f.symlink_to("/dev/zero"))
    yield "a folder", there(lambda f: f.mkdir())
    yield "a link to itself", there(lambda f: f.symlink_to(f))
    yield "a link to nothing", there(lambda f: f.symlink_to("/nowhere/at/all"))
    yield "missing", there(lambda f: None)
    yield "a terabyte of nothing", there(huge)


TEXTS: dict[str, bytes | str] = {
    "empty": "",
    "zeros": bytes(64),
    "noise": bytes(range(256)) * 8,
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a mark of byte order": "\N{BOM}{}",
    "a list": "[]",
    "a number": "1",
    "null": "null",
    "a text": '"x"',
    "an empty table": "{}",
    "cut": '{"a": 1, "b"',
    "deep lists": "[" * 100_000,
    "deep tables": '{"a":' * 50_000,
    "deep and whole": '{"a":' * 500 + "1" + "}" * 500,
    "a long number": "9" * 5000,
    "not a number": '{"a": NaN, "b": Infinity}',
    "surrogates": '{"a": "\\ud800"}',
    "one line of megabytes": "[" + "[]," * 2_000_000 + "1]",
}
VALUES = (None, -1, 10**30, 1e308, math.nan, "x", "\x1b[31m", [], [[]], {}, True, "../../etc/passwd", "A" * 100_000)


def bent_tables(name: str, deep: bool = True) -> Iterator[tuple[str, Bend]]:
    """A JSON file with each entry gone or another value."""

    def change(path: tuple, value: object) -> Bend:
        def bend(folder: Path) -> None:
            whole = json.loads((folder / name).read_text())
            places = list(_paths(whole)) if deep else [(key,) for key in whole]
            here = places[path[0] % len(places)]
            inner = whole
            for key in here[:-1]:
                inner = inner[key]
            if value is GONE:
                del inner[here[-1]]
            else:
                inner[here[-1]] = value
            put(name, json.dumps(whole))(folder)

        return bend

    for number in range(8):
        yield f"entry {number} gone", change((number,), GONE)
        for value in VALUES:
            yield f"entry {number} = {str(value)[:12]!r}", change((number,), value)


GONE = object()


def _paths(table: object, here: tuple = ()) -> Iterator[tuple]:
    if isinstance(table, dict):
        for key, value in table.items():
            yield (*here, key)
            yield from _paths(value, (*here, key))


def spread(cases: Iterator, every: int) -> Iterator:
    """Every n-th, so that one kind does not outweigh all others."""
    return (case for number, case in enumerate(cases) if number % every == 0)


# ---- the kinds ------------------------------------------------------------------------------------------------------


def numbers() -> Iterator[Case]:
    """Every number of a variant file."""
    tried = ("0", "-1", "2147483648", "1" + "0" * 30, "nan", "inf", "1.5", "true", '"x"', "[1, [2]]")
    for model in ("flow", "ki", "ar", "binning"):
        variant = vla.build(**MODELS[model][0], preset="tiny")
        lines = [
            line for line in variant.to_toml().splitlines() if re.fullmatch(r"\w+ = (-?[\d.e-]+|\[[\d, ]+\])", line)
        ]
        for at, line in enumerate(lines):
            key = line.partition(" = ")[0]
            if key in ("vla", "settings_version"):
                continue
            for value in tried[(at % 3) :: 3 if model != "ki" else 2]:

                def bend(folder: Path, key: str = key, at: int = at, value: str = value) -> None:
                    text, seen = (folder / "variant.toml").read_text(), -1
                    out = []
                    for row in text.splitlines():
                        if re.fullmatch(r"\w+ = (-?[\d.e-]+|\[[\d, ]+\])", row):
                            seen += 1
                            row = f"{key} = {value}" if seen == at else row
                        out.append(row)
                    put("variant.toml", "\n".join(out) + "\n")(folder)
                    sign(folder)

                yield Case(
                    "numbers of a variant",
                    f"{model}: {key} ({at}) = {value[:12]}",
                    model,
                    bend,
                    use if at % 2 else verb("show", "IT"),
                )


def structures() -> Iterator[Case]:
    """variant.toml as a text."""
    texts = {
        **TEXTS,
        "nested lists": "vla = 1\nx = " + "[" * 100_000,
        "nested and whole": "vla = 1\nx = " + "[" * 900 + "]" * 900,
        "nested tables": "vla = 1\nx = " + "{a=" * 10_000,
        "dotted key": "vla = 1\n" + "a." * 100_000 + "b = 1\n",
        "dotted header": "vla = 1\n[" + ".".join(["a"] * 50_000) + "]\n",
        "a long comment": "vla = 1\n#" + "x" * 20_000_000,
        "many keys": "vla = 1\n" + "".join(f"k{i} = {i}\n" for i in range(100_000)),
        "version 2": "vla = 2\n",
        "version of a list": "vla = [1]\n",
        "no version": "name = 'x'\n",
        "version true": "vla = true\n",
        "a zero in the name": 'vla = 1\nname = "\\u0000"\n',
        "colours in the name": 'vla = 1\nname = "\\u001b[31mRED\\u001b]0;x\\u0007"\n',
        "a name of megabytes": 'vla = 1\nname = "' + "A" * 5_000_000 + '"\n',
        "a name that is a list": "vla = 1\nname = [1]\n",
        "markup in the name": 'vla = 1\nname = "[bold red]x[/bold][/nope]"\n',
        "a name with a path": 'vla = 1\nname = "../../x"\n',
        "spec is a list": "vla = 1\nspec = []\n",
        "head is a number": "vla = 1\nhead = 3\n",
        "head is a name": 'vla = 1\nhead = "ki"\n',
        "an unknown slot": "vla = 1\n[tail]\npart = 'ki'\n",
        "an unknown key": "vla = 1\n[spec]\nwheels = 4\n",
        "colours in a key": 'vla = 1\n[spec]\n"\\u001b[31m" = 4\n',
        "a date": "vla = 1\n[spec]\nstate_dim = 1979-05-27\n",
        "head in head in head": "vla = 1\n" + "".join(f"[head{'.tokens' * i}]\npart = 'ki'\n" for i in range(60)),
        "cameras": "vla = 1\n[spec]\ncameras = [" + ",".join(f'"c{i}"' for i in range(20_000)) + "]\n",
        "a camera with a slash": 'vla = 1\n[spec]\ncameras = ["a/b"]\n',
        "a camera above": 'vla = 1\n[spec]\ncameras = ["../x"]\n',
        "cameras of one name": 'vla = 1\n[spec]\ncameras = ["a", "a"]\n',
        "no camera": "vla = 1\n[spec]\ncameras = []\n",
        "an image of a million": "vla = 1\n[spec]\nimage_size = [1000000, 1000000]\n",
        "an image of one": "vla = 1\n[spec]\nimage_size = [1, 1]\n",
        "an image of three": "vla = 1\n[spec]\nimage_size = [32, 32, 32]\n",
        "the largest that is allowed": "vla = 1\n[backbone.llm]\ndepth = 256\nwidth = 65536\n[backbone.vision]\ndepth = 128\n",
    }
    for name, text in texts.items():
        for act in (use, verb("show", "IT")):

            def bend(folder: Path, text: bytes | str = text) -> None:
                put("variant.toml", text)(folder)
                sign(folder)

            yield Case("texts of a variant", f"{name} ({getattr(act, '__name__', 'show')})", "ki", bend, act)
    for name, bend in special("variant.toml"):
        yield Case("special files", f"variant.toml: {name}", "ki", bend, use)
        yield Case("special files", f"variant.toml: {name} (show)", "ki", bend, verb("show", "IT"))


def names() -> Iterator[Case]:
    """Parts and presets that are no names."""
    tried = (
        "os:system",
        "os",
        "vla.cli:main",
        "../../x",
        "vla-core/plain",
        "evil/ki",
        "a/b/c",
        "",
        "__import__('os')",
        "ki\\n",
        "KI",
        "vla_head_ki",
        "x" * 50_000,
        "\\u001b[31mki",
        "\\u202eik",
        "pip install evil",
        "ki; rm -rf /",
        "/etc/passwd",
        " ",
    )
    for name in tried:
        for slot, old in (("head", '[head]\npart = "ki"'), ("head.tokens", '[head.tokens]\npart = "ar"')):
            bend = replaced("variant.toml", old, old[: old.rindex('"', 0, -1) + 1] + name + '"')
            yield Case("names of parts", f"{slot} = {name[:20]!r}", "ki", signed(bend), verb("show", "IT"))
    for line in ('from = "evil 1.0; rm -rf /"', 'from = "\\u001b]0;x\\u0007 1"', 'from = ["x"]', "from = 3"):
        bend = replaced("variant.toml", 'from = "vla-head-ki 0.1.0"', line)
        yield Case("names of parts", line, "ki", signed(bend), verb("show", "IT"))
    for line in (
        'preset = "../x"',
        "preset = [1]",
        "preset = 1",
        "settings_version = -1",
        "settings_version = 99",
        'settings_version = "x"',
        'part = "flow"',
        'tokens = "ki"',
        "tokens = 3",
        "actions = []",
    ):
        bend = replaced("variant.toml", '[head]\npart = "ki"', f'[head]\npart = "ki"\n{line}')
        yield Case("names of parts", line, "ki", signed(bend), verb("show", "IT"))
    for part in ("ki", "flow", "gemma", "plain"):
        bend = replaced("variant.toml", '[head.tokens]\npart = "ar"', f'[head.tokens]\npart = "{part}"')
        yield Case("names of parts", f"head.tokens = {part}", "ki", signed(bend), use)


def signed(bend: Bend) -> Bend:
    def both(folder: Path) -> None:
        bend(folder)
        sign(folder)

    return both


def paths() -> Iterator[Case]:
    """Paths that come with a model are not followed."""
    tried = (
        "/etc/passwd",
        "/dev/zero",
        "/dev/stdin",
        "/proc/self/mem",
        "/proc/kcore",
        "~/x",
        "../../../../etc/hostname",
        "FIFO",
        "x\\u0000y",
    )
    for path in tried:
        for setting, old in (("text.model", 'model = "embedded"'), ("source", 'source = ""')):

            def bend(folder: Path, path: str = path, old: str = old) -> None:
                os.mkfifo(folder / "fifo")
                new = old.partition(" = ")[0] + f' = "{path.replace("FIFO", str(folder / "fifo"))}"'
                replaced("variant.toml", old, new)(folder)
                sign(folder)

            for act in (use, verb("show", "IT")):
                yield Case(
                    "paths in settings", f"{setting} = {path} ({getattr(act, '__name__', 'show')})", "ki", bend, act
                )
    for text in ("source", "data", "cameras"):
        for value in (
            "tabletop",
            {"part": "tabletop", "episodes": 5},
            {"part": "tabletop", "path": "IT/data"},
            "/etc",
            "FIFO",
            3,
            ["x"],
            {"part": "lerobot", "path": "/dev/zero"},
            {"part": "os:system"},
        ):

            def recorded(folder: Path, text: str = text, value: object = value) -> None:
                record = json.loads((folder / "record.json").read_text())
                raw = json.dumps(value).replace("IT", str(folder)).replace("FIFO", str(folder / "fifo"))
                os.mkfifo(folder / "fifo")
                put("record.json", json.dumps({**record, text: json.loads(raw)}))(folder)
                sign(folder)

            yield Case(
                "records",
                f"{text} = {value}",
                "flow",
                recorded,
                verb("eval", "IT", "--env", "tabletop", "--episodes", "0") if text != "cameras" else use,
            )
            yield Case("records", f"{text} = {value} (open_recorded)", "flow", recorded, open_its_data)


def open_its_data(folder: Path) -> None:
    from vla.datasets import open_recorded
    from vla.store import open_model

    open_recorded(open_model(folder).record)


def tables_of_models() -> Iterator[Case]:
    """The JSON files of a model directory."""
    files = {
        "norm_stats.json": "flow",
        "record.json": "flow",
        "manifest.json": "flow",
        "assets/tokenizer/codec.json": "ar",
        "assets/tokenizer/id_map.json": "ki",
    }
    for file, model in files.items():
        finish = signed if file != "manifest.json" else lambda bend: bend
        for name, text in TEXTS.items():
            yield Case("texts of JSON", f"{file}: {name}", model, finish(put(file, text)), use)
        for name, bend in special(file):
            yield Case("special files", f"{file}: {name}", model, bend, use)
        for name, bend in spread(bent_tables(file), 3):
            yield Case("entries of JSON", f"{file}: {name}", model, finish(bend), use)


def npz(entries: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return out.getvalue()


def npy(shape: tuple, kind: str = "<i4", data: bytes = b"") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": kind, "fortran_order": False, "shape": shape})
    return out.getvalue() + data


def codecs() -> Iterator[Case]:
    """The merges of a codec."""

    def saved(array: np.ndarray) -> bytes:
        out = io.BytesIO()
        np.savez_compressed(out, merges=array)
        return out.getvalue()

    doubling = np.array([(12, 12)] + [(13 + i, 13 + i) for i in range(40)], np.int32)
    contents = {
        "doubling merges": saved(doubling),
        "merges of what is not there": saved(np.full((3, 2), 10**6, np.int32)),
        "merges of themselves": saved(np.arange(20, dtype=np.int32).reshape(-1, 2) + 60),
        "negative merges": saved(np.full((3, 2), -1, np.int32)),
        "odd merges": saved(np.zeros(5, np.int32)),
        "floats": saved(np.zeros((3, 2)) + 0.5),
        "NaN": saved(np.full((3, 2), np.nan)),
        "no merges": saved(np.zeros((0, 2), np.int32)),
        "objects": npz({"merges.npy": npy((1,), "|O", b"x")}),
        "texts": npz({"merges.npy": npy((1,), "<U4", b"x" * 16)}),
        "a shape of 2^60": npz({"merges.npy": npy((2**60,))}),
        "a negative shape": npz({"merges.npy": npy((-1, 2))}),
        "cut": npz({"merges.npy": npy((100, 2), data=b"1234")}),
        "a bomb": npz({"merges.npy": npy((1 << 28,), "|u1", bytes(1 << 27))}),
        "a bomb beside it": npz({"x.npy": npy((1 << 29,), "|u1", bytes(1 << 26))}),
        "no npy": npz({"merges.npy": b"hello"}),
        "empty npy": npz({"merges.npy": b""}),
        "a path": npz({"../../x.npy": npy((0,))}),
        "no such entry": npz({"others.npy": npy((0, 2))}),
        "many entries": npz({f"{i}.npy": b"" for i in range(5000)}),
        "no zip": b"PK\x03\x04" + bytes(100),
        "empty": b"",
        "a pickle": b"\x80\x04\x95\x00.",
        "an npy": npy((2, 2), data=bytes(16)),
    }
    for name, content in contents.items():
        for act in (use, verb("show", "IT")) if name.startswith(("doubling", "a bomb")) else (use,):
            yield Case(
                "arrays of a codec",
                f"{name} ({getattr(act, '__name__', 'show')})",
                "ar",
                signed(put("assets/tokenizer/codec.npz", content)),
                act,
            )
    for name, bend in special("assets/tokenizer/codec.npz"):
        yield Case("special files", f"codec.npz: {name}", "ar", bend, use)


def weights() -> Iterator[Case]:
    """model.safetensors."""

    def whole(table: object, data: bytes = bytes(64)) -> bytes:
        text = json.dumps(table).encode()
        return struct.pack("<Q", len(text)) + text + data

    one = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    contents = {
        "empty": b"",
        "short": b"1234",
        "a header of 2^63": struct.pack("<Q", 2**63) + b"{}",
        "a header of 99 MB": struct.pack("<Q", 99_000_000) + b"{" + b" " * 1000,
        "a header of 50 MB of lists": struct.pack("<Q", 30_000_001) + b"[" + b"[]," * 10_000_000,
        "a list": whole([]),
        "a text": whole("x"),
        "no JSON": struct.pack("<Q", 4) + b"nope",
        "deep": struct.pack("<Q", 100_000) + b"[" * 100_000,
        "no names": whole({}),
        "another name": whole({"a": one}),
        "no dtype": whole({"a": {"shape": [1], "data_offsets": [0, 4]}}),
        "an unknown dtype": whole({"a": {**one, "dtype": "C128"}}),
        "a dtype that is a number": whole({"a": {**one, "dtype": 3}}),
        "a negative shape": whole({"a": {**one, "shape": [-2, -2]}}),
        "a huge shape": whole({"a": {**one, "shape": [2**40, 2**40]}}),
        "a shape of texts": whole({"a": {**one, "shape": ["x"]}}),
        "offsets beyond": whole({"a": {**one, "data_offsets": [0, 2**40]}}),
        "offsets backwards": whole({"a": {**one, "data_offsets": [16, 0]}}),
        "overlap": whole({"a": one, "b": one}),
        "a gap": whole({"a": {**one, "data_offsets": [8, 24]}}),
        "too short": whole({"a": one}, b""),
        "metadata that is a list": whole({"__metadata__": [], "a": one}, bytes(16)),
        "colours in a name": whole({"\x1b[31m": one}, bytes(16)),
        "a name of 100 kB": whole({"A" * 100_000: one}, bytes(16)),
        "100,000 names": whole(
            {f"n{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}, b""
        ),
        "a pickle": b"\x80\x04\x95" + bytes(100),
        "a zip": npz({"data.pkl": b"x"}),
        "float 8": whole({"a": {"dtype": "F8_E4M3", "shape": [16], "data_offsets": [0, 16]}}, bytes(16)),
    }
    for name, content in contents.items():
        yield Case("weights", name, "flow", signed(put("model.safetensors", content)), use)
    for name, bend in special("model.safetensors"):
        yield Case("special files", f"model.safetensors: {name}", "flow", bend, use)
