"""Learning rates equal optax's, with openpi's settings."""

import pytest

from vla.errors import SettingsError
from vla.testing.closeness import close
from vla.training.config import TrainConfig, changes, config_from
from vla.training.schedules import ema_decay, learning_rate

STEPS = [0, 1, 2, 10, 499, 999, 1000, 1001, 5000, 15_000, 29_999, 30_000, 40_000]


@pytest.mark.parametrize("warmup", [1000, 1, 0])
def test_cosine_is_openpis(warmup):
    optax = pytest.importorskip("optax")
    config = TrainConfig(lr_warmup=warmup).planned()
    theirs = optax.warmup_cosine_decay_schedule(2.5e-5 / (warmup + 1), 2.5e-5, warmup, 30_000, 2.5e-6)
    for step in STEPS:
        # optax computes in float32
        close(learning_rate(config, step), float(theirs(step)), 1e-6, f"step {step}", scale=config.lr)


def test_rsqrt_is_openpis():
    optax = pytest.importorskip("optax")
    config = TrainConfig(lr_schedule="rsqrt", lr=5e-5, lr_warmup=1000).planned()

    def decay(step):
        return 5e-5 / (((10_000 + step) / 10_000) ** 0.5)

    theirs = optax.join_schedules([optax.linear_schedule(5e-5 / 1001, 5e-5, 1000), decay], [1000])
    for step in STEPS:
        # optax computes in float32
        close(learning_rate(config, step), float(theirs(step)), 1e-6, f"step {step}", scale=config.lr)


def test_constant_after_warm_up():
    config = TrainConfig(lr_schedule="constant", lr=1e-3, lr_warmup=4, steps=10).planned()
    rates = [learning_rate(config, k) for k in range(10)]
    assert rates[:5] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    assert set(rates[4:]) == {1e-3}


def test_the_default_plan_is_openpis_and_shrinks_with_short_runs():
    plan = TrainConfig().planned()
    assert (plan.lr_warmup, plan.lr_decay_steps, plan.lr_final) == (1000, 30_000, pytest.approx(2.5e-6))
    short = TrainConfig(steps=200).planned()
    assert (short.lr_warmup, short.lr_decay_steps) == (20, 200)


def test_a_resumed_run_keeps_its_plan():
    first = TrainConfig(steps=1000).planned()
    longer = TrainConfig(steps=2000).planned(first.to_dict())
    assert longer.lr_decay_steps == 1000
    assert changes(first.to_dict(), longer.to_dict()) == []
    assert changes(first.to_dict(), TrainConfig(steps=2000, seed=1).planned().to_dict()) == [
        "seed: 42 -> 1",
        "lr_warmup: 100 -> 200",
        "lr_decay_steps: 1000 -> 2000",
    ]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"steps": 0}, "train.steps"),
        ({"batch_size": 6, "accumulate": 4}, "train.accumulate"),
        ({"lr": 0.0}, "train.lr"),
        ({"lr_timescale": 0.0}, "train.lr_timescale"),
        ({"lr_warmup": -1}, "train.lr_warmup"),
        ({"lr_final": -1e-6}, "train.lr_final"),
        ({"eps": -1.0}, "train.eps"),
        ({"val_batches": 0}, "train.val_batches"),
        ({"ema_decay": 1.0}, "train.ema_decay"),
        ({"lr_schedule": "step"}, "train.lr_schedule"),
        ({"learning_rate": 1e-3}, "train.learning_rate"),
        ({"steps": "many"}, "train.steps"),
    ],
)
def test_wrong_settings_name_the_field(values, field):
    with pytest.raises(SettingsError) as caught:
        config_from(values)
    assert caught.value.field == field


def test_config_survives_json():
    import json

    config = TrainConfig(freeze=("backbone.vision",), steps=7).planned()
    assert config_from(json.loads(json.dumps(config.to_dict()))) == config


def test_the_average_forgets_its_first_weights_quickly_and_ends_as_openpis():
    config = TrainConfig(ema_decay=0.99)
    assert ema_decay(config, 0) == pytest.approx(0.1)
    assert ema_decay(config, 889) < 0.99 == ema_decay(config, 890)
    assert {ema_decay(TrainConfig(ema_decay=0.99, ema_warmup=False), k) for k in (0, 10**6)} == {0.99}
