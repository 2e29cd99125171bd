"""openpi's checkpoints become model directories: the stored ones, and ones written here in every form openpi writes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from shared_data import GOLDENS, needs

from vla.errors import StoreError
from vla.interop import openpi
from vla.interop.openpi import find_stats, import_openpi, open_checkpoint
from vla.params import from_jax, other_shapes, shapes, table, to_jax, to_other
from vla.testing.closeness import close

ts = pytest.importorskip("tensorstore")

ROOT = Path(__file__).parents[1]
CASES = sorted(p.parent for p in (GOLDENS / "openpi").glob("*/case.json"))
SET = {
    "backbone.vision": {"part": "siglip", "width": 16, "depth": 2, "mlp_dim": 24, "num_heads": 2, "patch_size": 8},
    "backbone.llm.width": 16, "backbone.llm.depth": 3, "backbone.llm.mlp_dim": 20, "backbone.llm.num_heads": 4,
    "backbone.llm.head_dim": 8, "backbone.llm.vocab_size": 40, "spec.image_size": [24, 24], "spec.action_dim": 5,
    "spec.state_dim": 5,
}  # fmt: skip
EXPERT = {"head.width": 8, "head.mlp_dim": 12}


def tiny(type):
    from vla.compose import build

    return build(type=type, set={**SET, **(EXPERT if type != "pi0_fast" else {})})


def write_orbax(folder, tree, *, value=False, top="params", ocdbt=True):
    """What orbax leaves on disk, written with tensorstore; `value`: as openpi's training does."""
    folder.mkdir(parents=True)
    meta = {}
    for path, array in tree.items():
        parts = [*([top] if top else []), *path.split("/"), *(["value"] if value else [])]
        keys = [{"key": k, "key_type": 2} for k in parts]
        meta[str(tuple(parts))] = {"key_metadata": keys, "value_metadata": {"value_type": "np.ndarray"}}
        name = ".".join(parts) + "/"
        store = {"driver": "ocdbt", "base": folder.as_uri() + "/", "path": name}
        if not ocdbt:
            store = {"driver": "file", "path": f"{folder}/{name}"}
        spec = {
            "driver": "zarr", "kvstore": store, "store_data_equal_to_fill_value": True,
            "metadata": {"compressor": {"id": "zstd", "level": 1}},
        }  # fmt: skip
        ts.open(spec, create=True, open=True, dtype=array.dtype.name, shape=array.shape).result().write(array).result()
    meta["('params', 'empty')"] = {
        "key_metadata": [{"key": "params", "key_type": 2}, {"key": "empty", "key_type": 2}],
        "value_metadata": {"value_type": "Dict"},
    }
    text = {"tree_metadata": meta, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    (folder / "_METADATA").write_text(json.dumps(text))
    return folder


def made(type, seed=0):
    """A variant, weights for it, and openpi's tree of them."""
    variant = tiny(type)
    rng = np.random.default_rng(seed)
    weights = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes(table(variant)).items()}
    return variant, weights, to_other(table(variant, "openpi"), weights)


@pytest.mark.goldens
@needs(GOLDENS / "openpi", found=bool(CASES))
@pytest.mark.parametrize("case", CASES or [None], ids=lambda p: p.name if p else "none")
def test_stored_checkpoints_import_bit_for_bit(case):
    sizes = json.loads((case / "case.json").read_text())
    variant, weights = import_openpi(case, spec={"action_horizon": sizes["action_horizon"]})
    assert variant.name == sizes["kind"]
    assert variant.spec.action_horizon == sizes["action_horizon"] and variant.spec.image_size == (224, 224)
    vision, llm = variant.backbone.inner["vision"].settings, variant.backbone.inner["llm"].settings
    for key in ("width", "depth", "mlp_dim", "num_heads"):
        assert getattr(vision, key) == sizes["siglip"][key]
    for key in ("width", "depth", "mlp_dim", "num_heads", "num_kv_heads", "head_dim"):
        assert getattr(llm, key) == sizes["llm"][key]
    assert llm.vocab_size == sizes["vocab_size"]
    if sizes["expert"]:
        assert (variant.head.settings.width, variant.head.settings.mlp_dim) == (
            sizes["expert"]["width"], sizes["expert"]["mlp_dim"],
        )  # fmt: skip
        assert variant.spec.action_dim == sizes["action_dim"]
    source = open_checkpoint(case).leaves
    again = to_other(table(variant, "openpi"), weights)
    assert set(again) == set(source)
    for path, array in again.items():
        assert array.tobytes() == np.asarray(source[path]).tobytes(), path
    back = from_jax(variant, to_jax(variant, weights))
    assert all(back[n].tobytes() == w.tobytes() for n, w in weights.items())


