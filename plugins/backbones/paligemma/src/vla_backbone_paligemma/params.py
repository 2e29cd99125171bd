"""Names of the projector, and where the parts of PaliGemma are in other layouts. Axes: d vision width, o LLM width."""

from __future__ import annotations

from collections.abc import Iterator

from vla.params import Row, Site, bind

ROWS = (
    Row("projector.weight", "projector/kernel", "o d -> d o"),
    Row("projector.bias", "projector/bias", "o"),
)
OPENPI = (
    Row("projector.weight", "PaliGemma/img/head/kernel", "o d -> d o"),
    Row("projector.bias", "PaliGemma/img/head/bias", "o"),
)
HF = (
    Row("projector.weight", "multi_modal_projector.linear.weight", "o d"),
    Row("projector.bias", "multi_modal_projector.linear.bias", "o"),
)
UNDER = {
    "openpi": {"vision": "PaliGemma/img/", "llm": "PaliGemma/llm/"},
    "hf": {"vision": "vision_tower.", "llm": ""},
}


def rows(site: Site) -> Iterator[Row]:
    """Our names and JAX paths."""
    yield from bind(ROWS, _sizes(site))


def openpi(site: Site) -> Iterator[Row]:
    """Openpi's tree; big_vision's with `params/` for `PaliGemma/`."""
    yield from bind(OPENPI, _sizes(site))


def hf(site: Site) -> Iterator[Row]:
    """Transformers' PaliGemmaForConditionalGeneration, in the style of `vla.interop.paligemma.standard_name`."""
    yield from bind(HF, _sizes(site))


def _sizes(site: Site) -> dict[str, int]:
    return {"d": site.inner["vision"].offers["width"], "o": site.inner["llm"].offers["width"]}
