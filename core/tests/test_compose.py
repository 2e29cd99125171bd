"""Names -> tree -> checks -> TOML and back; settings; misfits whose suggestions were tried."""

import shlex
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vla
from vla import compose
from vla.errors import PartError, SettingsError, StoreError, VlaError
from vla.fitting import MisfitError
from vla.parts import Part
from vla.settings import parse_sets, parse_value, to_toml

TOYS = {"backbone": "toybone", "tokenizer": "toycodec", "head": "toyboth"}


def test_a_tree_of_parts_from_names(world):
    variant = vla.build(**TOYS, preset="tiny")
    assert [path for path, _ in variant.walk()] == [
        "backbone", "backbone.llm", "tokenizer", "tokenizer.text", "head", "head.tokens", "head.actions", "robot",
    ]  # fmt: skip
    assert variant.at("backbone.llm").settings.width == 8 and variant.at("head.actions").settings.width == 4
    assert variant.spec.image_size == (64, 64) and variant.spec.action_horizon == 8
    assert variant.parts["head"].inner["tokens"].part.name == "toytokens"
    assert variant.backbone.offers == {"width": 8, "multi_expert": True, "insulates": True}
    assert str(variant.layout().row("action")) and variant.layout().row("action").look("image").stop
    assert list(variant.experts()) == ["action"]
    assert variant.frameworks() == ("torch",)  # the core has no jax code
    assert variant.name == "toybone-toycodec-toyboth-tiny"


def test_written_and_read_back_equal(world, tmp_path):
    variant = vla.build(**TOYS, set={"backbone.llm.note": 'a "quoted"\n\ttab \x7f ü', "backbone.llm.rate": 1e-7})
    text = variant.to_toml()
    assert compose.variant_from_toml(text) == variant
    (tmp_path / "variant.toml").write_text(text)
    assert compose.read_variant(tmp_path) == compose.read_variant(tmp_path / "variant.toml") == variant
    assert compose.compose(variant.tree(), variant.spec, variant.name) == variant
    table = tomllib.loads(text)
    assert table["vla"] == 1 and table["head"]["tokens"]["from"] == "toy-world 1.0"


def test_weakest_first_defaults_type_preset_set(world):
    plain = vla.build(type="toytype")
    assert vla.build(type="toytype", robot={"part": "plain", "action_dim": 3}).name == "toytype"
    assert plain.at("backbone.llm").settings.width == 48 and plain.at("head.actions").settings.width == 16
    assert plain.spec.max_token_len == 111 and plain.name == "toytype"
    tiny = vla.build(type="toytype", preset="tiny")
    assert tiny.at("backbone.llm").settings.width == 8 and tiny.spec.max_token_len == 96 and tiny.name == "toytype"
    over = vla.build(type="toytype", preset="tiny", set=["backbone.llm.width=9", "spec.max_token_len=50"])
    assert over.at("backbone.llm").settings.width == 9 and over.spec.max_token_len == 50
    assert over.at("head.actions").settings.width == 4


def test_preset_key_in_a_table_stands_for_its_settings_and_explicit_wins(world):
    llm = {"part": "toycore", "preset": "odd", "depth": 5}
    variant = vla.build(backbone={"part": "toybone", "llm": llm}, tokenizer="toytext", head="toyflow")
    assert variant.at("backbone.llm").settings.width == 7 and variant.at("backbone.llm").settings.depth == 5
    assert "preset" not in variant.to_toml()
    same = vla.build(
        backbone="toybone", tokenizer="toytext", head="toyflow", set=["backbone.llm.preset=odd", "backbone.llm.depth=5"]
    )
    assert same.backbone == variant.backbone
    with pytest.raises(SettingsError, match="no preset 'huge'"):
        vla.build(**TOYS, set=["backbone.llm.preset=huge"])
    with pytest.raises(SettingsError, match="did you mean 'tiny'"):
        vla.build(**TOYS, preset="tinny")


