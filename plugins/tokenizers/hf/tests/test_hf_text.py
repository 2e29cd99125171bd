"""Texts through `tokenizers`: files as people have them, chat formats against the templates of the families, refusals."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vla_tokenizer_hf.config import HuggingFace
from vla_tokenizer_hf.text import CHATS, TokenizersText, byte_level

import vla
from vla.tokenizer import open_tokenizer

TEMPLATES = {  # of Qwen/SmolLM2 (without a system message), Gemma 2/3, Llama 3
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "gemma_chat": "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "llama3_chat": "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
}


def a_model(folder, *markers, **special):
    """A folder as transformers writes it: tokenizer.json, its special tokens, config.json with a padded table."""
    made = json.loads(byte_level())
    for i, token in enumerate(markers):
        entry = {"id": 260 + i, "content": token, "special": True, "single_word": False, "lstrip": False}
        made["added_tokens"].append({**entry, "rstrip": False, "normalized": False})
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(made))
    names = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}} | special
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 320}))
    return folder


@settings(deadline=None)
@given(st.text())
def test_any_text_comes_back(text):
    made = TokenizersText(HuggingFace())
    assert made.decode(made.encode(text)) == text


@pytest.mark.parametrize("name", CHATS)
def test_chat_formats_are_those_of_the_templates(tmp_path, name):
    jinja = pytest.importorskip("jinja2")
    import re

    words = "  touch_the red block "
    chat = jinja.Template(TEMPLATES[name], keep_trailing_newline=True)
    want = chat.render(messages=[{"role": "user", "content": "touch the red block"}], add_generation_prompt=True)
    markers = sorted(set(re.findall(r"<[^>\n]+>", want)))
    model = a_model(tmp_path / "m", *markers)
    words_only = {"part": "hf", "model": str(model), "prompt": name}
    variant = vla.build(head="flow", preset="tiny", tokenizer=words_only, set={"head.state": "continuous"})
    made = open_tokenizer(variant.parts["tokenizer"], variant.spec)
    row = made.tokenize(words, np.zeros(8, np.float32))
    ids = row["tokenized_prompt"][row["tokenized_prompt_mask"]]
    assert made.text.decode(ids) == "<bos>" + want
    assert sum(i >= 260 for i in ids) == len(re.findall(r"<[^>\n]+>", want)), "markers are tokens, not letters"


def test_the_table_may_be_larger_than_the_tokenizer(tmp_path):
    chosen = HuggingFace(model=str(a_model(tmp_path / "m")), extra_ids=30)
    assert (chosen.vocab_size, chosen.ids) == (320, 350)
    assert TokenizersText(chosen).vocab_size == 350


def test_it_is_kept_with_the_model_and_goes_to_workers(tmp_path):
    made = TokenizersText(HuggingFace(model=str(a_model(tmp_path / "m"))))
    (tmp_path / "assets").mkdir()
    made.save(tmp_path / "assets")
    again = TokenizersText(HuggingFace(model="/gone", vocab_size=320), tmp_path / "assets")
    sent = pickle.loads(pickle.dumps(again))
    for other in (again, sent):
        assert other.encode("lift it", bos=True, eos=True) == made.encode("lift it", bos=True, eos=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: (m / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda m: (m / "tokenizer.json").write_text("{"), "no JSON|no tokenizer"),
        (lambda m: (m / "tokenizer.json").write_text("{}"), "no tokenizer"),
        (lambda m: (m / "tokenizer_config.json").unlink(), "no end of text"),
        (lambda m: (m / "config.json").write_text('{"vocab_size": 100}'), "more ids than the model has rows"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, change, words):
    model = a_model(tmp_path / "m")
    change(model)
    with pytest.raises(vla.VlaError, match=words):
        TokenizersText(HuggingFace(model=str(model)))


def test_a_chat_format_of_another_family_is_refused(tmp_path):
    with pytest.raises(vla.VlaError, match="im_start"):
        TokenizersText(HuggingFace(model=str(a_model(tmp_path / "m")), prompt="chatml"))
