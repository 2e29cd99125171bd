"""The prompt builder, the id map and the joints of `Tokenizer`, with a toy text tokenizer and a toy codec."""

import re

import numpy as np
import pytest

from vla.codecs import ARRAYS_FILE, CODEC_FILE, check_chunks, read_codec, write_codec
from vla.errors import DataError, DecodeError, SettingsError, StoreError
from vla.id_map import ID_MAP_FILE, IdMap
from vla.testing.closeness import close
from vla.tokenizer import Tokenizer, discretise_state


class Letters:
    """Text: one id per character (its code + 10), pad 0, eos 1, bos 2."""

    vocab_size = 1000
    prompt = "fast"

    def encode(self, text, bos=False, eos=False):
        return [2] * bos + [ord(c) + 10 for c in text] + [1] * eos

    def save(self, folder):
        (folder / "letters").write_text("")


class Tenths:
    """Codec: one id per value, round(10 x) + 20."""

    vocab_size = 41
    fitted = True

    def encode(self, chunks):
        return [np.rint(10 * c.ravel()).astype(np.int32) + 20 for c in chunks]

    def decode(self, ids, horizon, dim, mode="strict"):
        if len(ids) != horizon * dim:
            raise DecodeError("wrong number")
        return (ids - 20).reshape(horizon, dim) / 10

    def lengths(self):
        return np.ones(41, np.int32)

    def total(self, horizon, dim):
        return horizon * dim

    def save(self, folder):
        write_codec(folder, "tenths", {}, {})


@pytest.fixture
def tokenizer():
    return Tokenizer(Letters(), Tenths(), "fast", IdMap.from_end(1000, 41, 128), 100)


CHUNK = np.asarray([[0.1, -0.5], [1.0, 2.0]])


def test_state_bins_as_openpi():
    """Values below -1 print as -1, values of 1 and more as 255."""
    x = np.asarray([-5, np.nextafter(-1, -2), -1, -1 + 1 / 128, 0, 1 - 1 / 128, np.nextafter(1, 0), 1, 9])
    assert discretise_state(x).tolist() == [-1, -1, 0, 1, 128, 255, 255, 255, 255]


@pytest.mark.parametrize(
    ("prompt", "want"),
    [("pi0", "Pick up IT\n"), ("pi05", "Task: Pick up IT, State: -1 128 255;\nAction: ")],
)
def test_formats_without_actions(prompt, want):
    t = Tokenizer(Letters(), None, prompt, None, 100)
    out = t.tokenize(" Pick_up\nIT ", np.asarray([-2.0, 0.0, 1.0]))
    n = len(want) + 1
    assert out["tokenized_prompt"][:n].tolist() == Letters().encode(want, bos=True)
    assert out["tokenized_prompt_mask"].sum() == n
    assert not out["tokenized_prompt"][n:].any()
    assert not out["token_ar_mask"].any()
    assert not out["token_loss_mask"].any()


def test_fast_format_and_masks(tokenizer):
    out = tokenizer.tokenize(" Pick_Up\nIT ", np.asarray([0.0]), CHUNK)
    before = Letters().encode("Task: pick up\nit, State: 128;\n", bos=True)
    target = (
        Letters().encode("Action: ") + (871 - np.asarray([21, 15, 30, 40])).tolist() + Letters().encode("|", eos=True)
    )
    n, m = len(before), len(before) + len(target)
    assert out["tokenized_prompt"][:m].tolist() == before + target
    assert out["tokenized_prompt_mask"].tolist() == [True] * m + [False] * (100 - m)
    assert out["token_ar_mask"].tolist() == [0] * n + [1] * (m - n) + [0] * (100 - m)
    assert np.array_equal(out["token_loss_mask"], out["token_ar_mask"] == 1)
    assert {k: v.dtype.kind for k, v in out.items()} == {
        "tokenized_prompt": "i", "tokenized_prompt_mask": "b", "token_ar_mask": "i", "token_loss_mask": "b",
        "tokens_cut": "i",
    }  # fmt: skip
    close(tokenizer.decode(out["tokenized_prompt"], 2, 2), CHUNK, 1e-6)


def test_a_batch_equals_its_rows(tokenizer):
    prompts, states = ["a", "bb " * 60], [np.asarray([0.0]), np.asarray([1.0])]
    batch = tokenizer.tokenize_batch(prompts, states, np.stack([CHUNK, -CHUNK]), cut=True)
    for i, (prompt, state, chunk) in enumerate(zip(prompts, states, [CHUNK, -CHUNK], strict=True)):
        row = tokenizer.tokenize(prompt, state, chunk, cut=True)
        assert all(np.array_equal(batch[k][i], row[k]) for k in row)


