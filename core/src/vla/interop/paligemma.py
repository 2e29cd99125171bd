"""Starting weights from PaliGemma: a Hugging Face folder (safetensors) or big_vision's `pt_224.npz`.

They fill the backbone (vision encoder, projector, LLM); experts and heads keep their initialisation. Nothing is dropped
in silence: `Start` lists what is new and which tensors of the source have no use here.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from attrs import field, frozen

from vla.errors import StoreError
from vla.params import Row, cover, other_shapes, shapes, table, to_torch
from vla.reading import checked, npz_shapes, read_json, read_npz, reading
from vla.refit import groups

# Tensors a Hugging Face file may have beyond PaliGemma's own weights, and why they are left out.
UNUSED = {
    r"lm_head\.weight": "the output table; here that is the embedding (tied)",
    r"gemma_expert\.lm_head\.weight": "the action expert has no vocabulary; openpi's port and LeRobot never use it",
    r"vision_tower\.head\..*": "SigLIP's pooling head, which PaliGemma does not use",
    r"vision_tower\.embeddings\.position_ids": "a constant",
    r"language_model\..*\.rotary_emb\.inv_freq": "a constant",
}
# transformers adds the token <image> after the 257,152 of PaliGemma and pads the table to a multiple of 64.
MOST_EXTRA_TOKENS = 64
MOST_ITEM = 16  # bytes of one number


@frozen
class Start:
    """What a checkpoint gives a variant."""

    source: str
    weights: Mapping[str, np.ndarray] = field(repr=False)  # our name -> array, as stored
    new: tuple[str, ...]  # our names that keep their initialisation
    unused: tuple[str, ...]  # tensors of the source without a use here, each with the reason

    def fill(self, fresh: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The fresh weights of a model with these in their place, in the dtype of the fresh ones."""
        cover(
            {n: x.shape for n, x in fresh.items()}, {**fresh, **self.weights}, f"{self.source} does not fit the model"
        )
        return {n: self.weights[n].astype(x.dtype) if n in self.weights else x for n, x in fresh.items()}

    def __str__(self) -> str:
        lines = [f"{self.source}: filled {len(self.weights)} weights"]
        lines += [f"  filled  {group}" for group in groups(self.weights)]
        lines += [f"  new     {group}" for group in groups(self.new)]
        lines += [f"  unused  {text}" for text in self.unused]
        return "\n".join(lines)


def read_paligemma(path: str | Path, variant: Any) -> Start:
    """Starting weights for the backbone of a variant.

    Args:
        path: a folder with `config.json` and `*.safetensors` as transformers writes them (any prefix style, one file or
            shards with an index), or a big_vision `.npz`.
        variant: a `vla.compose.Variant` whose backbone has the sizes of the checkpoint.

    Raises:
        StoreError: the source is damaged or is not PaliGemma, or a tensor is missing, unknown or of a wrong shape.
    """
    path = Path(path).expanduser()
    tree: dict[str, Any]
    if path.is_dir():
        _check_config(_config(path), path, variant)
        layout, (tree, unused) = "hf", standard_tree(read_shards(path), str(path))
    elif path.suffix == ".npz" and path.is_file():
        layout, (tree, unused) = "openpi", _read_npz(path)
    else:
        raise StoreError(
            "no PaliGemma checkpoint here",
            field=str(path),
            expected="a folder with config.json and *.safetensors, or a .npz file of big_vision",
            fix="download one and give its path; nothing is fetched for you",
        )
    rows = [row for row in table(variant, layout, experts=False) if row.torch.startswith("backbone.")]
    _check_parts(variant, rows)
    if layout == "hf":
        tree, cut = _without_extra_tokens(tree, other_shapes(rows))
        unused += cut
    fix = (
        "the backbone must have the checkpoint's sizes: --set backbone.vision.*, backbone.llm.*, spec.image_size "
        "(224 for pt_224); only PaliGemma 1 (Gemma 1) fits"
    )
    cover(other_shapes(rows), tree, f"{path} does not fit the backbone of {variant.name}", fix)
    weights = to_torch(rows, tree)
    return Start(str(path), weights, tuple(n for n in shapes(table(variant)) if n not in weights), tuple(unused))


def standard_name(name: str) -> str:
    """The name of a tensor in one style, whatever version of transformers, openpi or LeRobot wrote it."""
    name = re.sub(r"^(model\.)?paligemma_with_expert\.(paligemma\.)?", "", name)
    name = re.sub(r"^(gemma_expert\.)model\.", r"\1", name)
    name = re.sub(r"^model\.", "", name)
    name = re.sub(r"^language_model\.(model\.|(?=lm_head\.))", lambda m: "language_model." if m[1] else "", name)
    return re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)


