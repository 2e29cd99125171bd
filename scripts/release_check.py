"""A dry run of a release (`make release-check`): what must be true before anything is uploaded, and nothing is.

Run with a Python that has hatchling, twine, cyclonedx-bom and pip-licenses:

    python scripts/release_check.py --out dist [--final]

Checks that all packages have one version and that the changelog names it (`--final`: with a date), builds every wheel
and sdist twice and compares the bytes, checks the metadata as the index will, and writes a bill of materials with the
licence of every dependency. Everything that is wrong is listed, not only the first; exit status 1 then.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EPOCH = "1700000000"  # the date inside the archives: any fixed one
# Licences that may stand beside Apache-2.0 in what a user installs.
ALLOWED = (
    *("MIT", "BSD", "Apache", "PSF", "Python Software Foundation", "ISC", "MPL", "Mozilla", "Unlicense", "HPND"),
    *("CMU", "Zlib", "0BSD"),
)


def packages() -> list[Path]:
    """Folders of the distributions that are uploaded."""
    found = [ROOT / "core", *sorted(ROOT.glob("plugins/*/*")), *sorted(ROOT.glob("clients/*"))]
    return [folder for folder in found if (folder / "pyproject.toml").exists()]


def check_versions(final: bool) -> list[str]:
    """One version everywhere, and in the changelog."""
    versions = {}
    for folder in packages():
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        versions[project["name"]] = project["version"]
    wrong = []
    if len(set(versions.values())) != 1:
        wrong.append(f"versions differ: {versions}")
    version = versions["vla-core"]
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    dated = re.search(rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$", text, re.M)
    named = f"## Unreleased ({version})" in text
    if not dated and (final or not named):
        want = f"## {version} (YYYY-MM-DD)" if final else f"## Unreleased ({version})"
        wrong.append(f"CHANGELOG.md has no heading {want!r}")
    if f"version: {version}" not in (ROOT / "CITATION.cff").read_text(encoding="utf-8"):
        wrong.append(f"CITATION.cff does not say version: {version}")
    return wrong


def build(out: Path) -> dict[str, str]:
    """File name -> SHA-256 of every wheel and sdist."""
    for folder in packages():
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-d", str(out)],
            cwd=folder, check=True, capture_output=True, env={**os.environ, "SOURCE_DATE_EPOCH": EPOCH},
        )  # fmt: skip
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(out.iterdir())}


def check_reproducible(out: Path) -> list[str]:
    """Build twice; leave the first set in `out`."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    first = build(out)
    with tempfile.TemporaryDirectory() as again:
        second = build(Path(again))
    (out / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in first.items()), encoding="utf-8")
    return [f"built twice, and {name} differs" for name in first if first[name] != second.get(name)]


def check_metadata(out: Path) -> list[str]:
    """What the index would say."""
    files = [str(f) for f in out.iterdir() if f.suffix in (".whl", ".gz")]
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True)
    bad = [line for line in done.stdout.splitlines() if "PASSED" not in line and line.strip()]
    return [f"twine check: {line}" for line in bad] if done.returncode else []


def check_licences(out: Path) -> list[str]:
    """Install what a user of every part gets without a framework, list it, judge it."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        wheels = [str(f) for f in out.glob("*.whl")]
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *wheels], check=True)
        sbom = [sys.executable, "-m", "cyclonedx_py", "environment", str(python), "--of", "JSON", "-o"]
        subprocess.run([*sbom, str(out / "sbom.cdx.json")], check=True, capture_output=True)
        listing = [sys.executable, "-m", "piplicenses", "--python", str(python), "--format", "json"]
        rows = json.loads(subprocess.run(listing, check=True, capture_output=True, text=True).stdout)
    (out / "licences.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return [
        f"licence of {row['Name']} {row['Version']}: {row['License']}"
        for row in rows
        if not any(word in row["License"] for word in ALLOWED)
    ]


def main() -> int:
    """The script. Exit status 0: ready."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where wheels, sdists, SBOM and digests go")
    parser.add_argument("--final", action="store_true", help="the changelog must be dated")
    given = parser.parse_args()
    checks = {
        "versions and changelog": lambda: check_versions(given.final),
        "built twice, equal bytes": lambda: check_reproducible(given.out),
        "metadata": lambda: check_metadata(given.out),
        "bill of materials, licences": lambda: check_licences(given.out),
    }
    wrong = []
    for name, check in checks.items():
        found = check()
        print(f"{'ok  ' if not found else 'FAIL'} {name}", flush=True)
        wrong += found
    for line in wrong:
        print(f"  {line}")
    if not wrong:
        count = len(list(given.out.glob("*.whl")))
        print(f"ready: {count} wheels, as many sdists, sbom.cdx.json and SHA256SUMS in {given.out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
