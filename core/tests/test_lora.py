"""LoRA in both engines: the same curve, the base untouched, the merged model equal to the adapted one, exact resume."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

for needed in ("jax", "torch", "vla_head_flow", "vla_llm_gemma", "vla_vision_siglip", "vla_backbone_paligemma"):
    pytest.importorskip(needed)

from vla.compose import build  # noqa: E402
from vla.contracts import Sampling  # noqa: E402
from vla.errors import SettingsError, StoreError  # noqa: E402
from vla.params import count, shapes, table  # noqa: E402
from vla.store import read_weights  # noqa: E402
from vla.testing.closeness import close  # noqa: E402
from vla.training import checkpoints, loop, lora  # noqa: E402
from vla.training.config import TrainConfig, TrainingError, config_from  # noqa: E402
from vla.training.jax_engine import JaxEngine  # noqa: E402
from vla.training.loader import Loader, Samples  # noqa: E402
from vla.training.metrics import read_metrics  # noqa: E402
from vla.training.run_folder import check_same_run  # noqa: E402
from vla.training.schedules import ema_decay, learning_rate  # noqa: E402
from vla.training.torch_engine import TorchEngine  # noqa: E402

_spec = importlib.util.spec_from_file_location("training_world", Path(__file__).parent / "training_world.py")
world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world)
STEPS = 20


def with_lora(steps=STEPS, rank=4, **values):
    own = {k.removeprefix("lora_"): values.pop(k) for k in list(values) if k.startswith("lora_")}
    return config_from({"lora": {"rank": rank, **own}}, world.config(steps, **values))


def engines(config, type="pi0", **sets):
    """Both engines from the same weights, and batches."""
    variant = world.small_variant(type, **sets)
    made = world.prepared(config, variant=variant)
    samples = Samples(made.dataset, made.group.inputs, 3, 1e9)
    loader = Loader(samples, made.train_index, variant, config)
    start = TorchEngine(variant, TrainConfig(seed=config.seed, ema_decay=0)).weights()
    copy = {k: v.copy() for k, v in start.items()}
    return variant, TorchEngine(variant, config, start), JaxEngine(variant, config, copy), loader, start


@pytest.fixture(scope="module")
def trained():
    """All linears of a pi05 adapted (vision, modulation, head too), trained for 20 steps in both frameworks."""
    config = with_lora(lora_on=["*"], lora_alpha=8, lr=1e-2).planned()
    sets = {"backbone.llm.depth": 2, "backbone.vision.depth": 2, "backbone.vision.patch_size": 8}
    variant, torch, jax, loader, start = engines(config, "pi05", **sets)
    curves = {"torch": [], "jax": []}
    for k in range(STEPS):
        batch = loader.batch(k)
        for name, engine in (("torch", torch), ("jax", jax)):
            results = engine.step(batch.micro, learning_rate(config, k), ema_decay(config, k))
            curves[name] += engine.read([results])
    return variant, config, torch, jax, curves, loader, start


def test_the_curves_agree_step_by_step(trained):
    """float32, 20 steps, adapters on every linear: losses within 2e-5, gradient norms within 1e-4 (relative)."""
    curves = trained[4]
    for key, bound in (("loss", 2e-5), ("grad_norm", 1e-4)):
        ours, theirs = ([r[key] for r in curves[name]] for name in ("jax", "torch"))
        np.testing.assert_allclose(ours, theirs, rtol=bound, err_msg=key)
    assert curves["torch"][-1]["loss"] < curves["torch"][0]["loss"]


def test_adapters_learn_and_no_base_weight_moves(trained):
    variant, config, torch, jax, _, _, start = trained
    for engine in (torch, jax):
        params = engine.state()["params"]
        linears = [m for a in engine.adapters for m in a.modules()]
        assert len(linears) == 12 + 1 + 4 * 7 + 4 + 1 + 4  # vision, projector, llm, modulation, final norm, head
        # Behind the last keys and values nobody reads the prefix of a flow model.
        unread = {f"backbone.llm.layers.1.backbone.{x}" for x in ("q", "o", "gate", "up", "down")}
        for name in linears:
            assert params[f"{name}.lora_b"].any() == (name not in unread), name
        fixed = lora.frozen_by(engine.adapters, variant)
        assert "backbone.llm.embedder.weight" in fixed and "backbone.vision.patch.weight" not in fixed
        for name in start:
            assert np.array_equal(params[name], start[name]) == (name in fixed), name


def test_names_and_moments_are_the_same_in_both(trained):
    variant, config, torch, jax, _, _, _ = trained
    ours, theirs = jax.state(), torch.state()
    assert {p: {k: v.shape for k, v in a.items()} for p, a in ours.items()} == {
        p: {k: v.shape for k, v in a.items()} for p, a in theirs.items()
    }
    names = lora.trained_names(torch.adapters, variant, config)
    assert set(ours["ema"]) == set(names) == set(torch.trained)
    assert set(ours["optimizer"]) == {f"{m}/{n}" for m in "mv" for n in names} | {"updates"}
    assert {n: tuple(p.shape) for n, p in torch.trained.items()} == names


def test_either_framework_takes_up_the_others_state(trained):
    variant, config, torch, _, _, _, start = trained
    state = torch.state()
    other = JaxEngine(variant, config, {k: v.copy() for k, v in start.items()})
    other.load_state(state)
    taken = other.state()
    assert all(np.array_equal(taken[p][k], state[p][k]) for p in state for k in state[p])


def test_the_first_values_are_the_same_and_change_nothing():
    config = with_lora(seed=3)
    _, torch, jax, loader, start = engines(config)
    ours, theirs = jax.state()["params"], torch.state()["params"]
    assert all(np.array_equal(ours[k], theirs[k]) for k in theirs)
    name = "backbone.llm.layers.0.action.down"
    a = theirs[f"{name}.lora_a"]
    assert a.shape == (4, 16) and 0.15 < a.std() < 0.35 and not theirs[f"{name}.lora_b"].any()
    assert not np.array_equal(a, theirs["backbone.llm.layers.0.backbone.down.lora_a"])
    batch = loader.batch(0).micro[0]
    plain = TorchEngine(world.small_variant(), TrainConfig(ema_decay=0), start)
    assert torch.evaluate(*batch)["loss"] == plain.evaluate(*batch)["loss"]


def test_the_merged_model_is_the_adapted_one(trained):
    """Losses within 1e-5 (relative), actions within 1e-5, in both frameworks; validation sees the average."""
    variant, config, torch, jax, _, loader, _ = trained
    plain = TrainConfig(ema_decay=0)
    obs, actions, draws = loader.batch(3).micro[0]
    noise = np.random.default_rng(0).normal(size=(4, 3, 4)).astype(np.float32)
    for engine, kind in ((torch, TorchEngine), (jax, JaxEngine)):
        whole = lora.merged(engine.weights(), engine.adapters)
        assert set(whole) == set(shapes(table(variant)))
        alone = kind(variant, plain, whole)
        np.testing.assert_allclose(
            alone.evaluate(obs, actions, draws)["loss"], engine.evaluate(obs, actions, draws)["loss"], rtol=1e-5
        )
        one, two = (e.sample(obs, noise, Sampling())["actions"] for e in (alone, engine))
        close(one, two, 1e-5)
        base = kind(variant, plain, {k: v for k, v in engine.weights().items() if "lora_" not in k})
        assert np.abs(base.sample(obs, noise, Sampling())["actions"] - one).max() > 1e-3  # adapters matter


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_decoding_with_packed_projections_sees_the_adapters(framework):
    """gemma_fast decodes with q, k, v packed into one matrix."""
    pytest.importorskip("vla_llm_gemma_fast")
    pytest.importorskip("vla_head_ar")
    from vla.contracts import DecodeGrammar
    from vla.transforms import batch

    sets = {k: v for k, v in world.SHAPES.items() if not k.startswith("head.")}
    variant = build(type="pi0_fast", preset="tiny", set=sets)
    kind = TorchEngine if framework == "torch" else JaxEngine
    config = with_lora(1, ema_decay=0.0)
    engine = kind(variant, config)
    rng, state = np.random.default_rng(0), engine.state()
    for name, array in state["params"].items():
        if name.endswith("lora_b"):
            state["params"][name] = rng.normal(size=array.shape).astype(np.float32)
    engine.load_state(state)
    alone = kind(variant, TrainConfig(ema_decay=0), lora.merged(engine.weights(), engine.adapters))
    made = world.prepared(config, variant=variant)
    obs = batch([world.Group.inputs(made.dataset.sample(i, 3)) for i in range(4)], variant.spec)[0]
    ids = np.arange(100, 140)
    grammar = DecodeGrammar((), ids, np.ones(len(ids), int), 12, (1,))
    one, two = (e.sample(obs, None, Sampling(grammar=grammar))["tokens"] for e in (alone, engine))
    assert np.array_equal(one, two) and len(np.unique(one)) > 2


def run(out, config, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "prepare", lambda *a: world.prepared(config))
        return loop.train("world", "world", out=out, config=config, **options)


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_saved_and_resumed_is_uninterrupted_to_the_bit(tmp_path, framework):
    config = with_lora(8, save_every=4, framework=framework)
    run(tmp_path / "whole", config)
    half = checkpoints.checkpoint_folder(tmp_path / "two", 4)
    shutil.copytree(checkpoints.checkpoint_folder(tmp_path / "whole", 4), half)
    run(tmp_path / "two", config, resume=True)
    one, two = (checkpoints.load_checkpoint(tmp_path / n, 8).arrays for n in ("whole", "two"))
    assert {p: set(a) for p, a in one.items()} == {p: set(a) for p, a in two.items()}
    assert all(np.array_equal(one[p][k], two[p][k]) for p in one for k in one[p])
    for file in ("model/model.safetensors", "adapter/adapter.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_what_is_saved_is_a_plain_model_and_what_was_trained(tmp_path):
    config = with_lora(3, freeze=("backbone.vision", "backbone.projector", "head"))
    result = run(tmp_path / "run", config)
    variant = world.small_variant()
    assert {n: a.shape for n, a in read_weights(result.model / "model.safetensors").items()} == shapes(table(variant))
    kept = read_weights(result.out / "adapter" / "adapter.safetensors")
    assert all(".lora_" in name for name in kept) and len(kept) == 2 * 14
    # q, k, v, o: 16 x 16, 16 x 8, 16 x 8, 16 x 16; three of 16 x 16; for two experts
    size = 4 * 2 * (4 * 32 + 2 * 24 + 32)
    assert sum(a.size for a in kept.values()) == size
    note = next(r["text"] for r in read_metrics(result.out, "note"))
    assert (
        f"14 linears: {size:,} parameters in adapters; {size:,} trained in all, of a model of {count(variant):,}"
        in note
    )
    assert {a.dtype for a in kept.values()} == {np.dtype(np.float32)}
    run(tmp_path / "run", world.config(1), overwrite=True)
    assert not (result.out / "adapter").exists()


@pytest.mark.parametrize(
    ("values", "bound"),
    [
        ({"checkpoint_activations": True}, 1e-6),
        ({"accumulate": 2}, 1e-4),  # Adam makes steps of rounding where a gradient is nearly none
        ({"precision": "bfloat16"}, 0.03),
        pytest.param({"compile": True}, 1e-5, marks=pytest.mark.slow),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_it_goes_with_the_other_options(values, bound):
    curves = []
    for own in ({}, values):
        config = with_lora(3, lr=1e-2, **own)
        made = world.prepared(config)
        loader = Loader(
            Samples(made.dataset, made.group.inputs, 3, 1e9), made.train_index, made.variant, config
        )
        engine = TorchEngine(made.variant, config)
        curves.append([r["loss"] for r in engine.read([engine.step(loader.batch(k).micro, 1e-2) for k in range(3)])])
    np.testing.assert_allclose(curves[1], curves[0], rtol=bound)


def test_an_expert_alone_leaves_the_other_to_train_as_in_openpi():
    """openpi's filters: gemma_2b_lora freezes what is not `llm.*_1`, gemma_300m_lora freezes `llm.*_1`, both all of llm."""
    variant = world.small_variant("pi05")
    names = set(shapes(table(variant)))
    llm = {n for n in names if n.startswith("backbone.llm.")}
    expert = {n for n in llm if ".action." in n}
    for on, frozen in (("backbone", llm - expert), ("action", expert), ("*", llm)):
        config = config_from({"lora": {"rank": 2, "on": [f"backbone.llm.layers.*.{on}.[qkvo]"]}})
        assert lora.frozen_by(lora.adapters_of(variant, config), variant) == frozen