@pytest.mark.parametrize("type", ["pi0", "pi05", "pi0_fast"])
@pytest.mark.parametrize("value", [False, True], ids=["plain", "value"])
def test_type_and_sizes_come_from_the_tree(tmp_path, type, value):
    variant, weights, tree = made(type)
    write_orbax(tmp_path / "params", tree, value=value)
    found, read = import_openpi(tmp_path, set=["spec.action_dim=5", "spec.state_dim=5"])
    assert found.tree() == variant.tree() and found.spec == variant.spec and found.name == type
    assert list(read) == list(weights)
    assert all(read[n].tobytes() == w.tobytes() for n, w in weights.items())


def test_a_folder_per_array_and_bfloat16(tmp_path):
    """Older orbax wrote no OCDBT; frozen weights are stored in bfloat16."""
    import ml_dtypes

    _, weights, tree = made("pi05")
    tree = {p: a.astype(ml_dtypes.bfloat16) if "llm" in p else a for p, a in tree.items()}
    write_orbax(tmp_path / "params", tree, ocdbt=False)
    _, read = import_openpi(tmp_path)
    name = "backbone.llm.layers.1.backbone.k.weight"
    assert read[name].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read[name], weights[name].astype(ml_dtypes.bfloat16))
    assert read["head.action_in_proj.weight"].dtype == np.float32


def test_the_checkpoint_may_be_named_by_any_of_its_folders(tmp_path):
    tmp_path = tmp_path / "my runs, 50% done"
    for step in ("999", "1000", "20"):
        write_orbax(tmp_path / step / "params", made("pi05", seed=int(step))[2])
        stats = tmp_path / step / "assets" / "org" / "robot"
        stats.mkdir(parents=True)
        (stats / "norm_stats.json").write_text("{}")
    last = tmp_path / "1000"
    for path in (tmp_path, last, last / "params"):
        assert open_checkpoint(path).params == last / "params"
        assert find_stats(path) == find_stats(path, "org/robot") == last / "assets/org/robot/norm_stats.json"
    (last / "assets" / "norm_stats.json").write_text("{}")
    with pytest.raises(StoreError, match="several robots"):
        find_stats(last)
    with pytest.raises(StoreError, match="no such normalisation statistics"):
        find_stats(last, "other")
    shutil.rmtree(last / "assets")
    assert find_stats(last) is None


def test_every_missing_unknown_and_misshapen_tensor_is_listed(tmp_path):
    _, _, tree = made("pi05")
    del tree["PaliGemma/llm/final_norm/scale"], tree["time_mlp_out/bias"]
    tree["PaliGemma/llm/extra/kernel"] = np.zeros((2, 3), np.float32)
    tree["PaliGemma/img/head/bias"] = np.zeros(9, np.float32)
    write_orbax(tmp_path / "params", tree)
    with pytest.raises(StoreError) as error:
        import_openpi(tmp_path)
    text = str(error.value)
    assert "2 missing, 1 unknown, 1 of a wrong shape" in text
    for line in (
        "missing      PaliGemma/llm/final_norm/scale (16,)", "missing      time_mlp_out/bias (8,)",
        "unknown      PaliGemma/llm/extra/kernel (2, 3)", "wrong shape  PaliGemma/img/head/bias (9,), expected (16,)",
    ):  # fmt: skip
        assert line in text


def test_a_checkpoint_of_another_type_is_refused(tmp_path):
    write_orbax(tmp_path / "params", made("pi05")[2])
    with pytest.raises(StoreError, match="the tree looks like pi05"):
        import_openpi(tmp_path, type="pi0")
    with pytest.raises(StoreError, match="no weights for some parts"):
        import_openpi(tmp_path, set=["backbone.vision.pool=map"])


