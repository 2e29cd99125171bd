"""The protocol of docs/parts/protocol.md as a package of its own passes the kit."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("websockets")
PAGE = Path(__file__).parents[1] / "docs" / "parts" / "protocol.md"


def test_the_protocol_of_the_page_passes_the_kit(tmp_path):
    part, check = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    info = tmp_path / "vla_protocol_json-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vla-protocol-json\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vla.protocols]\njson = my_json:PART\n")
    # Importing a part is light: its code is in a module of its own.
    code, declared = part.split("PART = Part(")
    (tmp_path / "my_protocol.py").write_text(code.replace("from vla.parts import Part\n", ""))
    (tmp_path / "my_json.py").write_text("from vla.parts import Part\n\nPART = Part(" + declared)
    (tmp_path / "test_mine.py").write_text("import json\n" + check)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "test_mine.py"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 25
