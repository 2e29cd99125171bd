"""A second, independent reference: Hugging Face transformers at tiny random sizes, through `--init paligemma:PATH`."""

import numpy as np
import pytest
from attrs import evolve

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from vla.compose import build  # noqa: E402
from vla.contracts import Observation  # noqa: E402
from vla.interop.paligemma import read_paligemma  # noqa: E402
from vla.torch_kit.model import build_model, observation_to  # noqa: E402

BOUND = 1e-4
VISION = {"width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 2, "patch_size": 14}
TEXT = {"width": 64, "depth": 3, "mlp_dim": 128, "num_heads": 4, "num_kv_heads": 1, "head_dim": 16, "vocab_size": 512}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same random PaliGemma in both code bases; ours filled from the files transformers writes."""
    torch.manual_seed(0)
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64,
        "num_attention_heads": 2, "patch_size": 14, "image_size": 56, "projection_dim": 64,
    }  # fmt: skip
    text = {
        "model_type": "gemma", "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128, "vocab_size": 512,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16,
    }  # fmt: skip
    config = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=text, projection_dim=64, hidden_size=64, image_token_index=511
    )
    theirs = transformers.PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():  # nothing at zero or one, so that nothing hides
            p.add_(torch.randn_like(p) * 0.1)
    folder = tmp_path_factory.mktemp("paligemma")
    theirs.save_pretrained(folder, max_shard_size="100KB")
    sizes = [f"backbone.vision.{k}={v}" for k, v in VISION.items()] + [f"backbone.llm.{k}={v}" for k, v in TEXT.items()]
    spec = ("spec.image_size=[56,56]", 'spec.cameras=["base"]', "spec.max_token_len=64")
    tokenizer = ("tokenizer.text.vocab_size=512", "tokenizer.skip=0")
    variant = build(head="ar", tokenizer="binning", backbone="paligemma", set=(*sizes, *spec, *tokenizer))
    start = read_paligemma(folder, variant)
    assert start.new == ()
    ours = build_model(variant)
    ours.load_state_dict({name: torch.tensor(np.asarray(w)) for name, w in start.weights.items()})
    return theirs, ours


def worst(a, b):
    return float((a - b).abs().max() / b.abs().max())


def test_siglip(pair):
    theirs, ours = pair
    image = torch.rand(2, 3, 56, 56) * 2 - 1
    with torch.no_grad():
        want = theirs.model.vision_tower(pixel_values=image).last_hidden_state
        got = ours.backbone.vision(image.permute(0, 2, 3, 1))
    assert worst(got, want) <= BOUND


def test_gemma_causal(pair):
    """GemmaForCausalLM over the same text weights; every token of ours is a target, so attention is causal."""
    theirs, ours = pair
    plain = {**theirs.config.text_config.to_dict(), "use_bidirectional_attention": None}  # PaliGemma sets it
    gemma = transformers.GemmaForCausalLM(transformers.GemmaConfig(**plain)).eval()
    gemma.model.load_state_dict(theirs.model.language_model.state_dict())
    gemma.lm_head.weight = gemma.model.embed_tokens.weight  # Gemma's output table is its embedding
    ids = torch.randint(3, 500, (2, 11))
    with torch.no_grad():
        want = gemma(ids).logits
        run = ours.text(ids, torch.ones_like(ids).bool(), torch.ones_like(ids))
        entry = ours.head.enter(_observation(ids, 0), None, {})
        got = ours._fused([run], entry)["prompt"] @ ours.backbone.llm.unembed().T
    assert worst(got, want) <= BOUND


def test_paligemma_prefix_and_suffix(pair):
    """Image and prompt see each other, the suffix is causal; padding at the end of the second row."""
    theirs, ours = pair
    ids = torch.randint(3, 500, (2, 14))
    valid = torch.ones_like(ids).bool()
    valid[1, -3:] = False
    is_target = (torch.arange(14) >= 6).long().expand(2, -1)
    image = torch.rand(2, 3, 56, 56) * 2 - 1
    pictures = torch.full((2, 16), 511)
    with torch.no_grad():
        want = theirs(
            input_ids=torch.cat([pictures, ids], 1),
            pixel_values=image,
            attention_mask=torch.cat([torch.ones_like(pictures), valid.long()], 1),
            token_type_ids=torch.cat([torch.zeros_like(pictures), is_target], 1),
            labels=torch.cat([pictures, ids], 1),
        ).logits[:, 16:]
        obs = _observation(ids, is_target)
        obs = evolve(obs, images={"base": image.permute(0, 2, 3, 1)}, image_masks={"base": torch.ones(2).bool()})
        obs = evolve(obs, tokenized_prompt_mask=valid)
        hidden = ours._fused(ours.embed(obs), ours.head.enter(obs, None, {}))["prompt"]
        got = hidden @ ours.backbone.llm.unembed().T
    assert worst(got[valid], want[valid]) <= BOUND


def _observation(ids, is_target):
    ones = torch.ones_like(ids)
    return observation_to(
        Observation({}, {}, torch.zeros(2, 8), ids, ones.bool(), ones * is_target, (ones * is_target).bool()), "cpu"
    )
