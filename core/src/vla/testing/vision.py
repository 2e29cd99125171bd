"""The conformance kit of vision encoders."""

from __future__ import annotations

from typing import Any

import numpy as np

from vla.testing.closeness import close
from vla.testing.frameworks import open_model, start_weights
from vla.testing.models import ModelChecks
from vla.testing.partners import stand_in


def encode(model: Any, images: Any) -> Any:
    """The call of a vision encoder, the same in both frameworks."""
    return model.backbone.vision(images)


def some_images(size: tuple[int, int], count: int = 3, seed: int = 0) -> np.ndarray:
    """[n h w 3] float32 in [-1, 1]."""
    return np.random.default_rng(seed).uniform(-1, 1, (count, *size, 3)).astype(np.float32)


class VisionConformance(ModelChecks):
    """A vision encoder: images [n h w 3] in [-1, 1] to tokens [n P width], in every framework it declares."""

    kind = "vision"

    def tokens(self, framework: str, images: np.ndarray) -> np.ndarray:
        """What the encoder makes of images."""
        bench = self.bench(framework)
        return bench.model.call(bench.weights, encode, images)

    def images(self) -> np.ndarray:
        """Three images of the variant's size."""
        return some_images(self.variant.spec.image_size)

    def test_tokens_are_as_wide_as_offered(self, framework: str) -> None:
        out = self.tokens(framework, self.images())
        assert out.ndim == 3 and out.shape[0] == 3 and out.shape[2] == self.chosen.offers["width"], out.shape
        assert out.dtype == np.float32 and np.isfinite(out).all()
        if self.chosen.offers["pooled"]:
            assert out.shape[1] == 1, "pooled: one token per image"

    def test_the_module_knows_its_width(self, framework: str) -> None:
        model = self.bench(framework).model
        module = model.model.backbone.vision if framework == "torch" else merged(model).backbone.vision
        assert module.width == self.chosen.offers["width"], "a backbone reads `.width` for its projector"

    def test_encoding_is_a_function(self, framework: str) -> None:
        assert np.array_equal(self.tokens(framework, self.images()), self.tokens(framework, self.images()))

    def test_images_of_a_batch_do_not_meet(self, framework: str) -> None:
        images = self.images()
        other = images.copy()
        other[0] = -other[0]
        before, after = self.tokens(framework, images), self.tokens(framework, other)
        close(after[1:], before[1:], 1e-5, "tokens of the other images")
        assert not np.allclose(after[0], before[0])

    def test_every_part_of_an_image_counts(self, framework: str) -> None:
        images = self.images()
        before = self.tokens(framework, images)
        height, width = (side // 2 for side in self.variant.spec.image_size)
        for top in (0, height):
            for left in (0, width):
                other = images.copy()
                other[:, top : top + height, left : left + width] *= -1
                assert not np.allclose(self.tokens(framework, other), before), (
                    f"the quarter at {top}, {left} is not seen"
                )

    def test_colours_count(self, framework: str) -> None:
        images = self.images()
        assert not np.allclose(self.tokens(framework, images[..., ::-1].copy()), self.tokens(framework, images))

    def test_places_count(self, framework: str) -> None:
        """A mirrored image is another image: patches must know where they are."""
        images = self.images()
        flipped = self.tokens(framework, images[:, :, ::-1].copy())
        before = self.tokens(framework, images)
        assert not np.allclose(flipped.mean(1), before.mean(1), atol=1e-6)

    def test_black_and_white_images_are_fine(self, framework: str) -> None:
        for value in (-1.0, 0.0, 1.0):
            assert np.isfinite(self.tokens(framework, np.full_like(self.images(), value))).all()

    def test_images_need_not_be_square(self, framework: str) -> None:
        size = (32, 48)
        wide = (*self.settings, f"spec.image_size={list(size)}")
        variant = stand_in(self.kind, self.name, wide, self.partners)
        out = open_model(framework, variant).call(start_weights(variant), encode, some_images(size))
        assert out.shape[::2] == (3, self.chosen.offers["width"]) and np.isfinite(out).all()

    def test_both_frameworks_give_the_same_tokens(self) -> None:
        torch, jax = (bench.model.call(bench.weights, encode, self.images()) for bench in self._both())
        close(jax, torch, 2e-5, "image tokens")


def merged(model: Any) -> Any:
    """The abstract nnx module of a `JaxModel`: shapes and static values."""
    from vla.jax_kit.model import merge

    return merge(model._graph, model._shapes)