def test_set_replaces_inner_parts_before_it_writes_settings(world):
    a = vla.build(backbone="toybone", tokenizer="toytext", head="toyflow", set=["head.width=5", "head=toyflow"])
    assert a.head.settings.width == 5
    b = vla.build(**TOYS, set=["head.actions.width=5", "head.actions=toyflow", "backbone.llm=toycore"])
    assert b.at("head.actions").settings.width == 5
    c = vla.build(type="toytype", set={"head.actions": {"part": "toyflow"}})
    assert c.at("head.actions").settings.width == 32 and c.name == "toybone-toycodec-toyboth"
    d = vla.build(type="toytype", set={"head.actions": {"state": "none"}})  # a table without a part: settings of it
    assert d.at("head.actions").settings.width == 16 and d.at("head.actions").settings.state == "none"


def test_base_is_changed_part_by_part(world):
    one = vla.build(**TOYS, preset="tiny", name="mine")
    two = vla.build(base=one, head="toyflow", set={"spec.action_dim": 3})
    assert two.backbone == one.backbone and two.head.part.name == "toyflow" and two.name == "mine"
    assert two.spec.action_dim == 3 and two.spec.image_size == one.spec.image_size
    with pytest.raises(SettingsError, match="not both"):
        vla.build(base=one, type="toytype")


def test_parts_given_as_objects_need_no_installation(world):
    from vla import registry

    mine = Part("tokenizer", "mine", "mine", offers=lambda s, i: {"emits": {"text", "state"}})
    variant = vla.build(backbone="toybone", tokenizer=mine, head="toyflow")
    assert variant.tokenizer.part is mine and 'part = "mine"' in variant.to_toml()
    assert vla.build(base=variant, set={"spec.action_dim": 3}).tokenizer.part is mine
    assert vla.build(backbone="toybone", tokenizer=variant.tokenizer, head="toyflow") == variant
    with pytest.raises(PartError, match="no tokenizer named 'mine' is installed"):
        compose.variant_from_toml(variant.to_toml())
    with pytest.raises(PartError, match="is a tokenizer, not a head"):
        vla.build(backbone="toybone", tokenizer="toytext", head=mine)
    assert registry.listed("tokenizer")


# A wrong setting -> words of the message.
WRONG = {
    "head.weihgt=1": ["unknown setting 'weihgt'", "head.weihgt", "head.weight", "did you mean head.weight?"],
    "head.actions.widht=1": [
        "head.actions.widht",
        "head.actions.width, head.actions.state",
        "did you mean head.actions.width?",
    ],
    "width=1": ["spec, backbone, tokenizer, head, robot", "backbone.llm.width"],
    "head.actionz.width=1": ["head.actionz", "head.actions"],
    "spec.action_dims=7": ["spec.action_dims", "did you mean spec.action_dim?"],
    "spec.action_dim=seven": ["spec.action_dim", "'seven' (str)", "int"],
    "spec.action_dim=0": ["spec.action_dim", "1 to 8,192"],
    "spec.action_dim=true": ["spec.action_dim", "True (bool)", "int"],
    "spec.image_size=64": ["spec.image_size", "[int, int]"],
    "spec.image_size=[64]": ["spec.image_size", "[64]"],
    "spec.cameras=[]": ["spec.cameras", "one or more"],
    'spec.cameras=["a", "a"]': ["spec.cameras", "different names"],
    "spec.cameras=a,b": ["spec.cameras", "list of str", "a list is written like this"],
    "spec.norm=none": ["spec.norm", "quantile or zscore"],
    "spec=3": ["unknown setting 'spec'"],
    "backbone.llm.width=3.5": ["backbone.llm.width", "3.5 (float)", "int"],
    "backbone.llm.tied=1": ["backbone.llm.tied", "bool"],
    "backbone.llm.rate=inf": ["backbone.llm.rate", "float"],
    "backbone.llm.note=3": ["backbone.llm.note", "3 (int)", "str"],
    "backbone.llm.scales=[1, 'x']": ["backbone.llm.scales", "list of int"],
    "head.actions.state=maybe": ["head.actions.state", "'tokens' or 'none'"],
    "head.tokens=": ["head.tokens"],
    "head.tokens=nope": ["no head named 'nope'", "head.tokens"],
    "head.tokens.preset=tiny": ["no preset 'tiny'", "head.tokens.preset"],
    "head..x=1": ["path=value"],
    "head": ["path=value"],
    "head.part=toyflow": ["unknown setting 'part'"],
}


