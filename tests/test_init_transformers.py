"""`vla build --init transformers:PATH`: real checkpoint layouts (shards, bfloat16, tied or not, a whole VLM) fill parts `hf`."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import vla  # noqa: E402
from vla.interop.start import starting_weights  # noqa: E402
from vla.testing.parity import relative  # noqa: E402

TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300, "max_position_embeddings": 256,
}  # fmt: skip
EYES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def decoder(path, family="qwen3", dtype=torch.float32, shard="20KB", **more):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **TEXT, **more)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    model.save_pretrained(path, max_shard_size=shard)
    return model


def variant_for(path, **more):
    sets = {"backbone.llm": {"part": "hf", "model": str(path)}, "tokenizer.vocab_size": 300, **more}
    return vla.build(head="flow", tokenizer="hf", preset="tiny", set=sets)


def logits(variant, weights, ids):
    from vla.layout import BACKBONE
    from vla.torch_kit.model import build_model, load_weights

    model = build_model(variant).eval()
    load_weights(model, variant, weights)
    llm, t = model.backbone.llm, ids.shape[1]
    mask = torch.ones(1, t, t, dtype=torch.bool).tril()
    with torch.no_grad():
        hidden = llm({BACKBONE: llm.embed(ids)}, mask, torch.arange(t)[None])[0][BACKBONE]
        return (hidden @ llm.unembed().T).numpy()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_language_model_in_shards(tmp_path, tied, dtype):
    decoder(tmp_path, dtype=dtype, tie_word_embeddings=tied)
    assert (tmp_path / "model.safetensors.index.json").exists()
    variant = variant_for(tmp_path)
    weights, start = starting_weights(variant, f"transformers:{tmp_path}")
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 300, (1, 9)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        want = theirs(ids).logits.numpy()
    assert relative(logits(variant, weights, ids), want) < 1e-5
    assert not start.unused and all(not n.startswith("backbone.llm.layers.0.backbone") for n in start.new)
    assert any(n.startswith("backbone.vision") for n in start.new), "what is new is listed"


def test_new_rows_for_action_ids_are_the_mean_of_the_others(tmp_path):
    theirs = decoder(tmp_path, tie_word_embeddings=True)
    extra = {"backbone.llm": {"part": "hf", "model": str(tmp_path), "extra_ids": 20}, "tokenizer.extra_ids": 20}
    weights, _ = starting_weights(variant_for(tmp_path, **extra), f"transformers:{tmp_path}")
    table = weights["backbone.llm.embedder.weight"]
    assert table.shape == (320, 64)
    assert relative(table[300:], np.repeat(table[:300].mean(0, keepdims=True), 20, 0)) < 1e-5
    assert np.array_equal(table[:300], theirs.get_input_embeddings().weight.detach().numpy())


def test_a_whole_vision_language_model_fills_both(tmp_path):
    """PaliGemma of transformers: its encoder and its decoder, behind their prefixes; its projector is said to be left."""
    torch.manual_seed(0)
    config = transformers.PaliGemmaConfig(
        text_config={"model_type": "gemma", **TEXT}, vision_config={"model_type": "siglip_vision_model", **EYES},
        projection_dim=64, image_token_index=299,
    )  # fmt: skip
    model = transformers.PaliGemmaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    sets = {"backbone.vision": {"part": "hf", "model": str(tmp_path)}}
    variant = variant_for(tmp_path, **sets)
    weights, start = starting_weights(variant, f"transformers:{tmp_path}")
    assert any("multi_modal_projector" in line for line in start.unused)
    assert {n for n in start.new if n.startswith("backbone.vision")} == set()
    patch = weights["backbone.vision.encoder.embeddings.patch_embedding.weight"]
    assert np.array_equal(patch, model.state_dict()["model.vision_tower.vision_model.embeddings.patch_embedding.weight"].numpy()
                          if "model.vision_tower.vision_model.embeddings.patch_embedding.weight" in model.state_dict()
                          else model.state_dict()["model.vision_tower.embeddings.patch_embedding.weight"].numpy())  # fmt: skip


def test_another_models_weights_are_refused_by_name(tmp_path):
    decoder(tmp_path / "a")
    variant = variant_for(tmp_path / "a")
    decoder(tmp_path / "b", family="llama")
    with pytest.raises(vla.VlaError, match="no part of the backbone"):
        starting_weights(variant, f"transformers:{tmp_path / 'b'}")
    with pytest.raises(vla.VlaError, match="no model folder"):
        starting_weights(variant, f"transformers:{tmp_path / 'nowhere'}")


def test_pickles_are_not_read(tmp_path):
    decoder(tmp_path)
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "qwen3"
    with pytest.raises(vla.VlaError, match="safetensors"):
        starting_weights(variant_for(tmp_path), f"transformers:{tmp_path}")
