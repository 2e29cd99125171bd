"""openpi's stored tokenizer outputs, case by case: tokens, masks and decoded actions."""

import json

import numpy as np
import pytest
from shared_data import GOLDENS, SHARED, needs

from vla.compose import resolve
from vla.contracts import Spec
from vla.errors import DataError, DecodeError
from vla.id_map import IdMap
from vla.testing.closeness import close
from vla.tokenizer import Tokenizer, open_tokenizer

MODEL = SHARED / "data" / "paligemma_tokenizer" / "tokenizer.model"
FILE = GOLDENS / "tokenizers" / "openpi_tokenizers.npz"

pytestmark = [pytest.mark.goldens, needs(FILE, MODEL)]


def cases():
    if not FILE.is_file():
        return []
    with np.load(FILE, allow_pickle=False) as z:
        return json.loads(str(z["meta_json"]))


def named(case):
    return f"{case['case']:03d}-{case['tokenizer']}-{case.get('name', case['format']).replace(' ', '_')}"


@pytest.fixture(scope="module")
def arrays():
    with np.load(FILE, allow_pickle=False) as z:
        return {name: z[name] for name in z.files}


@pytest.fixture(scope="module")
def open_case():
    opened = {}

    def open_one(case) -> Tokenizer:
        kind, text = case["tokenizer"], {"part": "paligemma", "model": str(MODEL)}
        tree = {
            "paligemma": text | {"prompt": case["format"]},
            "fast": {"part": "fast", "text": text, "source": str(GOLDENS / "tokenizers" / "fast")},
            "binning": {"part": "binning", "text": text, "preset": "openpi"},
        }[kind]
        key = (kind, case["format"] if kind == "paligemma" else "")
        if key not in opened:
            opened[key] = open_tokenizer(resolve("tokenizer", tree, "tokenizer"), Spec())
        opened[key].max_len = case.get("max_len", 10**6)
        return opened[key]

    return open_one


def test_all_cases_are_here():
    assert len(cases()) == 121


@pytest.mark.parametrize("case", [c for c in cases() if c["format"] != "extract_actions"], ids=named)
def test_tokens_and_masks(case, arrays, open_case):
    own = {k.split("/")[1]: v for k, v in arrays.items() if k.startswith(f"{case['case']:03d}/")}
    tokenizer, state, actions = open_case(case), own.get("state"), own.get("action_in")
    rows = tokenizer.ids(
        [case["prompt"]], None if state is None else [state], None if actions is None else actions[None]
    )
    out = {name: x[0] for name, x in tokenizer.arrange(rows).items()}  # openpi cuts the end off; so does this
    if sum(map(len, rows[0])) > tokenizer.max_len:  # ours would not: `tokenize` refuses, or drops words instead
        with pytest.raises(DataError):
            tokenizer.tokenize(case["prompt"], state, actions)
    else:
        whole = tokenizer.tokenize(case["prompt"], state, actions)
        assert all(np.array_equal(x, whole[name]) for name, x in out.items())
    pairs = {
        "tokens": "tokenized_prompt",
        "mask": "tokenized_prompt_mask",
        "ar_mask": "token_ar_mask",
        "loss_mask": "token_loss_mask",
    }
    compared = [name for name in pairs if name in own]
    assert compared[:2] == ["tokens", "mask"]
    for name in compared:
        assert np.array_equal(out[pairs[name]], own[name]), name


# What openpi accepts and strict decoding refuses, with the reason.
REFUSED = {
    "ordinary text inside": "no action token",
    "blank between two ids": "no action token",
    "ids outside the 256 bins": "no action token",
    "more ids than needed": "not 128",
}


@pytest.mark.parametrize("case", [c for c in cases() if c["format"] == "extract_actions"], ids=named)
def test_extracted_actions(case, arrays, open_case):
    """Mode "openpi" gives openpi's values, and raises exactly where openpi gives zeros."""
    tokens, want = (arrays[f"{case['case']:03d}/{name}"] for name in ("tokens", "actions"))
    tokenizer, shape = open_case(case), (case["horizon"], case["dim"])
    if not want.any():
        for mode in ("openpi", "strict"):
            with pytest.raises(DecodeError):
                tokenizer.decode(tokens, *shape, mode=mode)
        return
    close(tokenizer.decode(tokens, *shape, mode="openpi"), want, 1e-6)
    if case["name"] in REFUSED:
        with pytest.raises(DecodeError, match=REFUSED[case["name"]]):
            tokenizer.decode(tokens, *shape)
    else:
        close(tokenizer.decode(tokens, *shape), want, 1e-6)


def test_ids_do_not_go_through_text(open_case):
    """openpi's way back (ids to text to ids) changes some sequences of action ids; slicing changes none."""
    tokenizer = open_case({"tokenizer": "fast", "format": "tokenize"})
    ids = np.asarray(IdMap.from_end(tokenizer.vocab_size, 2048, 128).text_ids)  # the public processor has 2,048
    rows = np.random.default_rng(0).choice(ids, (300, 10))
    through_text = [tokenizer.text.encode(tokenizer.text.decode(row)) for row in rows]
    assert sum(a != b.tolist() for a, b in zip(through_text, rows, strict=True)) > 0
    id_map = IdMap(tokenizer.vocab_size, ids)
    assert np.array_equal(id_map.to_text(id_map.to_codec(rows)), rows)
