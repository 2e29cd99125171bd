"""What `vla train` and `vla build` were asked to start from, as words -> a path, a variant, or a model with changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attrs import frozen

from vla.compose import Variant, build, read_variant
from vla.datasets import open_dataset
from vla.errors import SettingsError
from vla.runs import find_model
from vla.training.for_data import fitted
from vla.training.recipes import read_recipe
from vla.training.start import Changed, is_trained


@frozen
class Asked:
    """What to train, as it was typed; see `vla train --help`."""

    model: str
    names: Mapping[str, str]  # head, tokenizer, backbone, robot -> part, "" where none is named
    type: str
    preset: str
    set: Mapping[str, Any]
    recipe: str
    reinit: tuple[str, ...]
    fit_data: bool

    def start(self, data: Any, note: Callable[[str], None] = print) -> tuple[Any, bool]:
        """What training starts from, and whether lengths that only data shows are to be measured on it.

        Raises:
            SettingsError: nothing is named, or things that exclude each other.
        """
        things = [self.model, self.type and f"--type {self.type}", self.recipe and f"--recipe {self.recipe}"]
        named = {slot: name for slot, name in self.names.items() if name}
        if not (any(things) or named) or (self.type and (self.model or self.recipe)):
            raise SettingsError(
                "name one thing to train: a model, parts (--head, ...), --type or --recipe",
                field="model",
                got=", ".join([*filter(None, things), *(f"--{k} {v}" for k, v in named.items())]) or "none of them",
                fix="vla train --head ki --preset tiny --data DATA, or --type pi05_ki",
            )
        fit = self.fit_data or not any(things)
        if self.model and not (fit or named or self.preset or self.set or self.recipe or self.reinit):
            return self.model, False
        variant, reinit = self.variant(named), self.reinit
        trained = bool(self.model) and is_trained(find_model(self.model))
        if fit:
            given = [*self.set, *named]
            variant, reinit = fitted(variant, open_dataset(data), given, reinit, trained, note)
        if trained:
            return Changed(self.model, variant, reinit), fit
        if reinit:
            fix = "leave out --reinit, or name a trained model"
            raise SettingsError("without a model all weights are new", field="--reinit", got=",".join(reinit), fix=fix)
        return variant, fit

    def variant(self, named: Mapping[str, str]) -> Variant:
        """The variant, before anything is known of data."""
        base, preset = read_variant(self.model) if self.model else None, self.preset or None
        if self.recipe:
            recipe = read_recipe(self.recipe)
            set = {**named, **self.set}  # parts that are named win over the recipe, as every option does
            return recipe.on(base, preset=preset, set=set) if base else recipe.build(preset=preset, set=set)  # type: ignore[no-any-return]
        return build(base=base, type=self.type or None, preset=preset, set=self.set, **named)