def test_pi05_weights_fill_pi05_ki(tmp_path):
    _, weights, tree = made("pi05")
    write_orbax(tmp_path / "params", tree)
    variant, read = import_openpi(tmp_path, type="pi05_ki")
    assert variant.head.inner["actions"].settings.width == 8
    assert len(read) == len(weights)
    np.testing.assert_array_equal(read["head.actions.time_mlp_in.bias"], weights["head.time_mlp_in.bias"])


def with_lora(tree, ranks=(2, 3), seed=1):
    """openpi's LoRA leaves beside those of a tree: gemma_2b_lora and gemma_300m_lora, small."""
    rng, out = np.random.default_rng(seed), dict(tree)
    for path, array in tree.items():
        named = re.fullmatch(
            r"(PaliGemma/llm/layers/(?:attn/\w+einsum(_1)?/|mlp(_1)?/(?:gating_einsum|linear)))(w?)", path
        )
        if named:
            stem, rank = (named[1], ranks[bool(named[2] or named[3])])
            stem = stem if named[4] else f"{stem}_"
            shapes_ = (*array.shape[:-1], rank), (*array.shape[:-2], rank, array.shape[-1])
            out |= {
                f"{stem}lora_{x}": rng.standard_normal(s).astype(np.float32) for x, s in zip("ab", shapes_, strict=True)
            }
    return out


@pytest.mark.parametrize(("alpha", "rslora", "scale"), [(None, False, 1), (6, False, 3), (6, True, 6 / 2**0.5)])
def test_lora_weights_are_merged_as_openpi_applies_them(tmp_path, alpha, rslora, scale):
    """Against openpi's own equations, on inputs: what the merged weights compute is what base and adapters compute."""
    variant, weights, tree = made("pi0")
    tree = with_lora(tree, ranks=(2, 2))
    assert len(tree) == 50 + 20  # as openpi's pi0 with both LoRA variants
    write_orbax(tmp_path / "params", tree, value=True)
    found, read = import_openpi(tmp_path, lora_alpha=alpha, lora_rslora=rslora)
    assert found.tree() == variant.tree()
    assert open_checkpoint(tmp_path).ranks == (2,)
    done = to_other(table(variant, "openpi"), read)
    rng = np.random.default_rng(2)
    for e, width, mlp in (("", 16, 20), ("_1", 8, 12)):
        attn = {k: {x: tree.get(f"PaliGemma/llm/layers/attn/{k}{e}/{x}") for x in ("w", "lora_a", "lora_b")}
                for k in ("q_einsum", "kv_einsum", "attn_vec_einsum")}  # fmt: skip
        x, heads = rng.standard_normal((2, 5, width)), rng.standard_normal((2, 5, 4, 8))
        hidden = rng.standard_normal((2, 5, mlp))
        for l in range(3):
            cases = []
            for name, into, (first, low, up) in (
                ("q_einsum", x, ("BTD,NDH->BTNH", "BTD,NDL->BTNL", "BTNL,NLH->BTNH")),
                ("kv_einsum", x, ("BSD,CKDH->CBSKH", "BSD,CKDL->CBSKL", "CBSKL,CKLH->CBSKH")),
                ("attn_vec_einsum", heads, ("BTNH,NHD->BTD", "BTNH,NHL->BTL", "BTL,NLD->BTD")),
            ):
                w, a, b = (attn[name][k][l] for k in ("w", "lora_a", "lora_b"))
                want = np.einsum(first, into, w) + scale * np.einsum(up, np.einsum(low, into, a), b)
                cases.append((want, np.einsum(first, into, done[f"PaliGemma/llm/layers/attn/{name}{e}/w"][l])))
            mlps = {k: tree[f"PaliGemma/llm/layers/mlp{e}/{k}"][l] for k in (
                "gating_einsum", "gating_einsum_lora_a", "gating_einsum_lora_b", "linear", "linear_lora_a", "linear_lora_b",
            )}  # fmt: skip
            for i in (0, 1):  # the MLP ignores alpha
                want = (
                    x @ mlps["gating_einsum"][i] + x @ mlps["gating_einsum_lora_a"][i] @ mlps["gating_einsum_lora_b"][i]
                )
                cases.append((want, x @ done[f"PaliGemma/llm/layers/mlp{e}/gating_einsum"][l][i]))
            want = hidden @ mlps["linear"] + hidden @ mlps["linear_lora_a"] @ mlps["linear_lora_b"]
            cases.append((want, hidden @ done[f"PaliGemma/llm/layers/mlp{e}/linear"][l]))
            for want, got in cases:
                close(got, want, 1e-5)
    plain = [n for n in weights if not re.search(r"layers.*\.(q|k|v|o|gate|up|down)\.weight", n) or "vision" in n]
    assert plain and all(read[n].tobytes() == weights[n].tobytes() for n in plain)


