"""Every verb, from wheels, in a fresh environment, as somebody has it who installed from an index (`make smoke`).

    python scripts/smoke.py --framework torch|jax|both|neither [--python python3.12] [--dist dist]

Builds the wheels when `--dist` has none, installs them (not editable) in a fresh environment,
and types one command per verb outside the repository. What a verb cannot do without a framework must be one clear error
with exit status 2, never a traceback.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINS = ("torch", "jax", "flax", "optax")  # the versions of requirements-dev.txt, which every lane here uses
TINY = "--steps 4 --batch-size 2 --log-every 2 --val-episodes 0"

# Verb, words, needs: "" nothing, "one" a framework (else exit status 2), "both" both of them.
COMMANDS = (
    ("build", "--head ki --tokenizer fast --backbone paligemma --preset tiny --robot tabletop --out mine", ""),
    ("build", "--head ki --tokenizer paligemma --preset tiny --out never || test $? = 2", ""),
    ("list", "", ""),
    ("show", "mine", ""),
    ("fits", "--head flow", ""),
    ("doctor", "", ""),
    ("record", "--env tabletop --preset tiny --episodes 3 --out data", ""),
    ("stats", "data", ""),
    ("tokenizer", "fit data --horizon 10 --out words", ""),
    ("tokenizer", "bench data --tokenizer fast", ""),
    ("new", "head smoke-head", ""),
    ("train", "mine --data data --out first --framework {framework} " + TINY, "one"),
    ("sample", "first/model --data data --framework {framework}", "one"),
    ("eval", "first/model --env tabletop --preset tiny --episodes 2 --framework {framework} --out report", "one"),
    ("serve", "first/model --check --seconds 1 --hz 0.5 --max-batch 1 --framework {framework}", "one"),
    ("train", "first/model --data data --out second --framework {framework} --lora.rank 2 " + TINY, "one"),
    ("merge", "first/model second/adapter --out merged", "one"),
    ("parity", "first/model", "both"),
)


def pins() -> list[str]:
    """Requirement lines of the frameworks."""
    lines = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.partition("==")[0] in PINS]


def install(python: str, env: Path, wheels: list[Path], framework: str, pip_args: list[str]) -> None:
    """A fresh environment with the wheels and the frameworks asked for."""
    subprocess.run([python, "-m", "venv", str(env)], check=True)
    extra = {"torch": ["torch"], "jax": ["jax", "flax", "optax"], "both": list(PINS), "neither": []}[framework]
    wanted = [line for line in pins() if line.partition("==")[0] in extra]
    wanted.append("prometheus-client>=0.20")  # of the extra `serve`; its other needs come with vla-client
    pip = [str(env / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pip_args]
    subprocess.run([*pip, *map(str, wheels), *wanted], check=True, cwd=env)


def run_all(env: Path, work: Path, framework: str) -> list[str]:
    """Type every command; gives what went wrong."""
    vla = env / "bin" / "vla"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VLA_"))}
    clean |= {"PATH": f"{env / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    named = {"torch": "torch", "jax": "jax", "both": "torch", "neither": "torch"}[framework]
    wrong = []
    for verb, words, needs in COMMANDS:
        able = not needs or (framework == "both" if needs == "both" else framework != "neither")
        line = f"{shlex.quote(str(vla))} {verb} {words.format(framework=named)}"
        began = time.perf_counter()
        done = subprocess.run(line, shell=True, cwd=work, env=clean, capture_output=True, text=True, timeout=600)
        seconds = time.perf_counter() - began
        said = (done.stdout + done.stderr).strip()
        good = done.returncode == 0 if able else done.returncode == 2
        good = good and "Traceback (most recent call last)" not in said
        print(f"{'ok  ' if good else 'FAIL'} {seconds:5.1f} s  vla {verb} {words.format(framework=named)}", flush=True)
        if not good:
            wrong.append(f"vla {verb} {words}: exit status {done.returncode}\n" + "\n".join(said.splitlines()[-15:]))
    return wrong


def main() -> int:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("torch", "jax", "both", "neither"), default="both")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    parser.add_argument("--pip-args", default=os.environ.get("PIP_ARGS", ""))
    given = parser.parse_args()
    if not list(given.dist.glob("*.whl")):
        from release_check import build

        given.dist.mkdir(parents=True, exist_ok=True)
        build(given.dist)
    with tempfile.TemporaryDirectory() as folder:
        env, work = Path(folder) / "env", Path(folder) / "work"
        work.mkdir()
        install(given.python, env, sorted(given.dist.glob("*.whl")), given.framework, shlex.split(given.pip_args))
        wrong = run_all(env, work, given.framework)
    for text in wrong:
        print("\n" + text)
    print(f"{len(COMMANDS) - len(wrong)} passed, {len(wrong)} failed")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
