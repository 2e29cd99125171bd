"""Every number that a variant file can say has a floor and a ceiling: of every setting of every installed part."""

import math
import typing

import pytest
from attrs import fields_dict

from vla import build, registry
from vla.contracts import Spec
from vla.errors import SettingsError, VlaError
from vla.parts import GROUPS
from vla.settings import Between, choices, fields_of, structure
from vla.training.config import config_from

TRIED = (0, -1, -(2**31), 2**31, 2**40, 2**63, 10**30, 1e300, -1e300, math.nan, math.inf)


def numbers(of: type) -> bool:
    """Whether a setting of this type holds whole numbers or floats."""
    inner = [t for t in typing.get_args(of) if t is not Ellipsis]
    return of in (int, float) or any(numbers(t) for t in inner)


# Numbers without bounds of their own, and what makes any of them harmless.
ALLOWED = {
    "dataset lerobot.episodes": "ranges of 18 digits at most, compared with the episodes that there are, never expanded",
    "dataset lerobot.exclude": "as episodes",
}
RECORDS = {"spec": Spec} | {
    f"{kind} {item.name}": item.load().settings for kind in GROUPS for item in registry.listed(kind)
}
FIELDS = [
    pytest.param(cls, field, id=f"{name}.{key}")
    for name, cls in RECORDS.items()
    for key, field in fields_of(cls).items()
    if numbers(field.type) and not choices(field) and f"{name}.{key}" not in ALLOWED
]


def test_there_are_numbers_to_look_at():
    assert len(FIELDS) > 60


@pytest.mark.parametrize(("cls", "field"), FIELDS)
def test_a_number_has_a_floor_and_a_ceiling(cls, field):
    bounds = field.validator
    assert isinstance(bounds, Between), f"{field.name}: write it with vla.settings.size or number"
    assert -1e9 <= bounds.low < bounds.high < 2**63
    path = f"here.{field.name}"
    for value in TRIED:
        for given in (value, [value], [value] * 2) if typing.get_origin(field.type) else (value,):
            try:
                structure(cls, {field.name: given}, "here")
            except SettingsError as error:
                assert field.name in error.field or error.field == path, error
                assert len(str(error)) < 1500
            else:
                assert isinstance(value, (int, float)) and bounds.low <= value <= bounds.high, value


@pytest.mark.parametrize("name", [name for name in RECORDS if name != "spec"])
def test_presets_and_defaults_lie_within(name):
    kind, part = name.split(" ")
    thing = next(i for i in registry.listed(kind) if i.name == part).load()
    for preset in ({}, *thing.presets.values()):
        structure(thing.settings, preset, "here")


# Published or larger than any published: what the ceilings must leave room for.
REAL = {
    "gemma 27b": {
        "llm": {"width": 5376, "depth": 62, "mlp_dim": 21504, "num_heads": 32, "num_kv_heads": 16, "head_dim": 128}
    },
    "llama 405b": {
        "llm": {"width": 16384, "depth": 126, "mlp_dim": 53248, "num_heads": 128, "num_kv_heads": 8, "head_dim": 128}
    },
    "SigLIP e/14": {"vision": {"preset": "e/14"}},
    "ViT-22B": {"vision": {"width": 6144, "depth": 48, "mlp_dim": 24576, "num_heads": 48}},
}


@pytest.mark.parametrize("name", REAL)
def test_full_sizes_and_larger_are_allowed(name):
    sets = {f"backbone.{slot}.{key}": value for slot, table in REAL[name].items() for key, value in table.items()}
    variant = build(type="pi05", set={**sets, "spec.image_size": (896, 896), "spec.action_horizon": 200})
    assert variant.spec.image_size == (896, 896)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"backbone.vision.num_heads": 7}, ("a multiple of 7", "every head", "--set backbone.vision.num_heads=6")),
        ({"backbone.vision": "vit", "backbone.vision.num_heads": 5}, ("a multiple of 5", "every head")),
        ({"backbone.vision.width": 98, "backbone.vision.num_heads": 7}, ("a multiple of 4", "sines and cosines")),
        ({"backbone.llm.num_kv_heads": 3}, ("a multiple of 3", "query heads", "--set backbone.llm.num_kv_heads=2")),
        ({"backbone.llm.head_dim": 33}, ("a multiple of 2", "rotary", "--set backbone.llm.head_dim=32")),
        ({"head.width": 33}, ("a multiple of 2", "time")),
        ({"spec.image_size": (8, 64)}, ("image_side >= 16", "patch", "--set spec.image_size='[16, 64]'")),
        ({"backbone.vision.pool": "first"}, ("backbone.vision.pool", "'gap'")),
        ({"head.min_period": 9.0}, ("head.min_period", "longest")),
        ({"head.time_offset": 0.5}, ("head.time_scale", "noise")),
        ({"spec.cameras": ("a/b",)}, ("spec.cameras", "without /")),
        ({"spec.cameras": ("\x1b[31m",)}, ("spec.cameras", "printable")),
        ({"spec.cameras": tuple(f"c{i}" for i in range(100_000))}, ("spec.cameras", "at most 64")),
    ],
)  # fmt: skip
def test_sizes_that_do_not_go_together_say_why(change, says):
    with pytest.raises(VlaError) as error:
        build(type="pi05", preset="tiny", set=change)
    for words in says:
        assert words in str(error.value)


def test_the_kit_shows_the_bounds():
    assert str(Between(1, 4096)) == "1 to 4,096"
    assert fields_dict(Spec)["state_dim"].validator.high >= 4096


@pytest.mark.parametrize("name", ["steps", "batch_size", "accumulate", "prefetch", "workers", "val_batches"])
def test_what_a_run_starts_and_allocates_is_bounded(name):
    for value in (10**12, 2**63, -1):
        with pytest.raises(SettingsError, match=f"train.{name}"):
            config_from({name: value})
    with pytest.raises(SettingsError, match=r"train\.lora\.rank"):
        config_from({"lora": {"rank": 10**9}})
