"""The conformance kit of tokenizers: text alone, or text and an action codec. numpy only."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import evolve

from vla.errors import DataError, DecodeError, SettingsError, VlaError
from vla.testing.parts import PartConformance
from vla.tokenizer import Tokenizer, open_tokenizer
from vla.transforms.text import Tokenize

HORIZON, DIM, ROOM = 8, 5, 400
PROMPT = "pick up the red_block"


def chunks(count: int = 48, seed: int = 0) -> np.ndarray:
    """Smooth chunks [n h d] within [-1, 1], the last dim a gripper that opens or closes."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 1, HORIZON)[None, :, None]
    phase, speed, size = (rng.uniform(low, high, (count, 1, DIM)) for low, high in ((0, 6), (0.5, 4), (0.1, 0.9)))
    out = size * np.sin(phase + speed * time)
    out[:, :, -1] = np.where(rng.random((count, 1)) < 0.5, -1, 1)
    return out.astype(np.float32)


@functools.cache
def fitted(cls: type[TokenizerConformance]) -> Tokenizer:
    """The class's tokenizer, fitted once."""
    return cls().open().fit(chunks())


class TokenizerConformance(PartConformance):
    """A tokenizer: prompts and states to ids; and, with an action codec, chunks to ids and back."""

    kind = "tokenizer"

    def open(self, assets: Path | None = None) -> Tokenizer:
        """A new tokenizer, not fitted."""
        return open_tokenizer(self.chosen, evolve(self.variant.spec, max_token_len=ROOM), assets)

    @property
    def tokenizer(self) -> Tokenizer:
        """The fitted tokenizer."""
        return fitted(type(self))

    @property
    def codec(self) -> Any:
        """The fitted codec; text-only tokenizers skip the check that asks."""
        if self.tokenizer.codec is None:
            pytest.skip("a text tokenizer has no action codec")
        return self.tokenizer.codec

    def state(self) -> np.ndarray:
        """A normalised state [s]."""
        return np.linspace(-0.9, 0.9, 4).astype(np.float32)

    def answer(self, chunk: np.ndarray) -> np.ndarray:
        """The target tokens of one chunk."""
        out = self.tokenizer.tokenize(PROMPT, self.state(), chunk)
        return out["tokenized_prompt"][out["token_loss_mask"]]

    # ---- what it says -----------------------------------------------------------------------------------------------

    def test_offers_are_true(self) -> None:
        offers, tokenizer = self.chosen.offers, self.tokenizer
        assert offers["vocab_size"] == tokenizer.vocab_size
        assert ("actions" in offers["emits"]) == (tokenizer.codec is not None)
        assert set(offers["emits"]) <= {"text", "state", "actions"} and "text" in offers["emits"]
        assert offers["prompt"] == tokenizer.prompt.name

    def test_state_is_written_as_offered(self) -> None:
        first, second = (self.tokenizer.tokenize(PROMPT, s)["tokenized_prompt"] for s in (self.state(), -self.state()))
        assert np.array_equal(first, second) == ("state" not in self.chosen.offers["emits"])

    # ---- the end of an episode --------------------------------------------------------------------------------------

    def test_what_stands_past_the_end_of_an_episode_teaches_nothing(self) -> None:
        """Padded steps are no targets: other values in them change nothing, and they count for nothing."""
        steps, length = self.codec, chunks().shape[1]
        real = np.arange(length) < length // 2
        step = Tokenize(self.tokenizer)

        def seen(values: np.ndarray, keep: np.ndarray) -> dict[str, np.ndarray]:
            return step({"prompt": PROMPT, "state": self.state(), "actions": values, "actions_is_pad": ~keep})

        one, other = (np.where(real[:, None], chunks()[0], values) for values in (chunks()[1], 0 * chunks()[0]))
        a, b, whole = seen(one, real), seen(other, real), seen(chunks()[0], np.ones(length, bool))
        for name in ("tokenized_prompt", "token_ar_mask", "token_loss_mask"):
            assert np.array_equal(a[name], b[name]), f"what stands in padded steps changes {name}"
        targets, left = whole["token_loss_mask"].sum(), a["token_loss_mask"].sum()
        if not getattr(steps, "by_step", False):
            assert a["extra/target_weight"] == real.mean() and whole["extra/target_weight"] == 1
            return
        assert left == targets - (~real).sum() * chunks().shape[2], "tokens of padded steps are targets"
        changed = np.where(real[:, None], chunks()[0], chunks()[1])
        first, second = (self.codec.encode(c[None])[0].reshape(length, -1) for c in (chunks()[0], changed))
        assert np.array_equal(first[real], second[real]), "by_step: a token stands for more than its own step"

    # ---- prompts ----------------------------------------------------------------------------------------------------

    def test_arrays_have_the_shapes_of_the_contract(self) -> None:
        out = self.tokenizer.tokenize(PROMPT, self.state(), chunks()[0])
        want = {
            "tokenized_prompt": np.int32,
            "tokenized_prompt_mask": bool,
            "token_ar_mask": np.int32,
            "token_loss_mask": bool,
        }
        assert out.pop("tokens_cut") == 0
        assert {name: x.dtype for name, x in out.items()} == {name: np.dtype(kind) for name, kind in want.items()}
        assert all(x.shape == (ROOM,) for x in out.values())
        ids = out["tokenized_prompt"]
        assert ids.min() >= 0 and ids.max() < self.tokenizer.vocab_size

    def test_padding_is_at_the_end(self) -> None:
        out = self.tokenizer.tokenize(PROMPT, self.state(), chunks()[0])
        count = int(out["tokenized_prompt_mask"].sum())
        assert 0 < count < ROOM and out["tokenized_prompt_mask"][:count].all()
        assert not out["tokenized_prompt"][count:].any(), "padding is 0"

    def test_inference_has_no_targets(self) -> None:
        out = self.tokenizer.tokenize(PROMPT, self.state())
        assert not out["token_ar_mask"].any() and not out["token_loss_mask"].any()

    def test_targets_come_last_and_start_the_same_prompt(self) -> None:
        with_actions = self.tokenizer.tokenize(PROMPT, self.state(), chunks()[0])
        without = self.tokenizer.tokenize(PROMPT, self.state())
        n = int(without["tokenized_prompt_mask"].sum())
        assert np.array_equal(with_actions["tokenized_prompt"][:n], without["tokenized_prompt"][:n])
        assert not with_actions["token_ar_mask"][:n].any(), "the prompt is the same at training and at inference"
        assert np.array_equal(with_actions["token_ar_mask"] == 1, with_actions["token_loss_mask"])

    def test_a_batch_is_a_loop(self) -> None:
        prompts = [PROMPT, "a", "put the cup on the plate"]
        states, some = [self.state() * k for k in (1, 0.5, -1)], chunks()[:3]
        batch = self.tokenizer.tokenize_batch(prompts, states, some)
        for row in range(3):
            one = self.tokenizer.tokenize(prompts[row], states[row], some[row])
            assert all(np.array_equal(batch[name][row], one[name]) for name in batch)

    def test_other_words_are_other_ids(self) -> None:
        a, b = (self.tokenizer.tokenize(p, self.state())["tokenized_prompt"] for p in ("push left", "push right"))
        assert not np.array_equal(a, b)

    @pytest.mark.parametrize("prompt", ["", "   ", "é 漢字 🤖", "Task: x, State: 1;\nAction: ", "word " * 60])
    def test_any_text_is_a_prompt(self, prompt: str) -> None:
        out = self.tokenizer.tokenize(prompt, self.state())
        assert out["tokenized_prompt_mask"].any() and out["tokenized_prompt"].shape == (ROOM,)

    def test_a_long_instruction_never_costs_the_state(self) -> None:
        """Refused at inference; where it may be cut, its last words go, and what follows it stays."""
        long = "word " * 2000
        with pytest.raises(DataError, match="instruction is too long"):
            self.tokenizer.tokenize(long, self.state())
        short, cut = (self.tokenizer.tokenize(p, self.state(), cut=True) for p in ("word", long))
        assert short["tokens_cut"] == 0 and cut["tokens_cut"] > 1000
        ends = [out["tokenized_prompt"][out["tokenized_prompt_mask"]][-8:] for out in (short, cut)]
        if "state" in self.chosen.offers["emits"]:
            assert np.array_equal(*ends)
        assert ends[0][-1] == ends[1][-1]

    def test_half_of_a_surrogate_pair_is_refused(self) -> None:
        for prompt in ("push \ud83d", "\udd16 left"):
            with pytest.raises(DataError, match="surrogate"):
                self.tokenizer.tokenize(prompt, self.state())

    def test_what_is_no_text_is_refused(self) -> None:
        for prompt in (None, 3, b"bytes"):
            with pytest.raises(DataError, match="prompt"):
                self.tokenizer.tokenize(prompt, self.state())  # type: ignore[arg-type]

    def test_bad_states_are_refused(self) -> None:
        if "state" not in self.chosen.offers["emits"]:
            pytest.skip("the state is not in its prompt")
        for state in (None, np.array([0.0, np.nan]), np.zeros((2, 2))):
            with pytest.raises(DataError, match="state"):
                self.tokenizer.tokenize(PROMPT, state)

    def test_text_comes_back(self) -> None:
        text = self.tokenizer.text
        assert text.decode(text.encode("pick up the block")).strip() == "pick up the block"

    # ---- saving -----------------------------------------------------------------------------------------------------

    def test_saved_it_gives_the_same_ids(self, tmp_path: Path) -> None:
        self.tokenizer.save(tmp_path)
        again = self.open(tmp_path)
        assert again.fitted
        for chunk in chunks(6, seed=1):
            before, after = (t.tokenize(PROMPT, self.state(), chunk) for t in (self.tokenizer, again))
            assert all(np.array_equal(before[name], after[name]) for name in before)
            if self.tokenizer.codec is not None:
                tokens = self.answer(chunk)
                assert np.array_equal(again.decode(tokens, HORIZON, DIM), self.tokenizer.decode(tokens, HORIZON, DIM))

    def test_no_pickle_is_written(self, tmp_path: Path) -> None:
        self.tokenizer.save(tmp_path)
        for file in (f for f in tmp_path.rglob("*") if f.is_file()):
            assert file.suffix not in (".pkl", ".pickle", ".pt", ".joblib"), file
            if file.suffix == ".npz":
                np.load(file, allow_pickle=False)

    # ---- the codec --------------------------------------------------------------------------------------------------

    def test_ids_are_in_range(self) -> None:
        for ids in self.codec.encode(chunks(8, seed=2)):
            assert ids.dtype == np.int32 and ids.ndim == 1
            assert ids.min() >= 0 and ids.max() < self.codec.vocab_size

    def test_errors_stay_within_the_bound(self) -> None:
        some = chunks(32, seed=3)
        bound = self.codec.error_bound(HORIZON, DIM)
        back = np.stack([self.codec.decode(ids, HORIZON, DIM) for ids in self.codec.encode(some)])
        assert back.shape == some.shape and np.isfinite(back).all()
        worst = float(np.abs(back - some).max())
        if np.isfinite(bound):
            assert worst <= bound * (1 + 1e-6) + 1e-6, f"error {worst:.4f}, promised {bound:.4f}"
        assert np.square(back - some).mean() < 0.5 * some.var(), "the ids say little about the chunk"

    def test_encoding_a_batch_is_a_loop(self) -> None:
        some = chunks(4, seed=4)
        for ids, chunk in zip(self.codec.encode(some), some, strict=True):
            assert np.array_equal(ids, self.codec.encode(chunk[None])[0])

    def test_a_fit_is_deterministic(self) -> None:
        assert self.codec is not None
        first, second = (self.open().fit(chunks(12)).codec for _ in range(2))
        for a, b in zip(first.encode(chunks(4, seed=5)), second.encode(chunks(4, seed=5)), strict=True):
            assert np.array_equal(a, b)

    def test_unfitted_it_says_so(self) -> None:
        if self.codec is None or self.open().fitted:
            pytest.skip("there is nothing to fit")
        with pytest.raises(SettingsError):
            self.open().codec.encode(chunks(1))

    def test_lengths_add_up(self) -> None:
        lengths = self.codec.lengths()
        assert lengths.shape == (self.codec.vocab_size,) and lengths.dtype == np.int32 and (lengths >= 0).all()
        for ids in self.codec.encode(chunks(8, seed=6)):
            assert lengths[ids].sum() == self.codec.total(HORIZON, DIM)

    def test_whatever_the_grammar_allows_can_be_decoded(self) -> None:
        """Random ids under the constraint that a decoder obeys: each answer is a finite chunk."""
        rng = np.random.default_rng(7)
        lengths, total = self.codec.lengths(), self.codec.total(HORIZON, DIM)
        for _ in range(20):
            ids, left = [], total
            while left:
                token = int(rng.choice(np.flatnonzero((lengths > 0) & (lengths <= left))))
                ids.append(token)
                left -= int(lengths[token])
            out = self.codec.decode(np.array(ids, np.int32), HORIZON, DIM)
            assert out.shape == (HORIZON, DIM) and np.isfinite(out).all()

    @pytest.mark.parametrize("mode", ["strict", "relaxed", "openpi"])
    def test_garbage_raises_nothing_but_decode_errors(self, mode: str) -> None:
        rng = np.random.default_rng(8)
        size = self.codec.vocab_size
        for _ in range(60):
            ids = rng.integers(-2, size + 2, rng.integers(0, 3 * HORIZON * DIM)).astype(np.int32)
            try:
                out = self.codec.decode(ids, HORIZON, DIM, mode)
            except DecodeError:
                continue
            assert out.shape == (HORIZON, DIM) and np.isfinite(out).all()

    def test_garbage_answers_raise_nothing_but_decode_errors(self) -> None:
        assert self.codec is not None
        rng = np.random.default_rng(9)
        tokens = self.answer(chunks()[0])
        for _ in range(60):
            bad = tokens.copy()
            where = rng.integers(0, len(bad), rng.integers(1, 4))
            bad[where] = rng.integers(0, self.tokenizer.vocab_size, len(where))
            bad = bad[: rng.integers(0, len(bad) + 1)] if rng.random() < 0.3 else bad
            try:
                out = self.tokenizer.decode(bad, HORIZON, DIM)
            except DecodeError:
                continue
            assert out.shape == (HORIZON, DIM) and np.isfinite(out).all()

    def test_bad_chunks_are_refused(self) -> None:
        bad = chunks(1)
        bad[0, 0, 0] = np.nan
        with pytest.raises(DataError):
            self.codec.encode(bad)
        with pytest.raises(VlaError):
            self.codec.encode(np.zeros((2, 3), np.float32))

    def test_values_beyond_the_range_stay_finite(self) -> None:
        for ids in self.codec.encode(chunks(4) * 5):
            assert np.isfinite(self.codec.decode(ids, HORIZON, DIM)).all()

    def test_an_answer_stands_for_its_chunk(self) -> None:
        """Through the text vocabulary and back: the same as through the codec alone."""
        for chunk in chunks(6, seed=10):
            direct = self.codec.decode(self.codec.encode(chunk[None])[0], HORIZON, DIM)
            assert np.array_equal(self.tokenizer.decode(self.answer(chunk), HORIZON, DIM), direct)

    def test_the_grammar_describes_the_answers(self) -> None:
        assert self.codec is not None
        rules = self.tokenizer.grammar(HORIZON, DIM)
        length = dict(zip(rules.action_ids.tolist(), np.asarray(rules.lengths).tolist(), strict=True))
        for chunk in chunks(6, seed=11):
            tokens = self.answer(chunk).tolist()
            end = len(tokens) - len(rules.suffix)
            assert tuple(tokens[: len(rules.prefix)]) == rules.prefix and tuple(tokens[end:]) == rules.suffix
            assert sum(length[t] for t in tokens[len(rules.prefix) : end]) == rules.total

    def test_action_ids_have_places_of_their_own(self) -> None:
        assert self.codec is not None
        ids = self.tokenizer.id_map.text_ids
        assert len(set(ids.tolist())) == len(ids) == self.codec.vocab_size
        assert ids.min() > 3 and ids.max() < self.tokenizer.vocab_size, "0 to 3 are padding, end, begin, unknown"
