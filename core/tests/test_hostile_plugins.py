"""A plugin that does what no plugin should costs nobody but itself: in list, fits, doctor and build."""

from pathlib import Path
from typing import Literal

import attrs
import pytest

from vla import compose, registry
from vla.cli import main
from vla.errors import PartError, SettingsError, VlaError
from vla.fitting import MisfitError
from vla.settings import fields_of, to_toml, type_faults

TOYS = {"backbone": "toybone", "tokenizer": "toycodec", "head": "toyboth"}
HEAD = "from attrs import frozen, field\nfrom vla.parts import *\nfrom vla.parts import Need\n"


def part(**more):
    """Source of a head with these attributes, as text."""
    extra = ", ".join(f"{key}={value}" for key, value in more.items())
    return f"{HEAD}PART = Part('head', 'bad', 'bad', contract=CONTRACTS['head'][1]{', ' if extra else ''}{extra})\n"


SOURCES = {
    "leaves": "raise SystemExit(0)",
    "interrupts": "raise KeyboardInterrupt",
    "exits with text": "raise SystemExit('goodbye')",
    "raises a base": "class E(BaseException): pass\nraise E('\\x1b[31mred')",
    "raises generator exit": "raise GeneratorExit",
    "overflows the stack": "def f(): f()\nf()",
    "fills the memory": "raise MemoryError",
    "syntax": "def (",
    "prints": "print('x' * 100)\nPART = 3",
    "contains itself": part(slots="{'inner': ('head', 'bad')}"),
    "contains itself twice": part(slots="{'a': ('head', 'bad'), 'b': ('head', 'bad')}"),
    "slots are a list": part(slots="['inner']"),
    "slots of another kind": part(slots="{'inner': ('wheel', 'x')}"),
    "presets are a list": part(presets="[1]"),
    "presets of numbers": part(presets="{'tiny': 3}"),
    "offers a number": part(offers="lambda s, i: 3"),
    "offers nothing": part(offers="lambda s, i: None"),
    "offers leave": part(offers="lambda s, i: (_ for _ in ()).throw(SystemExit(1))"),
    "offers interrupt": part(offers="lambda s, i: (_ for _ in ()).throw(KeyboardInterrupt())"),
    "needs are texts": part(needs="('gpu',)"),
    "needs are a number": part(needs="3"),
    "needs are nothing": part(needs="lambda s: None"),
    "a need of another type": part(needs="(at_least('backbone', 'width', 'wide', 'it is so wide'),)"),
    "a need of no slot": part(needs="(at_least('wheels', 'width', 3, 'it is so wide'),)"),
    "a need with another test": part(needs="(Need('backbone', 'width', '~', 3, 'it is so wide'),)"),
    "a need that raises": part(needs="lambda s: 1 / 0"),
    "a layout of text": part(layout="lambda s, i: 'all see all'"),
    "settings are a dict": part(settings="dict"),
    "settings without defaults": f"{HEAD}@frozen\nclass S:\n    a: int\n" + part(settings="S").removeprefix(HEAD),
    "settings of code": f"{HEAD}@frozen\nclass S:\n    a: type = int\n" + part(settings="S").removeprefix(HEAD),
    "settings of nothing": f"{HEAD}@frozen\nclass S:\n    a: 'Nowhere' = 1\n" + part(settings="S").removeprefix(HEAD),
    "a setting named part": f"{HEAD}@frozen\nclass S:\n    part: int = 1\n" + part(settings="S").removeprefix(HEAD),
    "a contract of text": part().replace("CONTRACTS['head'][1]", "'new'"),
    "a name of its own": part().replace("'bad', 'bad'", "'other', 'bad'"),
    "a summary with colours": part().replace("'bad', 'bad'", "'bad', '\\x1b[31mred'"),
}


@pytest.mark.parametrize("what", SOURCES)
def test_only_that_plugin_suffers(world, what, capsys):
    world.add("acme-bad", {"vla.heads": {"bad": "acme_bad:PART"}}, {"acme_bad": SOURCES[what]})
    assert compose.build(**TOYS).name == "toybone-toycodec-toyboth"
    assert main(["list", "head"]) == 0
    out = capsys.readouterr().out
    assert "toyboth" in out and "bad" in out and "\x1b" not in out
    assert main(["fits", "--tokenizer", "toycodec"]) == 0
    assert "fits" in capsys.readouterr().out
    with pytest.raises(MisfitError) as misfit:  # suggestions look at every head, the bad one too
        compose.build(backbone="toybone", tokenizer="toytext", head="toyboth")
    assert misfit.value.swaps
    main(["doctor", "--light"])
    out = capsys.readouterr().out
    assert "head toyboth" not in out
    try:  # itself: used, or refused in one error that names it
        compose.build(**{**TOYS, "head": "bad"})
    except VlaError as error:
        assert "bad" in str(error)
        assert "\x1b" not in str(error)


@pytest.mark.parametrize("what", ["leaves", "interrupts", "contains itself", "needs are texts", "offers a number"])
def test_the_doctor_names_it(world, what, capsys):
    world.add("acme-bad", {"vla.heads": {"bad": "acme_bad:PART"}}, {"acme_bad": SOURCES[what]})
    assert main(["doctor", "--light", "bad"]) == 1
    assert "head bad (acme-bad 1.0)" in capsys.readouterr().out


def test_ctrl_c_while_a_plugin_is_imported_is_heard(world):
    import signal

    world.add("acme-slow", {"vla.heads": {"slow": "acme_slow:PART"}}, {
        "acme_slow": "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)"
    })  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        registry.find("head", "slow").load()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_broken_plugin_is_imported_once(world):
    source = "import builtins\nbuiltins.acme_count = getattr(builtins, 'acme_count', 0) + 1\nraise SystemExit"
    world.add("acme-bad", {"vla.heads": {"bad": "acme_bad:PART"}}, {"acme_bad": source})
    import builtins

    for _ in range(5):
        with pytest.raises(PartError, match="SystemExit"):
            registry.find("head", "bad").load()
    assert builtins.acme_count == 1


