"""Reports: one file each, nothing loaded from outside, no text that turns into markup."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.errors import StoreError
from vla.evaluation.results import Episode, Evaluation
from vla.evaluation.rollout import Clip
from vla.evaluation.summary import report_page, save_report
from vla.report import Section, interval_bars, line_plot, page, table
from vla.report.plots import ticks


def evaluation(outcomes, policy="p", told="touch the red block"):
    rows = tuple(Episode(i, i, "touch", "touch the red block", told, bool(o), 5, 2) for i, o in enumerate(outcomes))
    return Evaluation(policy, "tabletop", {"families": ["touch"]}, 4, "given", rows, 1.0, "ab" * 32)


def clip(success):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (16, 32, 3), dtype=np.uint8) for _ in range(4)]
    return Clip(evaluation([success]).episodes[0], frames, 10.0)


def well_formed(text):
    """Every tag is closed, and nothing refers to another file or host."""
    stack = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            for name, value in attributes:
                if name in ("src", "href"):
                    assert value.startswith("data:"), value
            if tag not in ("meta", "img", "br", "input", "link"):
                stack.append(tag)

        def handle_endtag(self, tag):
            assert stack.pop() == tag

    Reader().feed(text)
    assert stack == []
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    return True


def test_a_report_is_one_self_contained_file(tmp_path):
    pytest.importorskip("av")
    runs = [evaluation([1, 1, 0]), evaluation([0, 0, 0], "untrained <script>")]
    path = save_report(tmp_path / "report", runs, [clip(True), clip(False)])
    text = path.read_text()
    assert well_formed(text) and "<script" not in text and "2 of 3" in text and "67%" in text
    results = json.loads((path.parent / "results.json").read_text())["evaluations"]
    assert results[0]["success"]["rate"] == pytest.approx(2 / 3) and len(results[0]["episodes"]) == 3
    assert sorted(p.name for p in (path.parent / "videos").iterdir()) == [
        "episode-000-failure.mp4",
        "episode-000-success.mp4",
    ]
    with pytest.raises(StoreError, match="already there"):
        save_report(tmp_path / "report", runs)
    save_report(tmp_path / "report", runs, overwrite=True)


def test_a_report_without_videos():
    assert well_formed(report_page([evaluation([1])]))


def test_plots_are_well_formed_and_put_points_where_they_belong():
    svg = line_plot({"a": [(0, 1.0), (10, 3.0)], "b <i>": [(0, 2.0), (10, float("nan"))]}, x="step", y="loss")
    root = ElementTree.fromstring(svg)
    lines = [e.get("points") for e in root.iter("{http://www.w3.org/2000/svg}polyline")]
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in lines[0].split())
    assert x0 < x1 and y0 > y1  # SVG's y points down
    assert len(lines[1].split()) == 1  # the NaN is left out
    ElementTree.fromstring(line_plot({"a": [(1, 0.01), (2, 100.0)]}, log=True, title="t"))
    ElementTree.fromstring(line_plot({"flat": [(1, 2.0), (2, 2.0)]}, dots=["flat"]))
    with pytest.raises(ValueError, match="nothing to plot"):
        line_plot({"a": [(1, float("inf"))]})


def test_bars_show_value_and_interval():
    root = ElementTree.fromstring(interval_bars([("one", 0.5, 0.25, 0.75, "5 of 10"), ("two", 0, 0, 0.3, "0 of 10")]))
    bars = [float(e.get("width")) for e in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert bars[0] > 50 * bars[1] and len(bars) == 2


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_even_and_cover_the_range(low, span):
    found = ticks(low, low + span)
    assert found[0] <= low + 1e-6 * span and found[-1] >= low + span - 1e-6 * span and 2 <= len(found) <= 8
    steps = np.diff(found)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-3)


def test_whatever_users_write_stays_text():
    text = page("<b>", "<i>", [Section("<u>", table(["<a>"], [["<script>alert(1)</script>"]]))], [("<x>", "<y>")])
    assert well_formed(text) and "<script" not in text and "<u>" not in text
