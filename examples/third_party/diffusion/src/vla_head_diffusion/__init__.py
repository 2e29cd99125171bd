"""Diffusion over action chunks, on an action expert."""

from vla import Part, has, is_true
from vla_head_diffusion.config import PRESETS, Options, Settings, experts, layout


def _needs(settings: Settings):
    needs = [
        is_true("backbone", "multi_expert", "the action expert runs beside the backbone in the same attention"),
        is_true("backbone", "adarms", "the step of the diffusion modulates the norms of the action expert"),
    ]
    if settings.state == "tokens":
        needs.append(has("tokenizer", "emits", "state", "state = tokens reads the robot's state from the prompt"))
    return tuple(needs)


PART = Part(
    kind="head",
    name="diffusion",
    summary="noise prediction on an action expert, squared-cosine schedule, DDIM sampling",
    settings=Settings,
    sampling=Options,
    presets=PRESETS,
    offers=lambda s, inner: {
        "gives": "chunk",
        "own_expert": True,
        "state": s.state,
        "losses": {"actions": "action"},
        "chunking": ("guided", "inpaint"),
    },
    needs=_needs,
    layout=lambda s, inner: layout(),
    experts=lambda s, inner: experts(s),
    torch="vla_head_diffusion.torch_impl:DiffusionHead",
    jax="vla_head_diffusion.jax_impl:DiffusionHead",
    draws="vla_head_diffusion.draws",
    params="vla_head_diffusion.params",
    contract=2,
)
