"""The console: dispatch, exit statuses, output that can be piped, files that are whole or absent."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vla
import vla.cli
from vla.cli import VERBS, main, verbs
from vla.errors import VlaError

TOYS = ["--backbone", "toybone", "--tokenizer", "toycodec", "--head", "toyboth"]


def test_help_lists_the_verbs_that_are_there(capsys):
    assert main([]) == main(["--help"]) == 0
    out = capsys.readouterr().out
    for verb, (where, line) in VERBS.items():
        module = Path(vla.cli.__file__).parent / f"{where.partition(':')[0].rpartition('.')[2]}.py"
        assert (verb in verbs()) == module.exists() == (line in out)
    assert main(["--version"]) == 0 and vla.__version__ in capsys.readouterr().out


def test_unknown_verbs_are_suggested(capsys):
    assert main(["biuld"]) == 2
    assert "did you mean 'build'?" in capsys.readouterr().err


@pytest.mark.parametrize("verb", sorted(verbs()))
def test_every_verb_explains_itself(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert f"usage: vla {verb}" in capsys.readouterr().out


def test_a_users_mistake_is_status_2_and_a_bug_keeps_its_traceback(world, capsys, monkeypatch):
    assert main(["build", *TOYS, "--set", "head.weihgt=3"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("vla build: unknown setting 'weihgt'") and not out and "Traceback" not in err
    assert main(["build", "--haed", "x"]) == 2

    def fail(error):
        def run(words):
            raise error

        return run

    import vla.cli.list as verb

    monkeypatch.setattr(verb, "main", fail(KeyboardInterrupt()))
    assert main(["list"]) == 130
    monkeypatch.setattr(verb, "main", fail(SystemExit("text")))
    assert main(["list"]) == 2 and "text" in capsys.readouterr().err
    monkeypatch.setattr(verb, "main", fail(VlaError("what", field="f", got=1, fix="do")))
    assert main(["list"]) == 2 and "vla list: what" in capsys.readouterr().err
    monkeypatch.setattr(verb, "main", fail(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["list"])


def test_build_prints_toml_and_writes_it(world, tmp_path, capsys):
    folder = tmp_path / "a" / "b"
    words = [
        "build",
        *TOYS,
        "--set",
        "head.weight=2",
        "--set",
        "spec.action_dim=7",
        "--name",
        "mine",
        "--out",
        str(folder),
    ]
    assert main(words) == 0
    out, err = capsys.readouterr()
    table = tomllib.loads(out)
    assert table["name"] == "mine" and table["head"]["weight"] == 2.0 and table["spec"]["action_dim"] == 7
    assert "# runs in: torch" in out and "wrote" in err
    assert [p.name for p in folder.iterdir()] == ["variant.toml"]
    assert vla.read_variant(folder) == vla.variant_from_toml(out)
    assert main(["build", "--base", str(folder), "--head", "toyflow"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["head"]["part"] == "toyflow"


def test_build_never_writes_half_a_file_nor_over_weights(world, tmp_path, capsys, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert main(["build", *TOYS, "--out", str(tmp_path)]) == 2
    assert "holds the weights of another variant" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["build", *TOYS, "--out", str(tmp_path / "file")]) == 2
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert main(["build", *TOYS, "--out", str(tmp_path / "x" / "y")]) == 2
    assert "No space left" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert (
        main(
            [
                "build",
                "--head",
                "toytokens",
                "--tokenizer",
                "toytext",
                "--backbone",
                "toybone",
                "--out",
                str(tmp_path / "z"),
            ]
        )
        == 2
    )
    assert not (tmp_path / "z").exists()


def test_show_a_variant(world, tmp_path, capsys):
    svg = tmp_path / "mask.svg"
    assert main(["show", "toytype", "--no-sizes", "--set", "head.weight=2", "--svg", str(svg)]) == 0
    out = capsys.readouterr().out
    for text in ("tokens = toytokens", "weight=2.0", "image:stop", "░", "▙", "gradient routes"):
        assert text in out
    lines = out.splitlines()
    routes = {
        line.split()[0]: line.split()[1:]
        for line in lines
        if line.split()[:1] in (["tokens"], ["actions"]) and len(line.split()) == 4
    }
    assert routes == {"tokens": ["●", "●", "0"], "actions": ["0", "0", "●"]}
    import xml.etree.ElementTree as ET

    root = ET.parse(svg).getroot()
    fills = [r.get("fill") for r in root.iter("{http://www.w3.org/2000/svg}rect")]
    # tokens drawn: image 6, prompt 4, target 5, action 5; stops: 5 x 10
    assert fills.count("url(#stop)") == 5 * 10 + 1
    (tmp_path / "no").write_text("")
    assert main(["show", "toytype", "--no-sizes", "--svg", str(tmp_path / "no" / "x.svg")]) == 2


def test_show_a_file_and_a_folder(world, tmp_path, capsys):
    assert main(["build", *TOYS, "--out", str(tmp_path)]) == 0
    assert main(["show", str(tmp_path), "--no-sizes"]) == 0
    assert main(["show", str(tmp_path / "variant.toml"), "--no-sizes"]) == 0
    assert capsys.readouterr().out.count("who sees whom") == 2
    assert main(["show", str(tmp_path / "nothing.toml")]) == 2
    assert "no such variant file" in capsys.readouterr().err


def test_show_a_part(world, capsys):
    assert main(["show", "toyboth"]) == 0
    assert main(["show", "head", "toyboth"]) == 0
    out = capsys.readouterr().out
    assert out.count("no gradient into the backbone") == 2 and "weight" in out
    assert main(["show", "toyopen"]) == 0  # has a slot without default
    assert "does not resolve with its defaults" in capsys.readouterr().out
    assert main(["show", "toybothh"]) == 2
    assert "did you mean 'toyboth'?" in capsys.readouterr().err
    assert main(["show"]) == 2 and main(["show", "toyboth", "--svg", "x.svg"]) == 2


def test_list_and_fits_as_data(world, capsys):
    assert main(["list", "head", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["toyboth"]["status"] == "ok" and rows["toyboth"]["frameworks"] == ["torch", "jax"]
    assert rows["toyboth"]["dist"] == "toy-world" and rows["toyboth"]["version"] == "1.0"
    assert main(["list", "nokind"]) == 2
    capsys.readouterr()
    assert main(["fits", "--json", "--backbone", "toybone"]) == 0
    pairs = {(p["head"], p["tokenizer"], p["backbone"]): p["reason"] for p in json.loads(capsys.readouterr().out)}
    assert pairs["toyboth", "toycodec", "toybone"] == ""
    assert "emits containing 'actions'" in pairs["toyboth", "toytext", "toybone"]
    assert "multi_expert" in pairs["toyflow", "toytext", "toybone+toylone"]
    for (head, tokenizer, backbone), reason in pairs.items():  # what the matrix says is what build does
        if not (head + tokenizer + backbone.replace("+", "")).startswith("toy") or "+" in backbone:
            continue
        words = ["build", "--head", head, "--tokenizer", tokenizer, "--backbone", backbone]
        assert (main(words) == 0) == (reason == ""), (head, tokenizer, backbone, reason)
    assert main(["fits", "--head", "nope"]) == 2


def test_doctor_says_what_is_wrong_and_goes_on(world, capsys):
    source = "from vla.parts import Part\nPART = Part('robot', 'ghost', '', numpy='ghost_code:X', slots={'x': ('head', 'toynone')})\n"
    world.add(
        "ghost", {"vla.robots": {"ghost": "ghost:PART"}}, {"ghost": source, "ghost_code": "import sys; sys.exit(9)"}
    )
    assert main(["doctor", "ghost"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "robot ghost (ghost 1.0)" in out and "SystemExit: 9" in out and "'toynone', which is not installed" in out
    assert "contracts spoken: vision 1" in out
    assert main(["doctor", "toyflow", "--light"]) == 0
    assert main(["doctor", "nothing-of-this-name"]) == 1


def test_hooks_speak_and_a_broken_listener_costs_nothing(world, capsys):
    good = """
