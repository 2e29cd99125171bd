"""What stands around the code is true: workflows and pages call make targets that exist, forms parse, versions agree."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FORMS = sorted(ROOT.glob(".github/**/*.yml"))
PAGES = [*FORMS, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "RELEASING.md", ".ci/run"))]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))


@pytest.mark.parametrize("file", FORMS, ids=lambda f: f.name)
def test_forms_and_workflows_parse(file):
    read = yaml.safe_load(file.read_text())
    assert isinstance(read, dict)
    if file.parent.name == "workflows":
        steps = [s for job in read["jobs"].values() for s in job["steps"]]
        assert any("run" in step for step in steps)
        assert read["permissions"] == {"contents": "read"}


@pytest.mark.parametrize("file", PAGES, ids=lambda f: f.name)
def test_every_make_target_that_is_named_exists(file):
    named = set(re.findall(r"(?:^|`|run: )make ([a-z][a-z-]*)", file.read_text(), re.M))
    assert named <= targets(), named - targets()


def test_the_pages_name_targets_at_all():
    assert {"test", "test-all", "demo", "interop"} <= targets()
    assert "make release-check" in (ROOT / "RELEASING.md").read_text()


def test_one_version_in_every_package():
    found = {}
    for file in [ROOT / "core/pyproject.toml", *ROOT.glob("plugins/*/*/pyproject.toml")]:
        found[str(file)] = re.search(r'^version = "(.+)"$', file.read_text(), re.M).group(1)
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M).group(1)
    assert set(found.values()) == {cited}
