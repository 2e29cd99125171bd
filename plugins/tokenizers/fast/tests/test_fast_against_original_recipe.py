"""On real actions the own fit needs no more tokens than the original recipe with as many ids on the same data."""

import numpy as np
import pytest
from shared_data import SHARED, needs
from vla_tokenizer_fast.codec import FastCodec
from vla_tokenizer_fast.config import Fast

from vla.codec_bench import load_chunks

ACTIONS = SHARED / "data" / "actions"


@needs(ACTIONS)
@pytest.mark.parametrize(
    ("name", "horizon"), [("franka_close_box_actions", 30), ("pen-human-v0", 25), ("door-human-v0", 25)]
)
def test_no_more_tokens(name, horizon):
    file = ACTIONS / f"{name}.npz"
    tokenizers = pytest.importorskip("tokenizers")
    chunks = np.clip(load_chunks(file, horizon, 300).normalised(), -1.5, 1.5)
    codec = FastCodec(Fast(codes=1024)).fit(chunks)
    rows = codec._coefficients(chunks)
    texts = ["".join(map(chr, row)) for row in rows - rows.min()]
    original = tokenizers.ByteLevelBPETokenizer()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1024, min_frequency=2, show_progress=False, special_tokens=[], max_token_length=10000,
        initial_alphabet=[chr(i) for i in range(int(rows.max() - rows.min()) + 1)],
    )  # fmt: skip
    original._tokenizer.train_from_iterator(texts, trainer=trainer)
    theirs = sum(len(original.encode(text).ids) for text in texts)
    ours = codec.encode(chunks)
    assert sum(map(len, ours)) <= theirs
    assert not codec.out_of_range(chunks).any()
    back = np.stack([codec.decode(ids, *chunks.shape[1:]) for ids in ours])
    assert np.abs(back - chunks).max() <= codec.error_bound(*chunks.shape[1:])
