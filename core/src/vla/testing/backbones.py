"""The conformance kit of backbones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vla import registry
from vla.compose import build
from vla.testing.closeness import close
from vla.testing.models import ModelChecks
from vla.testing.vision import merged, some_images


def embed_images(model: Any, images: Any) -> Any:
    """Camera -> tokens."""
    return model.backbone.embed_images(images)


def embed_text(model: Any, ids: Any) -> Any:
    """Token ids -> vectors."""
    return model.backbone.embed_text(ids)


class BackboneConformance(ModelChecks):
    """A backbone: it turns images and text into tokens of one width, and holds an LLM core as `llm`."""

    kind = "backbone"

    def pictures(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Two cameras with two images each."""
        images = some_images(self.variant.spec.image_size, 4, seed)
        return {"base_0_rgb": images[:2], "left_wrist_0_rgb": images[2:]}

    def run(self, framework: str, function: Any, *arrays: Any) -> Any:
        """A function of the module on arrays."""
        bench = self.bench(framework)
        return bench.model.call(bench.weights, function, *arrays)

    def test_it_has_the_slots_that_a_model_is_built_from(self) -> None:
        slots = {slot: kind for slot, (kind, _) in self.part.slots.items()}
        assert slots.get("vision") == "vision" and slots.get("llm") == "llm", slots

    def test_it_offers_what_its_llm_offers(self) -> None:
        """Heads ask the backbone: is there room for an expert, can it decode, can gradients be stopped?"""
        offers, llm = self.chosen.offers, self.chosen.inner["llm"].offers
        assert {facet: offers.get(facet) for facet in llm} == dict(llm)
        assert offers["images"] is True

    def test_it_holds_its_parts(self, framework: str) -> None:
        model = self.bench(framework).model
        backbone = model.model.backbone if framework == "torch" else merged(model).backbone
        assert backbone.llm is not None and backbone.vision is not None

    def test_every_camera_gives_tokens(self, framework: str) -> None:
        pictures = self.pictures()
        out = self.run(framework, embed_images, pictures)
        assert list(out) == list(pictures), "camera names and their order are kept"
        for name, tokens in out.items():
            assert tokens.shape[0] == 2 and tokens.shape[2] == self.chosen.offers["width"], f"{name}: {tokens.shape}"
            assert np.isfinite(tokens).all()

    def test_cameras_do_not_meet(self, framework: str) -> None:
        pictures = self.pictures()
        other = {**pictures, "base_0_rgb": -pictures["base_0_rgb"]}
        before, after = (self.run(framework, embed_images, p) for p in (pictures, other))
        close(after["left_wrist_0_rgb"], before["left_wrist_0_rgb"], 1e-5, "tokens of the other camera")
        assert not np.allclose(after["base_0_rgb"], before["base_0_rgb"])

    def test_the_order_of_cameras_changes_no_token(self, framework: str) -> None:
        pictures = self.pictures()
        turned = dict(reversed(pictures.items()))
        before, after = (self.run(framework, embed_images, p) for p in (pictures, turned))
        for name in pictures:
            close(after[name], before[name], 1e-5, f"tokens of {name}")

    def test_one_camera_is_enough(self, framework: str) -> None:
        pictures = self.pictures()
        alone = {"base_0_rgb": pictures["base_0_rgb"]}
        before, after = (self.run(framework, embed_images, p) for p in (pictures, alone))
        close(after["base_0_rgb"], before["base_0_rgb"], 1e-5, "tokens of the one camera")

    def test_no_camera_is_no_token(self, framework: str) -> None:
        assert self.run(framework, embed_images, {}) == {}

    def test_bytes_are_pixels(self, framework: str) -> None:
        """uint8 0 to 255 is -1 to 1, converted on the device."""
        rng = np.random.default_rng(3)
        size = self.variant.spec.image_size
        raw = {name: rng.integers(0, 256, (2, *size, 3), dtype=np.uint8) for name in self.pictures()}
        real = {name: (x.astype(np.float32) / 127.5 - 1).astype(np.float32) for name, x in raw.items()}
        before, after = (self.run(framework, embed_images, p) for p in (real, raw))
        for name in raw:
            close(after[name], before[name], 1e-4, f"tokens of {name} from bytes")

    def test_text_gives_tokens(self, framework: str) -> None:
        ids = np.array([[3, 4, 5, 3]], np.int32)
        out = self.run(framework, embed_text, ids)
        assert out.shape == (1, 4, self.chosen.offers["width"])
        assert np.array_equal(out[0, 0], out[0, 3]) and not np.allclose(out[0, 0], out[0, 1])

    def test_other_vision_encoders_fit(self) -> None:
        for item in registry.listed("vision"):
            try:
                item.load()
            except registry.PartError:
                continue
            variant = build(base=self.variant, set=[f"backbone.vision={item.dist}/{item.name}"])
            assert variant.at("backbone.vision").part.name == item.name

    def test_both_frameworks_give_the_same_tokens(self) -> None:
        torch, jax = (bench.model.call(bench.weights, embed_images, self.pictures()) for bench in self._both())
        for name, value in torch.items():
            close(jax[name], value, 2e-5, f"tokens of {name}")

    def test_pooled_encoders_fit(self, framework: str) -> None:
        """One token per image is as good as many."""
        pytest.importorskip({"torch": "torch", "jax": "jax"}[framework])
        part = self.chosen.inner["vision"].part
        if "pool" not in (f := {a: None for a in part.settings.__annotations__}) or part.name != "siglip":
            pytest.skip(f"the stand-in encoder {part.name!r} has no pooling: {list(f)}")
        from vla.testing.frameworks import open_model, start_weights

        variant = build(base=self.variant, set=["backbone.vision.pool=gap"])
        out = open_model(framework, variant).call(start_weights(variant), embed_images, self.pictures())
        assert all(tokens.shape[1] == 1 for tokens in out.values())
