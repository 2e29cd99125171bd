"""`vla check`: the conformance kit on an installed part, without a test file."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from vla.cli import console


def check(
    kind: str,
    name: str,
    /,
    set: tuple[str, ...] = (),
    data: str = "",
    only: str = "",
    verbose: bool = False,
) -> int:
    """Run the conformance kit on an installed part. Exit status 1: some check failed.

    Args:
        kind: head, tokenizer, vision, llm, backbone or dataset.
        name: as in `vla list`.
        set: path=value, settings to test instead of the defaults; may be repeated.
        data: for datasets: the path to open (its setting `path`).
        only: run only the checks whose names contain this.
        verbose: name every check.
    """
    from vla.errors import PartError, SettingsError

    try:
        import pytest

        from vla.testing import KITS
        from vla.testing.frameworks import installed
    except ModuleNotFoundError as error:
        fix = "pip install 'vla-core[testing]'"
        raise PartError("the conformance kit is not installed", field="check", got=str(error), fix=fix) from error
    from vla import registry

    if kind == "protocol":
        raise SettingsError(
            "a protocol is checked by a test file, which plays its client", field="kind", got=kind,
            fix="write two functions: docs/parts/protocol.md, vla.testing.ProtocolConformance",
        )  # fmt: skip
    if kind not in KITS:
        raise SettingsError("there is no kit for this kind of part", field="kind", got=kind, expected=", ".join(KITS))
    part = registry.find(kind, name).load()
    missing = [f for f in part.frameworks() if not installed(f)]
    if missing:
        console.note(f"not installed, so not checked: {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="vla-check-") as folder:
        file = Path(folder) / "test_conformance.py"
        file.write_text(source(KITS[kind], name, tuple(set), data), encoding="utf-8")
        options = ["-v"] if verbose else ["-q"]
        options += ["--tb=short", "-p", "no:cacheprovider", "--rootdir", folder, "-c", str(Path(folder) / "pytest.ini")]
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # vla itself is imported already
        options += ["-k", only] if only else []
        (Path(folder) / "pytest.ini").write_text("[pytest]\n")
        sys.stdout.flush()
        status = int(pytest.main([*options, str(file)]))
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise SettingsError("no check has such a name", field="--only", got=only, fix="`--verbose` lists the names")
    return 1 if status else 0


def source(kit: str, name: str, settings: tuple[str, ...], data: str) -> str:
    """The test file that an author would write."""
    lines = [f"from vla.testing import {kit}", "", "", f"class TestPart({kit}):", f"    name = {name!r}"]
    if settings:
        lines.append(f"    settings = {settings!r}")
    if data:
        path = str(Path(data).expanduser().absolute())
        lines += ["", "    def prepare(self, folder):", f"        return {{'path': {path!r}}}"]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """The verb."""
    return console.call(check, "check", argv)
