"""Checks that every part must pass, whatever its kind: what it says of itself, and that asking is cheap."""

from __future__ import annotations

import ast
import functools
import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from vla import registry
from vla.compose import Variant, load_object, resolve, variant_from_toml
from vla.errors import PartError, SettingsError
from vla.parts import CONTRACTS, TESTS, TOP_SLOTS, Part
from vla.settings import describe, fields_of, structure, to_toml, type_faults
from vla.testing import plugin
from vla.testing.frameworks import NEEDS, installed
from vla.testing.partners import needs_everywhere, stand_in, variations
from vla.testing.plugin import EXCUSED

HEAVY = ("numpy", "torch", "jax", "flax", "transformers", "tensorflow")
# What every part of a kind must offer (docs/architecture.md, "Facets").
FACETS: dict[str, tuple[str, ...]] = {
    "vision": ("width", "pooled"),
    "llm": (
        "width", "depth", "num_heads", "num_kv_heads", "head_dim", "vocab_size",
        "multi_expert", "adarms", "insulates", "decodes", "prefix_cache",
    ),
    "tokenizer": ("emits", "vocab_size", "prompt"),
    "head": ("gives", "own_expert", "state", "losses"),
    "robot": ("state_dim", "action_dim", "cameras", "hz"),
    "dataset": ("robot",),
    "env": ("robot",),
    "protocol": ("speaks",),
}  # fmt: skip
FACETS["backbone"] = (*FACETS["llm"], "images")


