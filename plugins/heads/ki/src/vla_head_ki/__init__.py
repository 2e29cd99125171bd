"""Knowledge insulation: a token head trains the backbone, a chunk head trains an insulated expert; and pi05_ki."""

from vla.parts import ModelType, Part, equals, is_true
from vla_head_ki.config import Settings, layout

PART = Part(
    kind="head",
    name="ki",
    summary="knowledge insulation: action tokens train the backbone, chunks train an insulated expert",
    settings=Settings,
    slots={"tokens": ("head", "ar"), "actions": ("head", "flow")},
    offers=lambda s, inner: {
        "gives": "both",
        "own_expert": True,
        "state": inner["actions"].get("state", "none"),
        "chunking": inner["actions"].get("chunking", ()),
        "losses": {**inner["tokens"].get("losses", {}), **inner["actions"].get("losses", {})},
    },
    needs=(
        equals("tokens", "gives", "tokens", "this half trains the backbone on action tokens"),
        equals("actions", "gives", "chunk", "this half produces the chunk of actions"),
        is_true("actions", "own_expert", "only an expert of its own can be insulated from the backbone"),
        is_true("backbone", "insulates", "the action expert must not send gradients into the backbone"),
    ),
    layout=layout,
    experts=lambda s, inner: {**inner["tokens"], **inner["actions"]},
    torch="vla_head_ki.torch_impl:KIHead",
    jax="vla_head_ki.jax_impl:KIHead",
    draws="vla_head_ki.draws",
    contract=2,
)

PI05_KI = ModelType(
    name="pi05_ki",
    summary="pi0.5 with knowledge insulation: FAST tokens and flow matching in one pass",
    tree={
        "backbone": {"part": "paligemma"},
        "tokenizer": {"part": "fast"},
        "head": {"part": "ki"},
    },
    spec={"max_token_len": 300},
)
