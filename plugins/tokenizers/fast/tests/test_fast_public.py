"""Files of the public processor: ids and actions equal to the original's, its failures typed errors here."""

import json

import numpy as np
import pytest
import shared_data
from vla_tokenizer_fast.codec import FastCodec
from vla_tokenizer_fast.config import Fast
from vla_tokenizer_fast.public import CONFIG, TOKENIZER, PublicFiles, byte_characters, word_starts

from vla.errors import DecodeError, SettingsError, StoreError
from vla.testing.closeness import close

GOLDENS = shared_data.GOLDENS / "tokenizers" / "fast"
here = shared_data.needs(GOLDENS / "cases.npz")


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDENS / "cases.npz", allow_pickle=False) as z:
        return {name: z[name] for name in z.files}


@pytest.fixture(scope="module")
def codec():
    return FastCodec(Fast(source=str(GOLDENS)))


def cases(z):
    for i, (h, d) in enumerate(z["shape"].tolist()):
        values, ids = (slice(*z[name][i : i + 2]) for name in ("value_offset", "ids_offset"))
        yield z["actions"][values].reshape(h, d), z["ids"][ids], z["decoded"][values].reshape(h, d)


@here
@pytest.mark.goldens
def test_every_stored_chunk(codec, golden):
    count = 0
    for chunk, ids, decoded in cases(golden):
        assert np.array_equal(codec.encode(chunk[None])[0], ids)
        close(codec.decode(ids, *chunk.shape), decoded, 1e-6)
        count += 1
    assert count == len(golden["shape"]) == 200


@here
@pytest.mark.goldens
def test_batches_give_the_same(codec, golden):
    by_shape = {}
    for chunk, ids, _ in cases(golden):
        by_shape.setdefault(chunk.shape, []).append((chunk, ids))
    for rows in by_shape.values():
        for got, (_, want) in zip(codec.encode(np.stack([c for c, _ in rows])), rows, strict=True):
            assert np.array_equal(got, want)


@here
@pytest.mark.goldens
def test_where_the_original_gives_zeros_we_raise(codec, golden):
    raised = 0
    for i in range(sum(k.endswith("_shape") for k in golden)):
        ids, want = golden[f"fail{i}_ids"], golden[f"fail{i}_decoded"]
        h, d = golden[f"fail{i}_shape"].tolist()
        strict_only = ids.max(initial=0) >= 1024  # the original drops such ids silently
        if want.any() and not strict_only:
            close(codec.decode(ids, h, d), want, 1e-6)
            continue
        with pytest.raises(DecodeError):
            codec.decode(ids, h, d)
        raised += 1
        if strict_only:
            close(codec.decode(ids[ids < 1024], h, d), want, 1e-6)
    assert raised == 10


@here
@pytest.mark.goldens
def test_out_of_range_becomes_the_nearest_coefficient(codec, golden):
    """Below the range the original does the same; above it the original loses the coefficient."""
    names = [str(golden[f"range{i}_name"]) for i in range(4)]
    below = names.index("below_min_clipped")
    assert np.array_equal(codec.encode(golden[f"range{below}_actions"][None])[0], golden[f"range{below}_ids"])
    for i in range(4):
        chunk = golden[f"range{i}_actions"]
        (ids,) = codec.encode(chunk[None])
        assert codec.out_of_range(chunk[None])[0] > 0
        back = codec.decode(ids, *chunk.shape)
        assert np.abs(back).max() < np.abs(chunk).max() + 1  # the original reaches 1633 here
        rows = codec._coefficients(chunk[None])
        moved = (codec._model.nearest(rows) != rows).reshape(chunk.shape).any(0)  # [d]
        assert moved.any()
        assert np.abs(back - chunk)[:, ~moved].max() <= codec.error_bound(*chunk.shape)


@here
@pytest.mark.goldens
def test_saved_files_serve_again(codec, golden, tmp_path):
    codec.save(tmp_path)
    again = FastCodec(Fast()).load(tmp_path)
    for chunk, ids, _ in list(cases(golden))[:20]:
        assert np.array_equal(again.encode(chunk[None])[0], ids)
    assert codec.fit(np.zeros((1, 4, 2))) is codec