@pytest.mark.parametrize("word", WRONG)
def test_a_wrong_setting_says_which_and_what_is_known(world, word):
    with pytest.raises(VlaError) as caught:
        vla.build(**TOYS, set=[word])
    for expected in WRONG[word]:
        assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("3.0", 3.0), ("1e-3", 1e-3), (".5", 0.5), ("true", True), ("null", None), ("abc", "abc"), ('"3"', "3"),
        ("[1, 2]", [1, 2]), ('["a"]', ["a"]), ("a,b", "a,b"), ("", ""), ("2024-01-01", "2024-01-01"), ("1\nx = 2", "1\nx = 2"),
        ("So400m/14", "So400m/14"), ("nan", float("nan")),
    ],
)  # fmt: skip
def test_values_as_a_person_types_them(text, value):
    got = parse_value(text)
    assert type(got) is type(value) and (got == value or value != value)


def test_a_setting_without_a_value_is_refused():
    """--set data.prompt=$UNSET; an empty text is written as such."""
    for text in ("data.prompt=", "data.prompt= "):
        with pytest.raises(SettingsError, match="no value") as error:
            parse_sets([text])
        assert error.value.field == "data.prompt" and "data.prompt=" in error.value.fix
    assert parse_sets(['data.prompt=""']) == {"data.prompt": ""}


@given(
    st.dictionaries(
        st.text(max_size=9),
        st.one_of(
            st.booleans(),
            st.integers(-(2**63), 2**63 - 1),
            st.floats(allow_nan=False),
            st.text(),
            st.lists(st.text(max_size=5), max_size=3),
        ),
        max_size=5,
    )
)
@settings(deadline=None, max_examples=200)
def test_toml_that_we_write_reads_back_equal(table):
    nested = {**table, "inner": {"a b": {"x": 1}}} if "inner" not in table else table
    try:
        text = to_toml(nested)
        text.encode()
    except UnicodeEncodeError:
        return  # lone surrogates have no UTF-8
    assert tomllib.loads(text) == nested


# Wrong combinations: arguments of build, and words of the need that fails.
MISFITS = [
    ({"head": "toytokens"}, "it predicts action tokens"),
    ({"head": "toyboth"}, "it predicts action tokens"),
    ({"head": "toyflow", "set": ["backbone.llm=toylone"]}, "its expert runs beside the backbone"),
    ({"head": "toyflow", "set": ["tokenizer.prompt=short"]}, "it reads the state"),
    ({"tokenizer": "toycodec", "head": "toyboth", "set": ["tokenizer.text.prompt=short"]}, "it reads the state"),
    ({"tokenizer": "toycodec", "head": "toyboth", "set": ["head.tokens=toyflow"]}, "this half trains the backbone"),
    ({"tokenizer": "toycodec", "head": "toyboth", "set": ["head.actions=toytokens"]}, "this half gives the chunk"),
    ({"tokenizer": "toycodec", "head": "toyboth", "set": ["backbone.llm=toylone"]}, "no gradient into the backbone"),
    ({"tokenizer": "toycodec", "head": "toyboth", "set": ["backbone.llm.width=4"]}, "less is too small"),
    ({"head": "toyflow", "robot": "toyarm", "set": ["spec.action_dim=4"]}, "padded to the spec, never cut"),
    ({"head": "toyflow", "robot": "toyarm", "set": ["spec.state_dim=40"]}, "no image of this robot"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "why"), MISFITS)
def test_a_misfit_names_need_reason_and_changes_that_build(world, arguments, why):
    arguments = {"backbone": "toybone", "tokenizer": "toytext", **arguments}
    with pytest.raises(MisfitError) as caught:
        vla.build(**arguments)
    error = caught.value
    assert why in str(error) and error.misfits[0].path in str(error)
    assert error.swaps or error.settings
    for change in [*error.swaps, *error.settings]:
        assert change.words in str(error) or len(error.swaps) > 6 or len(error.settings) > 6
        vla.build(**typed(change.words, change.drops, arguments))


def typed(words, drops, arguments):
    """The arguments with the words of a suggestion after them, as on a command line."""
    out = {**arguments, "set": [s for s in arguments.get("set", []) if s.partition("=")[0] not in drops]}
    words = shlex.split(words)
    for option, value in zip(words[::2], words[1::2], strict=True):
        if option == "--set":
            out["set"] = [*out["set"], value]
        else:
            out[option.removeprefix("--")] = value
    return out


