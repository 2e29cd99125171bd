"""Recipes: known configurations as readable TOML, naming parts, shapes and the training plan.

    vla_recipe = 1
    summary = "pi0.5 with knowledge insulation on DROID"
    type = "pi05_ki"                 # or tables [backbone], [head], ... as in a variant file
    robot = "droid"
    dataset = "..."                  # what data it is for, in words
    [spec]                           # on top of the model type's
    action_horizon = 16
    [set]                            # any other setting of the variant, by path
    "head.actions.num_steps" = 10
    [train]                          # vla.training.config.TrainConfig
    batch_size = 256

A recipe names no path and no weights: those are this machine's (`--data`, or a model directory to start from).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from attrs import asdict, frozen

from vla.errors import SettingsError
from vla.reading import MOST_TOML, parse_toml, read_text
from vla.training.config import TrainConfig, config_from

KEYS = ("vla_recipe", "summary", "type", "robot", "dataset", "spec", "set", "train")


@frozen
class Recipe:
    """A recipe, read and checked; the variant is composed on demand."""

    name: str
    summary: str
    type: str
    robot: str
    spec: Mapping[str, Any]
    sets: Mapping[str, Any]
    config: TrainConfig

    def build(self, *, preset: str | None = None, set: Mapping[str, Any] | Iterable[str] = ()) -> Any:
        """The variant.

        A preset replaces the shapes of the recipe by its own, but never by narrower ones than the robot has; `set` wins
        over both.
        """
        from vla.compose import SPEC_PRESETS, build, resolve
        from vla.settings import parse_sets

        sets = dict(self.sets)
        if preset is None:
            sets = {**{f"spec.{k}": v for k, v in self.spec.items()}, **sets}
        else:
            offers, shapes = resolve("robot", self.robot, "robot").offers, SPEC_PRESETS.get(preset, {})
            for key in ("state_dim", "action_dim"):
                if (offers.get(key) or 0) > shapes.get(key, 0):
                    sets[f"spec.{key}"] = offers[key]
        return build(type=self.type, robot=self.robot, preset=preset, set={**sets, **parse_sets(set)}, name=self.name)

    def on(self, base: Any, *, preset: str | None = None, set: Mapping[str, Any] | Iterable[str] = ()) -> Any:
        """An existing variant with what the recipe says of robot, shapes and settings; its parts stay as they are.

        Raises:
            SettingsError: the variant is of another type than the recipe is for.
        """
        from vla.compose import build
        from vla.settings import parse_sets

        sets = {**{f"spec.{k}": v for k, v in self.spec.items()}, **self.sets}
        known = build(type=self.type, robot=self.robot, set=sets)
        for path, chosen in known.walk():
            if path.partition(".")[0] not in ("head", "tokenizer"):
                continue
            mine = dict(base.walk()).get(path)
            if mine is None or mine.part.name != chosen.part.name:
                raise self._other_type(path, mine and mine.part.name, chosen.part.name)
        robot = self.robot if self.robot != base.parts["robot"].part.name else None
        out = build(base=base, robot=robot, preset=preset, set={**sets, **parse_sets(set)}, name=base.name)
        for path, chosen in known.head.walk("head"):
            # Words say what kind of head it is, numbers how large.
            for key, value in asdict(chosen.settings).items():
                got = getattr(out.at(path).settings, key)
                if isinstance(value, str) and got != value and f"{path}.{key}" not in parse_sets(set):
                    raise self._other_type(f"{path}.{key}", got, value)
        return out

    def _other_type(self, path: str, got: Any, expected: Any) -> SettingsError:
        return SettingsError(
            f"the recipe {self.name} is for {self.type}, and the model is another", field=path, got=got,
            expected=expected, fix="take a recipe for its type, or give the settings themselves: --set, --lr, ...",
        )  # fmt: skip


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(
        f.name.removesuffix(".toml") for f in resources.files("vla.recipes").iterdir() if f.name.endswith(".toml")
    )


def read_recipe(name: str | Path) -> Recipe:
    """A recipe by name, or from a file.

    Raises:
        SettingsError: no such recipe, or an unknown or wrong entry.
    """
    known = recipe_names()
    if str(name) in known:
        label, text = str(name), (resources.files("vla.recipes") / f"{name}.toml").read_text(encoding="utf-8")
    elif os.path.exists(file := os.path.expanduser(name)):
        label, text = Path(name).stem, read_text(file, MOST_TOML, SettingsError)
    else:
        raise SettingsError("no such recipe", field="--recipe", got=str(name), expected=", ".join(known))
    table = parse_toml(text, name, "the recipe is not TOML", error=SettingsError)
    if table.get("vla_recipe") != 1:
        raise SettingsError(
            "not a recipe of this version", field=f"{name}: vla_recipe", got=table.get("vla_recipe"), expected=1
        )
    if unknown := [key for key in table if key not in KEYS]:
        raise SettingsError("unknown entry in a recipe", field=f"{name}: {unknown[0]}", expected=", ".join(KEYS))
    if "type" not in table:
        raise SettingsError("a recipe names a model type", field=f"{name}: type", fix='for instance type = "pi05_ki"')
    kinds = {"summary": str, "type": str, "robot": str, "spec": dict, "set": dict, "train": dict}
    for key, kind in kinds.items():
        if key in table and not isinstance(table[key], kind):
            expected = "a table" if kind is dict else "text"
            raise SettingsError(
                "wrong entry in a recipe", field=f"{name}: {key}", got=repr(table[key])[:80], expected=expected
            )
    config = config_from(table.get("train", {}))
    robot, spec, sets = table.get("robot", "plain"), table.get("spec", {}), table.get("set", {})
    return Recipe(label, table.get("summary", ""), table["type"], robot, spec, sets, config)