def test_openpis_ranks_and_scales():
    variant = build(type="pi0")
    config = config_from({"lora": {"rank": 16, "ranks": ["*.action.*=32"]}})
    adapters = lora.adapters_of(variant, config)
    assert {(".action." in a.linear.torch, a.rank, a.scale) for a in adapters} == {(False, 16, 1.0), (True, 32, 1.0)}
    scaled = config_from({"lora": {"rank": 16, "alpha": 8, "rslora": True}})
    assert {a.scale for a in lora.adapters_of(variant, scaled)} == {2.0}
    plain = config_from({"lora": {"rank": 16, "alpha": 8}})
    assert {a.scale for a in lora.adapters_of(variant, plain)} == {0.5}


def test_parameters_at_full_size():
    """pi05 on `meta` and under eval_shape: 33,472,512 in adapters; all outside the LLM core trains with them."""
    import jax
    import torch
    from flax import nnx

    from vla.jax_kit.lora import adapt as adapt_jax
    from vla.jax_kit.model import abstract_model
    from vla.torch_kit.lora import adapt
    from vla.torch_kit.model import build_model

    variant = build(type="pi05")
    config = config_from({"lora": {"rank": 16, "ranks": ["*.action.*=32"]}})
    adapters = lora.adapters_of(variant, config)

    def low(rank, width, mlp):  # q and o: 8 heads of 256; k and v: one
        return 18 * rank * (2 * (width + 2048) + 2 * (width + 256) + 3 * (width + mlp))

    own = low(16, 2048, 16384) + low(32, 1024, 4096)
    assert own == 33_472_512
    names = lora.trained_names(adapters, variant, config)
    assert sum(int(np.prod(s)) for n, s in names.items() if ".lora_" in n) == own
    llm = count(variant, "backbone.llm.")
    assert sum(int(np.prod(s)) for s in names.values()) == count(variant) - llm + own
    with torch.device("meta"):
        model = build_model(variant)
        adapt(model, adapters)
    have = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert have == {**shapes(table(variant)), **{n: s for n, s in names.items() if ".lora_" in n}}
    mirror = abstract_model(variant)
    adapt_jax(mirror, adapters)
    leaves = [leaf.get_value() for _, leaf in nnx.to_flat_state(nnx.state(mirror))]
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
    assert sum(int(np.prod(x.shape)) for x in leaves) == count(variant) + own