class PartConformance:
    """What the kits of all kinds share. A third party's class sets `name`, and may set the rest.

    Attributes:
        name: the entry-point name (or `distribution/name`).
        settings: `path=value`, as for `vla build --set`: what to test instead of the defaults.
        partners: slot -> part to test it with (default: the first stand-ins that fit).
        excuse: {test name: reason}. The check is skipped, and the reason printed at the end of every run.
        old_settings: {version: settings as that version wrote them}, for parts with `settings_version` above 1.
    """

    is_conformance = True  # how the pytest plugin knows these classes
    kind = ""
    name = ""
    settings: tuple[str, ...] = ()
    partners: dict[str, str] = {}
    excuse: dict[str, str] = {}
    old_settings: dict[int, dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        for test, reason in cls.excuse.items():
            if not test.startswith("test_") or not hasattr(cls, test):
                close = [n for n in dir(cls) if n.startswith("test_")]
                raise TypeError(f"{cls.__name__}.excuse names {test!r}, which is no check of this kit: {close}")
            if len(str(reason).split()) < 2:
                raise TypeError(f"{cls.__name__}.excuse[{test!r}] needs a reason that a reader understands")

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Checks that take a `framework` run in each one that the part declares."""
        plugins = metafunc.config.pluginmanager
        if not plugins.is_registered(plugin):  # the kit is in use: its plugin was asked for
            plugins.register(plugin, plugin.__name__)
        if "framework" in metafunc.fixturenames:
            metafunc.parametrize(
                "framework",
                [
                    pytest.param(name, marks=() if installed(name) else pytest.mark.skip(f"{name} is not installed"))
                    for name in self.part.frameworks()
                ],
            )

    @pytest.fixture(autouse=True)
    def _declared_exceptions(self, request: Any) -> None:
        reason = self.excuse.get(getattr(request.node, "originalname", request.node.name))
        if reason:
            pytest.skip(EXCUSED + reason)

    # ---- what the checks are about ----------------------------------------------------------------------------------

    @property
    def listed(self) -> registry.Listed:
        """The entry point."""
        return registry.find(self.kind, self.name)

    @property
    def part(self) -> Part:
        """The part."""
        return self.listed.load()

    @property
    def variant(self) -> Variant:
        """The smallest variant that holds the part with the class's settings."""
        return _variant(type(self))

    @property
    def chosen(self) -> Any:
        """The part as it stands in the variant."""
        here = {"vision": "backbone.vision", "llm": "backbone.llm"}.get(self.kind, self.kind)
        return self.variant.at(here)

    # ---- what it says of itself -------------------------------------------------------------------------------------

    def test_is_found_by_its_name(self) -> None:
        part = self.part
        assert (part.kind, part.name) == (self.kind, self.name.rpartition("/")[2])
        assert part.summary and "\n" not in part.summary, "`vla list` shows the summary in one line"

    def test_contract_is_spoken(self) -> None:
        low, high = CONTRACTS[self.kind]
        assert low <= self.part.contract <= high, f"it speaks {self.part.contract}, this core {low} to {high}"

    def test_another_contract_is_refused_with_both_numbers(self) -> None:
        high = CONTRACTS[self.kind][1]
        faults = list(registry._faults(self.listed, attrs.evolve(self.part, contract=high + 1)))
        assert faults and str(high + 1) in faults[0] and str(high) in faults[0]

    def test_importing_it_is_light(self) -> None:
        """In a fresh interpreter: the part, its offers, needs and presets load no array library."""
        code = (
            "import sys\nfrom vla import compose, registry\n"
            f"item = registry.find({self.kind!r}, {self.name!r})\npart = item.load()\n"
            "part.needs_of(part.settings())\n"
            f"print(*[m for m in {HEAVY!r} if m in sys.modules])"
        )
        path = f"import sys; sys.path[:] = {sys.path!r}\n"
        done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert not done.stdout.split(), f"importing the part loads {done.stdout.strip()}; move it into a function"

    def test_keeps_the_walls(self) -> None:
        """torch_impl never imports JAX, jax_impl never imports PyTorch, and no file imports another plugin's code."""
        own = self.listed.value.partition(":")[0].partition(".")[0]
        others = {
            item.value.partition(":")[0].partition(".")[0]
            for kind in registry.ALL_GROUPS
            for item in registry.listed(kind)
        } - {own, "vla"}
        for file, module in _imports(own):
            root = module.partition(".")[0]
            assert not (file.name == "torch_impl.py" and root in ("jax", "jaxlib", "flax", "optax")), (
                f"{file}: {module}"
            )
            assert not (file.name == "jax_impl.py" and root == "torch"), f"{file}: {module}"
            private = root in others and module.split(".")[1:2] != ["config"]
            assert not private, f"{file} imports {module}: name the other part by a slot, or use its `config` alone"

    def test_code_is_where_it_says(self) -> None:
        part = self.part
        strings = [part.numpy, part.transforms, part.draws, part.params]
        strings += [getattr(part, f) for f in NEEDS if installed(f)]
        for where in filter(None, strings):
            load_object(where, f"{part.kind} {part.name!r}")

    def test_declares_a_framework(self) -> None:
        assert self.part.frameworks(), "say where the torch, jax or numpy code is"

    def test_offers_the_facets_of_its_kind(self) -> None:
        offers = self.chosen.offers
        missing = [facet for facet in FACETS[self.kind] if facet not in offers]
        assert not missing, f"does not offer {missing}"
        again = self.part.offers(self.chosen.settings, {s: c.offers for s, c in self.chosen.inner.items()})
        # Beside them stands what core reads off a head's layout.
        assert {**offers, **again} == dict(offers), "offers must depend on settings and inner parts alone"

    # ---- settings ---------------------------------------------------------------------------------------------------

    def test_settings_are_a_frozen_record_with_defaults(self) -> None:
        settings = self.part.settings()
        for name in fields_of(self.part.settings):
            with pytest.raises(attrs.exceptions.FrozenInstanceError):
                setattr(settings, name, None)
        assert hash(settings) == hash(self.part.settings()), "settings are compared and hashed by value"

    def test_settings_survive_a_file(self) -> None:
        cls = self.part.settings
        assert not (odd := list(type_faults(fields_of(cls)))), odd[0]
        for values in ({}, *self.part.presets.values()):
            settings = structure(cls, values, self.kind)
            text = to_toml({name: getattr(settings, name) for name in fields_of(cls)})
            assert structure(cls, tomllib.loads(text), self.kind) == settings

    def test_unknown_and_wrong_settings_are_refused_by_name(self) -> None:
        with pytest.raises(SettingsError, match="no_such_setting"):
            structure(self.part.settings, {"no_such_setting": 1}, self.kind)
        for name, field in fields_of(self.part.settings).items():
            with pytest.raises(SettingsError) as caught:
                structure(self.part.settings, {name: object()}, self.kind)
            assert caught.value.field.endswith(name), f"no type is checked for {name}: {describe(field.type)}"

    def test_settings_of_older_versions_can_be_read(self) -> None:
        part = self.part
        assert part.settings_version >= 1
        for version in range(1, part.settings_version):
            assert part.upgrade is not None, f"settings_version is {part.settings_version}, and there is no upgrade"
            structure(part.settings, part.upgrade(dict(self.old_settings.get(version, {})), version), self.kind)

    def test_presets_stand_for_settings(self) -> None:
        for preset in self.part.presets:
            table = {"part": self.name, "preset": preset}
            settings = resolve(self.kind, {**self._inner_names(), **table}).settings
            for key, value in self.part.presets[preset].items():
                want = tuple(value) if isinstance(value, list) else value
                assert getattr(settings, key) == want

    # ---- needs ------------------------------------------------------------------------------------------------------

    def test_every_need_has_a_reason(self) -> None:
        for need in needs_everywhere(self.chosen):
            assert len(need.why.split()) >= 3, f"{need}: the user is shown this reason: {need.why!r}"
            assert need.test in TESTS
            known = (*self.part.slots, *TOP_SLOTS, "self", "spec")
            assert need.slot in known, f"{need}: there is no such slot"

    def test_every_need_can_fail(self) -> None:
        """A need that nothing violates says nothing: `some facet` must be missing or too small somewhere."""
        for need in self._of_others():
            assert not need.met_by({}), f"{need} is met by a part that offers nothing"
            if need.test == ">=" and isinstance(need.value, (int, float)):
                assert not need.met_by({need.facet: need.value - 1})
                continue
            found = [name for name, offers in self._variations(need.slot) if not need.met_by(offers)]
            assert found, f"{need}: every installed part meets it"

    def test_every_need_can_be_met(self) -> None:
        for need in self._of_others():
            found = [name for name, offers in self._variations(need.slot) if need.met_by(offers)]
            assert found, f"{need}: no installed part offers that; is the facet spelled right?"

    def test_every_inner_slot_refuses_some_part(self) -> None:
        """Else the slot's default hides what the part relies on, and a user finds out in training."""
        kinds_with_choice = {
            slot: kind for slot, (kind, _) in self.part.slots.items() if len(list(registry.listed(kind))) > 1
        }
        for slot, kind in kinds_with_choice.items():
            needs = [need for need in needs_everywhere(self.chosen) if need.slot == slot]
            refused = [n for n, offers in variations(kind) if not all(need.met_by(offers) for need in needs)]
            ranged = any(need.test == ">=" for need in needs)
            assert refused or ranged, f"slot {slot!r} takes every installed {kind}: say what it needs, and why"

    # ---- in a variant -----------------------------------------------------------------------------------------------

    def test_a_variant_with_it_survives_its_file(self) -> None:
        text = self.variant.to_toml()
        again = variant_from_toml(text)
        assert again == self.variant and again.to_toml() == text
        assert self.listed.source in text, "the file says which distribution to install"

    def test_names_of_parts_are_all_that_a_file_can_say(self) -> None:
        """A file cannot name code: the strings of the part are not in it."""
        text = self.variant.to_toml()
        for where in filter(None, (self.part.torch, self.part.jax, self.part.numpy, self.part.draws)):
            assert where not in text

    def _of_others(self) -> list[Any]:
        """The needs that another part meets or not."""
        return [need for need in needs_everywhere(self.chosen) if need.slot not in ("self", "spec")]

    def _variations(self, slot: str) -> Iterator[tuple[str, Any]]:
        kind = self.part.slots[slot][0] if slot in self.part.slots else TOP_SLOTS[slot][0]
        return variations(kind)

    def _inner_names(self) -> dict[str, Any]:
        return {slot: chosen.table() for slot, chosen in self.chosen.inner.items()}


@functools.cache
def _variant(cls: type[PartConformance]) -> Variant:
    try:
        return stand_in(cls.kind, cls.name, cls.settings, cls.partners)
    except PartError as error:
        raise AssertionError(f"{cls.kind} {cls.name!r} fits none of the stand-in partners\n{error}") from error


def _imports(package: str) -> Iterator[tuple[Path, str]]:
    """(file, imported module) of every import in a package's sources."""
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for place in places for file in sorted(Path(place).rglob("*.py"))] or (
        [Path(spec.origin)] if spec and spec.origin else []
    )
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((file, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield from ((file, f"{node.module}.{alias.name}") for alias in node.names)
