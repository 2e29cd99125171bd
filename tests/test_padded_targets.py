"""Steps past the end of an episode are no targets for any head; the kit finds whoever makes them some."""

import numpy as np
import pytest

import vla
from vla.errors import DataError
from vla.testing import HeadConformance, TokenizerConformance
from vla.tokenizer import Tokenizer, open_tokenizer
from vla.transforms import build_group, identity_stats, text

for needed in ("vla_head_ar", "vla_tokenizer_fast", "vla_tokenizer_binning", "vla_backbone_paligemma"):
    pytest.importorskip(needed)

H, D = 4, 3
SETS = {"spec.action_horizon": H, "robot.state_dim": 5, "robot.action_dim": D, "spec.max_token_len": 96}


class Fast(TokenizerConformance):
    name = "fast"


class Binning(TokenizerConformance):
    name = "binning"


class AR(HeadConformance):
    name = "ar"


def group_of(tokenizer):
    variant = vla.build(head="ar", tokenizer=tokenizer, backbone="paligemma", preset="tiny", set=SETS)
    made = open_tokenizer(variant.parts["tokenizer"], variant.spec, None)
    made.fit(np.random.default_rng(0).uniform(-1, 1, (32, H, D)))
    return build_group(variant, stats=identity_stats(5, D), tokenizer=made), made


def sample(past=0.0, pad=(False, False, True, True), **more):
    actions = np.array([[0.1, -0.2, 0.3], [0.5, 0.5, -0.5], [past] * 3, [past] * 3], np.float32)
    image = {"base_0_rgb": np.zeros((8, 8, 3), np.uint8)}
    known = {"images": image, "state": np.zeros(5, np.float32), "prompt": "go", "actions": actions}
    return {**known, **({} if pad is None else {"actions_is_pad": np.array(pad)}), **more}


def test_bins_of_padded_steps_are_left_out_of_the_loss():
    group, _ = group_of("binning")
    one, other = (group.inputs(sample(past)) for past in (0.9, -0.9))
    assert np.array_equal(one["tokenized_prompt"], other["tokenized_prompt"])
    whole = group.inputs(sample(0.9, pad=(False,) * H))["token_loss_mask"]
    assert whole.sum() - one["token_loss_mask"].sum() == 2 * D
    left_out = np.flatnonzero(whole & ~one["token_loss_mask"])
    ids, last = one["tokenized_prompt"], left_out[0]
    held = ids[last - D : last].tolist()
    assert ids[left_out].tolist() == held * 2, "they hold the last action of the episode"
    assert "extra" not in one


def test_rows_of_codecs_that_mix_steps_count_as_much_as_their_real_steps():
    group, _ = group_of("fast")
    one, other = (group.inputs(sample(past)) for past in (0.9, -0.9))
    assert all(np.array_equal(one[k], other[k]) for k in ("tokenized_prompt", "token_loss_mask"))
    assert one["extra"]["target_weight"] == 0.5
    rows = [sample(pad=(False,) * H), sample(pad=None), sample(0.4)]
    assert [float(group.inputs(r)["extra"]["target_weight"]) for r in rows] == [1.0, 1.0, 0.5]
    for alone, batched in zip(map(group.inputs, rows), group.inputs_batch(rows), strict=True):
        assert alone["extra"] == batched["extra"]
        assert np.array_equal(alone["tokenized_prompt"], batched["tokenized_prompt"])
    observation = {k: v for k, v in sample().items() if not k.startswith("actions")}
    assert "extra" not in group.inputs(observation)


@pytest.mark.parametrize("key", ["action_is_pad", "actions_pad", "is_pad", "actions_is_padded"])
@pytest.mark.parametrize("tokenizer", ["binning", "fast"])
def test_a_misspelt_key_does_not_turn_the_mask_off(tokenizer, key):
    group, _ = group_of(tokenizer)
    with pytest.raises(DataError, match=rf"nothing reads(.|\n)*field: +{key}\n(.|\n)*actions_is_pad"):
        group.inputs(sample(pad=None, **{key: np.array([False, False, True, True])}))


def nothing_left_out(self, done, real):
    return {**done, "extra/target_weight": np.float32(real.mean())}


@pytest.mark.parametrize(
    ("kit", "plant"),
    [
        (Fast, lambda patch: patch.setattr(Fast().codec.__class__, "by_step", True, raising=False)),
        (Binning, lambda patch: patch.setattr(Tokenizer, "without_padded", nothing_left_out)),
        (Fast, lambda patch: patch.setattr(Tokenizer, "without_padded", lambda self, done, real: {**done, "extra/target_weight": np.float32(1)})),
        (Fast, lambda patch: patch.setattr(text, "hold", lambda actions, real: actions)),
        (Binning, lambda patch: patch.setattr(text, "hold", lambda actions, real: actions)),
    ],
    ids=["mixes and says it does not", "no token left out", "full weight", "FAST of what stands there", "bins of what stands there"],
)  # fmt: skip
def test_the_kit_finds_a_tokenizer_that_makes_targets_of_padding(kit, plant, monkeypatch):
    kit().test_what_stands_past_the_end_of_an_episode_teaches_nothing()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        kit().test_what_stands_past_the_end_of_an_episode_teaches_nothing()


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_the_kit_finds_a_head_that_ignores_the_weight(framework, monkeypatch):
    head = pytest.importorskip(f"vla_head_ar.{framework}_impl").ARHead
    enter = head.enter

    def ignoring(self, obs, actions, draws):
        entry = enter(self, obs, actions, draws)
        entry.notes["weight"] = 1.0
        return entry

    AR().test_a_row_counts_as_much_as_its_weight(framework)
    monkeypatch.setattr(head, "enter", ignoring)
    if framework == "jax":
        pytest.importorskip("jax").clear_caches()
    with pytest.raises(AssertionError, match="weighted rows"):
        AR().test_a_row_counts_as_much_as_its_weight(framework)
