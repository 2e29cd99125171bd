"""Every way out that a message names works when it is typed: into the verb that printed it, or as the command it is.

The table below makes mistakes; each `fix:` line is read as a person would read it, and typed.
"""

import ast
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

for needed in ("torch", "vla_dataset_lerobot", "vla_head_ki", "vla_tokenizer_fast", "vla_tokenizer_paligemma"):
    pytest.importorskip(needed)

from vla.cli import VERBS, main  # noqa: E402
from vla.datasets import DatasetInfo, create_dataset  # noqa: E402

ROOT = Path(__file__).parents[1]
FILES = [*ROOT.glob("core/src/vla/**/*.py"), *ROOT.glob("plugins/*/*/src/**/*.py")]
OPTION = r"--[a-z][\w.-]*"
ELSEWHERE = {"--nproc-per-node", "--no-python", "--no-deps", "--no-build-isolation", "--find-links", "--index-url"}


# ---- every option and every command that a way out names exists --------------------------------------------------------


def texts(node):
    """The texts of an expression, with X where a value is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
    else:
        for child in ast.iter_child_nodes(node):
            yield from texts(child)


def ways_out():
    """(file:line, text) of every `fix=` and `fix = `."""
    for file in FILES:
        if "templates" in file.parts or "testing" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            values = []
            if isinstance(node, ast.Call):
                values = [k.value for k in node.keywords if k.arg == "fix"]
            elif isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "fix" for t in node.targets):
                values = [node.value]
            for value in values:
                for text in texts(value):
                    yield f"{file.relative_to(ROOT)}:{node.lineno}", text


@pytest.fixture(scope="module")
def options():
    """Verb -> its options."""
    import contextlib
    import io

    found = {}
    for verb in VERBS:
        for words in (
            ([verb],)
            if verb not in ("tokenizer", "data")
            else ([verb], [verb, "fit"], [verb, "bench"], [verb, "check"])
        ):
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                main([*words, "--help"])
            found.setdefault(verb, set()).update(re.findall(OPTION, said.getvalue()))
    return found


def test_every_option_and_command_that_a_way_out_names_exists(options):
    every = set().union(*options.values()) | ELSEWHERE
    wrong, seen = [], 0
    for where, text in ways_out():
        for name in re.findall(rf"(?<![\w-]){OPTION}", text):
            seen += 1
            if name.rstrip(".") not in every and "X" not in text[text.index(name) :][: len(name) + 1]:
                wrong.append(f"{where}: no verb has {name}")
        for verb, rest in re.findall(r"\bvla ([a-z]+)((?: [^,;`()]+)?)", text):
            if verb not in VERBS:
                wrong.append(f"{where}: there is no vla {verb}")
                continue
            for name in re.findall(rf"(?<![\w-]){OPTION}", rest):
                if name.rstrip(".") not in options[verb]:
                    wrong.append(f"{where}: vla {verb} has no {name}")
    assert seen > 60 and not wrong, "\n".join(wrong)


# ---- what is printed is typed ------------------------------------------------------------------------------------------

TINY = [
    "--preset", "tiny", "--set", "spec.image_size=[16, 16]", "--set", "backbone.vision.depth=1",
    "--set", "backbone.llm.depth=1", "--set", "spec.action_horizon=4",
]  # fmt: skip
ONE_STEP = ["--steps", "1", "--batch-size", "2", "--no-progress"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a dataset of one camera `top` and 44 dims, one of 5 dims, and a model trained on that."""
    here, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    for name, camera, dims in (("wide", "base_0_rgb", 44), ("arm", "base_0_rgb", 5), ("top", "top", 5)):
        with create_dataset(here / name, DatasetInfo({camera: (16, 16)}, dims, dims, 10.0)) as writer:
            for row in rng.normal(size=(12, dims)).astype(np.float32):
                image = np.full((16, 16, 3), 80, np.uint8)
                writer.add({"images": {camera: image}, "state": row, "action": row, "prompt": "go"})
            writer.end_episode()
    words = ["train", "--type", "pi0", *TINY, "--data", str(here / "arm"), "--out", str(here / "run"), *ONE_STEP]
    assert main(words) == 0
    return here


