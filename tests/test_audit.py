"""What verbs do beyond computing: no socket, no other program, nothing unpickled, nothing written outside their target."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vla.cli import main

HERE = Path(__file__).parent
for module in ("torch", "mujoco", "vla_head_flow", "vla_tokenizer_paligemma", "vla_dataset_tabletop"):
    pytest.importorskip(module)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with demonstrations, a trained run, an openpi checkpoint, and an empty home."""
    place = tmp_path_factory.mktemp("audit")
    for name in ("home", "tmp"):
        (place / name).mkdir()
    assert main(["record", "--preset", "tiny", "--episodes", "2", "--workers", "1", "--out", str(place / "data")]) == 0
    model = ["--type", "pi0", "--preset", "tiny", "--set", "backbone.llm.depth=1"]
    run = ["--steps", "1", "--batch-size", "2", "--no-progress", "--device", "cpu"]
    assert main(["train", *model, "--data", str(place / "data"), *run, "--out", str(place / "run")]) == 0
    return place


def tree(folder, without=()):
    files = (p for p in folder.rglob("*") if p.is_file() and not any(p.is_relative_to(w) for w in without))
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in files}


def audited(place, out, *words):
    """What the command did that it may not: the lines that the hook wrote."""
    record, scratch = place / "heard.txt", place / "tmp"
    env = {**os.environ, "HOME": str(place / "home"), "TMPDIR": str(scratch), "PYTHONDONTWRITEBYTECODE": "1"}
    before = tree(place, (place / out, scratch, record))
    command = [sys.executable, HERE / "helpers" / "audited.py", record, place / out, scratch, "--", *words]
    done = subprocess.run(list(map(str, command)), env=env, cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert tree(place, (place / out, scratch, record)) == before  # whatever went past the hook
    assert not list(place.glob(".*"))
    return record.read_text().splitlines()


TRAIN = "train --type pi0 --preset tiny --set backbone.llm.depth=1 --data data --steps 2 --batch-size 2 --device cpu"


@pytest.mark.parametrize("words", ["sample run", f"{TRAIN} --out new"])
def test_opening_sampling_and_training_touch_nothing_else(place, words):
    assert audited(place, "new", *words.split()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "show run",
        "show pi05_ki --preset tiny --svg new/a.svg",
        "list",
        "doctor",
        "data check data --pixels",
        "stats data --out new/norm_stats.json",
        "record --preset tiny --episodes 2 --workers 1 --out new/data",
        "eval run --preset tiny --set env.max_steps=3 --episodes 2 --num-workers 0 --out new/report",
        "parity run",
    ],
)
def test_verbs_touch_nothing_else(place, words):
    if words.startswith("parity"):
        pytest.importorskip("flax")
    assert audited(place, "new", *words.split()) == []


@pytest.mark.slow
def test_importing_touches_nothing_else(place):
    pytest.importorskip("tensorstore")
    spec = importlib.util.spec_from_file_location("of_openpi", HERE / "test_import_openpi.py")
    of_openpi = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(of_openpi)
    _, _, tree_of_openpi = of_openpi.made("pi0")
    of_openpi.write_orbax(place / "checkpoint" / "params", tree_of_openpi)
    sets = [word for path in ("spec.action_horizon=4",) for word in ("--set", path)]
    assert audited(place, "new2", "import", "openpi", "checkpoint", *sets, "--out", "new2") == []


def test_the_hook_hears(place):
    """A test that cannot fail would be none: this one does all that is forbidden."""
    script = """
import os, pickle, socket, subprocess, sys
sys.argv = ["audited.py", sys.argv[1], sys.argv[2], "--", "--version"]
sys.path.insert(0, sys.argv[0])
import importlib.util
spec = importlib.util.spec_from_file_location("audited", os.environ["AUDITED"])
audited = importlib.util.module_from_spec(spec); spec.loader.exec_module(audited)
audited.main(sys.argv)
socket.socket().close()
subprocess.run(["true"])
pickle.loads(pickle.dumps(os.getcwd))
for name in ("allowed/a", "allowed/.tmp-b-01234567", "outside"):
    open(name, "w").close()
os.rename("outside", "outside2")
"""
    (place / "allowed").mkdir()
    record = place / "heard.txt"
    env = {**os.environ, "AUDITED": str(HERE / "helpers" / "audited.py")}
    subprocess.run([sys.executable, "-c", script, str(record), "allowed"], env=env, cwd=place, check=True, timeout=60)
    heard = [line.split()[0] for line in record.read_text().splitlines()]
    assert heard == ["socket.__new__", "subprocess.Popen", "pickle.find_class", "open", "os.rename"]
