"""Names from metadata; a broken plugin breaks only itself."""

import os
import sys

import pytest

import vla
from vla import registry
from vla.cli import main
from vla.errors import PartError
from vla.parts import GROUPS

GOOD = "from vla.parts import Part\nPART = Part('head', '{name}', 'fine', contract=2)\n"
PART = "from vla.parts import Part\n"

# What can be wrong with a plugin: module source, and words of the reason that the user sees.
BROKEN = {
    "raises": ("raise ValueError('kaputt\\nsecond line')", ["ValueError: kaputt second line"]),
    "exits": ("import sys; sys.exit(3)", ["SystemExit", "3"]),
    "exits_quietly": ("raise SystemExit", ["SystemExit"]),
    "lacks_a_dependency": ("import no_such_package_anywhere", ["ModuleNotFoundError", "no_such_package_anywhere"]),
    "has_a_syntax_error": ("def (", ["SyntaxError"]),
    "its_file_is_gone": (None, ["ModuleNotFoundError", "bad_module"]),
    "lacks_the_object": ("OTHER = 1", ["AttributeError", "PART"]),
    "publishes_a_wrong_type": ("PART = dict(kind='head')", ["is a dict, not a vla.Part"]),
    "publishes_a_wrong_kind": (PART + "PART = Part('llm', 'bad', '')", ["it is a 'llm'", "as a 'head'"]),
    "has_another_name": (PART + "PART = Part('head', 'good', '', contract=2)", ["calls itself 'good'"]),
    "speaks_a_newer_contract": (
        PART + "PART = Part('head', 'bad', '', contract=99)",
        ["contract 99", "speaks 2", "upgrade vla-core"],
    ),
    "speaks_an_older_contract": (
        PART + "PART = Part('head', 'bad', '')",
        ["contract 1", "speaks 2", "upgrade bad-dist", "`sample(model, obs, noise, sampling)`", "model.decoder"],
    ),
    "has_settings_of_no_attrs_class": (PART + "PART = Part('head', 'bad', '', contract=2, settings=dict)", ["not an attrs class"]),
    "has_a_malformed_slot": (PART + "PART = Part('head', 'bad', '', contract=2, slots={'x': ('nokind', 'y')})", ["slot 'x'"]),
    "has_a_preset_of_nothing": (
        PART + "PART = Part('head', 'bad', '', contract=2, presets={'tiny': {'z': 1}})",
        ["preset 'tiny'", "'z'"],
    ),
    "raises_a_bare_base_exception": ("class Odd(BaseException): pass\nraise Odd()", ["Odd"]),
}


@pytest.fixture(params=sorted(BROKEN))
def broken(request, world):
    source, words = BROKEN[request.param]
    world.add("bad-dist", {"vla.heads": {"bad": "bad_module:PART"}}, {"bad_module": source} if source else {})
    return words


def test_a_broken_plugin_is_one_line_and_breaks_only_itself(broken, capsys):
    with pytest.raises(PartError) as caught:
        registry.find("head", "bad").load()
    first = str(caught.value).splitlines()[0]
    assert "head 'bad' is installed (bad-dist 1.0) but broken" in first
    for word in broken:
        assert word in first
    assert registry.find("head", "toyflow").load().name == "toyflow"


@pytest.mark.parametrize("verb", ["list", "fits", "doctor", "build", "show", "build it"])
def test_every_verb_works_for_the_healthy_parts(broken, capsys, verb):
    words = {
        "list": ["list", "head"],
        "fits": ["fits", "--backbone", "toybone"],
        "doctor": ["doctor", "--light"],
        "build": ["build", "--backbone", "toybone", "--tokenizer", "toytext", "--head", "toyflow"],
        "show": ["show", "toytype", "--no-sizes"],
        "build it": ["build", "--backbone", "toybone", "--tokenizer", "toytext", "--head", "bad"],
    }[verb]
    status = main(words)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    if verb == "build it":
        assert status == 2 and broken[0].split()[0].strip(":") in err
        return
    assert status == (1 if verb == "doctor" else 0)
    assert "toyflow" in out or verb == "doctor"
    if verb in ("list", "doctor"):
        flat = "".join(out.split())
        assert "bad" in out and "".join(broken[0].split()) in flat
    assert not err


def test_names_come_from_metadata_without_running_code(world):
    world.add("bomb", {"vla.heads": {"bomb": "bomb:PART"}}, {"bomb": "import os; os.environ['BOMB'] = 'went off'"})
    assert "bomb" in [item.name for item in registry.listed("head")]
    vla.build(backbone="toybone", tokenizer="toytext", head="toyflow")
    assert "BOMB" not in os.environ and "bomb" not in sys.modules