@here
@pytest.mark.goldens
def test_equal_to_the_tokenizers_package_on_any_text(codec):
    """The pattern that cuts words, and the merges, against the library that the original uses."""
    tokenizers = pytest.importorskip("tokenizers")
    original = tokenizers.Tokenizer.from_file(str(GOLDENS / TOKENIZER))
    files = codec._model
    usable = np.flatnonzero(files._nearest == np.arange(len(files._nearest)))
    tricky = np.asarray([ord(c) for c in "'  \t\nstrevlmd1!G\x85\xa0"])
    rng = np.random.default_rng(0)
    for trial in range(60):
        pool = np.intersect1d(tricky, usable) if trial % 2 else rng.choice(usable, rng.integers(2, 40))
        text = rng.choice(pool, (20, rng.integers(1, 60)))
        for row, got in zip(text, files.encode(text + files.low), strict=True):
            assert original.encode("".join(map(chr, row))).ids == got.tolist()


@here
@pytest.mark.goldens
def test_random_ids_decode_or_say_why(codec):
    rng = np.random.default_rng(0)
    for _ in range(300):
        ids = rng.integers(-2 if rng.random() < 0.2 else 0, 1030 if rng.random() < 0.2 else 1024, rng.integers(0, 40))
        try:
            out = codec.decode(ids, 10, 7, rng.choice(["strict", "relaxed"]))
        except DecodeError:
            continue
        assert np.isfinite(out).all()


@here
@pytest.mark.goldens
def test_grammar_lengths_add_up(codec, golden):
    lengths = codec.lengths()
    for chunk, ids, _ in cases(golden):
        if (lengths[ids] > 0).all():
            assert lengths[ids].sum() == chunk.size


def tiny_files(merges=(), **changes):
    """A processor over the characters '!' .. '/' (coefficients -7 .. 7)."""
    vocab = {chr(33 + i): i for i in range(15)}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    before = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    tokenizer = {
        "model": {"type": "BPE", "vocab": vocab, "merges": list(map(list, merges))},
        "pre_tokenizer": before,
        **changes,
    }
    return {"scale": 10, "min_token": -40, "vocab_size": len(vocab)}, tokenizer


def test_holes_become_neighbours():
    """The original drops a coefficient that it never saw, and then the whole chunk decodes to zeros."""
    config, tokenizer = tiny_files()
    del tokenizer["model"]["vocab"]["-"]  # coefficient 5
    files = PublicFiles(config, tokenizer, "here")
    assert files.nearest(np.asarray([-9, -7, 4, 5, 6, 99])).tolist() == [-7, -7, 4, 4, 6, 7]
    assert files.decode(files.encode(files.nearest(np.asarray([[5, 0]])))[0]).tolist() == [4, 0]


def test_files_are_found_in_the_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SettingsError, match="hf download some/fast"):
        FastCodec(Fast(source="some/fast", codes=15))
    folder = tmp_path / "models--some--fast" / "snapshots" / "0a"
    folder.mkdir(parents=True)
    for name, content in zip((CONFIG, TOKENIZER), tiny_files(), strict=True):
        (folder / name).write_text(json.dumps(content))
    (folder / "processing_action_tokenizer.py").write_text("raise SystemExit('remote code was run')")
    codec = FastCodec(Fast(source="some/fast", codes=15))
    close(codec.decode(codec.encode(np.full((1, 4, 2), 0.3))[0], 4, 2), 0.3, codec.error_bound(4, 2) / 0.3)
    with pytest.raises(SettingsError, match="tokenizer.codes=15"):
        FastCodec(Fast(source="some/fast"))


@pytest.mark.parametrize(
    "changes",
    [
        {"added_tokens": [{"id": 3}]},
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"model": {}},
        {"model": 3},
    ],
)
def test_what_is_no_fast_file_is_refused(changes):
    with pytest.raises(StoreError):
        PublicFiles(*tiny_files(**changes), "here")


def test_two_merges_of_one_text_are_refused():
    merges = [("!", "!"), ("!!", "!"), ("!", "!!")]
    with pytest.raises(StoreError, match="two merges"):
        PublicFiles(*tiny_files(merges), "here")


def test_byte_characters_are_a_bijection():
    table = byte_characters()
    assert sorted(table.values()) == list(range(256))
    assert table["!"] == 33
    assert table["\u0120"] == 32


def test_words_follow_the_pattern():
    def words(text):
        from vla_tokenizer_fast.public import _char_class

        codes = np.asarray([[ord(c) for c in text]])
        starts = word_starts(np.asarray([[_char_class(c) for c in codes[0].tolist()]]), codes)[0]
        edges = [*np.flatnonzero(starts), len(text)]
        return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]

    assert words("ab12 cd  ef") == ["ab", "12", " cd", " ", " ef"]
    assert words("it's we'll!'s '") == ["it", "'s", " we", "'ll", "!'", "s", " '"]
    assert words("a\t b\n") == ["a", "\t", " b", "\n"]
    assert words("a\tb  ") == ["a", "\t", "b", "  "]
