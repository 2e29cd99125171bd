"""The pytest plugin of the kit (`pytest11`): shows what was declared as an exception, in every run.

It is loaded in every pytest run of an environment that has vla-core, so it imports nothing but pytest.
"""

from __future__ import annotations

from typing import Any

import pytest

EXCUSED = "declared exception: "
# Their `assert` statements show values, as those of a test file do.
pytest.register_assert_rewrite(
    *(f"vla.testing.{name}" for name in (
        "parts", "models", "heads", "vision", "llms", "backbones", "tokenizers", "datasets", "protocols",
    ))
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """With pytest-xdist and `--dist loadgroup`, the checks of one class stay on one worker: they share a model."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        if getattr(getattr(item, "cls", None), "is_conformance", False):
            item.add_marker(pytest.mark.xdist_group(item.cls.__qualname__))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line for every check that a part was excused from, with the reason its author gave."""
    lines = []
    for report in terminalreporter.stats.get("skipped", []):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        _, found, text = reason.partition(EXCUSED)
        if found:
            lines.append(f"{report.nodeid}: {text}")
    if lines:
        terminalreporter.section("conformance: declared exceptions")
        for line in sorted(lines):
            terminalreporter.line(line)
