"""Flow-matching action head, and the model types pi0 and pi05."""

from vla.parts import ModelType, Part
from vla_head_flow.config import PRESETS, Settings, experts, layout, needs

PART = Part(
    kind="head",
    name="flow",
    summary="flow matching with an action expert (pi0, pi0.5)",
    settings=Settings,
    presets=PRESETS,
    offers=lambda s, inner: {
        "gives": "chunk",
        "own_expert": True,
        "state": s.state,
        "losses": {"actions": "action"},
        "chunking": ("guided", "trained", "inpaint"),
    },
    needs=needs,
    layout=lambda s, inner: layout(s),
    experts=lambda s, inner: experts(s),
    torch="vla_head_flow.torch_impl:FlowHead",
    jax="vla_head_flow.jax_impl:FlowHead",
    draws="vla_head_flow.draws",
    params="vla_head_flow.params",
    contract=2,
)

PI0 = ModelType(
    name="pi0",
    summary="flow matching, time by concat, continuous state (openpi Pi0, pi05=False)",
    tree={
        "backbone": {"part": "paligemma"},
        "tokenizer": {"part": "paligemma", "prompt": "pi0"},
        "head": {"part": "flow", "time": "concat", "state": "continuous"},
    },
    spec={"max_token_len": 48, "norm": "zscore"},
)
PI05 = ModelType(
    name="pi05",
    summary="flow matching, time by adaRMS, state in the prompt (openpi Pi0, pi05=True)",
    tree={
        "backbone": {"part": "paligemma"},
        "tokenizer": {"part": "paligemma", "prompt": "pi05"},
        "head": {"part": "flow"},
    },
)
