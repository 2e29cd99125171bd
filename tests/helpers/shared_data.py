"""Where the data lies that is too large or not ours to store, and the mark of the tests that need it.

Tests without their data are skipped; conftest.py says at the end of the run how many, and what was missing.
"""

import os
from pathlib import Path

import pytest

ABSENT = "shared data absent: "  # how the reason of such a skip begins
SHARED = Path(os.environ.get("VLA_SHARED", Path(__file__).parents[3] / "shared"))
GOLDENS = Path(os.environ.get("VLA_GOLDENS", SHARED / "goldens"))


def needs(*paths, found=True):
    """The mark that skips a test when one of the paths, or what was looked for in them, is not there."""
    missing = [path for path in paths if not path.exists()] or ([] if found else list(paths))
    return pytest.mark.skipif(bool(missing), reason=ABSENT + ", ".join(map(str, missing)))