def test_our_names_stay_ours(world, capsys):
    module = "from vla.parts import *\nPART = Part('robot', 'plain', 'mine', contract=CONTRACTS['robot'][1])\n"
    world.add("acme-robots", {"vla.robots": {"plain": "acme_robots:PART"}}, {"acme_robots": module})
    assert registry.find("robot", "plain").dist == "vla-core"
    assert registry.find("robot", "acme-robots/plain").dist == "acme-robots"
    ours = [i for i in registry.listed("head") if registry.is_ours(i)]
    for item in ours[:1]:
        source = f"from vla.parts import *\nPART = Part('head', {item.name!r}, 'mine')\n"
        world.add("acme-heads", {"vla.heads": {item.name: "acme_heads:PART"}}, {"acme_heads": source})
        assert registry.find("head", item.name).dist == item.dist
    assert main(["list", "robot"]) == 0
    assert "acme-robots/plain" in capsys.readouterr().out


def test_sixty_more_packages_and_a_misfit(world):
    """The search for suggestions is bounded by the number of tries (timed: benchmarks/results/hostile.md)."""
    from vla import fitting

    for number in range(60):
        name = f"more{number}"
        source = f"{HEAD}PART = Part('head', '{name}', 'm', contract=CONTRACTS['head'][1], slots={{'a': ('head', 'toyboth')}})\n"
        world.add(f"acme-{name}", {"vla.heads": {name: f"acme_{name}:PART"}}, {f"acme_{name}": source}, refresh=False)
    registry.refresh()
    calls = []
    real = fitting._fits
    fitting._fits = lambda tree, spec: calls.append(1) or real(tree, spec)
    try:
        with pytest.raises(MisfitError):
            compose.build(backbone="toybone", tokenizer="toytext", head="toyboth")
    finally:
        fitting._fits = real
    assert len(calls) < 4 * fitting.MOST_TRIES


RICH = """
import enum
from pathlib import Path
from typing import Optional
from attrs import field, frozen, validators
from vla.parts import *

class Colour(enum.Enum):
    RED, BLUE = "red", "blue"

@frozen
class Rich:
    few: list[int] = field(factory=lambda: [1, 2], validator=validators.deep_iterable(validators.ge(0)))
    table: dict[str, float] = field(factory=lambda: {"a": 1.0})
    maybe: Optional[int] = field(default=None, validator=validators.optional(validators.in_((1, 2))))
    colour: Colour = Colour.RED
    place: Path = Path("/tmp/x")
    name: str = field(default="x", validator=validators.matches_re("[a-z]+"))

PART = Part("robot", "rich", "rich", contract=CONTRACTS["robot"][1], settings=Rich)
"""


def test_settings_of_every_plain_type(world):
    world.add("acme-rich", {"vla.robots": {"rich": "acme_rich:PART"}}, {"acme_rich": RICH})
    variant = compose.build(**TOYS, robot="rich", set=["robot.few=[3, 4]", "robot.table={b = 2}", "robot.colour=blue", "robot.place=/a/b", "robot.maybe=2"])  # fmt: skip
    s = variant.robot.settings
    assert (s.few, s.table, s.colour.value, s.place, s.maybe) == ([3, 4], {"b": 2.0}, "blue", Path("/a/b"), 2)
    again = compose.variant_from_toml(variant.to_toml())
    assert again.robot.settings == s and again.to_toml() == variant.to_toml()
    assert compose.build(base=variant) == variant
    for wrong in (
        "few=3",
        "few=[-1]",
        'few=["x"]',
        "table=[1]",
        'table={a = "x"}',
        "colour=green",
        "place=3",
        "maybe=7",
        "name=7",
        "name=X1",
    ):
        with pytest.raises(SettingsError, match=f"robot.{wrong.partition('=')[0]}"):
            compose.build(**TOYS, robot="rich", set=[f"robot.{wrong}"])


def test_types_that_no_file_can_hold_are_found_by_the_kit():
    for kind in (complex, set[int], bytes, object, frozenset, dict[str, object]):
        cls = attrs.make_class("S", {"f": attrs.field(default=None, type=kind)}, frozen=True)
        assert "no file can hold" in "".join(type_faults(fields_of(cls)))
    for kind in (int, str | None, list[int], dict[str, float], tuple[str, ...], Path, Literal["a"]):
        cls = attrs.make_class("S", {"f": attrs.field(default=None, type=kind)}, frozen=True)
        assert not list(type_faults(fields_of(cls)))


def test_control_characters_are_spelled_out():
    text = to_toml({"a": "\x1b[31m\x9b\u202e\x7f", "b": "ä 😀"})
    assert text.isprintable() or all(c.isprintable() or c == "\n" for c in text)
    assert "ä 😀" in text
    import tomllib

    assert tomllib.loads(text) == {"a": "\x1b[31m\x9b\u202e\x7f", "b": "ä 😀"}
    error = SettingsError("a\x1b[31mb", field="\u202e", got="\x07", expected="\x9b", fix="\r")
    assert all(c.isprintable() or c == "\n" for c in str(error))


def test_install_advice_names_what_vla_knows(world):
    known = registry.install_line("vla-head-ki")
    assert known.startswith("pip install vla-head-ki") and "does not know" not in known
    assert "does not know" in registry.install_line("acme-heads")
    for name in ("x; rm -rf /", "--index-url http://x", "\x1b[31m", "", "a b"):
        assert "pip install" not in registry.install_line(name)
