"""The page at / in a real browser: what it shows, what it can ask, and that it asks nobody else.

Needs Debian's package `chromium` (or CHROMIUM=/path/to/it); skipped where it is absent.
"""

import os
import shutil
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
from serving import CONTRACT, Echo, observation, serving
from vla_client import RemotePolicy, ServerError

from vla.errors import DataError
from vla.serving.live import Frames, Live

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or ""
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium here: apt install chromium, or CHROMIUM=/path")


def sample(index):
    row = observation(index, 2 * index)
    actions = np.full((5, 2), index, np.float32)
    return {**row, "actions": actions, "actions_is_pad": np.arange(5) > 3, "prompt": f"frame {index}"}


def seven(sample_of):
    """Frames of a dataset of seven."""

    class Seven:
        def __len__(self):
            return 7

        def sample(self, index, horizon):
            return sample_of(index)

    return Frames(Seven, 5)


def nothing(why):
    def opens():
        raise DataError(why)

    return Frames(opens, 5)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        made = play.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield made
        made.close()


@pytest.fixture
def page(browser):
    """A page that notes what it requests and what goes wrong on it."""
    made = browser.new_page()
    made.asked, made.wrong = [], []
    made.on("request", lambda request: made.asked.append(request.url))
    made.on("websocket", lambda socket: made.asked.append(socket.url))
    made.on("pageerror", lambda error: made.wrong.append(str(error)))
    made.on("console", lambda said: made.wrong.append(said.text) if said.type == "error" else None)
    yield made
    made.close()


def test_robots_latencies_contract_and_frames(page):
    name = "<img src=x onerror=alert(1)> arm"  # names come from strangers
    with serving(Echo(), warm=True, live=lambda s: Live(s, seven(sample))) as server:
        with RemotePolicy(server.url, name=name, embodiment={"hz": 50}) as robot:
            began = time.monotonic()
            page.goto(server.http)
            page.wait_for_selector("#link:text('live')", timeout=10_000)
            assert page.title() == "stand-in – vla serve" and page.inner_text("#name") == "stand-in"
            page.wait_for_selector("text=No robot is connected.")
            for i in range(3):
                robot.infer(observation(i, 10), step=i)
            page.wait_for_selector("[data-robot]", timeout=10_000)
            section = page.locator("[data-robot]")
            page.wait_for_selector("[data-robot] >> text=3 chunks", timeout=10_000)  # the page allows no eval
            text = section.inner_text()
            for shown in (name, "3 chunks", "“go”", "step 2", "state 2 10 0", "ms (p50)"):
                assert shown in text, (shown, text)
            assert section.locator("img").count() == 2 and section.locator("polyline").count() == 2
            assert section.locator("img").first.get_attribute("alt") == "camera front"
            assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            assert "5 steps of 2 values" in section.locator("svg").inner_html()
            assert page.locator("#histogram rect").count() == 10
            assert "latencies of 3 chunks" in page.locator("#histogram svg").get_attribute("aria-label")
            tiles = page.inner_text("#tiles")
            assert "1\nrobots" in tiles and "3\nchunks" in tiles and "one pass" in tiles
            rows = page.inner_text("#contract")
            for key in ("digest", "action_horizon", "embodiment", CONTRACT["digest"]):
                assert key in rows
            # errors of a robot are shown beside its chunks
            with pytest.raises(ServerError):
                robot.infer(observation(np.nan))
            page.wait_for_selector(".robot .bad >> text=1 BAD_OBSERVATION", timeout=10_000)
            # a frame of the data
            assert "7 frames" in page.inner_text("#why")
            page.fill("#frame", "3")
            page.click("#ask")
            page.wait_for_selector("#tried >> text=frame 3", timeout=10_000)
            assert "“frame 3”" in page.inner_text("#tried") and page.locator("#tried polyline").count() == 4
            assert page.locator("#tried polyline[stroke-dasharray='4 3']").count() == 2
            page.click("#next")
            page.keyboard.press("Tab")
            assert time.monotonic() - began < 60
        page.wait_for_selector("text=No robot is connected.", timeout=10_000)
        hosts = {urlsplit(url).netloc for url in page.asked if not url.startswith("data:")}
        assert hosts == {f"127.0.0.1:{server.port}"}, page.asked
    page.wait_for_selector("#link.bad", timeout=10_000)  # the server is gone: the page says so
    assert all("ERR_" in text or "WebSocket" in text for text in page.wrong), page.wrong


def test_without_data_the_page_says_why(page):
    with serving(Echo(), live=lambda s: Live(s, nothing("the data is not here"))) as server:
        page.goto(server.http)
        page.wait_for_selector("#why >> text=the data is not here", timeout=10_000)
        assert page.is_disabled("#ask") and page.is_disabled("#next") and page.is_disabled("#frame")
        assert page.wrong == []


def test_a_frame_that_the_policy_refuses(page):
    def broken(index):
        return {**sample(index), "state": np.full(3, np.nan, np.float32)}

    with serving(Echo(), live=lambda s: Live(s, seven(broken))) as server:
        page.goto(server.http)
        page.wait_for_selector("#link.good", timeout=10_000)
        page.click("#ask")
        page.wait_for_selector("#tried .bad", timeout=10_000)
        assert "BAD_OBSERVATION" in page.inner_text("#tried")


def test_a_frame_that_cannot_be_read(page):
    def gone(index):
        raise OSError("the disk is gone")

    with serving(Echo(), live=lambda s: Live(s, seven(gone))) as server:
        page.goto(server.http)
        page.wait_for_selector("#link.good", timeout=10_000)
        page.click("#ask")
        page.wait_for_selector("#tried .bad", timeout=10_000)
        assert "OSError: the disk is gone" in page.inner_text("#tried")


def test_a_key_is_given_behind_the_hash(page):
    with serving(Echo(), api_key="sesame", live=lambda s: Live(s, nothing("none"))) as server:
        page.goto(server.http)
        page.wait_for_selector("#link.bad", timeout=10_000)
        assert "#key=KEY" in page.inner_text("#link")
        page.goto("about:blank")
        page.goto(f"{server.http}/#key=sesame")
        page.wait_for_selector("#link.good", timeout=10_000)
        assert page.inner_text("#name") == "stand-in"


def test_the_page_is_small_and_whole():
    from importlib.resources import files

    text = files("vla.serving").joinpath("page.html").read_text()
    assert (
        len(text) < 40_000
        and "http://" not in text.replace("http://www.w3.org/2000/svg", "")
        and "https://" not in text
    )
