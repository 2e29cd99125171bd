"""Every recipe composes at full size, and trains two steps at the tiny preset on data of its robot."""

import numpy as np
import pytest
from attrs import evolve

for needed in (
    *("torch", "vla_head_ki", "vla_tokenizer_fast", "vla_tokenizer_paligemma", "vla_dataset_tabletop"),
    *("vla_robot_aloha", "vla_robot_droid", "vla_robot_libero"),
):
    pytest.importorskip(needed)

from vla.datasets import DatasetInfo, chunk  # noqa: E402
from vla.errors import SettingsError  # noqa: E402
from vla.training.loop import train  # noqa: E402
from vla.training.metrics import read_metrics  # noqa: E402
from vla.training.recipes import read_recipe, recipe_names  # noqa: E402

ROBOTS = {  # cameras, state, action
    "aloha": (("cam_high", "cam_left_wrist", "cam_right_wrist"), 14, 14),
    "droid": (("exterior_image_1_left", "wrist_image_left"), 8, 8),
    "libero": (("image", "wrist_image"), 8, 7),
    "tabletop": (("front", "wrist"), 8, 7),
}


class Recording:
    """Two episodes of eight frames as a robot would record them."""

    def __init__(self, robot):
        cameras, state, action = ROBOTS[robot]
        rng = np.random.default_rng(0)
        self.info = DatasetInfo({c: (48, 64) for c in cameras}, state, action, 10.0, robot=robot)
        self.episodes = [range(0, 8), range(8, 16)]
        self._images = {c: rng.integers(0, 255, (16, 48, 64, 3), dtype=np.uint8) for c in cameras}
        self._state = rng.uniform(0, 1, (16, state)).astype(np.float32)
        self._actions = rng.uniform(0, 1, (16, action)).astype(np.float32)

    def __len__(self):
        return 16

    def sample(self, index, horizon, cameras=None, images=True):
        actions, is_pad = chunk(self._actions, index, 8 * (index // 8 + 1), horizon)
        pictures = {c: a[index] for c, a in self._images.items()} if images else {}
        return {
            "images": pictures, "state": self._state[index], "actions": actions, "actions_is_pad": is_pad,
            "prompt": "fold the towel", "episode": index // 8, "frame": index % 8,
        }  # fmt: skip

    def states(self):
        return self._state

    def actions(self):
        return self._actions

    def prompts(self):
        return ["fold the towel"] * 16

    def digest(self):
        return "recording"


def test_there_is_one_for_every_model_type_and_robot():
    types = ("pi0", "pi05", "pi0_fast", "pi05_ki")
    adapted = {"pi0_libero_lora", "pi0_fast_libero_lora"}
    assert set(recipe_names()) == {f"{t}_{r}" for t in types for r in ROBOTS} | adapted


@pytest.mark.parametrize("name", recipe_names())
def test_it_composes_at_full_size_and_trains_two_steps_at_tiny(tmp_path, name):
    recipe = read_recipe(name)
    full = recipe.build()
    assert full.backbone.inner["llm"].settings.depth == 18 and full.name == name
    # Tiny tokenizers have few merges, so that chunks of 50 steps take more tokens than the published length.
    config = evolve(recipe.config, steps=2, batch_size=2, progress=False, log_every=1, fit_lengths=True)
    data = Recording(recipe.robot)
    result = train(recipe.build(preset="tiny"), data, out=tmp_path / "run", config=config, yes_random=True)
    losses = [r["loss"] for r in read_metrics(result.out)]
    assert len(losses) == 2 and np.isfinite(losses).all()


@pytest.mark.parametrize(
    ("name", "shapes", "train"),
    [
        ("pi0_libero", (32, 50, 48), {"batch_size": 32, "steps": 30_000, "lr": 2.5e-5, "lr_final": 2.5e-6}),
        ("pi05_libero", (32, 10, 200), {"batch_size": 256, "lr": 5e-5, "lr_warmup": 10_000, "ema_decay": 0.999}),
        ("pi0_fast_libero", (7, 10, 180), {"batch_size": 32, "steps": 30_000}),
        ("pi0_fast_droid", (8, 16, 180), {"batch_size": 256, "steps": 100_000, "lr": 5e-5}),
        ("pi05_droid", (32, 16, 200), {"batch_size": 256, "steps": 100_000}),
        ("pi05_aloha", (32, 50, 200), {"batch_size": 64, "steps": 20_000}),
    ],
)
def test_openpis_numbers(name, shapes, train):
    """action_dim, action_horizon, max_token_len and the plan as openpi's configuration of that name has them."""
    recipe = read_recipe(name)
    spec = recipe.build().spec
    assert (spec.action_dim, spec.action_horizon, spec.max_token_len) == shapes
    assert {k: getattr(recipe.config, k) for k in train} == train
    assert not recipe.config.ema_warmup and (recipe.config.beta1, recipe.config.beta2) == (0.9, 0.95)


@pytest.mark.parametrize(("name", "own"), [("pi0_libero_lora", 33_472_512), ("pi0_fast_libero_lora", 19_611_648)])
def test_openpis_low_memory_runs(name, own):
    """Adapters of rank 16 in the backbone and 32 in the action expert, scale 1; the rest of the LLM core stands still."""
    from vla.params import count
    from vla.training import lora

    recipe = read_recipe(name)
    variant, config = recipe.build(), recipe.config
    adapters = lora.adapters_of(variant, config)
    assert {a.scale for a in adapters} == {1.0} and config.ema_decay == 0
    assert {a.rank for a in adapters if ".action." in a.linear.torch} <= {32}
    assert {a.rank for a in adapters if ".action." not in a.linear.torch} == {16}
    names = lora.trained_names(adapters, variant, config)
    assert not any(n.startswith("backbone.llm.") and ".lora_" not in n for n in names)
    assert sum(int(np.prod(s)) for n, s in names.items() if ".lora_" in n) == own
    outside = sum(count(variant, p) for p in ("backbone.vision.", "backbone.projector.", "head."))
    assert (
        sum(int(np.prod(s)) for s in names.values())
        == own + outside
        == own + count(variant) - count(variant, "backbone.llm.")
    )


def test_a_recipe_of_ones_own_and_its_mistakes(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('vla_recipe = 1\ntype = "pi0"\n[spec]\naction_horizon = 7\n[train]\nsteps = 5\n')
    mine = read_recipe(file)
    assert mine.build().spec.action_horizon == 7 and mine.config.steps == 5
    assert mine.build(set=["spec.action_horizon=9"]).spec.action_horizon == 9
    for text, field in (
        ("vla_recipe = 2\n", "vla_recipe"),
        ('vla_recipe = 1\ntyp = "pi0"\n', "typ"),
        ('vla_recipe = 1\ntype = "pi0"\n[train]\nstep = 5\n', "train.step"),
        ("vla_recipe = ", "mine.toml"),
        ("vla_recipe = 1\n", "type"),
    ):
        file.write_text(text)
        with pytest.raises(SettingsError) as caught:
            read_recipe(file)
        assert field in caught.value.field
    with pytest.raises(SettingsError, match="pi05_ki_droid"):
        read_recipe("pi05_ki_droyd")
