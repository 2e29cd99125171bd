"""The repository as a whole: every plugin is listed everywhere, one version, tests where pytest can live with them."""

import ast
import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = [
    ROOT / "core",
    *sorted(path.parent for path in ROOT.glob("plugins/*/*/pyproject.toml")),
    *sorted(path.parent for path in ROOT.glob("clients/*/pyproject.toml")),
]
TABLES = {path: tomllib.loads((path / "pyproject.toml").read_text()) for path in PACKAGES}
LABELS = [str(path.relative_to(ROOT)) for path in PACKAGES]
WORKSPACE = tomllib.loads((ROOT / "pyproject.toml").read_text())
each_package = pytest.mark.parametrize("path", PACKAGES, ids=LABELS)


def test_every_package_folder_is_a_package():
    places = [*ROOT.glob("plugins/*/*"), *ROOT.glob("clients/*")]
    folders = [f for f in places if f.is_dir() and any(f.rglob("*.py"))]
    assert sorted(folders) == sorted(PACKAGES[1:])


def test_requirements_list_exactly_the_packages():
    lines = re.findall(r"^-e \./(\S+)$", (ROOT / "requirements-dev.txt").read_text(), re.M)
    assert sorted(lines) == sorted(LABELS)


def test_the_private_distribution_lists_exactly_the_packages():
    project = WORKSPACE["project"]
    assert "Private :: Do Not Upload" in project["classifiers"]
    wanted = {
        f"{TABLES[path]['project']['name']}{'[serve]' * (label == 'core')} @ {{root:uri}}/{label}"
        for path, label in zip(PACKAGES, LABELS, strict=True)
    }
    assert set(project["dependencies"]) == wanted


def test_one_version_everywhere():
    import vla

    versions = {label: TABLES[path]["project"]["version"] for path, label in zip(PACKAGES, LABELS, strict=True)}
    versions["workspace"] = WORKSPACE["project"]["version"]
    assert set(versions.values()) == {vla.__version__}, versions


