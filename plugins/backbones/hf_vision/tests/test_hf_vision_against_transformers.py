"""Every family against transformers itself at tiny random sizes, with its own pixels, sizes and tokens."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from vla_vision_hf.config import CLIP, FAMILIES, TINY, Settings  # noqa: E402
from vla_vision_hf.torch_impl import HuggingFace, leading_tokens  # noqa: E402

import vla  # noqa: E402
from vla.testing.parity import relative  # noqa: E402

families = pytest.mark.parametrize("family", FAMILIES)


def pair(family, size=(32, 32), **more):
    torch.manual_seed(0)
    settings = Settings(**TINY[family], **more)
    ours = HuggingFace(settings, size).eval()
    values = settings.values
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    theirs = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    other = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, p in ours.encoder.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2)
            other[name].copy_(p)
    return ours, theirs


@families
@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
def test_the_last_hidden_state(family, size):
    """From bytes as a processor of transformers normalises them; another size resamples the positions."""
    ours, theirs = pair(family, size)
    pixels = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    mean, std = (np.asarray(x, np.float32) for x in FAMILIES[family])
    asked = {"interpolate_pos_encoding": True} if family in ("siglip_vision_model", "clip_vision_model", "vit") else {}
    normal = torch.from_numpy((pixels.astype(np.float32) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        got = ours(torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1))
        want = theirs(normal, **(asked if size != (32, 32) else {})).last_hidden_state
    assert got.shape == (2, size[0] // 8 * (size[1] // 8), 32)
    assert relative(got.numpy(), want[:, leading_tokens(theirs.config) :].numpy()) < 1e-5


def test_recomputing_changes_no_gradient():
    ours, _ = pair("siglip_vision_model")
    ours.train()
    found = []
    for on in (False, True):
        ours.checkpointing = on
        assert ours.checkpointing == on
        ours.zero_grad()
        ours(torch.linspace(-1, 1, 32 * 32 * 3).view(1, 32, 32, 3)).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in ours.named_parameters()})
    assert all(relative(found[1][n].numpy(), g.numpy()) < 1e-5 for n, g in found[0].items() if g.any())


def test_size_and_normalisation_are_facets(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"vision_config": json.loads(TINY["clip_vision_model"]["config"])})
    )
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]})
    )
    variant = vla.build(head="flow", preset="tiny", set={"backbone.vision": {"part": "hf", "model": str(tmp_path)}})
    offers = variant.at("backbone.vision").offers
    assert (
        offers["image_size"] == (32, 32)
        and offers["image_mean"] == (0.1, 0.2, 0.3)
        and offers["image_std"] == (1, 1, 1)
    )
    assert Settings(**TINY["clip_vision_model"]).normalisation[0] == CLIP[0]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_type": "mystery"}, "config.model_type"),
        ({"model_type": "x", "auto_map": {}}, "config.auto_map"),
        ({"patch_size": 0}, "config.patch_size"),
    ],
)
def test_a_configuration_that_is_no_encoder_is_refused_by_field(change, field):
    config = json.dumps(json.loads(TINY["vit"]["config"]) | change)
    with pytest.raises(vla.SettingsError, match=field.replace(".", "\\.")):
        Settings(config=config)


def test_siglip_has_no_class_token():
    with pytest.raises(vla.SettingsError, match="class token"):
        Settings(tokens="class")