def test_what_does_not_fit_is_an_error(tokenizer):
    with pytest.raises(DataError, match="instruction is too long") as found:
        tokenizer.tokenize("bb " * 60, np.asarray([0.0]))
    assert found.value.field == "prompt" and "60 words, 200 tokens" in str(found.value)
    words = int(re.search(r"(\d+) words fit", str(found.value))[1])
    assert tokenizer.tokenize("bb " * words, np.asarray([0.0]))["tokenized_prompt_mask"].sum() <= 100
    with pytest.raises(DataError, match="instruction is too long"):
        tokenizer.tokenize("bb " * (words + 1), np.asarray([0.0]))
    with pytest.raises(DataError, match="do not fit") as found:  # the prompt does, its targets do not
        tokenizer.tokenize("bb " * words, np.asarray([0.0]), CHUNK)
    assert found.value.field == "spec.max_token_len"
    with pytest.raises(DataError, match="state alone"):
        tokenizer.tokenize("go", np.zeros(60), cut=True)


def test_where_it_may_be_cut_words_of_the_instruction_go_and_never_the_state(tokenizer, caplog):
    state = np.asarray([0.0, 0.5, -0.5])
    end = Letters().encode(", State: 128 192 64;\n")
    out = tokenizer.tokenize("bb " * 60, state, CHUNK, cut=True)
    n = int((~out["token_loss_mask"] & out["tokenized_prompt_mask"]).sum())
    assert out["tokenized_prompt"][n - len(end) : n].tolist() == end
    whole, kept = (
        sum(map(len, tokenizer.ids(["bb " * 60], [state], CHUNK[None])[0])),
        out["tokenized_prompt_mask"].sum(),
    )
    assert kept == 100 and out["tokens_cut"] == whole - kept - (100 - kept)
    assert not caplog.records  # training counts
    tokenizer.long_prompt = "shorten"
    out = [tokenizer.tokenize("bb " * 60, state) for _ in range(2)][0]
    n = int(out["tokenized_prompt_mask"].sum())
    assert out["tokenized_prompt"][n - len(end) : n].tolist() == end
    assert len(caplog.records) == 1 and "60 words" in caplog.text


def answer(text="Action: ", ids=(21, 15, 30, 40), end="|"):
    return np.asarray(
        [2, 50] + Letters().encode(text) + [871 - i for i in ids] + Letters().encode(end, eos=True) + [0, 0]
    )


def test_decode_is_strict_about_what_is_not_an_action(tokenizer):
    close(tokenizer.decode(answer(), 2, 2), CHUNK, 1e-6)
    with pytest.raises(DecodeError, match="no 'Action: '"):
        tokenizer.decode(answer(text="Actions "), 2, 2)
    stray = answer(ids=(21, 15, 800, 30, 40))  # 871 - 800 = 71: text
    with pytest.raises(DecodeError, match="no action token"):
        tokenizer.decode(stray, 2, 2)
    close(tokenizer.decode(stray, 2, 2, mode="openpi"), CHUNK, 1e-6)
    with pytest.raises(DecodeError, match="wrong number"):
        tokenizer.decode(answer(ids=(21, 15, 30)), 2, 2)
    with pytest.raises(SettingsError, match="mode"):
        tokenizer.decode(answer(), 2, 2, mode="lenient")
    with pytest.raises(DataError, match="whole numbers"):
        tokenizer.decode(answer().astype(float), 2, 2)


def test_decode_ends_at_bar_end_of_text_padding_or_a_second_answer(tokenizer):
    body = answer(end="")[:-3]
    for tail in ([], [1], [0], [ord("|") + 10, 870, 1], [*Letters().encode("Action: "), 871]):
        close(tokenizer.decode(np.asarray([*body, *tail]), 2, 2), CHUNK, 1e-6)


def test_grammar_spells_what_tokenize_writes(tokenizer):
    g = tokenizer.grammar(2, 2)
    out = tokenizer.tokenize("go", np.asarray([0.0]), CHUNK)
    target = out["tokenized_prompt"][out["token_loss_mask"]].tolist()
    assert tuple(target[: len(g.prefix)]) == g.prefix
    assert tuple(target[-len(g.suffix) :]) == g.suffix
    body = target[len(g.prefix) : -len(g.suffix)]
    place = {int(t): i for i, t in enumerate(g.action_ids)}
    assert sum(int(g.lengths[place[t]]) for t in body) == g.total == 4
    assert g.max_tokens == len(target)


