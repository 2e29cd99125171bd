"""Starting weights from PaliGemma, as transformers and as big_vision write it, at tiny sizes."""

import json
import re

import numpy as np
import pytest

from vla.compose import build
from vla.errors import SettingsError, StoreError
from vla.interop.paligemma import read_paligemma, standard_name
from vla.interop.start import fresh_weights, starting_weights
from vla.params import shapes, table, to_other
from vla.testing.closeness import close

SET = {
    "backbone.vision": {"part": "siglip", "width": 32, "depth": 2, "mlp_dim": 48, "num_heads": 2, "patch_size": 56},
    "backbone.llm.width": 64, "backbone.llm.depth": 3, "backbone.llm.mlp_dim": 96, "backbone.llm.num_heads": 4,
    "backbone.llm.head_dim": 16, "backbone.llm.vocab_size": 512, "spec.action_dim": 5, "head.width": 32,
    "head.mlp_dim": 40,
}  # fmt: skip


def variant(type="pi05", **more):
    return build(type=type, set={**SET, **more})


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A tiny PaliGemma of transformers, and the folder it wrote in shards."""
    torch = pytest.importorskip("torch")
    t = pytest.importorskip("transformers")
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 224, "patch_size": 56, "projection_dim": 64,
    }  # fmt: skip
    text = {
        "model_type": "gemma", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 576,
    }  # fmt: skip
    torch.manual_seed(0)
    config = t.PaliGemmaConfig(vision_config=vision, text_config=text, projection_dim=64, image_token_index=512)
    config._attn_implementation = "eager"
    model = t.PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: nothing hides behind a zero
            parameter.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return model, folder


def rewritten(source, target, rename, drop=(), add=None):
    """The same checkpoint as one file, with other names."""
    from safetensors.numpy import load_file, save_file

    target.mkdir()
    tensors = {k: v for f in source.glob("*.safetensors") for k, v in load_file(f).items()}
    tensors = {rename(k): v for k, v in tensors.items() if k not in drop}
    save_file({**tensors, **(add or {})}, target / "model.safetensors")
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


def old_style(name):
    """transformers 4.40 to 4.51."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def new_style(name):
    """transformers 4.52 and later, in memory."""
    return "model." + name.replace("language_model.model.", "language_model.")


def lerobot_style(name):
    return "model.paligemma_with_expert.paligemma." + new_style(old_style(name))


def test_shards_fill_the_backbone_and_nothing_else(hf):
    model, folder = hf
    v = variant()
    start = read_paligemma(folder, v)
    named = shapes(table(v))
    assert set(start.weights) | set(start.new) == set(named) and not set(start.weights) & set(start.new)
    assert all(n.startswith("head.") or ".action." in n for n in start.new)
    assert all(n.startswith("backbone.") and ".action." not in n for n in start.weights)
    sd = {standard_name(k): x.detach().numpy() for k, x in model.state_dict().items()}
    np.testing.assert_array_equal(
        start.weights["backbone.llm.embedder.weight"], sd["language_model.embed_tokens.weight"][:512]
    )
    np.testing.assert_array_equal(
        start.weights["backbone.llm.layers.2.backbone.norm_mlp.scale"],
        sd["language_model.layers.2.post_attention_layernorm.weight"],
    )
    text = str(start)
    assert "vision_tower.head.probe (1, 1, 32): SigLIP's pooling head" in text
    assert "embed_tokens.weight[512:576]" in text  # dropped rows are said
    assert "new     backbone.llm.layers.*.action.q.weight x3" in text and "new     head.time_mlp_in.weight" in text
    assert "filled  backbone.vision.blocks.*.attn.q.weight x2" in text


@pytest.mark.parametrize("style", [old_style, new_style, lerobot_style, str])
def test_every_style_of_names_gives_the_same(hf, tmp_path, style):
    _, folder = hf
    want = read_paligemma(folder, variant()).weights
    got = read_paligemma(rewritten(folder, tmp_path / "one", style), variant()).weights
    assert list(want) == list(got) and all(np.array_equal(want[n], got[n]) for n in want)


def test_a_tied_head_stands_for_the_embedding(hf, tmp_path):
    _, folder = hf
    want = read_paligemma(folder, variant()).weights["backbone.llm.embedder.weight"]
    embed = "language_model.model.embed_tokens.weight"
    swap = rewritten(folder, tmp_path / "a", lambda k: "language_model.lm_head.weight" if k == embed else k)
    np.testing.assert_array_equal(read_paligemma(swap, variant()).weights["backbone.llm.embedder.weight"], want)
    both = rewritten(folder, tmp_path / "b", str, add={"lm_head.weight": np.zeros((576, 64), np.float32)})
    start = read_paligemma(both, variant())
    np.testing.assert_array_equal(start.weights["backbone.llm.embedder.weight"], want)
    assert any(line.startswith("lm_head.weight") for line in start.unused)


