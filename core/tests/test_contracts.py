"""The border between data and model: what is refused, what is dropped, and that nothing else changes."""

import numpy as np
import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.contracts import Observation, Spec, check_observation, observation_from, pack
from vla.errors import DataError

SPEC = Spec(cameras=("base", "wrist"), image_size=(8, 6), state_dim=3, max_token_len=40)


def observation(batch=2, **changes):
    valid = np.arange(40) < np.array([[9], [20]])[:batch]
    return evolve(
        Observation(
            images={name: np.zeros((batch, 8, 6, 3), np.uint8) for name in SPEC.cameras},
            image_masks={name: np.ones(batch, bool) for name in SPEC.cameras},
            state=np.zeros((batch, 3), np.float32),
            tokenized_prompt=np.where(valid, 5, 0).astype(np.int32),
            tokenized_prompt_mask=valid,
        ),
        **changes,
    )


def test_a_good_observation_passes():
    check_observation(observation(), SPEC, vocab_size=6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": {}}, ["images", "no camera", "base"]),
        ({"images": {"front": np.zeros((2, 8, 6, 3), np.uint8)}}, ["front", "base", "spec.cameras"]),
        ({"images": {"base": np.zeros((2, 6, 8, 3), np.uint8)}}, ["base", "(2, 6, 8, 3)", "(2, 8, 6, 3)"]),
        ({"images": {"base": np.full((2, 8, 6, 3), np.nan, np.float32)}}, ["base", "NaN"]),
        ({"image_masks": {"base": np.ones(2, bool)}}, ["wrist", "mask"]),
        ({"state": np.zeros((2, 4), np.float32)}, ["state", "(2, 4)", "(2, 3)", "spec.state_dim"]),
        ({"state": np.array([[0, 0, 0], [0, np.nan, 0]], np.float32)}, ["state[1, 1]", "nan"]),
        ({"state": np.array([[0, np.inf, 0], [0, 0, 0]], np.float32)}, ["state[0, 1]", "inf"]),
        ({"tokenized_prompt": np.full((2, 40), 6, np.int32)}, ["tokenized_prompt", "6", "0 .. 5", "vocab_size"]),
        ({"tokenized_prompt": np.full((2, 40), -1, np.int32)}, ["tokenized_prompt", "-1"]),
        ({"tokenized_prompt_mask": None}, ["tokenized_prompt_mask"]),
    ],
)
def test_bad_observations_name_field_value_and_way_out(changes, words):
    with pytest.raises(DataError) as error:
        check_observation(observation(**changes), SPEC, vocab_size=6)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_an_incomplete_batch_names_what_is_missing():
    with pytest.raises(DataError, match="state"):
        observation_from({"images": {}, "image_masks": {}})


def test_pack_drops_absent_cameras_and_trims_the_prompt():
    obs = observation(image_masks={"base": np.array([True, False]), "wrist": np.zeros(2, bool)})
    packed = pack(obs)
    assert list(packed.images) == ["base"] and list(packed.image_masks) == ["base"]
    assert packed.tokenized_prompt.shape == (2, 32)  # 20 rounded up to 16s
    assert packed.tokenized_prompt_mask.sum() == obs.tokenized_prompt_mask.sum()


@given(st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_pack_lists_exactly_the_predicted_tokens(rows):
    loss = np.array(rows)
    obs = observation(1)
    obs = evolve(
        obs,
        state=np.zeros((len(rows), 3)),
        images={},
        image_masks={},
        tokenized_prompt=np.zeros(loss.shape, np.int32),
        tokenized_prompt_mask=np.ones(loss.shape, bool),
        token_ar_mask=loss.astype(np.int32),
        token_loss_mask=loss,
    )
    packed = pack(obs)
    index, valid = packed.extra["target_index"], packed.extra["target_valid"]
    for row in range(len(rows)):
        assert sorted(index[row][valid[row]] + 1) == [i for i in range(1, 12) if loss[row, i]]