@pytest.mark.parametrize("type", ["pi0", "pi05", "pi0_fast"])
def test_lora_of_either_expert_over_frozen_bfloat16(tmp_path, type):
    """openpi stores frozen weights in bfloat16; the sum with an adapter is float32."""
    import ml_dtypes

    variant, weights, tree = made(type)
    full = with_lora(tree, ranks=(2, 3))
    assert len(full) == {"pi0": 70, "pi05": 71, "pi0_fast": 42}[type]
    full = {p: a.astype(ml_dtypes.bfloat16) if p in tree and "llm" in p else a for p, a in full.items()}
    write_orbax(tmp_path / "params", full)
    sets = ["spec.action_dim=5", "spec.state_dim=5"]
    _, read = import_openpi(tmp_path, set=sets)
    assert open_checkpoint(tmp_path).ranks == ((2,) if type == "pi0_fast" else (2, 3))
    name = "backbone.llm.layers.1.backbone.down.weight"
    a, b = (full[f"PaliGemma/llm/layers/mlp/linear_lora_{x}"][1] for x in "ab")
    assert read[name].dtype == np.float32
    want = weights[name].astype(ml_dtypes.bfloat16).astype(np.float32) + (a @ b).T
    close(read[name], want, 1e-5)


def test_the_verb_says_what_it_merged(tmp_path, capsys):
    from vla.cli import main
    from vla.store import read_weights

    write_orbax(tmp_path / "params", with_lora(made("pi05")[2]))
    words = ["import", "openpi", str(tmp_path), "--out", str(tmp_path / "model"), "--lora-alpha", "6"]
    assert main(words) == 0
    assert "rank 2, 3 are merged, with alpha 6" in capsys.readouterr().err
    assert json.loads((tmp_path / "model" / "record.json").read_text())["imported"]["lora_ranks"] == [2, 3]
    want = import_openpi(tmp_path, lora_alpha=6)[1]
    read = read_weights(tmp_path / "model" / "model.safetensors")
    assert all(np.array_equal(read[n], w) for n, w in want.items())
    name = "backbone.llm.layers.0.backbone.q.weight"
    assert not np.array_equal(want[name], import_openpi(tmp_path)[1][name])


def test_lora_weights_that_do_not_fit_are_listed(tmp_path):
    tree = with_lora(made("pi0")[2])
    del tree["PaliGemma/llm/layers/attn/q_einsum/lora_b"], tree["PaliGemma/llm/layers/mlp_1/linear"]
    tree["PaliGemma/llm/layers/attn/kv_einsum_1/lora_a"] = np.zeros((3, 2, 1, 7, 3), np.float32)
    write_orbax(tmp_path / "params", tree)
    with pytest.raises(StoreError) as error:
        import_openpi(tmp_path)
    for line in (
        "missing      PaliGemma/llm/layers/attn/q_einsum/lora_b",
        "missing      PaliGemma/llm/layers/mlp_1/linear, of the pair PaliGemma/llm/layers/mlp_1/linear_lora_a",
        "wrong shape  PaliGemma/llm/layers/attn/kv_einsum_1/lora_a (3, 2, 1, 7, 3)",
    ):
        assert line in str(error.value)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(StoreError, match="no such folder"):
        import_openpi(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="no openpi checkpoint here"):
        import_openpi(tmp_path)
    write_orbax(tmp_path / "a" / "params", {"w": np.zeros(2, np.float32)})
    with pytest.raises(StoreError, match="not the weights of an openpi policy"):
        import_openpi(tmp_path / "a")
    write_orbax(tmp_path / "b" / "params", {"mu/w": np.zeros(2, np.float32)}, top="opt_state")
    with pytest.raises(StoreError, match="not openpi's `params`"):
        import_openpi(tmp_path / "b")
    (tmp_path / "c" / "params").mkdir(parents=True)
    outside = {"key_metadata": [{"key": "..", "key_type": 2}], "value_metadata": {"value_type": "np.ndarray"}}
    for damage in ("{", "[]", '{"tree_metadata": {"x": 1}}', json.dumps({"tree_metadata": {"x": outside}})):
        (tmp_path / "c" / "params" / "_METADATA").write_text(damage)
        with pytest.raises(StoreError, match="list of arrays is damaged"):
            import_openpi(tmp_path / "c")


