"""docs/fine-tune.md as its reader goes through it: every line is run, in order, on the tiny openpi checkpoint of the
goldens and on recordings of a robot with 44 joints and one camera. The run is killed and goes on with `--out` alone.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

for needed in ("torch", "jax", "av", "orbax.checkpoint", "vla_dataset_lerobot", "vla_head_flow"):
    pytest.importorskip(needed)

from shared_data import GOLDENS, SHARED, needs  # noqa: E402

import vla  # noqa: E402
from vla.datasets import open_dataset  # noqa: E402
from vla.testing.closeness import close  # noqa: E402
from vla.training.checkpoints import checkpoint_steps  # noqa: E402

ROOT = Path(__file__).parents[1]
CHECKPOINT = GOLDENS / "openpi" / "pi05"
DATA = SHARED / "data" / "robot" / "gr00t_picknplace"
PAGE = (ROOT / "docs" / "fine-tune.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LINES = [line for kind, code in BLOCK.findall(PAGE) if kind == "bash" for line in code.splitlines()]
PYTHON = [code for kind, code in BLOCK.findall(PAGE) if kind == "python"]
pytestmark = [pytest.mark.slow, needs(CHECKPOINT, DATA)]


def environment():
    bin_folder = str(Path(sys.executable).parent)
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "CHECKPOINT": str(CHECKPOINT), "DATA": str(DATA), "OMP_NUM_THREADS": "1"}


def run(line, folder, check=True):
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 or not check, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The page gone through: its folder, and what its lines printed."""
    folder = tmp_path_factory.mktemp("robot")
    imports, trains, goes_on, samples = LINES
    assert len(LINES) + len(PYTHON) <= 6
    said = [run(imports, folder)]
    child = subprocess.Popen(
        ["bash", "-c", f"exec {trains}"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    for _ in range(2400):  # two minutes
        if checkpoint_steps(folder / "runs" / "mine") or child.poll() is not None:
            break
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    output = child.communicate(timeout=60)[0].decode()
    assert child.returncode == -signal.SIGKILL, output
    killed_at = checkpoint_steps(folder / "runs" / "mine")
    assert killed_at and killed_at[-1] < 40 and not (folder / "runs" / "mine" / "model").exists()
    early = vla.open(f"{folder}/runs/mine@{killed_at[-1]}")  # a policy already
    assert early.metadata["record"]["steps"] == killed_at[-1]
    said += [output, run(goes_on, folder), run(samples, folder)]
    said.append(run(shlex.join([sys.executable, "-c", PYTHON[0]]), folder))
    return folder, said


def test_every_line_of_the_page_does_what_it_says(told):
    folder, (imported, trained, _, sampled, opened) = told
    assert "statistics: none beside the weights" in imported.stderr
    for line in re.findall(r"^  (?:spec|robot)\..*|^statistics: .*", PAGE, re.M):
        assert line in trained, f"the page shows {line!r}, and the command said\n{trained}"
    assert "recorded" in sampled.stdout
    assert opened.stdout.split("\n")[:2] == ["torch (50, 44)", "jax (50, 44)"]
    record = vla.open(folder / "runs" / "mine").metadata["record"]
    assert record["steps"] == 40 and record["weights"]["base"] == str(folder / "runs" / "base")
    assert set(record["weights"]["reinit"]) == {
        "backbone.llm.embedder.weight", "head.action_in_proj.weight", "head.action_out_proj.weight", "head.action_out_proj.bias",
    }  # fmt: skip


def test_both_frameworks_act_alike_in_the_units_of_the_robot(told):
    data = open_dataset(str(DATA))
    seen = data.sample(100, 50)
    chunks = [vla.open(told[0] / "runs" / "mine", f).infer(seen, seed=3)["actions"] for f in ("torch", "jax")]
    close(chunks[1], chunks[0], 1e-4)
    stats = vla.open(told[0] / "runs" / "mine").model.stats["actions"]
    recorded = data.actions()
    assert stats.mean.shape == (44,) and np.all(stats.q01 >= recorded.min(0)) and np.all(stats.q99 <= recorded.max(0))
    moving = recorded.std(0) > 0.05
    spread = np.abs(chunks[0] - recorded.mean(0))[:, moving] / recorded.std(0)[moving]
    assert moving.sum() > 5 and np.median(spread) < 10  # radians, not numbers between -1 and 1 or rubbish


def test_the_options_of_the_page_are_those_that_the_refusals_name(told, tmp_path):
    """From the bare command the `fix:` lines lead to the command of the page: nothing has to be looked up."""
    words = shlex.split(LINES[1])
    bare = [*words[: words.index("--fit-data")], "--steps", "1", "--batch-size", "2"]
    bare[bare.index("--out") + 1] = str(tmp_path / "run")
    named = []
    for _ in range(4):
        done = run(" ".join(bare + named), told[0], check=False)
        if done.returncode == 0:
            break
        fix = done.stderr.rpartition("fix:")[2]
        options = re.search(r"--(?:fit-data|set|reinit)(?:(?! or )[^;(,]|,(?! or ))*", fix)[0]
        named += [w for w in shlex.split(options) if w]
    assert done.returncode == 0, done.stderr
    wanted = set(words[words.index("--fit-data") : words.index("--steps")])
    assert wanted <= {word for text in named for word in (text, *text.split(","))}


def test_the_lines_of_the_readme_work_on_a_real_dataset(tmp_path):
    block = next(
        code for kind, code in BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8")) if "vla train" in code
    )
    for line in block.splitlines():
        line = line.partition("#")[0].strip().replace("DATA", "$DATA")
        if line.startswith("vla eval"):
            continue  # of a policy for an environment
        run(line + (" --steps 2 --batch-size 2" if line.startswith("vla train") else ""), tmp_path)