def test_suggestions_start_where_it_is_wanting_and_say_which_set_they_void(world):
    with pytest.raises(MisfitError) as caught:
        vla.build(**TOYS, set=["head.tokens=toyflow"])
    swaps = caught.value.swaps
    assert swaps[0].words == "--set head.tokens=toytokens"
    assert [s.drops for s in swaps if s.path == "head"] == [("head.tokens",)] * sum(s.path == "head" for s in swaps)
    assert "(and without --set head.tokens)" in str(caught.value)


def test_two_changes_are_offered_where_no_single_one_fits(world):
    with pytest.raises(MisfitError) as caught:
        vla.build(backbone="toybone", tokenizer="toytext", head="toyboth", set=["backbone.llm=toylone"])
    error = caught.value
    assert not error.swaps and error.pairs
    for one, two in error.pairs:
        arguments = {
            "backbone": "toybone",
            "tokenizer": "toytext",
            "head": "toyboth",
            "set": {"backbone.llm": "toylone"},
        }
        for change in (one, two):
            if "." in change.path:
                arguments["set"][change.path] = change.value
            else:
                arguments[change.path] = change.value
                arguments["set"] = {k: v for k, v in arguments["set"].items() if not k.startswith(f"{change.path}.")}
        vla.build(**arguments)


def test_a_slot_without_default_must_be_given(world):
    with pytest.raises(PartError) as caught:
        vla.build(backbone="toybone", tokenizer="toytext", head="toyopen")
    assert "head.half" in str(caught.value) and "--set head.half=NAME" in str(caught.value)
    table = {"part": "toyopen", "half": "toyflow"}
    variant = vla.build(backbone="toybone", tokenizer="toytext", head=table)
    assert variant.at("head.half").part.name == "toyflow"
    same = vla.build(backbone="toybone", tokenizer="toytext", head="toyopen", set=["head.half=toyflow"])
    assert same == variant


def test_faults_in_a_plugins_own_functions_name_the_plugin(world):
    source = """
from vla.parts import Part, Need
from vla.layout import Layout
OFFERS = Part("head", "off", "", contract=2, offers=lambda s, i: i["nothing"])
NEEDS = Part("head", "nee", "", contract=2, needs=lambda s: 1 / 0)
SLOT = Part("head", "slo", "", contract=2, needs=(Need("wheels", "x", "true", True, "why"),))
LAYOUT = Part("head", "lay", "", contract=2, layout=lambda s, i: Layout.parse("a b"))
NONE = Part("head", "non", "", contract=2)
EXPERT = Part("head", "exp", "", contract=2, layout=lambda s, i: Layout.parse("action action action"))
"""
    entries = {
        "off": "faulty:OFFERS",
        "nee": "faulty:NEEDS",
        "slo": "faulty:SLOT",
        "lay": "faulty:LAYOUT",
        "non": "faulty:NONE",
        "exp": "faulty:EXPERT",
    }
    world.add("faulty", {"vla.heads": entries}, {"faulty": source})
    toys = {"backbone": "toybone", "tokenizer": "toytext"}
    for name, words in {
        "off": ["'off' (faulty 1.0) fails in its offers", "KeyError"],
        "nee": ["fails in its needs", "ZeroDivisionError"],
        "slo": ["wheels", "slot that is not there"],
        "lay": ["a row needs a role"],
        "non": ["a layout says who sees whom"],
        "exp": ["experts containing 'action'"],
    }.items():
        with pytest.raises(VlaError) as caught:
            vla.build(**toys, head=name).head.offers  # noqa: B018
        for word in words:
            assert word in str(caught.value)


