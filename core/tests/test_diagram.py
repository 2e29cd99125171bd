"""The architecture picture is drawn from the tree: what is in it follows the layout, not a template."""

import xml.etree.ElementTree as ET

import pytest

import vla
from vla.cli import main
from vla.diagram import diagram_svg

SVG = "{http://www.w3.org/2000/svg}"


def read(variants):
    root = ET.fromstring(diagram_svg(variants))
    texts = [t.text or "" for t in root.iter(f"{SVG}text")]
    classes = [p.get("class") for p in root.iter(f"{SVG}path") if p.get("class")]
    return texts, {c: classes.count(c) for c in ("always", "training", "inference", "cache")}


LEGEND = {"always": 1, "training": 1, "inference": 1, "cache": 1}


def test_a_chunk_head_with_its_own_expert(world):
    texts, arrows = read([vla.build(backbone="toybone", tokenizer="toytext", head="toyflow")])
    assert "loss: actions" in texts and "loss: tokens" not in texts and "target" not in texts
    assert "action lane: expert of width 32" in texts and "prefix lane: toycore, width 64, None layers" in texts
    assert "cache" in texts  # no stop in this layout
    # image and prompt lead to the cache, which leads to the action
    assert arrows["cache"] - LEGEND["cache"] == 3


def test_both_halves_and_the_stop(world):
    texts, arrows = read([vla.build(type="toytype")])
    assert {"loss: tokens", "loss: actions", "target", "cache, gradient stopped", "toycodec codec"} <= set(texts)
    # targets are for training: nothing green leaves them, only the actions of the expert are an output
    assert sum(text == "actions" for text in texts) == 3  # codec input, mixed with noise, output
    assert arrows["inference"] - LEGEND["inference"] == 1  # the toy chunk head needs no rounds


def test_a_token_head_decodes_in_a_loop_within_one_lane(world):
    texts, arrows = read([vla.build(backbone="toybone", tokenizer="toycodec", head="toytokens")])
    assert "sampling loop: one token per round" in texts and not any("action lane" in text for text in texts)
    assert arrows["inference"] - LEGEND["inference"] == 2


def test_one_panel_per_variant(world, tmp_path, capsys):
    file = tmp_path / "d.svg"
    assert main(["show", "toytype", "toytype", "--no-sizes", "--diagram", str(file)]) == 0
    texts = [t.text for t in ET.parse(file).getroot().iter(f"{SVG}text")]
    assert texts.count("toytype") == 2 and texts.count("training only") == 1


@pytest.mark.parametrize("name", ["pi0", "pi05", "pi0_fast", "pi05_ki"])
def test_ours_are_drawn(name):
    try:
        variant = vla.build(type=name)
    except vla.PartError as error:
        pytest.skip(f"our plugins are not all installed: {error.what}")
    texts, arrows = read([variant])
    assert name in texts and min(arrows.values()) >= 2
    rounds = "one token per round" if name == "pi0_fast" else "10 rounds"
    assert f"sampling loop: {rounds}" in texts