from vla.hooks import Finding, hookimpl

@hookimpl
def vla_check(variant):
    level = "error" if variant.spec.action_dim == 13 else "note"
    return [Finding(level, f"thirteen is unlucky, {variant.spec.action_dim} is what you have", "choose another")]
"""
    bad = "from vla.hooks import hookimpl\n@hookimpl\ndef vla_check(variant): return 1 / 0\n"
    unknown = "from vla.hooks import hookimpl\n@hookimpl\ndef vla_nonsense(x): pass\n"
    for name, source in {"goodhook": good, "badhook": bad, "oddhook": unknown, "dead": "raise SystemExit(1)"}.items():
        world.add(name, {"vla.hooks": {name: name}}, {name: source})
    assert main(["build", *TOYS]) == 0
    out, err = capsys.readouterr()
    assert "note: thirteen is unlucky, 32" in err and tomllib.loads(out)
    assert "'badhook' (badhook 1.0) fail in vla_check: ZeroDivisionError" in err
    assert "oddhook" in err and "hooks 'dead' is installed (dead 1.0) but broken" in err
    assert main(["build", *TOYS, "--set", "spec.action_dim=13"]) == 2
    assert "a listener refuses this variant" in capsys.readouterr().err


def run(*words, **more):
    return subprocess.run([sys.executable, "-m", "vla.cli", *words], capture_output=True, text=True, **more)


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -c 'import sys; from vla.cli import main; sys.exit(main([\"list\"]))' | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0" and not done.stderr


def test_show_counts_bytes():
    from vla.cli.show import _bytes

    assert [_bytes(n) for n in (512, 2_070_000, 13_413_735_488)] == ["512 B", "2.07 MB", "13.4 GB"]


@pytest.mark.parametrize("dims", [3, 44])
def test_wide_tables_show_every_number(dims, capsys):
    from vla.cli import console

    names = ["step", *(f"left_arm_joint_number_{i}" for i in range(dims))]
    rows = [[str(t), *(f"+{t}.{i:03d} [dim](-{t}.{i:03d})[/]" for i in range(dims))] for t in range(3)]
    console.show(*console.tables("a title", names, rows))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 120 and shown.count("a title") == 1
    for t in range(3):
        for i in range(dims):
            assert f"+{t}.{i:03d} (-{t}.{i:03d})" in shown


def test_an_edited_variant_is_not_overwritten_unasked(world, tmp_path, capsys):
    file = tmp_path / "variant.toml"
    assert main(["build", *TOYS, "--out", str(tmp_path)]) == main(["build", *TOYS, "--out", str(tmp_path)]) == 0
    written = file.read_text()
    file.write_text(written + "# by hand\n")
    assert main(["build", *TOYS, "--out", str(tmp_path)]) == 2
    assert "--overwrite" in capsys.readouterr().err and file.read_text() == written + "# by hand\n"
    assert main(["build", *TOYS, "--out", str(tmp_path), "--overwrite"]) == 0 and file.read_text() == written
    file.write_text("mine = true\n")
    assert main(["build", *TOYS, "--out", str(tmp_path), "--overwrite"]) == 2 and file.read_text() == "mine = true\n"


def test_a_picture_of_somebody_else_is_not_replaced(world, tmp_path, capsys):
    for name in ("--svg", "--diagram"):
        file = tmp_path / f"{name}.svg"
        assert [main(["show", "toytype", "--no-sizes", name, str(file)]) for _ in range(2)] == [0, 0]
        file.write_text("<svg>mine</svg>")
        assert main(["show", "toytype", "--no-sizes", name, str(file)]) == 2
        assert "did not write" in capsys.readouterr().err and file.read_text() == "<svg>mine</svg>"