REFUSED = {
    "rank 0": ({"rank": 0}, {}, "lora.rank"),
    "rank -1": ({"rank": -1}, {}, "lora.rank"),
    "no rank": ({"alpha": 4}, {}, "without a rank"),
    "alpha 0": ({"rank": 2, "alpha": 0}, {}, "lora.alpha"),
    "no such linear": ({"rank": 2, "on": ["backbone.lm"]}, {}, "backbone.llm.layers.*.action.q"),
    "an embedding": ({"rank": 2, "on": ["backbone.llm.embedder"]}, {}, "not a linear"),
    "a norm": ({"rank": 2, "on": ["*.norm_attn.scale"]}, {}, "norm_attn.scale is not a linear"),
    "a convolution": ({"rank": 2, "on": ["backbone.vision.patch"]}, {}, "not a linear"),
    "one layer": ({"rank": 2, "on": ["backbone.llm.layers.0"]}, {}, "all layers"),
    "no rank in ranks": ({"rank": 2, "ranks": ["*.action.*"]}, {}, "PATTERN=RANK"),
    "rank without adapter": ({"rank": 2, "ranks": ["head=4"]}, {}, "no adapter"),
    "frozen": ({"rank": 2}, {"freeze": ("backbone.llm",)}, "take it out of --freeze"),
    "frozen adapter": ({"rank": 2}, {"freeze": ("backbone.llm.layers.1.action.q.lora_a",)}, "take it out of --freeze"),
    "unknown": ({"ranck": 2}, {}, "train.lora.rank"),
    "not a table": (16, {}, r"\[train.lora\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_one_clear_error(case):
    values, more, match = REFUSED[case]
    match = match.replace(".*", r"\.\*") if match.startswith("backbone") else match
    with pytest.raises(SettingsError, match=match):
        config = config_from({"lora": values}, world.config(1, **more))
        lora.adapters_of(world.small_variant(**{"backbone.llm.depth": 2}), config)


def test_a_run_keeps_its_adapters(tmp_path):
    run(tmp_path / "run", with_lora(2, lr_decay_steps=4))
    for config in (with_lora(4, rank=2), with_lora(4, lora_alpha=1), world.config(4)):
        with pytest.raises(TrainingError, match="adapters of a run cannot change"):
            run(tmp_path / "run", config, resume=True, allow_change=True)
    run(tmp_path / "plain", world.config(2))
    with pytest.raises(TrainingError, match="adapters of a run cannot change"):
        run(tmp_path / "plain", with_lora(4), resume=True)


def test_a_run_from_before_lora_goes_on(tmp_path):
    """Its record has no entry for LoRA."""
    plan = {"lr_decay_steps": 4}
    run(tmp_path / "run", world.config(2, **plan))
    found = checkpoints.load_checkpoint(tmp_path / "run", 2)
    old = {**found.state, "config": {k: v for k, v in found.state["config"].items() if k != "lora"}}
    assert "lora" in found.state["config"]
    check_same_run(
        checkpoints.Checkpoint(found.folder, 2, found.arrays, old), world.config(4, **plan).planned(found.state["config"]),
        world.prepared(world.config(4)), False,
    )  # fmt: skip


def test_damage_is_found(tmp_path):
    result = run(tmp_path / "run", with_lora(1))
    file = result.out / "adapter" / "adapter.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreError, match="bytes changed"):
        lora.merge_adapter(result.model, result.out / "adapter", tmp_path / "out")
    with pytest.raises(StoreError, match="no adapter here"):
        lora.merge_adapter(result.model, result.model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


WORKER = """
import importlib.util, sys
from attrs import evolve
from vla.training.config import Lora
spec = importlib.util.spec_from_file_location("training_world", sys.argv[1])
world = importlib.util.module_from_spec(spec)
spec.loader.exec_module(world)
plain = world.config
world.config = lambda *a, **k: evolve(plain(*a, **k), lora=Lora(4))
world.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("framework", "mode"), [("torch", "ddp"), ("torch", "fsdp"), ("jax", "fsdp")])
def test_several_devices_give_the_curve_of_one(tmp_path, framework, mode):
    """Two gloo processes, or four forced host devices of JAX: to rounding, and the same checkpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", WORKER, world.__file__, str(tmp_path / "run"), "6", framework, mode]
    if framework == "torch":
        env |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        each = [{**env, "RANK": r, "LOCAL_RANK": r} for r in "01"]
    else:
        each = [{**env, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=e, **pipes) for e in each]
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    run(tmp_path / "one", with_lora(6, save_every=2, framework=framework))
    curves = [[r["loss"] for r in read_metrics(tmp_path / name)] for name in ("run", "one")]
    np.testing.assert_allclose(*curves, rtol=1e-5)
    ours, theirs = (checkpoints.load_checkpoint(tmp_path / n, 6).arrays for n in ("run", "one"))
    assert {p: set(a) for p, a in ours.items()} == {p: set(a) for p, a in theirs.items()}
    kept = [read_weights(tmp_path / n / "adapter" / "adapter.safetensors") for n in ("run", "one")]
    largest = max(np.abs(array).max() for array in kept[1].values())
    for name, array in kept[1].items():
        close(kept[0][name], array, 1e-3, name, scale=largest)