@each_package
def test_packages_are_built_alike(path):
    table = TABLES[path]
    project = table["project"]
    assert table["build-system"]["build-backend"] == "hatchling.build"
    python = ">=3.9" if path.parent.name == "clients" else ">=3.11"  # a robot's computer is older
    assert project["requires-python"] == python and project["license"] == "Apache-2.0" and project["description"]
    required = {re.split(r"[^\w-]", line)[0] for line in project.get("dependencies", [])}
    frameworks = {"torch", "jax", "jaxlib", "flax", "optax", "torchvision"}
    assert not required & frameworks, "frameworks are extras, never dependencies"
    (module,) = table["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert (path / module / "__init__.py").exists()
    if path.name != "core":
        assert ("vla-core" in required) == (path.parent.name != "clients")
        assert module == f"src/{project['name'].replace('-', '_')}"


@each_package
def test_entry_points_lead_to_parts_of_their_name(path):
    from vla import registry
    from vla.parts import ModelType, Part

    groups = {group: kind for kind, group in registry.ALL_GROUPS.items()}
    for group, names in TABLES[path]["project"].get("entry-points", {}).items():
        if not group.startswith("vla."):
            continue
        assert set(names) <= {item.name for item in registry.listed(groups[group])}, (
            f"the installed metadata is old: make install (or pip install --no-deps --no-build-isolation -e {path})"
        )
        for name in names:
            thing = registry.find(groups[group], f"{TABLES[path]['project']['name']}/{name}").load()
            assert isinstance(thing, (Part, ModelType)) or groups[group] == registry.HOOKS


def test_known_parts_know_ours():
    from vla import registry

    groups = {group: kind for kind, group in registry.ALL_GROUPS.items()}
    published = {
        (groups[group], name): TABLES[path]["project"]["name"]
        for path in PACKAGES
        for group, names in TABLES[path]["project"].get("entry-points", {}).items()
        if group in groups
        for name in names
    }
    known = {(kind, name): dist for kind, names in registry.known_parts().items() for name, dist in names.items()}
    assert published.items() <= known.items()


@each_package
def test_the_install_line_leads_to_the_package(path):
    from vla.registry import install_line

    if path.parent.parent.name == "plugins":
        name, label = TABLES[path]["project"]["name"], path.relative_to(ROOT)
        assert install_line(name) == f"pip install {name}   (in a clone of vla: pip install ./{label})"


@each_package
def test_what_is_installed_is_this_checkout(path):
    """An editable install silently becomes a copy when `pip install .` runs after it."""
    name = TABLES[path]["project"]["name"]
    try:
        origin = distribution(name).read_text("direct_url.json") or ""
    except PackageNotFoundError:
        pytest.fail(f"{name} is not installed: make install (or pip install --no-deps --no-build-isolation -e {path})")
    assert '"editable": true' in origin and str(path) in origin, f"{name} is a copy: pip install -e {path}"


def test_no_test_folder_is_a_package():
    """With --import-mode=importlib an __init__.py beside tests makes pytest register plugins twice."""
    assert not [p for p in ROOT.glob("**/tests/__init__.py") if not any(x.startswith(".venv") for x in p.parts)]


def test_test_files_of_one_folder_kind_have_telling_names():
    files = [
        p
        for pattern in ("core/tests/test_*.py", "tests/test_*.py", "plugins/*/*/tests/test_*.py", "clients/*/tests/test_*.py")
        for p in ROOT.glob(pattern)
    ]
    assert len({p.name for p in files}) == len(files), sorted(p.name for p in files)


def test_no_machine_paths_in_the_code():
    tracked = [
        p
        for pattern in ("core/**/*", "plugins/**/*", "clients/**/*", "tests/*", "benchmarks/*", "*.md", "Makefile")
        for p in ROOT.glob(pattern)
    ]
    needle = "/" + "work/"
    found = [
        str(p.relative_to(ROOT))
        for p in tracked
        if p.is_file() and p.suffix in (".py", ".toml", ".md", ".txt", "") and needle in p.read_text(errors="ignore")
    ]
    assert not found


TEST_FILES = sorted(
    file
    for pattern in ("core/tests/*.py", "plugins/*/*/tests/*.py", "tests/**/*.py", "core/src/vla/testing/*.py")
    for file in ROOT.glob(pattern)
)


def without_scale(tree):
    """Lines that compare floats by an absolute difference: another processor, or smaller values, and they say nothing."""
    negated = {id(node.operand) for node in ast.walk(tree) if isinstance(node, ast.UnaryOp)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            words = {keyword.arg for keyword in node.keywords}
            if (
                (name == "assert_allclose" and ("atol" in words or "rtol" not in words))
                or name == "assert_close"  # torch.testing: 1e-5 of whatever it is
                or (name == "allclose" and id(node) not in negated)
                or (name == "approx" and "abs" in words)
            ):
                yield node.lineno
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Lt, ast.LtE)):
            bound = node.comparators[0]
            small = isinstance(bound, ast.Constant) and isinstance(bound.value, float) and bound.value <= 1e-3
            if small and any(getattr(n, "attr", getattr(n, "id", "")) == "abs" for n in ast.walk(node.left)):
                yield node.lineno


@pytest.mark.parametrize(
    "line", ["np.allclose(a, b)", "assert np.abs(a - b).max() < 1e-6", "assert_allclose(a, b, atol=1)"]
)
def test_an_absolute_comparison_is_seen(line):
    assert list(without_scale(ast.parse(line))) == [1]


def test_no_test_compares_floats_without_a_scale():
    """`vla.testing.closeness.close` has one; equal bits are for what is copied, or computed twice by one program."""
    found = {str(file.relative_to(ROOT)): list(without_scale(ast.parse(file.read_text()))) for file in TEST_FILES}
    assert len(found) > 100 and not {file: lines for file, lines in found.items() if lines}
