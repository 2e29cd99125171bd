"""`vla demo --quick`: every stage for real, without a network, ending in one page that stands alone."""

import json
import re
import socket

import numpy as np
import pytest

import vla
from vla.cli import main

pytest.importorskip("torch")
pytest.importorskip("mujoco")
pytest.importorskip("av")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(the folder of a quick demo, what it printed)."""
    import contextlib
    import io

    out = tmp_path_factory.mktemp("demo")
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        patch.setenv("VLA_CACHE", str(out / "cache"))

        def no_network(self, address, *rest):
            raise AssertionError(f"the demo wants the network: {address}")

        patch.setattr(socket.socket, "connect", no_network)
        status = main(["demo", "--quick", "--out", str(out / "demo")])
    assert status == 0, said.getvalue()
    return out / "demo", said.getvalue()


def test_it_says_what_it_does_and_where_the_page_is(demo):
    folder, said = demo
    for stage in range(1, 7):
        assert f"[{stage}/6]" in said
    assert str(folder / "report" / "index.html") in said
    assert re.search(r"after 20 steps: actions \d.*, tokens \d.* samples/s", said) or re.search(
        r"after 20 steps: tokens \d.*, actions \d.* samples/s", said
    )


def test_both_losses_fall(demo):
    curves = json.loads((demo[0] / "report" / "results.json").read_text())["curves"]
    for name in ("loss/tokens", "loss/actions"):
        assert curves[-1][name] < curves[0][name]


def test_every_contestant_ran_the_same_episodes(demo):
    found = json.loads((demo[0] / "report" / "results.json").read_text())["evaluations"]
    assert [e["instruction"] for e in found] == ["given", "shuffled", "given", "given", "given", "given"]
    assert [e["pictures"] for e in found] == ["given", "given", "swapped", "given", "given", "given"]
    seeds = [[row["seed"] for row in e["episodes"]] for e in found]
    assert len(seeds[0]) == 6 and all(s == seeds[0] for s in seeds)
    assert all(row["told"] != row["prompt"] for row in found[1]["episodes"])
    for e in found:
        assert 0 <= e["success"]["low"] <= e["success"]["rate"] <= e["success"]["high"] <= 1


def test_the_page_stands_alone_and_shows_everything(demo):
    text = (demo[0] / "report" / "index.html").read_text()
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", text) and "<script" not in text
    assert text.count("data:video/mp4;base64,") == 1 and text.count("data:image/png;base64,") == 1
    assert "too little to learn" in text
    for words in ("vla-head-ki", "image:stop", "flow matching", "FAST tokens", "95 % Wilson", "dx", "vla eval"):
        assert words in text, words


def test_the_model_opens_again_and_listens_to_checks(demo):
    policy = vla.open(demo[0] / "train" / "model")
    rng = np.random.default_rng(0)
    seen = {
        "images": {c: rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for c in ("front", "wrist")},
        "state": np.zeros(8, np.float32),
        "prompt": "touch the red block",
    }
    assert policy.infer(seen)["actions"].shape == (8, 7)
    with pytest.raises(vla.DataError, match="wrist"):
        policy.infer({**seen, "images": {"front": seen["images"]["front"]}})


def test_a_second_demo_reuses_the_demonstrations_and_replaces_the_report(demo, monkeypatch, capsys):
    from vla.cli import demo as module

    folder = demo[0]
    monkeypatch.setenv("VLA_CACHE", str(folder.parent / "cache"))
    monkeypatch.setattr("vla.recording.record", lambda *a, **k: pytest.fail("demonstrations were recorded again"))
    page = module.run(folder, {**module.QUICK, "steps": 2, "episodes": 2})
    assert page.is_file() and "2 training steps" in page.read_text()


def test_a_wrong_option_is_one_clear_error(capsys):
    assert main(["demo", "--quick", "--color"]) == 2
    assert "Traceback" not in capsys.readouterr().err
