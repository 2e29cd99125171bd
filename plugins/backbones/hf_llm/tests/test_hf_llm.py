"""The decoder among other parts: what fits, what is refused, and that every kind of head trains and samples on it."""

import json

import numpy as np
import pytest
from attrs import evolve
from vla_llm_hf.config import FAMILIES, TINY

import vla
from vla.fitting import MisfitError
from vla.layout import Layout

FOUR = ("llama", "qwen3", "gemma3_text", "smollm3")


def small(family, head="ki", tokenizer="binning", **more):
    sets = {"backbone.llm": "hf", "backbone.llm.preset": f"tiny_{family}", "spec.action_horizon": 4, **more}
    return vla.build(head=head, tokenizer=tokenizer, preset="tiny", set=sets)


def test_a_head_whose_layout_lets_the_backbone_see_an_expert_is_refused():
    head = vla.build(head="flow", preset="tiny").head.part
    table = Layout.parse("image backbone image prompt action\nprompt backbone image prompt\naction action image action")
    with pytest.raises(MisfitError, match="backbone_sees_experts.*before the experts"):
        vla.build(head=evolve(head, layout=lambda s, i: table), preset="tiny", set={"backbone.llm": "hf"})


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"model_type": "mamba"}, "config.model_type"),
        ({"model_type": "mystery", "auto_map": {"AutoModel": "x.py"}}, "config.auto_map"),
        ({"model_type": "llama"}, "config.hidden_size"),
        ({**json.loads(TINY["llama"]["config"]), "num_hidden_layers": 0}, "config.num_hidden_layers"),
        ({**json.loads(TINY["llama"]["config"]), "vocab_size": 10**12}, "config.vocab_size"),
    ],
)
def test_a_configuration_that_is_no_decoder_is_refused_by_field(tmp_path, config, field):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(vla.VlaError) as caught:
        vla.build(head="flow", set={"backbone.llm": "hf", "backbone.llm.model": str(tmp_path)})
    assert field in str(caught.value) and "Traceback" not in str(caught.value)
    if field == "config.model_type":
        assert all(family in str(caught.value) for family in FAMILIES)


def test_sizes_and_facets_come_from_config_json_alone(tmp_path):
    """Of a whole vision-language model its text part; the file is not needed again."""
    text = json.loads(TINY["qwen3"]["config"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "some_vlm", "text_config": text}))
    variant = vla.build(head="flow", preset="tiny", set={"backbone.llm": {"part": "hf", "model": str(tmp_path)}})
    (tmp_path / "config.json").unlink()
    again = vla.compose.variant_from_toml(variant.to_toml())
    assert again.backbone.offers["width"] == 64 and again.backbone.offers["depth"] == 3
    assert again.to_toml() == variant.to_toml()


def test_a_capped_output_is_not_decoded_in_silence():
    config = json.loads(TINY["gemma2"]["config"]) | {"final_logit_softcapping": 30.0}
    with pytest.raises(MisfitError, match="decodes"):
        vla.build(
            head="ar",
            tokenizer="binning",
            preset="tiny",
            set={"backbone.llm": {"part": "hf", "config": json.dumps(config)}},
        )


@pytest.mark.parametrize("family", FOUR)
@pytest.mark.parametrize("head", ["ki", "ar", "flow"])
def test_every_kind_of_head_learns_and_samples(family, head):
    """Loss and gradients are finite; the action loss of `ki` leaves the decoder alone, exactly, that of `flow` does not."""
    pytest.importorskip("torch")
    from vla.testing.batches import random_batch
    from vla.testing.frameworks import open_model, start_weights

    variant = small(family, head, "paligemma" if head == "flow" else "binning")
    model, weights = open_model("torch", variant), start_weights(variant)
    batch = random_batch(variant, 2)
    for loss in variant.head.offers["losses"]:
        values, gradients = model.gradients(weights, *batch[:3], loss)
        assert np.isfinite(values[loss]).all()
        reached = [n for n, g in gradients.items() if ".backbone.self_attn" in n and (g != 0).any()]
        insulated = head == "ki" and loss == "actions"
        assert bool(reached) != insulated, (loss, reached[:2])


def test_lora_reaches_the_decoder():
    from vla.training.config import config_from
    from vla.training.lora import adapters_of

    found = adapters_of(small("llama"), config_from({"lora": {"rank": 2}}))
    names = {name for a in found for name in a.modules()}
    assert any("self_attn.q_proj" in n for n in names) and any(".action.q" in n for n in names)


@pytest.mark.parametrize(("name", "millions"), [("smollm2_360m", 361.8), ("qwen3_0.6b", 596.0), ("gemma3_270m", 268.1)])
def test_published_sizes(name, millions):
    """Parameter counts of the published models, from the names alone."""
    pytest.importorskip("torch")
    from vla_llm_hf.config import PUBLISHED, Settings
    from vla_llm_hf.params import decoder_names

    count = sum(int(np.prod(shape)) for _, _, shape in decoder_names(Settings(**PUBLISHED[name])))
    assert abs(count / 1e6 - millions) < 0.1
