"""Every reader of files that anybody may have written, fed with anything: a value, or one error of ours."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from fuzz_targets import TARGETS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("VLA_FUZZ_EXAMPLES", 40))  # of each reader
SCRIPT = Path(__file__).parent / "helpers" / "fuzz_targets.py"
plain = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=8)
tables = st.recursive(plain, lambda c: st.lists(c, max_size=4) | st.dictionaries(st.text(max_size=6), c, max_size=4))


@st.composite
def bent(draw, honest):
    """The honest bytes with pieces cut out, doubled or overwritten, and with values of JSON replaced."""
    try:
        table = json.loads(honest)
    except ValueError:
        table = None
    if isinstance(table, dict) and draw(st.booleans()):
        here = table
        while True:  # to some entry, at any depth
            key = draw(st.sampled_from(sorted(here))) if here else None
            if key is None or not isinstance(here[key], dict) or draw(st.integers(0, 2)) == 0:
                break
            here = here[key]
        if key is not None:
            here[key] = draw(tables)
        return json.dumps(table).encode("utf-8", "surrogatepass")
    data = bytearray(honest)
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, len(data))), draw(st.integers(0, 12))
        data[at : at + length] = draw(st.binary(max_size=12) | st.just(bytes(data[at : at + 40]) * 3))
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_a_value_or_one_error(name, tmp_path):
    target = TARGETS[name]
    target.make(tmp_path)
    honest = (tmp_path / target.file).read_bytes()

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=EXAMPLES == 40,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )  # fmt: skip
    @given(bent(honest) | st.binary(max_size=200) | tables.map(lambda t: json.dumps(t).encode()))
    def fed(data):
        target(tmp_path, data)

    fed()
    (tmp_path / target.file).write_bytes(honest)
    if name not in ("orbax", "Hugging Face", "shards", "public FAST"):  # these need more than the one file
        target.read(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed (it has wheels for Linux on x86_64)")
@pytest.mark.parametrize("name", ["variant", "merges", "id map"])
def test_guided_by_coverage(name):
    """A bounded run of atheris, which looks for inputs that reach new code."""
    command = [
        sys.executable,
        str(SCRIPT),
        name,
        "-runs=20000",
        "-max_total_time=40",
        "-timeout=10",
        "-rss_limit_mb=2048",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done" in done.stderr