@pytest.mark.parametrize(
    ("prompt", "state", "actions", "error", "says"),
    [
        (3, np.zeros(2), None, DataError, "not text"),
        ("go", None, None, DataError, "there is none"),
        ("go", np.asarray([0, np.nan]), None, DataError, r"state\[1\]"),
        ("go", np.zeros((2, 2)), None, DataError, "one axis"),
        ("go", np.zeros(2), np.full((2, 2), np.inf), DataError, r"actions\[0, 0, 0\]"),
        ("go", np.zeros(2), np.zeros(4), DataError, "three axes"),
    ],
)
def test_bad_samples_are_named(tokenizer, prompt, state, actions, error, says):
    with pytest.raises(error, match=says):
        tokenizer.tokenize(prompt, state, actions)


def test_text_only_tokenizer_has_no_actions():
    t = Tokenizer(Letters(), None, "pi0", None, 10)
    assert t.fitted
    assert t.fit(np.zeros((1, 2, 2))) is t
    for call in (lambda: t.grammar(2, 2), lambda: t.decode(answer(), 2, 2)):
        with pytest.raises(SettingsError, match="no action tokens"):
            call()


def test_id_map_is_openpis_involution_and_stored(tmp_path):
    ids = IdMap.from_end(257152, 1024, 128)
    assert ids.text_ids[[0, 1023]].tolist() == [257023, 256000]
    ids.save(tmp_path)
    again = IdMap.load(tmp_path)
    assert again.vocab_size == 257152
    assert np.array_equal(again.text_ids, ids.text_ids)
    assert np.array_equal(again.to_codec(again.to_text(np.arange(1024))), np.arange(1024))
    assert (again.to_codec(np.asarray([-3, 0, 255999, 257024, 2**40])) == -1).all()


@pytest.mark.parametrize(
    "content", ["", "{}", '{"vocab_size": 5, "text_ids": [5]}', '{"vocab_size": 5, "text_ids": [1, 1]}']
)
def test_damaged_id_map(tmp_path, content):
    (tmp_path / ID_MAP_FILE).write_text(content)
    with pytest.raises(StoreError, match="id map"):
        IdMap.load(tmp_path)


def test_id_map_needs_room():
    with pytest.raises(SettingsError, match="too small") as e:
        IdMap.from_end(1000, 900, 128)
    assert "1000" in str(e.value)
    assert "1032" in str(e.value)
    with pytest.raises(SettingsError, match="negative"):
        IdMap.from_end(1000, 10, -1)


def test_action_ids_must_leave_the_markers_alone():
    """With skip 0 and room to spare, ids that reach down to the letters of "Action: " are refused."""

    class Wide(Tenths):
        vocab_size = 950

    with pytest.raises(SettingsError, match="prompt format needs"):
        Tokenizer(Letters(), Wide(), "fast", IdMap.from_end(1000, 950, 0), 10)
    with pytest.raises(SettingsError, match="of another tokenizer"):
        Tokenizer(Letters(), Tenths(), "fast", IdMap.from_end(1000, 40, 128), 10)
    with pytest.raises(SettingsError, match="prompt format"):
        Tokenizer(Letters(), None, "pi9", None, 10)


def test_save_writes_all_three(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert {p.name for p in (tmp_path / "tokenizer").iterdir()} == {"letters", CODEC_FILE, ID_MAP_FILE}


def test_codec_files(tmp_path):
    write_codec(tmp_path, "mine", {"x": 1.5}, {"a": np.arange(3)})
    facts, arrays = read_codec(tmp_path, "mine")
    assert facts["x"] == 1.5
    assert arrays["a"].tolist() == [0, 1, 2]
    with pytest.raises(SettingsError, match="another tokenizer"):
        read_codec(tmp_path, "other")
    (tmp_path / ARRAYS_FILE).write_bytes(b"PK nothing")
    with pytest.raises(StoreError, match="cannot be read"):
        read_codec(tmp_path, "mine")
    (tmp_path / CODEC_FILE).write_text('{"vla_codec": 2, "kind": "mine"}')
    (tmp_path / ARRAYS_FILE).unlink()
    with pytest.raises(StoreError, match="version"):
        read_codec(tmp_path, "mine")


def test_pickles_are_refused(tmp_path):
    write_codec(tmp_path, "mine", {}, {})
    np.savez(tmp_path / ARRAYS_FILE, a=np.asarray([object()], dtype=object), allow_pickle=True)
    with pytest.raises(StoreError):
        read_codec(tmp_path, "mine")


def test_chunks_are_checked():
    assert check_chunks(np.zeros((2, 3, 4), np.float32)).dtype == np.float32
    assert check_chunks(np.zeros((2, 3, 4), np.int64)).dtype == np.float64
    bad = np.zeros((2, 3, 4))
    bad[1, 2, 3] = np.nan
    with pytest.raises(DataError, match=r"actions\[1, 2, 3\]"):
        check_chunks(bad)
    for shape in ((3, 4), (1, 0, 4), (1, 3, 0)):
        with pytest.raises(DataError, match="three axes"):
            check_chunks(np.zeros(shape))