def read_shards(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder's safetensors, one file or shards with an index; pages are read when touched.

    Raises:
        StoreError: no file, a shard is missing or damaged, or the index and the shards disagree.
    """
    from vla.store import read_weights

    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not (folder / "model.safetensors").is_file():
            raise StoreError(
                "no weights in this folder",
                field=str(folder),
                expected="model.safetensors, or shards with model.safetensors.index.json",
                fix="pickled weights (pytorch_model.bin) are not read: convert them to safetensors",
            )
        return read_weights(folder / "model.safetensors")
    table = read_json(index, "the index of the shards is damaged")
    with reading("the index of the shards is damaged", index):
        where = {str(name): str(file) for name, file in table["weight_map"].items()}
    out: dict[str, np.ndarray] = {}
    for file in sorted(set(where.values())):
        if Path(file).name != file:
            raise StoreError("the index names a file outside its folder", field=str(index), got=file)
        if not (folder / file).is_file():
            raise StoreError(
                "a shard is missing", field=str(folder / file), fix="copy the folder again from its source"
            )
        out |= read_weights(folder / file)
    if lost := sorted(set(where) ^ set(out)):
        raise StoreError(
            "the index and the shards disagree about their tensors",
            field=str(index),
            got=lost,
            fix="copy the folder again",
        )
    return out


def standard_tree(tensors: Mapping[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """Tensors under `standard_name`, and a note for each that has no use.

    Raises:
        StoreError: two tensors have one standard name.
    """
    tree: dict[str, Any] = {}
    for name, array in tensors.items():
        key = standard_name(name)
        if key in tree:
            raise StoreError("two tensors of the checkpoint have one meaning", field=source, got=name)
        tree[key] = array
    embed = "language_model.embed_tokens.weight"
    if embed not in tree and "lm_head.weight" in tree:  # saving tied weights keeps only one of the two names
        tree[embed] = tree.pop("lm_head.weight")
    unused = []
    for key in list(tree):
        for pattern, why in UNUSED.items():
            if re.fullmatch(pattern, key):
                unused.append(f"{key} {tuple(tree.pop(key).shape)}: {why}")
    return tree, unused


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not os.path.exists(file):
        raise StoreError(
            "no config.json: not a Hugging Face checkpoint",
            field=str(folder),
            got=sorted(p.name for p in folder.iterdir())[:8],
            fix="give the folder that transformers wrote",
        )
    config = read_json(file, "config.json cannot be read")
    for section in ("text_config", "vision_config"):
        checked(config.setdefault(section, {}), f"{file}: {section}", "config.json cannot be read")
    kinds = config.get("model_type"), config["text_config"].get("model_type", "gemma")
    if kinds != ("paligemma", "gemma"):
        raise StoreError(
            "not a PaliGemma checkpoint",
            field=str(folder / "config.json"),
            got="model_type {}, text {}".format(*kinds),
            expected="model_type paligemma, text gemma (PaliGemma 1)",
        )
    return config


def _check_config(config: Mapping[str, Any], folder: Path, variant: Any) -> None:
    """Head counts do not show in the shapes of a Hugging Face file: q is [heads * head_dim, width]."""
    backbone = variant.parts["backbone"].inner
    llm, vision = backbone["llm"].settings, backbone["vision"].settings
    asked = (
        ("text_config", "num_attention_heads", "backbone.llm.num_heads", getattr(llm, "num_heads", None)),
        ("text_config", "num_key_value_heads", "backbone.llm.num_kv_heads", getattr(llm, "num_kv_heads", None)),
        ("text_config", "head_dim", "backbone.llm.head_dim", getattr(llm, "head_dim", None)),
        ("vision_config", "num_attention_heads", "backbone.vision.num_heads", getattr(vision, "num_heads", None)),
    )
    for section, key, field_name, ours in asked:
        theirs = config.get(section, {}).get(key, ours)
        if theirs != ours:
            raise StoreError(
                f"{folder} does not fit the backbone of {variant.name}",
                field=field_name,
                got=ours,
                expected=f"{theirs} (its {section}.{key})",
                fix=f"--set {field_name}={theirs}",
            )


def _check_parts(variant: Any, rows: list[Row]) -> None:
    """Every weight of the backbone must be one that PaliGemma has."""
    ours = [n for n in shapes(table(variant, experts=False)) if n.startswith("backbone.")]
    named = shapes(rows)
    if lost := [n for n in ours if n not in named]:
        raise StoreError(
            "PaliGemma has no weights for some parts of this backbone:\n" + "\n".join("    " + g for g in groups(lost)),
            field=variant.name,
            fix="use backbone paligemma with vision siglip (pool none, learned positions) and llm gemma or gemma_fast",
        )


def _without_extra_tokens(tree: dict[str, Any], expected: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    key = "language_model.embed_tokens.weight"
    if key not in tree or key not in expected:
        return tree, []
    extra = tree[key].shape[0] - expected[key][0]
    if not 0 < extra <= MOST_EXTRA_TOKENS:
        return tree, []
    first = expected[key][0]
    note = f"{key}[{first}:{first + extra}]: tokens that transformers adds to PaliGemma's vocabulary of {first}"
    return {**tree, key: tree[key][:first]}, [note]


@frozen
class _Member:
    """An array in an .npz, read when asked for."""

    file: Path
    name: str
    shape: tuple[int, ...]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        size = math.prod(self.shape)  # checked against the model before
        found = read_npz(self.file, MOST_ITEM * size, only=self.name)[self.name]
        if found.dtype.kind == "V" and found.dtype.itemsize == 2:  # numpy has no bfloat16 and stores raw bytes
            import ml_dtypes

            found = found.view(ml_dtypes.bfloat16)
        return found if dtype is None else found.astype(dtype)


def _read_npz(path: Path) -> tuple[dict[str, _Member], list[str]]:
    tree, unused = {}, []
    for name, shape in npz_shapes(path).items():
        if name.startswith("params/"):
            tree["PaliGemma/" + name.removeprefix("params/")] = _Member(path, name, shape)
        else:
            unused.append(f"{name} {shape}: not under params/")
    return tree, unused