def test_what_a_plugin_prints_does_not_reach_stdout(world, capsys):
    source = "print('HELLO FROM A PLUGIN')\n" + GOOD.format(name="chatty")
    world.add("chatty", {"vla.heads": {"chatty": "chatty:PART"}}, {"chatty": source})
    assert main(["list", "head", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "HELLO" not in out and "HELLO" in err
    assert '"chatty"' in out


def test_two_of_one_name_are_refused_with_both_named(world, capsys):
    world.add("acme-heads", {"vla.heads": {"toyflow": "acme:PART"}}, {"acme": GOOD.format(name="toyflow")})
    with pytest.raises(PartError) as caught:
        registry.find("head", "toyflow")
    assert "acme-heads 1.0" in str(caught.value) and "toy-world 1.0" in str(caught.value)
    assert registry.find("head", "acme-heads/toyflow").dist == "acme-heads"
    assert registry.find("head", "Toy_World/toyflow").dist == "toy-world"  # spelling of distributions is free
    # a file says whose part it means
    assert registry.find("head", "toyflow", source="toy-world 0.7").dist == "toy-world"
    fix = caught.value.fix
    words = fix.split("say which: ")[1].split(", or")[0].split()
    assert main(["build", "--backbone", "toybone", "--tokenizer", "toytext", *words]) in (0, 2)
    assert "two installed" not in capsys.readouterr().err
    assert main(["list", "head"]) == 0
    assert "double" in capsys.readouterr().out


def test_core_names_cannot_be_shadowed(world, capsys):
    source = "from vla.parts import Part\nPART = Part('robot', 'plain', 'not the real one')\n"
    world.add("evil", {"vla.robots": {"plain": "evil:PART"}}, {"evil": source})
    assert registry.find("robot", "plain").dist == "vla-core"
    assert registry.find("robot", "evil/plain").dist == "evil"
    assert main(["doctor", "--light"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "robot plain (evil 1.0): the same name is published by vla-core" in out


def test_unknown_names_list_the_installed_and_suggest(world):
    with pytest.raises(PartError) as caught:
        registry.find("head", "toyflwo")
    assert "toyboth, toyflow" in str(caught.value) and "did you mean 'toyflow'?" in str(caught.value)


def test_known_but_absent_parts_come_with_the_install_line(monkeypatch):
    monkeypatch.setattr(registry, "_scan", _only_core())
    with pytest.raises(PartError) as caught:
        registry.find("head", "ki")
    assert "pip install vla-head-ki" in caught.value.fix and "./plugins/heads/ki" in caught.value.fix


def _only_core():
    items = {kind: () for kind in registry.ALL_GROUPS}

    def scan():
        return items, ()

    scan.cache_clear = lambda: None
    return scan


def test_a_plugin_installed_while_running_is_found(world):
    with pytest.raises(PartError):
        registry.find("head", "late")
    module = {"late": GOOD.format(name="late")}
    world.add("late", {"vla.heads": {"late": "late:PART"}}, module, refresh=False)
    assert registry.find("head", "late").load().name == "late"


def test_unreadable_metadata_costs_only_its_own_package(world):
    (world.folder / "half-1.0.dist-info").mkdir()
    (world.folder / "half-1.0.dist-info" / "entry_points.txt").write_text("[vla.heads]\nhalf = half:PART\n")
    (world.folder / "bytes-1.0.dist-info").mkdir()
    (world.folder / "bytes-1.0.dist-info" / "entry_points.txt").write_bytes(b"[vla.heads]\nb\xff\xfe = x\n")
    odd = world.add("odd", {"vla.heads": {"odd": "no colon here"}, "vla.nogroup": {"x": "y:z"}}, {})
    registry.refresh()
    assert "toyflow" in [item.name for item in registry.listed("head")]
    what = " ".join(f"{stray.dist} {stray.what}" for stray in registry.strays())
    for word in ("half", "no name", "bytes", "cannot be read", "not 'module:object'", "vla.nogroup"):
        assert word in what
    assert odd.exists()


def test_a_stale_second_copy_is_reported_and_the_first_wins(world, tmp_path, monkeypatch):
    later = tmp_path / "later"
    later.mkdir()
    info = later / "toy_world-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy_world\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[vla.heads]\ntoyold = toyworld:FLOW\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(later)])
    registry.refresh()
    assert registry.find("head", "toyflow").version == "1.0"
    assert any("second copy" in stray.what for stray in registry.strays())
    assert "toyold" not in [item.name for item in registry.listed("head")]


def test_every_kind_has_a_group_and_a_plural():
    assert set(registry.PLURAL) == set(registry.ALL_GROUPS) >= set(GROUPS)


def test_the_scan_agrees_with_importlib_metadata():
    from importlib.metadata import entry_points

    for kind, group in GROUPS.items():
        ours = {(item.name, item.value, item.dist) for item in registry.listed(kind)}
        theirs = {(e.name, e.value, e.dist.name) for e in entry_points(group=group)}
        assert ours == theirs
