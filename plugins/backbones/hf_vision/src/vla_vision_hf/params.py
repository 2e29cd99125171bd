"""Names of the encoder's weights, asked of transformers without memory: ours are theirs below `encoder.`."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from vla.errors import PartError
from vla.params import Row, Site


def rows(site: Site) -> Iterator[Row]:
    """Our names and JAX-style paths (no JAX code exists)."""
    for name, shape in encoder_names(site.settings):
        yield _row(f"encoder.{name}", f"encoder/{name.replace('.', '/')}", shape)


def hf(site: Site) -> Iterator[Row]:
    """Our names and transformers' own."""
    for name, shape in encoder_names(site.settings):
        yield _row(f"encoder.{name}", name, shape)


def _row(ours: str, other: str, shape: tuple[int, ...]) -> Row:
    letters = "abcde"[: len(shape)]
    return Row(ours, other, " ".join(letters), dict(zip(letters, shape, strict=True)))


@functools.lru_cache(maxsize=32)
def encoder_names(settings: object) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(name, shape) of every weight, from a model on the meta device."""
    try:
        import torch

        from vla_vision_hf.torch_impl import make_encoder
    except ImportError as error:
        fix = "pip install 'vla-vision-hf[torch]'"
        raise PartError("what its weights are called is asked of transformers", got=str(error), fix=fix) from error

    with torch.device("meta"):
        model = make_encoder(settings)  # type: ignore[arg-type]
    return tuple((name, tuple(p.shape)) for name, p in model.named_parameters())