def test_lost_and_damaged_pieces_are_an_error_never_zeros(tmp_path):
    _, _, tree = made("pi05")
    write_orbax(tmp_path / "a" / "params", tree, ocdbt=False)
    array = tmp_path / "a" / "params" / "params.PaliGemma.llm.layers.mlp.linear"
    pieces = [p for p in array.iterdir() if not p.name.startswith(".")]
    content = pieces[0].read_bytes()
    pieces[0].write_bytes(content[: len(content) // 2])
    with pytest.raises(StoreError, match="damaged") as error:
        import_openpi(tmp_path / "a")
    assert "PaliGemma/llm/layers/mlp/linear" in str(error.value)
    pieces[0].unlink()
    with pytest.raises(StoreError, match="pieces of an array are missing"):
        import_openpi(tmp_path / "a")
    shutil.rmtree(array)
    with pytest.raises(StoreError, match="1 of 51 arrays .* cannot be opened"):
        import_openpi(tmp_path / "a")


def test_reading_needs_no_framework(tmp_path):
    write_orbax(tmp_path / "params", made("pi05")[2])
    code = (
        "import sys; from vla.interop.openpi import import_openpi; import_openpi(sys.argv[1]);"
        "assert not {'torch', 'jax', 'flax', 'orbax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_full_sizes_count_as_openpi_counts():
    from vla.compose import build
    from vla.params import count

    assert count(build(type="pi0")) == 3_238_048_528
    assert count(build(type="pi05")) == count(build(type="pi05_ki")) == 3_353_433_872
    assert count(build(type="pi0_fast")) == 2_923_335_408
    leaves = {t: len(other_shapes(table(build(type=t), "openpi"))) for t in ("pi0", "pi05", "pi0_fast")}
    assert leaves == {"pi0": 50, "pi05": 51, "pi0_fast": 32}


def test_the_verb_writes_a_model_directory_or_nothing(tmp_path, capsys):
    from vla.cli import main
    from vla.store import read_weights

    _, weights, tree = made("pi05")
    write_orbax(tmp_path / "params", tree)
    out = tmp_path / "model"
    assert main(["import", "openpi", str(tmp_path), "--out", str(out), "--set", "spec.action_horizon=4"]) == 0
    assert "51 arrays" in capsys.readouterr().err
    read = read_weights(out / "model.safetensors")
    assert all(read[n].tobytes() == w.tobytes() for n, w in weights.items()) and len(read) == len(weights)
    assert "action_horizon = 4" in (out / "variant.toml").read_text()
    assert main(["import", "openpi", str(tmp_path), "--out", str(tmp_path / "other"), "--type", "pi0"]) == 2
    assert "missing      state_proj/kernel" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_statistics_come_along(tmp_path, capsys):
    pytest.importorskip("vla.transforms.stats", reason="no statistics in this core")
    from vla.cli import main

    write_orbax(tmp_path / "params", made("pi05")[2])
    row = {"mean": [0.5] * 5, "std": [2.0] * 5, "q01": [-1.0] * 5, "q99": [3.0] * 5}
    (tmp_path / "assets" / "robot").mkdir(parents=True)
    (tmp_path / "assets" / "robot" / "norm_stats.json").write_text(
        json.dumps({"norm_stats": {"state": row, "actions": row}})
    )
    assert main(["import", "openpi", str(tmp_path), "--out", str(tmp_path / "model")]) == 0, capsys.readouterr().err
    written = json.loads((tmp_path / "model" / "norm_stats.json").read_text())["norm_stats"]
    for key in ("state", "actions"):
        for name, values in row.items():
            close(written[key][name], values, 1e-7)


def test_marks_are_leaves_of_their_types():
    for leaf, type in openpi.MARKS:
        assert leaf in other_shapes(table(tiny(type), "openpi"))
