"""Parallel decoding with L1 regression (OpenVLA-OFT)."""

from vla import Part, has
from vla_head_l1.config import PRESETS, Settings, layout


def _needs(settings: Settings):
    if settings.state == "tokens":
        return (has("tokenizer", "emits", "state", "state = tokens reads the robot's state from the prompt"),)
    return ()


PART = Part(
    kind="head",
    name="l1",
    summary="action queries in the backbone, L1 regression of the whole chunk in one pass (OpenVLA-OFT)",
    settings=Settings,
    presets=PRESETS,
    offers=lambda s, inner: {"gives": "chunk", "own_expert": False, "state": s.state, "losses": {"actions": "query"}},
    needs=_needs,
    layout=lambda s, inner: layout(s),
    experts=lambda s, inner: {},
    torch="vla_head_l1.torch_impl:L1Head",
    jax="vla_head_l1.jax_impl:L1Head",
    params="vla_head_l1.params",
    contract=2,
)