FILE = """
vla = 1
[backbone]
part = "toybone"
from = "toy-world 1.0"
[tokenizer]
part = "toytext"
[head]
part = "toyflow"
"""


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (("vla = 1", "vla = 2"), StoreError, ["upgrade vla-core", "got:      2"]),
        (("vla = 1", ""), StoreError, ["not a variant file"]),
        (("vla = 1", "vla = "), StoreError, ["not valid TOML", "line"]),
        (("[head]", "[heat]"), SettingsError, ["unknown setting 'heat'"]),
        (("toyflow", "toyflown"), PartError, ["no head named 'toyflown'"]),
        (('part = "toyflow"', 'part = "diffuse"\nfrom = "acme-diffuse 2.1"'), PartError, ["acme-diffuse 2.1", "pip install acme-diffuse"]),
        (('part = "toyflow"', 'part = "toyflow"\nfrom = "acme-flow 2.1"'), PartError, ["'toyflow' of acme-flow is not installed", "from toy-world", "delete the `from`"]),
        (('part = "toyflow"', 'part = "toyflow"\nfrom = 3'), SettingsError, ["head.from"]),
        (('part = "toyflow"', 'part = "toyflow"\nwidht = 3'), SettingsError, ["head.widht", "head.width"]),
        (('part = "toyflow"', 'part = "toyflow"\nsettings_version = 4'), SettingsError, ["another version", "got:      4"]),
        (('part = "toyflow"', "part = 3"), PartError, ["a part is named by text", "head.part"]),
        (("[head]", "[head.tokens]"), SettingsError, ["head.tokens"]),
        (("vla = 1", "vla = 1\nspec = 3"), StoreError, ["a table is expected"]),
        (("vla = 1", "vla = 1\nrobot = 3"), StoreError, ["a table is expected"]),
    ],
)  # fmt: skip
def test_files_that_are_wrong_say_where(world, change, error, words):
    assert compose.variant_from_toml(FILE).name == "toybone-toytext-toyflow"
    with pytest.raises(error) as caught:
        compose.variant_from_toml(FILE.replace(*change))
    for word in words:
        assert word in str(caught.value)


def test_paths_that_hold_no_variant(tmp_path):
    with pytest.raises(StoreError, match="no model directory"):
        compose.read_variant(tmp_path)
    with pytest.raises(StoreError, match="no such variant file"):
        compose.read_variant(tmp_path / "nope.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(StoreError, match="not UTF-8"):
        compose.read_variant(tmp_path / "bytes.toml")


def test_old_settings_are_upgraded_by_their_part(world):
    source = """
from attrs import frozen
from vla.parts import Part
from vla.layout import Layout

@frozen
class S:
    breadth: int = 3

def upgrade(old, version):
    assert version == 1
    return {"breadth": old.pop("width", 3), **old}

PART = Part("head", "grown", "", contract=2, settings=S, settings_version=2, upgrade=upgrade, layout=lambda s, i: Layout.parse("prompt backbone prompt"))
"""
    world.add("grown", {"vla.heads": {"grown": "grown:PART"}}, {"grown": source})
    old = FILE.replace('part = "toyflow"', 'part = "grown"\nfrom = "grown 0.9"\nwidth = 7')
    variant = compose.variant_from_toml(old)
    assert variant.head.settings.breadth == 7
    assert "settings_version = 2" in variant.to_toml() and compose.variant_from_toml(variant.to_toml()) == variant
    by_hand = FILE.replace('part = "toyflow"', 'part = "grown"\nbreadth = 9')
    assert compose.variant_from_toml(by_hand).head.settings.breadth == 9


def test_objects_that_a_part_names(world):
    assert compose.load_object("vla.errors:VlaError") is VlaError
    assert compose.load_object("vla.errors").VlaError is VlaError
    for where, words in {
        "vla.nothing_here:X": ["not where the part says", "vla.nothing_here"],
        "vla.errors:Nope": ["has no 'Nope'"],
    }.items():
        with pytest.raises(PartError) as caught:
            compose.load_object(where, "head 'x'")
        assert all(word in str(caught.value) for word in [*words, "head 'x'"])
    world.add("hungry", {}, {"hungry": "import no_framework_of_this_name"})
    with pytest.raises(PartError, match="does not know which package brings 'no_framework_of_this_name'"):
        compose.load_object("hungry:X", "head 'hungry'")


def test_every_public_name_exists():
    missing = []
    for name in vla.__all__:
        try:
            getattr(vla, name)
        except (ImportError, AttributeError) as error:
            missing.append((name, str(error)))
    assert not missing
    with pytest.raises(AttributeError):
        vla.nope  # noqa: B018
