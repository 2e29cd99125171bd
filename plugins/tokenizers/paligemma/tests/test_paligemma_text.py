"""Finding the SentencePiece model, and the small embedded one."""

import importlib.util
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vla_tokenizer_paligemma import PART
from vla_tokenizer_paligemma.config import EMBEDDED, Paligemma
from vla_tokenizer_paligemma.text import MODEL_FILE, VARIABLE, SentencePieceText

from vla.errors import SettingsError, StoreError

SMALL = Paligemma(EMBEDDED, 4096)
TEXT = SentencePieceText(SMALL)
EMBEDDED_FILE = files("vla_tokenizer_paligemma") / "embedded.model"


def searched(vocab=4096):
    return Paligemma("", vocab)


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No variable, no caches."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "openpi"))
    return tmp_path


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(EMBEDDED_FILE.read_bytes())
    return path


def test_embedded_layout():
    sp = TEXT._sp
    pieces = [sp.id_to_piece(i) for i in range(4096)]
    assert pieces[:5] == ["<pad>", "<eos>", "<bos>", "<unk>", "\n"]
    assert pieces[-1152:-128] == [f"<loc{i:04d}>" for i in range(1024)]
    assert pieces[-128:] == [f"<seg{i:03d}>" for i in range(128)]
    assert not [p for p in pieces if sum(c.isdigit() for c in p) > 1 and not p.startswith("<")]
    assert len(EMBEDDED_FILE.read_bytes()) < 200_000
    # FAST ids 0..1023 fall on the <loc> pieces, as in PaliGemma.
    assert pieces[4096 - 1 - 128 - 0] == "<loc1023>"
    assert pieces[4096 - 1 - 128 - 1023] == "<loc0000>"


def test_embedded_model_comes_from_the_script():
    script = Path(__file__).parents[4] / "scripts" / "train_embedded_tokenizer.py"
    if not script.is_file():
        pytest.skip("not in a clone of the repository")
    spec = importlib.util.spec_from_file_location("train_embedded_tokenizer", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    trained = module.train()
    assert SentencePieceText.__module__  # the plugin is importable without the script
    assert trained == EMBEDDED_FILE.read_bytes()


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\u2581\0")))
def test_embedded_round_trip(text):
    ids = TEXT.encode(text, bos=True, eos=True)
    assert ids[0] == 2
    assert ids[-1] == 1
    assert 3 not in ids  # byte fallback: nothing is unknown
    assert TEXT.decode(ids[1:-1]) == text


def test_prompts_are_compact():
    assert len(TEXT.encode("pick up the red cup and place it in the basket")) < 16


def test_order_of_places(nowhere, monkeypatch):
    with pytest.raises(SettingsError) as e:
        SentencePieceText(searched())
    for hint in ("model directory", VARIABLE, "openpi", "hf download google/paligemma", "tokenizer.preset=tiny"):
        assert hint in str(e.value)
    hub = put(nowhere / "hf/hub/models--google--paligemma-3b-pt-224/snapshots/abc" / MODEL_FILE)
    assert SentencePieceText(searched()).vocab_size == 4096
    # Each earlier place wins: broken bytes there are an error, not passed over.
    for place in (nowhere / "openpi/big_vision/paligemma_tokenizer.model", nowhere / "named.model"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"no model")
        if place.name == "named.model":
            monkeypatch.setenv(VARIABLE, str(place))
        with pytest.raises(StoreError, match="no SentencePiece model") as e:
            SentencePieceText(searched())
        assert place.name in str(e.value)
    put(nowhere / "assets" / MODEL_FILE)
    assert SentencePieceText(searched(), nowhere / "assets").vocab_size == 4096
    # A path that comes with a model is not followed: the model directory has its own copy.
    assert SentencePieceText(Paligemma("/dev/zero", 4096), nowhere / "assets").vocab_size == 4096
    with pytest.raises(SettingsError, match="at this path"):
        SentencePieceText(Paligemma(str(nowhere / "absent.model"), 4096))
    with pytest.raises(StoreError, match="not a regular file"):
        SentencePieceText(Paligemma("/dev/zero", 4096))
    assert SentencePieceText(Paligemma(str(hub), 4096)).vocab_size == 4096
    assert SentencePieceText(Paligemma(str(hub.parent), 4096)).vocab_size == 4096
    monkeypatch.setenv(VARIABLE, str(nowhere / "absent"))
    with pytest.raises(SettingsError, match=VARIABLE):
        SentencePieceText(searched())


def test_wrong_vocabulary_is_named(tmp_path):
    with pytest.raises(SettingsError) as e:
        SentencePieceText(Paligemma(EMBEDDED, 257152))
    assert "4096" in str(e.value)
    assert "257152" in str(e.value)
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(StoreError):
        SentencePieceText(Paligemma(str(tmp_path / "empty.model")))


def test_saved_model_is_used_again(tmp_path):
    TEXT.save(tmp_path)
    assert (tmp_path / MODEL_FILE).read_bytes() == EMBEDDED_FILE.read_bytes()
    (tmp_path / MODEL_FILE).write_bytes(b"broken")
    with pytest.raises(StoreError):  # the stored copy is what the policy was trained with: it is not passed over
        SentencePieceText(SMALL, tmp_path)


def test_part_offers_its_vocabulary_without_the_model():
    assert PART.offers(Paligemma(), {}) == {"emits": {"text", "state"}, "vocab_size": 257152, "prompt": "pi05"}
    assert PART.offers(Paligemma(prompt="pi0"), {})["emits"] == {"text"}
    for name in ("tiny", "small"):
        assert Paligemma(**PART.presets[name]) == SMALL