def test_the_filled_backbone_computes_what_transformers_computes(hf):
    torch = pytest.importorskip("torch")
    from vla.torch_kit.model import build_model

    theirs, folder = hf
    v = variant()
    weights, _ = starting_weights(v, f"paligemma:{folder}")
    ours = build_model(v)
    ours.load_state_dict({n: torch.from_numpy(np.array(w)) for n, w in weights.items()})
    image = torch.rand(2, 224, 224, 3) * 2 - 1
    ids = torch.randint(0, 512, (2, 9))
    with torch.no_grad():
        seen = theirs.model.vision_tower(image.permute(0, 3, 1, 2)).last_hidden_state
        want = theirs.model.multi_modal_projector(seen)
        got = ours.backbone.embed_images({"base_0_rgb": image})["base_0_rgb"]
        close(got, want, 1e-4)
        x = ours.backbone.embed_text(ids)
        want = theirs.model.language_model(inputs_embeds=x, use_cache=False).last_hidden_state  # causal
        mask = torch.ones(2, 9, 9, dtype=torch.bool).tril()
        got = ours.backbone.llm({"backbone": x}, mask, torch.arange(9).expand(2, 9))[0]["backbone"]
        close(got, want, 1e-4)


def big_vision(path, seed=0, extra=None):
    """An .npz as big_vision writes PaliGemma: openpi's names below `params/`, one expert."""
    v = build(type="pi0_fast", set={k: x for k, x in SET.items() if not k.startswith("head")})
    rng = np.random.default_rng(seed)
    weights = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes(table(v)).items()}
    tree = {p.replace("PaliGemma/", "params/"): a for p, a in to_other(table(v, "openpi"), weights).items()}
    np.savez(path, **{**tree, **(extra or {})})
    return weights, tree


def test_big_vision_fills_the_backbone(tmp_path):
    weights, tree = big_vision(tmp_path / "pt_224.npz", extra={"opt/step": np.zeros(())})
    assert tree["params/llm/layers/attn/kv_einsum/w"].shape == (3, 2, 1, 64, 16)
    assert tree["params/img/pos_embedding"].shape == (1, 16, 32)
    start = read_paligemma(tmp_path / "pt_224.npz", variant())
    assert set(start.weights) == set(weights)
    assert all(np.array_equal(start.weights[n], w) for n, w in weights.items())
    assert start.unused == ("opt/step (): not under params/",)
    assert all(n.startswith("head.") or ".action." in n for n in start.new)


