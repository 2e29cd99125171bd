"""Readers under fuzzing: bytes in, a value or one `VlaError` out. As a script: one of them under atheris.

python tests/helpers/fuzz_targets.py variant -runs=100000 -max_total_time=60
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import attrs
import numpy as np

if __name__ == "__main__":  # under atheris: what is read with is instrumented, so it must not be imported before
    import atheris

    with atheris.instrument_imports(include=["vla", "vla_tokenizer_fast"]):
        import vla.codecs
        import vla.compose
        import vla.id_map
        import vla.reading
        import vla.tokenizer
import vla


@attrs.frozen
class Target:
    """One reader: an honest folder, the file of it that is bent, and what reads it."""

    make: Callable[[Path], None]
    file: str
    read: Callable[[Path], object]

    def __call__(self, folder: Path, data: bytes) -> None:
        """Read the file with this content; anything but a result or a `VlaError` is a fault."""
        file = folder / self.file
        file.write_bytes(data)
        try:
            self.read(folder)
        except vla.VlaError as error:
            text = str(error)
            assert len(text) < 50_000 and not any(ord(c) < 32 and c not in "\n\t" for c in text)


def _json(name: str, table: object) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(json.dumps(table), encoding="utf-8") and None


def _stats(folder: Path) -> object:
    from vla.transforms.stats import load_stats

    return load_stats(folder)


def _recipe(folder: Path) -> object:
    from vla.training.recipes import read_recipe

    return read_recipe(folder / "r.toml")


def _record(folder: Path) -> object:
    from vla.store import read_record

    return read_record(folder)


def _manifest(folder: Path) -> object:
    from vla.manifest import verify_folder

    return verify_folder(folder)


def _checkpoint(folder: Path) -> object:
    from vla.runs import checkpoint_variant

    return checkpoint_variant(folder)


def _codec(folder: Path) -> object:
    from vla.compose import load_object, resolve

    chosen = resolve("tokenizer", {"part": "fast", "preset": "tiny", "text": {"part": "paligemma", "preset": "tiny"}})
    return load_object(chosen.part.numpy)(chosen.settings).load(folder)


def _id_map(folder: Path) -> object:
    from vla.id_map import IdMap

    return IdMap.load(folder)


def _arrays(folder: Path) -> object:
    from vla.reading import read_npz

    return read_npz(folder / "a.npz", most=1 << 24)


def _weights(folder: Path) -> object:
    from vla.store import read_weights

    return read_weights(folder / "w.safetensors")


def _orbax(folder: Path) -> object:
    from vla.interop.orbax import read_item

    return read_item(folder)


def _shards(folder: Path) -> object:
    from vla.interop.paligemma import read_shards

    return read_shards(folder)


def _hf(folder: Path) -> object:
    from vla.interop.paligemma import read_paligemma

    return read_paligemma(folder, vla.build(type="pi05", preset="tiny"))


def _public(folder: Path) -> object:
    from vla.compose import load_object, resolve

    table = {"part": "fast", "source": str(folder), "codes": 64, "text": {"part": "paligemma", "preset": "tiny"}}
    chosen = resolve("tokenizer", table)
    return load_object(chosen.part.numpy)(chosen.settings)


def _data(folder: Path) -> object:
    from vla.datasets import open_dataset

    return open_dataset(folder)


def _write_codec(folder: Path) -> None:
    from vla.codecs import write_codec

    facts = {"codes": 64, "scale": 3.0, "low": -6, "high": 6, "shapes": [[4, 4]], "public": False}
    write_codec(folder, "fast", facts, {"merges": np.array([(1, 2), (13, 3)], np.int32)})


def _write_weights(folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.int64)}, folder / "w.safetensors")


def _write_data(folder: Path) -> None:
    from vla.datasets import DatasetInfo, create_dataset

    with create_dataset(folder, DatasetInfo({"top": (8, 8)}, 2, 2, 10.0), overwrite=True) as writer:
        for step in range(4):
            image = np.zeros((8, 8, 3), np.uint8)
            writer.add({"images": {"top": image}, "state": [step, 0], "action": [0, step], "prompt": "push"})
        writer.end_episode()


def _write_public(folder: Path) -> None:
    vocab = {chr(33 + i): i for i in range(64)}
    before = {"type": "ByteLevel", "add_prefix_space": False}
    _json("processor_config.json", {"scale": 10, "min_token": -30})(folder)
    _json("tokenizer.json", {"model": {"type": "BPE", "vocab": vocab, "merges": []}, "pre_tokenizer": before})(folder)


def _write_manifest(folder: Path) -> None:
    from vla.manifest import write_manifest

    (folder / "a").write_text("a")
    write_manifest(folder, "model")


ONE = {"mean": [0.0], "std": [1.0], "q01": [-1.0], "q99": [1.0]}
LEAF = {"key_metadata": [{"key": "a", "key_type": 2}], "value_metadata": {"value_type": "np.ndarray"}}
VARIANT = vla.build(type="pi05", preset="tiny").to_toml()
HF = {"model_type": "paligemma", "text_config": {"model_type": "gemma"}, "vision_config": {}}
INFO, EPISODES = "meta/info.json", "meta/episodes/chunk-000/file-000.parquet"
TARGETS = {
    "statistics": Target(_json("norm_stats.json", {"norm_stats": {"state": ONE, "actions": ONE}}), "norm_stats.json", _stats),
    "variant": Target(lambda f: (f / "variant.toml").write_text(VARIANT) and None, "variant.toml", vla.read_variant),
    "recipe": Target(lambda f: (f / "r.toml").write_text("vla_recipe = 1\ntype = 'pi05'\n[train]\nsteps = 3\n") and None, "r.toml", _recipe),
    "record": Target(_json("record.json", {"cameras": ["top"], "steps": 3, "source": "x"}), "record.json", _record),
    "manifest": Target(_write_manifest, "manifest.json", _manifest),
    "checkpoint": Target(_json("train_state.json", {"step": 3, "variant": VARIANT, "config": {}}), "train_state.json", _checkpoint),
    "codec": Target(_write_codec, "codec.json", _codec),
    "merges": Target(_write_codec, "codec.npz", _codec),
    "id map": Target(_json("id_map.json", {"vla_id_map": 1, "vocab_size": 9, "text_ids": [3, 4]}), "id_map.json", _id_map),
    "arrays": Target(lambda f: np.savez(f / "a.npz", a=np.eye(2), b=np.arange(3)), "a.npz", _arrays),
    "weights": Target(_write_weights, "w.safetensors", _weights),
    "orbax": Target(_json("_METADATA", {"tree_metadata": {"x": LEAF}}), "_METADATA", _orbax),
    "shards": Target(_json("model.safetensors.index.json", {"weight_map": {"a": "w.safetensors"}}), "model.safetensors.index.json", _shards),
    "Hugging Face": Target(_json("config.json", HF), "config.json", _hf),
    "public FAST": Target(_write_public, "tokenizer.json", _public),
    "data": Target(_write_data, INFO, _data),
    "episodes": Target(_write_data, EPISODES, _data),
}  # fmt: skip


def main() -> None:
    """One target under atheris, from its honest file on; the other words are libFuzzer's."""
    name = sys.argv[1]
    with tempfile.TemporaryDirectory() as place:
        folder, seeds = Path(place) / "it", Path(place) / "seeds"
        folder.mkdir(), seeds.mkdir()
        target = TARGETS[name]
        target.make(folder)
        (seeds / "honest").write_bytes((folder / target.file).read_bytes())
        os.chdir(place)  # where libFuzzer writes what it finds
        options = ["-len_control=0", "-max_len=8192", *sys.argv[2:]]
        atheris.Setup([sys.argv[0], str(seeds), *options], lambda data: target(folder, data))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
