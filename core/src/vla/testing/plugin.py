"""The pytest plugin of the kit: shows what was declared as an exception.

The kit registers it in the runs that use the kit; in any other, vla has no part.
"""

from __future__ import annotations

from typing import Any

import pytest

EXCUSED = "declared exception: "


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
