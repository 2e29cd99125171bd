"""The options of the verbs: one set of rules, read from signatures and docstrings; one clear error per mistake."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Literal

import pytest
from attrs import frozen
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.cli import console, main, options, verbs
from vla.errors import SettingsError, VlaError


@frozen
class Inner:
    """A record inside a record.

    Attributes:
        depth: how deep.
    """

    depth: int = 1

    def __attrs_post_init__(self):
        if self.depth > 9:
            raise SettingsError("too deep", field="inner.depth", got=self.depth)


@frozen
class Run:
    """A run.

    Attributes:
        steps: how many,
            in all.
        warm: begin slowly.
        tags: names.
        inner: what is inside.
        rate: how fast.
    """

    steps: int = 5
    warm: bool = True
    tags: tuple[str, ...] = ("a",)
    inner: Inner = Inner()
    rate: float | None = 0.5


def verb(
    first: str,
    rest: tuple[int, ...] = (),
    /,
    kind: Literal["torch", "jax"] = "torch",
    out_dir: Path = Path("here"),
    set: tuple[str, ...] = (),
    no_sizes: bool = False,
    json: bool = False,
    run: Run = Run(),  # noqa: B008 (frozen)
):
    """Do something.

    Args:
        first: the first word.
        rest: numbers.
        kind: which.
        out_dir: where.
        set: path=value.
        no_sizes: count nothing.
        json: for machines.
        run: the run.
    """
    return first, rest, kind, out_dir, set, no_sizes, json, run


def call(text, function=verb, **defaults):
    found = []
    names = inspect.signature(function).parameters

    def keep(*values, **more):
        found.append(dict(zip(names, values, strict=False)) | more)

    keep.__signature__, keep.__doc__ = inspect.signature(function), function.__doc__
    keep.__annotations__, keep.__wrapped__ = function.__annotations__, function
    console.call(keep, "verb", text.split() if isinstance(text, str) else text, defaults)
    return found[0]


def refused(text, function=verb):
    with pytest.raises(VlaError) as error:
        call(text, function)
    return str(error.value)


def test_defaults_words_and_options():
    bare = call("w")
    assert bare == {
        "first": "w", "rest": (), "kind": "torch", "out_dir": Path("here"), "set": (), "no_sizes": False,
        "json": False, "run": Run(),
    }  # fmt: skip
    full = call("--json w 1 --out_dir=x -2 --set a=1 --set b=2 --no-sizes 3 --kind torch")
    assert full["rest"] == (1, -2, 3) and full["out_dir"] == Path("x") and full["set"] == ("a=1", "b=2")
    assert full["json"] and full["no_sizes"] and full["kind"] == "torch"
    assert call("w --no-json")["json"] is False
    assert call(["--", "--kind"])["first"] == "--kind"
    assert call(["w", "--set=--x=1"])["set"] == ("--x=1",)


@pytest.mark.parametrize("words", [[""], ["w", "--set", ""], ["w", "--out-dir="], ["w", "--tags", " "]])
def test_an_empty_text_is_no_value(words):
    """A variable of the shell that is not set; it used to count as an option that is left out."""
    assert "an empty value" in refused(words) and "leave" in refused(words)


def test_records_are_groups_of_options():
    assert call("w --steps 7 --no-warm --inner.depth 3 --rate none")["run"] == Run(7, False, ("a",), Inner(3), None)
    assert call("w --tags b --tags c")["run"].tags == ("b", "c")  # instead of the default, not beside it
    assert call("w --tags none")["run"].tags == () and call("w --tags none --tags b")["run"].tags == ("b",)
    assert call("w --set none")["set"] == ("none",)  # nothing to empty
    recipe = Run(steps=9, warm=False, rate=None)
    assert call("w --rate 1e-3", run=recipe)["run"] == Run(9, False, rate=1e-3)
    assert call("w --warm", run=recipe)["run"].warm is True
    assert "too deep" in refused("w --inner.depth 10")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["a word is missing", "FIRST", "the first word", "vla verb FIRST [REST ...] [options]"]),
        ("w x", ["wrong value", "REST", "x", "a whole number"]),
        ("w --kind jax --kind jax", ["given twice", "--kind"]),
        ("w --json --no-json", ["given twice", "--json"]),
        ("w --knid jax", ["no such option", "--knid", "did you mean --kind?"]),
        ("w --zzzzzz", ["no such option", "--zzzzzz", "`vla verb --help`"]),
        ("w -kind jax", ["-kind", "two dashes: --kind"]),
        ("w --first x", ["--first", "without its name: vla verb FIRST"]),
        ("w --no-kind", ["--no-kind", "--kind?"]),
        ("w --head.tokens ar", ["--set head.tokens=ar"]),
        ("w --head.tokens=ar", ["--set head.tokens=ar"]),
        ("w --kind keras", ["--kind", "keras", "'torch' or 'jax'"]),
        ("w --kind", ["no value", "--kind torch|jax"]),
        ("w --out-dir --json", ["no value", "--out-dir PATH"]),
        ("w --json=yes", ["a switch takes no value", "yes", "--no-json"]),
        ("w --steps 3.5", ["--steps", "3.5", "a whole number"]),
        ("w --rate quick", ["--rate", "quick", "a finite number or none"]),
        ("w --rate nan", ["--rate", "nan", "a finite number or none"]),
        ("w --rate=-inf", ["--rate", "-inf", "a finite number or none"]),
    ],
)
def test_one_error_names_option_value_and_way_out(text, parts):
    message = refused(text)
    assert all(part in message for part in parts), message


def test_words_too_many():
    def one(name: str, /, set: tuple[str, ...] = (), *, out: str):
        """One word."""

    assert "fix:      repeat the option: --set b=2" in refused("w --out o --set a=1 b=2", one)
    message = refused("w v --out o", one)
    assert "a word too many" in message and "usage: vla verb NAME --out TEXT [options]" in message
    assert "an option is missing" in refused("w", one) and call("w --out o", one)["out"] == "o"


texts = st.text(st.characters(codec="ascii", exclude_categories=["Cc"])).filter(lambda t: t.strip() and not t.startswith("-"))


@settings(deadline=None, max_examples=60)
@given(
    first=texts,
    rest=st.lists(st.integers(), max_size=3),
    kind=st.sampled_from(["torch", "jax"]),
    sets=st.lists(texts, max_size=3),
    json=st.booleans(),
    steps=st.integers(),
    rate=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    equals=st.booleans(),
)
def test_what_is_typed_is_what_arrives(first, rest, kind, sets, json, steps, rate, equals):
    words = [first, *map(str, rest)]
    pairs = [("kind", kind), *(("set", s) for s in sets), ("steps", str(steps)), ("rate", str(rate).lower())]
    for name, value in pairs:
        words += [f"--{name}={value}"] if equals else [f"--{name}", value]
    got = call(words + ["--json"] * json)
    assert (got["first"], got["rest"], got["kind"], got["set"]) == (first, tuple(rest), kind, tuple(sets))
    assert got["json"] is json and got["run"] == Run(steps=steps, rate=rate)


def functions():
    """(verb, function, defaults) of every verb, as it reaches the parser."""
    found = []

    def keep(function, verb, argv, defaults=None):
        found.append((verb, function, defaults or {}))
        return 0

    original, console.call = console.call, keep
    try:
        for where, _ in verbs().values():
            module, _, name = where.partition(":")
            for words in ([], ["fit"], ["bench"]) if module.endswith("tokenizer") else ([],):
                getattr(import_module(module), name)(words)
    finally:
        console.call = original
    return found


@pytest.mark.parametrize(("verb", "function", "defaults"), [pytest.param(*row, id=row[0]) for row in functions()])
def test_every_option_of_every_verb_is_described(verb, function, defaults):
    table = options.options_of(function, defaults)
    parameters = inspect.signature(function).parameters
    assert list(options.descriptions(function)) == list(parameters), "every parameter, in order, and nothing else"
    assert len({o.name for o in table}) == len(table)
    textbook = {"beta1", "beta2", "eps", "weight-decay"}  # of Adam
    assert [o.name for o in table if not o.help and o.name not in textbook] == []
    typed = {o.name: ["x"] if o.type is str else ["1"] for o in table if o.placed and o.default is options.REQUIRED}
    words = [w for some in typed.values() for w in some]
    words += [w for o in table if not o.placed and o.default is options.REQUIRED for w in (f"--{o.name}", "x")]
    placed, named = options.arguments(function, options.parse(table, words, verb), defaults)
    inspect.signature(function).bind(*placed, **named)


def test_help_says_everything_once(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["check", "--help"]) == main(["check", "head", "-h"]) == 0
    out = capsys.readouterr().out
    assert out.count("usage: vla check KIND NAME [options]") == 2 and "\x1b" not in out
    assert console.call(verb, "verb", ["--help"]) == 0
    out = capsys.readouterr().out
    lines = [line.strip() for line in out.splitlines()]
    assert max(map(len, out.splitlines())) <= 100
    for line in (
        "usage: vla verb FIRST [REST ...] [options]", "Do something.", "FIRST                   the first word.",
        "--kind torch|jax        which. (default: torch)", "--no-sizes              count nothing.",
        "--steps INT             how many, in all. (default: 5)", "--no-warm               switch off: begin slowly.",
        "--tags TEXT             names. May be repeated. (default: a)", "the run:", "inner: what is inside:",
        "--inner.depth INT       how deep. (default: 1)", "--rate FLOAT            how fast. (default: 0.5)",
    ):  # fmt: skip
        assert lines.count(line) == 1, line


def test_help_is_bold_on_a_terminal_unless_asked_not_to(monkeypatch):
    from vla.cli import help as text

    monkeypatch.setattr(text.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    table = options.options_of(verb, {})
    assert "\x1b[1musage:\x1b[0m" in text.help_text(verb, table, "verb")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in text.help_text(verb, table, "verb")


def test_a_recipe_gives_the_defaults_of_train(capsys, monkeypatch):
    from vla.training.recipes import read_recipe, recipe_names

    name = recipe_names()[0]
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["train", "--recipe", name, "--help"]) == 0
    assert f"(default: {read_recipe(name).config.batch_size})" in capsys.readouterr().out
    # A recipe's lists can be emptied, else its LoRA could not be turned off.
    assert main(["train", "--recipe", "pi0_libero_lora", "--lora.rank", "none", "--data", "no/where"]) == 2
    assert "fix:      add --lora.rank 16, or take the others away: --lora.ranks none" in capsys.readouterr().err
    off = ["--lora.rank", "none", "--lora.ranks", "none"]
    assert main(["train", "--recipe", "pi0_libero_lora", *off, "--data", "no/where"]) == 2
    assert "no such dataset folder" in capsys.readouterr().err
    assert main(["train", "--recipe", "no-such", "--help"]) == 2
    assert "no such recipe" in capsys.readouterr().err
    assert main(["train", "--recipe", "--data", "x"]) == 2
    assert "an option has no value" in capsys.readouterr().err
