"""What importing, installing and pickling bring along: nothing that was not asked for, everything that is used."""

import ast
import builtins
import pickle
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest

import vla

ROOT = Path(__file__).parent.parent
PACKAGES = sorted([ROOT / "core", *ROOT.glob("plugins/*/*"), *ROOT.glob("clients/*")])
PACKAGES = [path for path in PACKAGES if (path / "pyproject.toml").is_file()]
each_package = pytest.mark.parametrize("path", PACKAGES, ids=lambda p: p.name)
OPTIONAL = {"tensorboardX"}  # taken in the place of tensorboard, which is declared, where somebody has it


def test_a_star_shadows_nothing_of_python():
    names: dict[str, object] = {}
    exec("from vla import *", names)
    assert "build" in names and "VlaError" in names
    assert not [name for name in names if hasattr(builtins, name) and not name.startswith("__")]
    assert vla.open is not builtins.open


def test_pytest_runs_of_others_do_not_meet_vla(tmp_path):
    (tmp_path / "test_x.py").write_text("import sys\ndef test(): assert 'vla' not in sys.modules\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "vla" not in tomllib.loads((ROOT / "core/pyproject.toml").read_text())["project"]["entry-points"].get(
        "pytest11", {}
    )


def test_the_kit_brings_its_plugin_when_it_is_used(tmp_path):
    text = (
        "from vla.testing import VisionConformance\n"
        "class TestIt(VisionConformance):\n"
        "    name = 'vit'\n"
        "    excuse = {'test_presets_stand_for_settings': 'a reason that a reader understands'}\n"
    )
    (tmp_path / "test_kit.py").write_text(text)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        "-k",
        "preset",
    ]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "declared exceptions" in done.stdout and "a reason that a reader understands" in done.stdout


@pytest.mark.parametrize("type", ["pi0", "pi05", "pi0_fast", "pi05_ki"])
def test_a_variant_pickles_and_prints_in_a_line(type):
    variant = vla.build(type=type, preset="tiny")
    again = pickle.loads(pickle.dumps(variant))
    assert again == variant and again.to_toml() == variant.to_toml()
    for thing in (variant, variant.head):
        assert len(repr(thing)) < 160 and "\n" not in repr(thing)
    assert type in repr(variant) and "paligemma(siglip, gemma" in repr(variant)
    assert pickle.loads(pickle.dumps(variant.backbone)) == variant.backbone


def test_a_policy_pickles_and_prints_in_a_line():
    pytest.importorskip("torch")
    from vla.policy import untrained
    from vla.tokenizer import open_tokenizer
    from vla.transforms.stats import Stats

    variant = vla.build(type="pi05", preset="tiny", set={"backbone.llm.depth": 1, "backbone.vision.depth": 1})
    one = Stats(mean=np.zeros(8), std=np.ones(8), q01=-np.ones(8), q99=np.ones(8))
    policy = untrained(variant, {"state": one, "actions": one}, open_tokenizer(variant.tokenizer, variant.spec), seed=5)
    assert "torch" in repr(policy) and len(repr(policy)) < 160
    image = np.zeros((64, 64, 3), np.uint8)
    seen = {"images": {n: image for n in variant.spec.cameras}, "state": np.zeros(8, np.float32), "prompt": "push"}
    again = pickle.loads(pickle.dumps(policy))
    for _ in range(2):  # the stream of noise goes on where it was
        assert np.array_equal(policy.infer(seen)["actions"], again.infer(seen)["actions"])
    assert again.name == policy.name


@each_package
def test_what_is_imported_is_declared(path):
    """By the package itself: a dependency of a dependency may go away."""
    project = tomllib.loads((path / "pyproject.toml").read_text())["project"]
    lines = [
        *project.get("dependencies", []),
        *(d for extra in project.get("optional-dependencies", {}).values() for d in extra),
    ]
    if any(_plain(line) == "vla-core" for line in lines):  # what core promises: settings are attrs, arrays numpy
        lines += tomllib.loads((ROOT / "core/pyproject.toml").read_text())["project"]["dependencies"]
    declared = {_plain(line) for line in lines} | {_plain(project["name"])}
    dists, missing = distributions(), set()
    for file in sorted((path / "src").rglob("*.py")):
        for root in roots(file) - sys.stdlib_module_names - OPTIONAL:
            owners = {_plain(name) for name in dists.get(root, [root])}
            if not owners & declared:
                missing.add(f"{file.relative_to(ROOT)} imports {root}: declare {' or '.join(sorted(owners))}")
    assert not missing, "\n".join(sorted(missing))


@each_package
def test_what_is_declared_is_imported(path):
    project = tomllib.loads((path / "pyproject.toml").read_text())["project"]
    used = {root for file in (path / "src").rglob("*.py") for root in roots(file)}
    dists = distributions()
    owners = {_plain(name) for root in used for name in dists.get(root, [root])}
    ours = {_plain(line) for line in project.get("dependencies", []) if _plain(line).startswith("vla-")}
    needless = {_plain(line) for line in project.get("dependencies", [])} - owners - ours - AT_RUN_TIME
    assert not needless, f"{path.name} declares what it never imports: {sorted(needless)}"


# Loaded by others at run time: mujoco draws through it.
AT_RUN_TIME = {"pyopengl"}


def distributions() -> dict[str, list[str]]:
    """Package -> the distributions that bring it; ours are installed in place, which the metadata does not say."""
    ours = {"vla": ["vla-core"]}
    for path in PACKAGES:
        ours |= {folder.name: [path_name(path)] for folder in (path / "src").iterdir() if folder.name != "vla"}
    return {**packages_distributions(), **ours}


def path_name(path: Path) -> str:
    return tomllib.loads((path / "pyproject.toml").read_text())["project"]["name"]


def roots(file: Path) -> set[str]:
    """The packages that a file imports, at any depth; those for type checkers alone are left out."""
    found = set()
    todo: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
        todo.extend(ast.iter_child_nodes(node))
    return found


def _plain(requirement: str) -> str:
    import re

    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", requirement)[0]).lower()
