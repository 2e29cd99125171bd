"""`vla parity` says whether the frameworks agree, and where they stop."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("jax")

from vla.cli import main  # noqa: E402

SET = [
    "backbone.llm.width=32", "backbone.llm.depth=2", "backbone.llm.mlp_dim=48", "backbone.llm.num_heads=4",
    "backbone.llm.head_dim=8", "backbone.vision.width=16", "backbone.vision.depth=2", "backbone.vision.mlp_dim=24",
    "backbone.vision.num_heads=2", "backbone.llm.vocab_size=300", "spec.image_size=[24,24]", "spec.max_token_len=40",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from vla.compose import build

    path = tmp_path_factory.mktemp("variant")
    (path / "variant.toml").write_text(build(type="pi05", preset="tiny", set=SET).to_toml())
    return path


@pytest.mark.parametrize(("tolerance", "status", "words"), [("1e-5", 0, "agree"), ("0", 1, "first in: part vision")])
def test_agreement_and_difference(folder, capsys, tolerance, status, words):
    """No two frameworks round alike: with a bound of zero the first part is named."""
    assert main(["parity", str(folder), "--tolerance", tolerance]) == status
    out = capsys.readouterr().out
    assert words in out
    order = [
        "vision",
        "projector",
        "embedder",
        "head:",
        "layer 0",
        "layer 1",
        "final norm",
        "loss",
        "gradient",
        "sample",
    ]
    assert [out.index(w) for w in order] == sorted(out.index(w) for w in order)


def test_what_cannot_be_compared(folder, tmp_path, capsys):
    assert main(["parity", str(tmp_path / "nothing")]) == 2
    assert main(["parity", str(folder), "--batch", "0"]) == 2
    assert main(["parity", str(folder), "--data", "nowhere"]) == 2
    assert "without statistics" in capsys.readouterr().err
