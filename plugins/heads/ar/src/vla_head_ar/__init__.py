"""Autoregressive action-token head, and the model type pi0_fast."""

from vla.parts import ModelType, Part, has, is_true
from vla_head_ar.config import LAYOUT, Settings

PART = Part(
    kind="head",
    name="ar",
    summary="predicts action tokens one by one (pi0-FAST, RT-2, OpenVLA)",
    settings=Settings,
    offers=lambda s, inner: {
        "gives": "tokens",
        "own_expert": False,
        "state": "tokens",
        "losses": {"tokens": "target"},
        "chunking": ("forced",),
    },
    needs=(
        has("tokenizer", "emits", "actions", "it predicts action tokens"),
        is_true("backbone", "decodes", "it reads and writes the backbone's text vocabulary"),
    ),
    layout=lambda s, inner: LAYOUT,
    experts=lambda s, inner: {},
    torch="vla_head_ar.torch_impl:ARHead",
    jax="vla_head_ar.jax_impl:ARHead",
    draws="vla_head_ar.draws",
    contract=2,
)

PI0_FAST = ModelType(
    name="pi0_fast",
    summary="FAST action tokens, one by one (openpi Pi0FAST, LeRobot PI0FASTPolicy)",
    tree={
        "backbone": {"part": "paligemma", "llm": {"part": "gemma_fast"}},
        "tokenizer": {"part": "fast"},
        "head": {"part": "ar"},
    },
    spec={"action_horizon": 32, "max_token_len": 250},
)
