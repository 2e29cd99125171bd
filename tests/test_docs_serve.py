"""docs/serve.md, typed from top to bottom in one shell: what it says about serving is what happens."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import vla
from vla.cli import main
from vla.training.config import TrainConfig

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "serve.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
OPENPI = os.environ.get("VLA_OPENPI_CLIENT", "")


@pytest.mark.slow
def test_the_page_from_top_to_bottom(tmp_path):
    if not shutil.which("curl"):
        pytest.skip("the page uses curl")
    scene = ["--env", "tabletop", "--preset", "tiny", "--set", "env.image_size=32"]
    assert main(["record", *scene, "--episodes", "3", "--workers", "1", "--out", str(tmp_path / "data")]) == 0
    variant = vla.build(type="pi0", robot="tabletop", preset="tiny", set={"backbone.llm.depth": 1})
    vla.train(variant, tmp_path / "data", out=tmp_path / "runs" / "mine", config=TrainConfig(steps=1, batch_size=2))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script, left_out = ["set -e"], 0
    for number, (language, code) in enumerate(BLOCKS):
        code = code.replace("8000", port)
        if language == "bash":
            script.append(code)
        elif language == "python":
            interpreter = OPENPI if "openpi_client" in code else sys.executable
            left_out += not interpreter
            file = tmp_path / f"block{number}.py"
            file.write_text(code)
            script += [f"{shlex.quote(interpreter)} -W ignore {file}"] if interpreter else []
    assert left_out <= 1, "only openpi's client may be absent"
    (tmp_path / "page.sh").write_text("\n".join([*script, "echo THE END"]))
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    words = ["timeout", "280", "bash", "page.sh"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("THE END\n"), done.stdout[-2000:] + done.stderr[-4000:]
    for said in ("it keeps up", '"action_horizon"', "EMBODIMENT", "401\n200\n"):
        assert said in done.stdout, said
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [line for kind, code in BLOCKS if kind in ("bash", "text") for line in
                                     re.findall(r"vla (?:serve|eval) .*", code.replace("\\\n", " "))])  # fmt: skip
def test_commands_of_the_page_parse(command):
    check(shlex.split(command.removesuffix("&"))[1:])


def test_the_container_starts_what_there_is():
    (text,) = [code for kind, code in BLOCKS if kind == "dockerfile"]
    words = re.search(r"^CMD (\[.*\])$", text, re.M)[1]
    import json

    check(json.loads(words)[1:])
    named = re.findall(r"\b(vla-[a-z-]+)", text)
    names = {
        re.search(r'^name = "(.+)"', p.read_text(), re.M)[1]
        for p in ROOT.glob("**/pyproject.toml")
        if ".venv" not in str(p)
    }
    assert set(named) <= names, set(named) - names


def check(words):
    """The options are options of the verb."""
    from importlib import import_module

    from vla.cli.options import options_of, parse

    verb, *rest = words
    function = {"serve": "serve", "eval": "evaluate"}[verb]
    parse(options_of(getattr(import_module(f"vla.cli.{verb}"), function), {}), rest, verb)


def test_every_kind_of_error_is_explained():
    from vla_client.wire import KINDS

    text = PAGE.read_text()
    assert all(f"`{kind}`" in text for kind in KINDS)
