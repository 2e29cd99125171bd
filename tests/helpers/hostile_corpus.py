"""The corpus, second half: datasets, pictures, recipes, checkpoints of others, observations."""

import io
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from hostile import OBSERVATION, Case
from hostile_models import (
    TEXTS,
    VALUES,
    codecs,
    names,
    npy,
    npz,
    numbers,
    paths,
    put,
    read_data,
    signed,
    special,
    spread,
    structures,
    tables_of_models,
    use,
    weights,
)

import vla


def datasets() -> Iterator[Case]:
    """A LeRobotDataset's metadata and files."""
    info = "meta/info.json"
    for name, text in TEXTS.items():
        yield Case("texts of JSON", f"{info}: {name}", "pictures", put(info, text), read_data)
    files = (info, "meta/tasks.parquet", "meta/episodes/chunk-000/file-000.parquet", "data/chunk-000/file-000.parquet")
    for file in files:
        for name, bend in special(file):
            yield Case("special files", f"{file}: {name}", "pictures", bend, read_data)
    for name, bend in special("videos/observation.images.base_0_rgb/chunk-000/file-000.mp4"):
        yield Case("special files", f"a video: {name}", "films", bend, read_data)
    keys = (
        "codebase_version",
        "fps",
        "features",
        "data_path",
        "robot_type",
        "total_frames",
        "total_episodes",
        "chunks_size",
        "splits",
        "video_path",
    )
    for key in keys:
        for value in VALUES:

            def change(folder: Path, key: str = key, value: object = value) -> None:
                table = json.loads((folder / info).read_text())
                put(info, json.dumps({**table, key: value}))(folder)

            yield Case(
                "metadata of data",
                f"{key} = {str(value)[:12]!r}",
                "films" if key == "video_path" else "pictures",
                change,
                read_data,
            )
    for feature in ("observation.state", "action", "observation.images.base_0_rgb"):
        for key in ("dtype", "shape", "names"):
            for value in spread(iter(VALUES), 2):

                def alter(folder: Path, feature: str = feature, key: str = key, value: object = value) -> None:
                    table = json.loads((folder / info).read_text())
                    table["features"][feature][key] = value
                    put(info, json.dumps(table))(folder)

                yield Case("metadata of data", f"{feature}.{key} = {str(value)[:12]!r}", "pictures", alter, read_data)
    templates = (
        "{chunk_index:1000000000000}",
        "{chunk_index:0>99999999999d}",
        "{0.__class__}",
        "{chunk_index.__class__.__mro__}",
        "{file_index!r}",
        "/etc/passwd",
        "../../{chunk_index}",
        "data/{nothing}",
        "{",
        "}",
        "{}",
        "{chunk_index",
        "x\0y",
        "{chunk_index:{file_index}}",
        "{chunk_index:%d}",
    )
    for template in templates:
        for base, key in (("pictures", "data_path"), ("films", "video_path")):

            def path(folder: Path, key: str = key, template: str = template) -> None:
                table = json.loads((folder / info).read_text())
                put(info, json.dumps({**table, key: template}))(folder)

            yield Case("path templates", f"{key} = {template!r}", base, path, read_data)
    for file in files[1:]:
        for at in range(0, 12):

            def damage(folder: Path, file: str = file, at: int = at) -> None:
                data = bytearray((folder / file).read_bytes())
                if at < 4:
                    data = data[: len(data) * (at + 1) // 5]
                elif at < 8:  # the footer, where the counts and the offsets are
                    place = len(data) - 12 - (at - 4) * 37
                    data[place : place + 4] = b"\xff\xff\xff\x7f"
                else:
                    place = len(data) * (at - 7) // 6
                    data[place : place + 8] = b"\x81" * 8
                put(file, bytes(data))(folder)

            yield Case("damaged parquet", f"{file} ({at})", "pictures", damage, read_data)
    yield Case(
        "damaged parquet", "a footer of 4 GB", "pictures", put(files[3], b"PAR1" + b"\xff\xff\xff\xffPAR1"), read_data
    )
    yield Case("damaged parquet", "millions of equal rows", "pictures", many_rows, read_data)
    yield from version_two()


def many_rows(folder: Path) -> None:
    """A file of kilobytes with 33 million equal rows, and metadata that agrees."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, most = 1 << 20, 32
    row = pa.array([[0.0] * 4] * 1024, pa.list_(pa.float32(), 4))
    state = pa.concat_arrays([row] * (rows // 1024))
    table = pa.table({"observation.state": state, "action": state})
    place = folder / "data/chunk-000/file-000.parquet"
    with pq.ParquetWriter(place, table.schema, compression="zstd") as writer:
        for _ in range(most):
            writer.write_table(table)
    episodes = folder / "meta/episodes/chunk-000/file-000.parquet"
    old = pq.read_table(episodes).slice(0, 1)
    at = old.column_names.index("length")
    pq.write_table(old.set_column(at, "length", pa.array([rows * most], pa.int64())), episodes)


def version_two() -> Iterator[Case]:
    """The layout of v2, whose tables are JSON lines."""

    def base(folder: Path) -> dict[str, str]:
        table = json.loads((folder / "meta/info.json").read_text())
        table |= {
            "codebase_version": "v2.1",
            "data_path": "data/chunk-{episode_chunk:03d}/file-{episode_index:03d}.parquet",
            "chunks_size": 1000,
        }
        put("meta/info.json", json.dumps(table))(folder)
        return {
            "episodes": '{"episode_index": 0, "length": 12, "tasks": []}\n',
            "tasks": '{"task_index": 0, "task": "push"}\n',
        }

    rows = {
        "whole": "",
        "a list": "[]\n",
        "deep": "[" * 100_000,
        "no JSON": "{nope\n",
        "a row of megabytes": '{"x": "' + "A" * 3_000_000 + '"}\n',
        "not UTF-8": "\udcff\n",
        "a million rows": "{}\n" * 1_100_000,
        "a text for a number": '{"episode_index": "x", "length": 1, "task_index": "x", "task": 1}\n',
        "null": '{"episode_index": null, "length": null, "task_index": null, "task": null}\n',
        "a huge number": '{"episode_index": 1' + "0" * 40 + ', "length": 1, "task_index": 1e400, "task": "x"}\n',
        "negative": '{"episode_index": -1, "length": -5, "task_index": -1, "task": "x"}\n',
        "long": '{"episode_index": 1, "length": 1000000000000, "task_index": 1, "task": "\\u001b[31m"}\n',
    }
    for name, text in rows.items():
        for which in ("episodes", "tasks"):

            def bend(folder: Path, which: str = which, text: str = text) -> None:
                for key, lines in base(folder).items():
                    content = (lines + text if key == which else lines).encode("utf-8", "surrogateescape")
                    put(f"meta/{key}.jsonl", content)(folder)

            yield Case("JSON lines", f"{which}: {name}", "pictures", bend, read_data)


def pictures() -> Iterator[Case]:
    """Pictures that are something else."""
    from PIL import Image

    def drawn(kind: str, size: tuple[int, int] = (32, 32), mode: str = "RGB", **more: object) -> bytes:
        out = io.BytesIO()
        Image.new(mode, size).save(out, kind, **more)
        return out.getvalue()

    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n(/tmp/owned) (w) file closefile\nshowpage\n%%EOF\n"
    png = drawn("PNG")
    contents = {
        "EPS": script,
        "TIFF": drawn("TIFF"),
        "GIF": drawn("GIF"),
        "BMP": drawn("BMP"),
        "PPM": drawn("PPM"),
        "ICO": drawn("ICO"),
        "TGA": drawn("TGA"),
        "PDF": b"%PDF-1.4\n",
        "PCX": drawn("PCX"),
        "SGI": drawn("SGI"),
        "a PNG of another size": drawn("PNG", (64, 16)),
        "a PNG of 16,000 x 16,000": drawn("PNG", (16_000, 16_000), "1"),
        "a JPEG of 10,000 x 10,000": drawn("JPEG", (10_000, 10_000), "L", quality=1),
        "a WebP of 8,000 x 8,000": drawn("WEBP", (8000, 8000), quality=1, method=0),
        "a cut PNG": png[: len(png) // 2],
        "a PNG that says 2^31": png[:16] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + png[24:],
        "empty": b"",
        "noise": bytes(range(256)),
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "text": b"hello",
        "a JPEG of another size": drawn("JPEG", (16, 64)),
        "grey": drawn("PNG", mode="L"),
        "with an alpha": drawn("PNG", mode="RGBA"),
    }
    for name, content in contents.items():

        def bend(folder: Path, content: bytes = content) -> None:
            import pyarrow as pa
            import pyarrow.parquet as pq

            file = folder / "data/chunk-000/file-000.parquet"
            table = pq.read_table(file)
            at = next(i for i, n in enumerate(table.column_names) if n.startswith("observation.images"))
            kind = table.schema.field(at).type
            rows = pa.array([{"bytes": content, "path": "x"}] * table.num_rows, kind)
            pq.write_table(table.set_column(at, table.schema.field(at), rows), file)

        yield Case("pictures", name, "pictures", bend, read_data)
    for name, content in {
        "noise": bytes(range(256)) * 40,
        "empty": b"",
        "a picture": png,
        "a playlist": b"#EXTM3U\n/etc/passwd\n",
        "ffconcat": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "an SDP": b"v=0\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
    }.items():
        yield Case(
            "pictures",
            f"a video of {name}",
            "films",
            put("videos/observation.images.base_0_rgb/chunk-000/file-000.mp4", content),
            read_data,
        )


def recipes() -> Iterator[Case]:
    """Recipes from files."""

    def read(folder: Path) -> None:
        from vla.training.recipes import read_recipe

        read_recipe(folder / "r.toml").build(preset="tiny")

    texts = {
        **TEXTS,
        "dotted": "vla_recipe = 1\n" + "a." * 100_000 + "b = 1\n",
        "no type": "vla_recipe = 1\n",
        "type 3": "vla_recipe = 1\ntype = 3\n",
        "spec 3": "vla_recipe = 1\ntype = 'pi05'\nspec = 3\n",
        "set 3": "vla_recipe = 1\ntype = 'pi05'\nset = 3\n",
        "train 3": "vla_recipe = 1\ntype = 'pi05'\ntrain = 3\n",
        "robot 3": "vla_recipe = 1\ntype = 'pi05'\nrobot = 3\n",
        "summary 3": "vla_recipe = 1\ntype = 'pi05'\nsummary = 3\n",
        "steps": "vla_recipe = 1\ntype = 'pi05'\n[train]\nsteps = -1\n",
        "a path": "vla_recipe = 1\ntype = '../../x'\n",
        "a key": "vla_recipe = 1\ntype = 'pi05'\nrun = 'rm'\n",
        "colours": 'vla_recipe = 1\ntype = "\\u001b[31m"\n',
        "sizes": "vla_recipe = 1\ntype = 'pi05'\n[set]\n\"backbone.llm.depth\" = 1000000000\n",
        "lora": "vla_recipe = 1\ntype = 'pi05'\n[train]\nlora = 3\n",
        "listeners": "vla_recipe = 1\ntype = 'pi05'\n[train]\nlisteners = ['os']\n",
    }
    for name, text in texts.items():
        yield Case("recipes", name, "nothing", put("r.toml", text), read)
    for name, bend in special("r.toml"):
        yield Case("special files", f"a recipe: {name}", "nothing", bend, read)


def foreign() -> Iterator[Case]:
    """Checkpoints of others: orbax metadata, an index of shards, a Hugging Face config, .npz of big_vision."""

    def orbax(folder: Path) -> None:
        from vla.interop.orbax import read_item

        read_item(folder)

    leaf = {"key_metadata": [{"key": "a", "key_type": 2}], "value_metadata": {"value_type": "np.ndarray"}}
    listings = {
        **TEXTS,
        "a leaf above": {"tree_metadata": {"x": {**leaf, "key_metadata": [{"key": ".."}]}}},
        "a leaf with a slash": {"tree_metadata": {"x": {**leaf, "key_metadata": [{"key": "/etc/passwd"}]}}},
        "a leaf without keys": {"tree_metadata": {"x": {**leaf, "key_metadata": []}}},
        "a leaf that is not there": {"tree_metadata": {"x": leaf}},
        "keys that are numbers": {"tree_metadata": {"x": {**leaf, "key_metadata": 3}}},
        "a list of leaves": {"tree_metadata": [leaf]},
        "null leaves": {"tree_metadata": None},
        "many leaves": {"tree_metadata": {str(i): {**leaf, "key_metadata": [{"key": f"k{i}"}]} for i in range(300)}},
    }
    for name, content in listings.items():
        text = content if isinstance(content, (bytes, str)) else json.dumps(content)
        yield Case("orbax", name, "nothing", put("_METADATA", text), orbax)
    for name, bend in special("_METADATA"):
        yield Case("special files", f"_METADATA: {name}", "nothing", bend, orbax)

    def paligemma(folder: Path) -> None:
        from vla.interop.paligemma import read_paligemma

        read_paligemma(folder, vla.build(type="pi05", preset="tiny"))

    good = json.dumps({"model_type": "paligemma", "text_config": {"model_type": "gemma"}})
    configs = {
        **TEXTS,
        "text_config 3": '{"model_type": "paligemma", "text_config": 3}',
        "heads": '{"model_type": "paligemma", "text_config": {"num_attention_heads": "x"}}',
        "code": '{"auto_map": {"AutoModel": "evil.Evil"}, "model_type": "evil"}',
    }
    for name, text in configs.items():
        yield Case("Hugging Face", f"config.json: {name}", "nothing", put("config.json", text), paligemma)
    indices = {
        **TEXTS,
        "a path": '{"weight_map": {"a": "../../x"}}',
        "a file that is not there": '{"weight_map": {"a": "x"}}',
        "a list": '{"weight_map": []}',
        "a number": '{"weight_map": {"a": 3}}',
        "itself": '{"weight_map": {"a": "config.json"}}',
    }
    for name, text in indices.items():

        def both(folder: Path, text: bytes | str = text) -> None:
            put("config.json", good)(folder)
            put("model.safetensors.index.json", text)(folder)

        yield Case("Hugging Face", f"index: {name}", "nothing", both, paligemma)

    def big_vision(folder: Path) -> None:
        from vla.interop.paligemma import read_paligemma

        read_paligemma(folder / "x.npz", vla.build(type="pi05", preset="tiny"))

    for name, content in {
        "empty": b"",
        "no zip": b"PK",
        "objects": npz({"params/a.npy": npy((1,), "|O", b"x")}),
        "a huge shape": npz({"params/a.npy": npy((2**50,))}),
        "a path": npz({"params/../../a.npy": npy((1,), data=bytes(4))}),
        "no npy": npz({"params/a.npy": b"x"}),
    }.items():
        yield Case("Hugging Face", f".npz: {name}", "nothing", put("x.npz", content), big_vision)

    def frames(folder: Path) -> None:
        from vla.datasets import open_dataset
        from vla.frame_cache import cache_frames

        data = open_dataset(folder)
        real = cache_frames(data, ["base_0_rgb"], (16, 16), folder / "cache")
        file = Path(real.filename)
        content = (folder / "bad").read_bytes() if (folder / "bad").is_file() else None
        file.unlink()
        if content is None:
            os.mkfifo(file)
        else:
            file.write_bytes(content)
        cache_frames(data, ["base_0_rgb"], (16, 16), folder / "cache")

    for name, content in {
        "empty": b"",
        "noise": bytes(range(256)),
        "objects": npy((1,), "|O", b"x"),
        "another shape": npy((3,), "|u1", bytes(3)),
        "a huge shape": npy((2**50,), "|u1"),
        "cut": npy((12, 1, 16, 16, 3), "|u1", bytes(9)),
        "a pickle": b"\x80\x04.",
    }.items():
        yield Case("frame cache", name, "pictures", put("bad", content), frames)
    yield Case("frame cache", "a pipe", "pictures", lambda folder: None, frames)

    def public(folder: Path) -> None:
        from vla.compose import resolve
        from vla.contracts import Spec
        from vla.tokenizer import open_tokenizer

        chosen = resolve(
            "tokenizer",
            {"part": "fast", "source": str(folder), "codes": 64, "text": {"part": "paligemma", "preset": "tiny"}},
        )
        open_tokenizer(chosen, Spec())

    processor = json.dumps({"scale": 10, "min_token": -30})
    bytes_only = {
        "model": {"type": "BPE", "vocab": {chr(33 + i): i for i in range(64)}, "merges": []},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    }
    tokenizers = {
        **TEXTS,
        "no merges": bytes_only,
        "doubling": {
            **bytes_only,
            "model": {
                "type": "BPE",
                "vocab": {"!" * 2**i: i for i in range(16)},
                "merges": [["!" * 2**i] * 2 for i in range(15)],
            },
        },
        "ids that are texts": {**bytes_only, "model": {"type": "BPE", "vocab": {"!": "x"}, "merges": []}},
        "ids of 10^18": {**bytes_only, "model": {"type": "BPE", "vocab": {"!": 10**18}, "merges": []}},
        "negative ids": {**bytes_only, "model": {"type": "BPE", "vocab": {"!": -5, "a": 63}, "merges": []}},
        "one id for all": {
            **bytes_only,
            "model": {"type": "BPE", "vocab": {chr(33 + i): 63 for i in range(90)}, "merges": []},
        },
        "no pre_tokenizer": {"model": bytes_only["model"]},
        "a model of texts": {"model": "x"},
        "merges of one": {**bytes_only, "model": {**bytes_only["model"], "merges": ["a"]}},
        "merges of numbers": {**bytes_only, "model": {**bytes_only["model"], "merges": [[1, 2]]}},
    }
    for name, content in tokenizers.items():

        def processors(folder: Path, content: object = content) -> None:
            put("processor_config.json", processor)(folder)
            put("tokenizer.json", content if isinstance(content, (bytes, str)) else json.dumps(content))(folder)

        yield Case("public FAST", name, "nothing", processors, public)


def texts_of_tokens() -> Iterator[Case]:
    """tokenizer.model."""
    for name, content in {
        "empty": b"",
        "noise": bytes(range(256)) * 9,
        "text": b"hello",
        "zeros": bytes(4096),
        "a long field": b"\x0a\xff\xff\xff\xff\x7f",
        "a message in itself": b"\x0a\x02\x0a\x00" * 1000,
        "JSON": b"{}",
    }.items():
        yield Case("tokenizer.model", name, "flow", signed(put("assets/tokenizer/tokenizer.model", content)), use)
    for name, bend in special("assets/tokenizer/tokenizer.model"):
        yield Case("special files", f"tokenizer.model: {name}", "flow", bend, use)


def observations() -> Iterator[Case]:
    """What a robot sends."""
    image = OBSERVATION["images"]["base_0_rgb"]
    bent = {
        "nothing": {},
        "no state": {"images": OBSERVATION["images"], "prompt": "x"},
        "no images": {**OBSERVATION, "images": {}},
        "images None": {**OBSERVATION, "images": None},
        "images a list": {**OBSERVATION, "images": [image]},
        "an image of text": {**OBSERVATION, "images": {"base_0_rgb": "x"}},
        "an image of objects": {**OBSERVATION, "images": {"base_0_rgb": np.full((32, 32, 3), None)}},
        "two axes": {**OBSERVATION, "images": {"base_0_rgb": image[0]}},
        "no pixels": {**OBSERVATION, "images": {"base_0_rgb": image[:0]}},
        "four colours": {**OBSERVATION, "images": {"base_0_rgb": np.zeros((32, 32, 4), np.uint8)}},
        "complex pixels": {**OBSERVATION, "images": {"base_0_rgb": image.astype(complex)}},
        "NaN pixels": {**OBSERVATION, "images": {"base_0_rgb": np.full((32, 32, 3), np.nan, np.float32)}},
        "another camera": {**OBSERVATION, "images": {"x": image}},
        "a camera of colours": {**OBSERVATION, "images": {"\x1b[31m": image}},
        "state None": {**OBSERVATION, "state": None},
        "state text": {**OBSERVATION, "state": "x"},
        "state NaN": {**OBSERVATION, "state": np.full(4, np.nan)},
        "state inf": {**OBSERVATION, "state": np.full(4, np.inf)},
        "state of 5": {**OBSERVATION, "state": np.zeros(5)},
        "state of none": {**OBSERVATION, "state": np.zeros(0)},
        "state of two axes": {**OBSERVATION, "state": np.zeros((4, 4))},
        "state of objects": {**OBSERVATION, "state": np.array([None] * 4)},
        "state ragged": {**OBSERVATION, "state": [1, [2]]},
        "state 1e300": {**OBSERVATION, "state": np.full(4, 1e300)},
        "state of texts": {**OBSERVATION, "state": np.array(["a"] * 4)},
        "prompt None": {**OBSERVATION, "prompt": None},
        "prompt 3": {**OBSERVATION, "prompt": 3},
        "prompt empty": {**OBSERVATION, "prompt": ""},
        "prompt of 10 MB": {**OBSERVATION, "prompt": "a " * 500_000},
        "prompt of surrogates": {**OBSERVATION, "prompt": "\ud800"},
        "prompt of zeros": {**OBSERVATION, "prompt": "\0" * 100},
        "prompt bytes": {**OBSERVATION, "prompt": b"x"},
        "a list": [1],
        "a text": "x",
        "None": None,
    }
    for name, observation in bent.items():
        for model in ("flow", "ar"):
            yield Case(
                "observations",
                f"{name} ({model})",
                model,
                lambda folder: None,
                lambda folder, o=observation: vla.open(folder).infer(o),
            )


def corpus() -> list[Case]:
    """All cases, the same in every run."""
    kinds = (
        numbers,
        structures,
        names,
        paths,
        tables_of_models,
        codecs,
        weights,
        datasets,
        pictures,
        recipes,
        foreign,
        texts_of_tokens,
        observations,
    )
    return [case for kind in kinds for case in kind()]
