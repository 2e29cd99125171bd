"""Every code block of the documentation is executed, page by page, in a folder of its own; every link leads somewhere.

Python blocks of a page share one namespace and run in a subprocess; so do shell blocks. `text` blocks show, and are not run.
TOML blocks must be variant files that resolve. One thing is different from a reader's day: `pip install -e X` installs
X into a folder on the path, without looking at an index, since tests run offline.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vla

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for p in (ROOT / "docs").rglob("*.md") if p.name not in ("architecture.md", "reference.md"))
OURS = [p for p in PAGES if p.parent.name == "parts" or p.stem in ("publish-a-head", "python-api", "rtc", "hugging-face", "recorded-data", "rtc")]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
PIP = """
set -e
pip() {
    local words=()
    for word in "${@:2}"; do
        case "$word" in -e) ;; *) word="${word%%\\[*}"; words+=("$word");; esac
    done
    python -m pip install -q --no-deps --no-build-isolation --no-index --disable-pip-version-check --upgrade --target "$SITE" "${words[@]}"
}
"""


def run(folder, *words):
    bin_folder = str(Path(sys.executable).parent)
    env = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "SITE": str(folder / "site")}
    env.update(PYTHONPATH=str(folder / "site"), PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def test_the_pages_are_there():
    assert {p.stem for p in OURS} >= {
        "head", "tokenizer", "vision", "llm", "backbone", "dataset", "robot", "env", "protocol", "publish-a-head", "python-api"
    }  # fmt: skip


@pytest.mark.parametrize("page", OURS, ids=lambda p: p.stem)
def test_every_block_runs(page, tmp_path):
    if page.stem == "python-api":
        pytest.importorskip("torch")
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks
    pending: list[str] = []
    for language, code in [*blocks, ("end", "")]:
        if language == "python":
            pending.append(code)
            continue
        if pending and language in ("bash", "end"):
            file = tmp_path / "page.py"
            file.write_text("\n".join(pending))
            run(tmp_path, sys.executable, str(file))
            if language == "bash":
                pending = []
        if language == "bash":
            run(tmp_path, "bash", "-c", PIP + code)
        elif language == "toml":
            vla.variant_from_toml(code)
        else:
            assert language in ("text", "end"), f"a block of language {language!r} is not executed"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_run(path, tmp_path):
    if "frameworks" in path.stem:
        pytest.importorskip("torch")
    assert run(tmp_path, sys.executable, str(path))


def test_every_facet_of_the_kit_is_documented():
    from vla.testing.parts import FACETS

    for kind, facets in FACETS.items():
        text = (ROOT / "docs" / "parts" / f"{kind}.md").read_text()
        lines = text + (ROOT / "docs" / "parts" / "llm.md").read_text() if kind == "backbone" else text
        missing = [facet for facet in facets if f"`{facet}`" not in lines]
        assert not missing, f"docs/parts/{kind}.md does not say what {missing} mean"


def test_the_reference_is_made_from_docstrings(tmp_path):
    file = tmp_path / "reference.md"
    run(tmp_path, sys.executable, str(ROOT / "scripts" / "make_reference.py"), str(file))
    text = file.read_text()
    for name in vla.__all__:
        assert name == "__version__" or f"`vla.{name}`" in text
    assert "### build(" in text and "### Part(" in text and len(text) > 20_000
    kept = (ROOT / "docs" / "reference.md").read_text()
    headings = {line for line in text.splitlines() if line.startswith("## ")}
    assert headings <= set(kept.splitlines()), "run scripts/make_reference.py"


def test_toml_blocks_are_toml():
    for page in OURS:
        for language, code in BLOCK.findall(page.read_text()):
            if language == "toml":
                assert tomllib.loads(code)["vla"] == 1
