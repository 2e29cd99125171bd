"""Settings of every test run."""

import os
from collections import Counter

import pytest

# XLA compiles anew in every run, and longer than a tiny model computes: 7 times less with these.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()


def _without_data(config):
    """What the skipped tests missed -> how many tests."""
    from shared_data import ABSENT

    terminal = config.pluginmanager.get_plugin("terminalreporter")
    skipped = terminal.stats.get("skipped", []) if terminal else []
    reasons = (r.longrepr[2].removeprefix("Skipped: ") for r in skipped if isinstance(r.longrepr, tuple))
    return Counter(reason.removeprefix(ABSENT) for reason in reasons if reason.startswith(ABSENT))


def pytest_terminal_summary(terminalreporter, config):
    """Numbers that nobody compared are said, not hidden among the skips."""
    if missing := _without_data(config):
        from shared_data import SHARED

        terminalreporter.section("NOT COMPARED WITH STORED NUMBERS", sep="=", red=True, bold=True)
        total = f"{sum(missing.values())} tests skipped: their data is not there (VLA_SHARED={SHARED})"
        terminalreporter.write_line(total, red=True, bold=True)
        for path, count in sorted(missing.items()):
            terminalreporter.write_line(f"  {count:4} need {path}", red=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """VLA_NEED_SHARED=1 (the CI where shared/ lies beside the clone): a test without its data is a failure."""
    if os.environ.get("VLA_NEED_SHARED") == "1" and session.exitstatus == 0 and _without_data(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