# What is typed, and what stands for a word in capitals.
MISTAKES = [
    "build --hed ki --tokenizer fast",
    "build --head ar --tokenizer binning --set spec.action_dim=7",
    "build --head ki --tokenizer fast --set spec.cameras=top",
    "build --head ki --tokenizer fast --set spec.max_token_len",
    "build --head ki --tokenizer fast --preset tiny --init {model}",
    "show",
    "stats {arm} --set data.state_key=pose",
    "stats {arm} --robot aloha",
    "stats {arm} --out {model}",
    "tokenizer fit {arm} --tokenizer binning --horizon 4",
    "tokenizer bench {arm} --tokenizer binning --horizon 4 --set codes=128",
    "sample {model} --set spec.action_dim=3",
    "sample {model} --data {top}",
    "parity {model} --set data.stride=2",
    "train --type pi0 TINY --out {new} ONE",
    "train --type pi0 TINY --data {wide} --out {new} ONE",
    "train --type pi0 TINY --data {top} --out {new} ONE",
    "train --type pi0 TINY --data {arm} --out {run} ONE",
    "train --type pi0 TINY --data {arm} --out {new} ONE --device cuda:7",
    "train --type pi0 TINY --data {arm} --out {new} ONE --lora.alpha 4",
    "train --type pi0 TINY --data {arm} --out {new} ONE --freeze backbone.vision",
    "train --type pi0_fast TINY --data {arm} --out {new} ONE --set spec.max_token_len=20",
    "train --type pi0 TINY --data {arm} --out {new} ONE --stats base",
    "train --type pi0 TINY --data {arm} --out {new} ONE --stats {none}",
    "train {model} --recipe {recipe} --data {arm} --out {new} ONE",
]  # fmt: skip
NAMES = {
    ("--data", "FOLDER"): "{arm}", ("--out", "FOLDER"): "{new}", ("--out", "DIR"): "{new}", "FOLDER": "{new}",
    "DATA": "{arm}", "FILE": "{file}", ("--robot", "NAME"): "plain", "MODEL": "{model}",
}  # fmt: skip


def advice(said):
    """The ways out of a message, each a list of words: options to add, or a whole command after `vla`."""
    line = "\n".join(re.findall(r"(?m)^  (?:fix:|one (?:change|setting) that fits:)(.*(?:\n    .*)*)", said))
    value = r"(?:'[^']*'|[^\s,;:()'])+"
    found = []
    for way in re.split(r", or |; |   or   |,? or (?=--|vla )|, then |, e\.g\. (?=--)", line):
        # a command of its own, or options of the verb at hand, without those that wait for a choice of the reader
        if command := re.search(r"(?:^|: |`| )vla ([a-z]+(?: [^`;,]+)?)", way):
            found.append(("vla", shlex.split(command[1].strip().rstrip("."))))
        elif options := re.findall(rf"(?<![\w-])(?<!another )(?<!lower )(?<!of )({OPTION})(?:[ =]({value}))?", way):
            words = [w for name, text in options for w in [name, *shlex.split(text)]]
            found.append(("leave out" if "leave" in way else "add", words))
    return found


def typed(words, more, leave_out=False):
    """The command with options added, or left out; one that was there already has the new value."""
    words = list(words)
    while more:
        name, *rest = more
        value = rest[0] if rest and not rest[0].startswith("--") else None
        more = rest[1:] if value is not None else rest
        key = value.partition("=")[0] if name == "--set" and value else None
        for i in range(len(words) - 1, -1, -1):
            same = words[i] == name and (key is None or words[i + 1].partition("=")[0] in (key, key.rpartition(".")[2]))
            if same:
                del words[i : i + (2 if i + 1 < len(words) and not words[i + 1].startswith("--") else 1)]
        if not leave_out:
            words += [name] if value is None else [name, value]
    return words


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_a_message_advises_works_when_typed(world, tmp_path, mistake, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stats = tmp_path / "norm_stats.json"
    # of a robot with a wider state than the model
    (tmp_path / "aloha.toml").write_text('vla_recipe = 1\ntype = "pi0"\nrobot = "aloha"\n')
    stats.write_bytes((world / "run" / "model" / "norm_stats.json").read_bytes())
    places = {
        "arm": world / "arm", "wide": world / "wide", "top": world / "top", "model": world / "run" / "model",
        "run": world / "run", "new": tmp_path / "new", "file": stats,
        "none": tmp_path / "none.json", "recipe": tmp_path / "aloha.toml",
    }  # fmt: skip

    def filled(words):
        words = [NAMES.get((before, w), NAMES.get(w, w)) for before, w in zip(["", *words], words)]
        return [w.format(**places) if re.fullmatch(r"\{\w+\}", w) else w for w in words]

    words = []
    for word in mistake.split():
        words += {"TINY": TINY, "ONE": ONE_STEP}.get(word, [word])
    words = filled(words)
    assert main(words) == 2
    said = capsys.readouterr().err
    ways = advice(said)
    assert ways, f"no way out can be typed:\n{said}"
    first = said.splitlines()[0]
    problems = []
    for kind, more in ways:
        more = filled(more)
        if any(re.fullmatch(r"[A-Z]{2,}(=VALUE)?|.*=VALUE|\.\.\.", w) for w in more):
            continue  # something that only the reader knows
        again = more if kind == "vla" else typed(words, more, kind == "leave out")
        if kind == "vla" and more[0] == "train":
            again = typed(typed(again, ONE_STEP), ["--out", str(places["new"])])
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        status = main(again)
        after = capsys.readouterr().err
        # what is wrong beside it is the next message; the same one, or an option that is not there, is bad advice
        line = after.splitlines()[0] if after else ""
        if status == 2 and (line == first or "option" in line or "no such" in line):
            problems.append(f"vla {shlex.join(again)}\n{after}")
    assert not problems, f"{said}\n--- typed ---\n" + "\n".join(problems)