def test_bfloat16_in_an_npz(tmp_path):
    import ml_dtypes

    weights, tree = big_vision(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", **{k: a.astype(ml_dtypes.bfloat16) for k, a in tree.items()})
    start = read_paligemma(tmp_path / "b.npz", variant())
    for name, w in weights.items():
        np.testing.assert_array_equal(start.weights[name], w.astype(ml_dtypes.bfloat16))


def test_new_weights_are_those_of_a_fresh_model_and_follow_the_seed(tmp_path):
    pytest.importorskip("torch")
    weights, _ = big_vision(tmp_path / "pt.npz")
    v = variant()
    filled, start = starting_weights(v, f"paligemma:{tmp_path / 'pt.npz'}", seed=3)
    fresh, other = fresh_weights(v, seed=3), fresh_weights(v, seed=4)
    assert list(filled) == list(fresh) and set(fresh) == set(shapes(table(v)))
    for name, array in filled.items():
        assert np.array_equal(array, weights[name] if name in weights else fresh[name]), name
        assert array.dtype == np.float32
    assert not np.array_equal(fresh["head.action_in_proj.weight"], other["head.action_in_proj.weight"])


def test_sizes_that_do_not_fit_are_listed(hf, tmp_path):
    _, folder = hf
    with pytest.raises(StoreError, match=r"--set backbone.llm.num_heads=4"):  # no shape shows this
        read_paligemma(folder, variant(**{"backbone.llm.num_heads": 2, "backbone.llm.head_dim": 32}))
    with pytest.raises(StoreError, match=r"position_embedding.weight \(16, 32\), expected \(4, 32\)"):
        read_paligemma(folder, variant(**{"spec.image_size": (112, 112)}))
    with pytest.raises(StoreError, match=r"embed_tokens.weight \(576, 64\), expected \(400, 64\)"):
        read_paligemma(folder, variant(**{"backbone.llm.vocab_size": 400}))
    with pytest.raises(StoreError, match="no weights for some parts of this backbone"):
        read_paligemma(folder, variant(**{"backbone.vision.pool": "map"}))
    big_vision(tmp_path / "pt.npz")
    with pytest.raises(StoreError, match=r"\d+ of a wrong shape"):
        read_paligemma(tmp_path / "pt.npz", variant(**{"backbone.llm.mlp_dim": 100}))


def test_what_is_no_paligemma(hf, tmp_path):
    _, folder = hf
    v = variant()
    with pytest.raises(StoreError, match="no PaliGemma checkpoint here"):
        read_paligemma(tmp_path / "nowhere", v)
    with pytest.raises(StoreError, match="no config.json"):
        read_paligemma(tmp_path, v)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma"}))
    with pytest.raises(StoreError, match="not a PaliGemma checkpoint"):
        read_paligemma(tmp_path, v)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(StoreError, match="no weights in this folder"):
        read_paligemma(tmp_path, v)
    (tmp_path / "bad.npz").write_bytes(b"PK not a zip")
    with pytest.raises(StoreError, match="file of arrays cannot be read"):
        read_paligemma(tmp_path / "bad.npz", v)
    np.savez(tmp_path / "pickle.npz", **{"params/img/head/bias": np.array([{}], object)})
    with pytest.raises(StoreError, match="not of plain numbers"):
        read_paligemma(tmp_path / "pickle.npz", v)
    odd = rewritten(folder, tmp_path / "odd", str, add={"language_model.model.odd.weight": np.zeros(2, np.float32)})
    with pytest.raises(StoreError, match=r"unknown      language_model.odd.weight \(2,\)"):
        read_paligemma(odd, v)


def test_incomplete_and_crafted_shards(hf, tmp_path):
    import shutil

    _, folder = hf
    for name in ("lost", "crafted", "wrong"):
        shutil.copytree(folder, tmp_path / name)
    next((tmp_path / "lost").glob("model-00002*")).unlink()
    with pytest.raises(StoreError, match="a shard is missing"):
        read_paligemma(tmp_path / "lost", variant())
    index = tmp_path / "crafted" / "model.safetensors.index.json"
    index.write_text(re.sub(r"model-00002", "../model-00002", index.read_text()))
    with pytest.raises(StoreError, match="outside its folder"):
        read_paligemma(tmp_path / "crafted", variant())
    index = tmp_path / "wrong" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("layers.1.mlp.up_proj", "layers.9.mlp.up_proj"))
    with pytest.raises(StoreError, match="disagree"):
        read_paligemma(tmp_path / "wrong", variant())


@pytest.mark.parametrize("init", ["paligemma", "paligemma:", "siglip:x", ""])
def test_an_unknown_source_says_what_there_is(init):
    with pytest.raises(SettingsError, match="paligemma:PATH"):
        starting_weights(variant(), init)


def test_the_verb_writes_a_model_directory_and_says_what_is_new(tmp_path, capsys):
    pytest.importorskip("torch")
    from vla.cli import main
    from vla.store import read_weights

    weights, _ = big_vision(tmp_path / "pt.npz")
    v = variant()
    v_dir, out = tmp_path / "variant", tmp_path / "model"
    v_dir.mkdir()
    (v_dir / "variant.toml").write_text(v.to_toml())
    words = ["build", "--base", str(v_dir / "variant.toml"), "--init", f"paligemma:{tmp_path / 'pt.npz'}"]
    assert main(words) == 2
    assert "add --out DIR" in capsys.readouterr().err
    assert main([*words, "--out", str(out), "--seed", "3"]) == 0
    assert "new        head.action_in_proj.weight" in capsys.readouterr().err
    want, _ = starting_weights(v, f"paligemma:{tmp_path / 'pt.npz'}", seed=3)
    read = read_weights(out / "model.safetensors")
    assert set(read) == set(want) and all(np.array_equal(read[n], w) for n, w in want.items())
    assert "head.action_in_proj.weight" in json.loads((out / "record.json").read_text())["weights"]["new"]
    assert main([*words, "--out", str(out)]) == 2  # the folder is taken
    assert main([*words[:-1], "paligemma:nowhere", "--out", str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists()
