"""Which of our parts combine: the whole matrix against a table in this file, and misfits whose advice is followed."""

import itertools

import pytest

import vla
from vla import registry
from vla.cli.fits import pairings
from vla.fitting import MisfitError

OURS = {
    "head": ("ar", "flow", "ki"),
    "tokenizer": ("binning", "fast", "fsq", "paligemma"),
    "backbone": ("paligemma", "paligemma+gemma_fast"),
}
# head -> tokenizer -> the backbones it fits, with the settings parts come with. A change here changes what users can build.
FITS = {
    "ar": {
        "binning": {"paligemma", "paligemma+gemma_fast"},
        "fast": {"paligemma", "paligemma+gemma_fast"},
        "fsq": {"paligemma", "paligemma+gemma_fast"},
        "paligemma": set(),
    },
    "flow": {name: {"paligemma"} for name in OURS["tokenizer"]},
    "ki": {"binning": {"paligemma"}, "fast": {"paligemma"}, "fsq": {"paligemma"}, "paligemma": set()},
}


def test_the_matrix_of_ours():
    got = {}
    for p in pairings():
        if p.head in OURS["head"] and p.tokenizer in OURS["tokenizer"] and p.backbone in OURS["backbone"]:
            cell = got.setdefault(p.head, {}).setdefault(p.tokenizer, set())
            if not p.reason:
                cell.add(p.backbone)
    assert got == FITS


def tree_with(path, value, arguments):
    """The arguments of `vla.build` with one more change, as a user would type it."""
    out = {**arguments, "set": dict(arguments.get("set", {}))}
    if path == "spec":
        out["set"] |= {f"spec.{key}": v for key, v in value.items()}
    elif "." in path:
        out["set"][path] = value
    else:
        out[path] = value
    return out


SETS = [
    {},
    {"backbone.llm": "gemma_fast"},
    {"head.tokens": "flow"},
    {"head.actions": "ar"},
    {"head.tokens": "ki"},
    {"backbone.llm": "gemma_fast", "backbone.vision": "vit"},
    {"spec.action_dim": 4},
    {"tokenizer.text.prompt": "pi0"},
    {"tokenizer.prompt": "pi0"},
]
WRONG = []
for head, tokenizer, more in itertools.product(OURS["head"], OURS["tokenizer"], SETS):
    if any(path.startswith("head.") for path in more) and head != "ki":
        continue
    if (
        "tokenizer.text.prompt" in more
        and tokenizer == "paligemma"
        or "tokenizer.prompt" in more
        and tokenizer != "paligemma"
    ):
        continue
    robot = "aloha" if "spec.action_dim" in more else "plain"
    WRONG.append({"head": head, "tokenizer": tokenizer, "robot": robot, "set": more})


def misfit(arguments):
    try:
        vla.build(**arguments)
    except MisfitError as error:
        return error
    return None


def test_at_least_thirty_of_these_do_not_fit():
    assert sum(misfit(arguments) is not None for arguments in WRONG) >= 30


@pytest.mark.parametrize(
    "arguments", WRONG, ids=lambda a: "-".join([a["head"], a["tokenizer"], *map(str, a["set"].values())])
)
def test_advice_is_true(arguments):
    error = misfit(arguments)
    if error is None:
        return
    text = str(error)
    for unmet in error.misfits:
        assert unmet.need.why in text and str(unmet.need) in text and unmet.path in text
    assert error.swaps or error.settings or error.pairs
    for changes in [*((c,) for c in (*error.swaps, *error.settings)), *error.pairs]:
        fixed = arguments
        for change in changes:
            fixed = tree_with(change.path, change.value, fixed)
            drop = f"{change.path}."
            fixed["set"] = {p: v for p, v in fixed["set"].items() if change.path == "spec" or not p.startswith(drop)}
        vla.build(**fixed)


@pytest.mark.parametrize("name", ["pi0", "pi05", "pi0_fast", "pi05_ki"])
@pytest.mark.parametrize("preset", [None, "tiny", "small"])
def test_model_types_build_at_every_size(name, preset):
    variant = vla.build(type=name, preset=preset)
    assert variant.name == name and variant.frameworks() == ("torch", "jax")
    assert vla.variant_from_toml(variant.to_toml()) == variant
    assert all(chosen.dist for _, chosen in variant.walk())


def test_every_inner_slot_of_ours_refuses_some_part():
    """`ki` must say that its token half needs a token head: a slot that takes anything was forgotten."""
    refused = 0
    for slot, wrong in (("tokens", "flow"), ("actions", "ar")):
        assert registry.find("head", wrong)
        error = misfit({"head": "ki", "tokenizer": "fast", "set": {f"head.{slot}": wrong}})
        assert error is not None and error.misfits[0].at == f"head.{slot}"
        refused += 1
    assert refused == 2
