"""The loop: what a run leaves behind, resuming exactly, refusing wrong runs, surviving bad numbers and signals."""

import importlib.util
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for plugin in ("vla_head_flow", "vla_llm_gemma", "vla_vision_siglip", "vla_backbone_paligemma"):
    pytest.importorskip(plugin)

from vla.errors import DataError, NotFiniteError, StoreError  # noqa: E402
from vla.files import atomic_folder  # noqa: E402
from vla.manifest import verify_folder, write_manifest  # noqa: E402
from vla.store import read_weights, write_weights  # noqa: E402
from vla.training import checkpoints, loop  # noqa: E402
from vla.training.config import TrainingError, TrainResult  # noqa: E402
from vla.training.loader import Loader, Samples  # noqa: E402
from vla.training.metrics import read_metrics  # noqa: E402

_path = Path(__file__).parent / "training_world.py"
_spec = importlib.util.spec_from_file_location("training_world", _path)
world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world)


def run(out, config, data=None, monkeypatch=None, **options):
    """`train` in the small world."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "prepare", lambda *a: world.prepared(config, data))
        return loop.train("world", "world", out=out, config=config, **options)


def state_of(out, step=None):
    found = checkpoints.load_checkpoint(out, step)
    return {f"{part}/{name}": a.copy() for part, arrays in found.arrays.items() for name, a in arrays.items()}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 20 steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    result = run(out, world.config(20))
    return result


def test_a_run_leaves_a_model_checkpoints_and_metrics(whole):
    assert whole.step == 20 and not whole.interrupted
    assert checkpoints.checkpoint_steps(whole.out) == [15, 20]
    verify_folder(whole.model)
    records = read_metrics(whole.out)
    assert [r["step"] for r in records] == list(range(1, 21))
    assert {"loss", "loss/actions", "lr", "grad_norm", "samples_per_s", "data_wait"} <= records[0].keys()
    assert np.mean([r["loss"] for r in records[-5:]]) < np.mean([r["loss"] for r in records[:5]])
    ema = state_of(whole.out)
    weights = read_weights(whole.model / "model.safetensors")
    assert all(np.array_equal(weights[n], ema[f"ema/{n}"]) for n in weights)  # the average is what acts
    assert any(not np.array_equal(weights[n], ema[f"params/{n}"]) for n in weights)


@pytest.mark.parametrize("stop", [3, 5, 11])
def test_resuming_gives_the_same_weights_and_the_same_order(tmp_path, whole, stop):
    """3: between saves (a run of 3 steps saves its last); 11: two resumes on the way, in the second epoch."""
    plan = {"lr_decay_steps": 20, "lr_warmup": 2}
    asked = []
    for last in (stop, stop + 4, 20):
        data = world.World()
        run(tmp_path / "run", world.config(last, workers=1, prefetch=1, **plan), data, resume=last != stop)
        asked.append(last)
    assert same(state_of(tmp_path / "run", 20), state_of(whole.out, 20))
    ours, theirs = ([(r["step"], r["loss"]) for r in read_metrics(out)] for out in (tmp_path / "run", whole.out))
    assert ours == theirs


@pytest.mark.parametrize("workers", [1, 3])
def test_order_does_not_depend_on_workers_or_micro_batches(workers):
    def ids(**values):
        config = world.config(30, **values)
        made = world.prepared(config)
        samples = Samples(made.dataset, made.group.inputs, 3, 0)
        loader = Loader(samples, made.train_index, made.variant, config)
        return [b.ids.tolist() for b in loader.stream(4, 30)], loader.batch(7)

    reference, batch = ids()
    other, split = ids(workers=workers, prefetch=workers, accumulate=2)
    assert other == reference
    states = [np.concatenate([obs.state for obs, _, _ in b.micro]) for b in (batch, split)]
    noises = [np.concatenate([drawn["noise"] for _, _, drawn in b.micro]) for b in (batch, split)]
    assert np.array_equal(*states) and np.array_equal(*noises)


def test_accumulation_gives_the_same_update(tmp_path):
    for name, accumulate in (("one", 1), ("four", 4)):
        run(tmp_path / name, world.config(1, accumulate=accumulate, lr_warmup=0, save_every=1))
    one, four = (read_metrics(tmp_path / n)[0] for n in ("one", "four"))
    assert four["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert four["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_killed_at_random_points_and_resumed_it_ends_the_same(tmp_path, whole):
    """SIGKILL, VLA_KILLS times (default 3; 50 for the record), each at a random moment of training or saving."""
    config = world.config(20)
    made = world.prepared(config)
    expected = Loader(Samples(made.dataset, None, 3, 0), made.train_index, made.variant, config)

    def check(out):
        assert same(state_of(out, 20), state_of(whole.out, 20))
        assert not [*out.rglob(".tmp-*"), *out.rglob(".old-*"), *out.rglob(".gone-*")]
        ours, theirs = ([(r["step"], r["loss"]) for r in read_metrics(o)] for o in (out, whole.out))
        assert ours == theirs
        assert world.ids_seen(out) == [expected.ids(k).tolist() for k in range(20)]
        verify_folder(out / "model")

    # Equal bits need as many threads as `whole` had: sums are cut into as many parts.
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    kills = int(os.environ.get("VLA_KILLS", "3"))
    print(world.survive(tmp_path, "torch", kills, env, check))


def test_a_folder_moved_aside_by_a_killed_process_comes_back_or_goes(tmp_path):
    """Both sides of the moment between the two renames that replace a folder."""
    for name in ("model", ".old-model-0123abcd", ".old-adapter-0123abcd", "checkpoints/.gone-step-00000002-0123abcd"):
        with atomic_folder(tmp_path / name, "model") as temp:
            (temp / "x").write_text(name)
    for name in ("checkpoints/.tmp-step-00000002-0123abcd", ".tmp-of-mine", ".old-notes-0123abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    (tmp_path / ".old-model-0123abcd" / "mine.txt").write_text("put there by hand")
    checkpoints.sweep(tmp_path)
    checkpoints.sweep(tmp_path)
    strangers = [".old-model-0123abcd", ".old-notes-0123abcd", ".tmp-of-mine"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*strangers, "adapter", "checkpoints", "model"]
    assert [(tmp_path / n / "x").read_text() for n in ("model", "adapter")] == ["model", ".old-adapter-0123abcd"]
    assert [p.name for p in (tmp_path / ".old-model-0123abcd").iterdir()] == ["mine.txt"]
    assert not [*(tmp_path / "checkpoints").iterdir()]


def test_what_an_older_vla_left_while_it_pruned_goes(tmp_path):
    with atomic_folder(tmp_path / "checkpoints" / "step-00000003", "checkpoint") as temp:
        (temp / "x").write_text("x")
    (tmp_path / "checkpoints" / "step-00000003").rename(tmp_path / "checkpoints" / ".old-step-00000003")
    checkpoints.sweep(tmp_path)
    assert not [*(tmp_path / "checkpoints").iterdir()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(tmp_path, whole, number):
    def stop_at_8(event, record):
        if event == "step" and record["step"] == 8:
            os.kill(os.getpid(), number)

    result = run(tmp_path / "run", world.config(20), listeners=[stop_at_8])
    assert (result.interrupted, result.step, result.signal, result.model) == (True, 8, number, None)
    assert checkpoints.checkpoint_steps(result.out) == [5, 8]
    run(tmp_path / "run", world.config(20), resume=True)
    assert same(state_of(result.out, 20), state_of(whole.out, 20))
    assert signal.getsignal(number) is not None


@pytest.mark.parametrize("file", ["params", "ema", "optimizer", "train_state.json", "norm_stats.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_found_before_use_and_names_the_file(tmp_path, whole, file, damage):
    import shutil

    out = tmp_path / "run"
    shutil.copytree(whole.out, out)
    target = next(p for p in checkpoints.checkpoint_folder(out, 20).iterdir() if p.name.startswith(file))
    data = bytearray(target.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
        target.write_bytes(data)
    elif damage == "cut":
        target.write_bytes(data[: len(data) // 2])
    else:
        target.unlink()
    with pytest.raises(StoreError) as caught:
        run(out, world.config(30, lr_decay_steps=20), resume=True)
    assert "step-00000020" in str(caught.value) and "--resume-step 15" in str(caught.value)
    if file != "manifest.json" or damage != "flip":  # a flipped digest accuses the file it belongs to
        assert target.name in str(caught.value)
    result = run(out, world.config(20), resume_step=15)
    assert same(state_of(out, 20), state_of(whole.out, 20)) and result.step == 20


def test_a_bad_step_is_not_applied_and_reported(tmp_path, capsys):
    """An infinite pixel-to-action target: the weights of the step before stay, the frames are named."""
    data = world.World()
    data.state[:] = np.clip(data.state, -1, 1)
    bad_frames = set()

    def prepared_with_overflow(config):
        made = world.prepared(config, data)
        plain = made.group.inputs

        class Group(world.Group):
            @staticmethod
            def inputs(sample):
                done = plain(sample)
                frame = int(np.flatnonzero((data.state == sample["state"]).all(1))[0])
                if frame in bad_frames:
                    done = {**done, "actions": np.full_like(done["actions"], 3e38)}  # finite, but its square is not
                return done

        return world.WorldPrepared(
            **{**{f: getattr(made, f) for f in made.__slots__ if f != "__weakref__"}, "group": Group}
        )

    config = world.config(6, save_every=1, keep_last=6, max_bad_steps=3)
    probe = Loader(Samples(data, world.Group.inputs, 3, 0), np.arange(45), world.small_variant(), config)
    bad_frames.add(int(probe.ids(3)[0]))
    hit = [k for k in range(6) if bad_frames & set(probe.ids(k).tolist())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "prepare", lambda *a: prepared_with_overflow(config))
        loop.train("w", "w", out=tmp_path / "run", config=config)
    assert "step 3 was not applied" in capsys.readouterr().err, "said without a progress bar"
    reports = read_metrics(tmp_path / "run", "bad_step")
    assert [r["step"] for r in reports] == hit == [3]
    assert reports[0]["sample_ids"] == probe.ids(3).tolist() and reports[0]["loss"] is None
    before, after, later = (state_of(tmp_path / "run", s) for s in (3, 4, 5))
    assert same(before, after) and not same(after, later)

    bad_frames.update(range(45))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingError) as caught:
        patch.setattr(loop, "prepare", lambda *a: prepared_with_overflow(config))
        loop.train("w", "w", out=tmp_path / "all", config=config)
    assert "3 steps in a row" in str(caught.value)
    assert same(state_of(tmp_path / "all", 1), state_of(tmp_path / "all", 2))

    config = world.config(2, max_bad_steps=3)  # too short a run to be stopped: it has learned nothing all the same
    with pytest.MonkeyPatch.context() as patch, pytest.raises(NotFiniteError, match="no step of this run"):
        patch.setattr(loop, "prepare", lambda *a: prepared_with_overflow(config))
        loop.train("w", "w", out=tmp_path / "short", config=config)
    assert not (tmp_path / "short/model").exists()


def test_weights_that_are_not_finite_are_neither_saved_nor_resumed(tmp_path, whole):
    """Nor exported: a checkpoint of them would push out the last good one."""
    from vla.training.torch_engine import TorchEngine

    config, real = world.config(6, save_every=2, keep_last=1), TorchEngine.step
    steps = iter(range(6))

    def break_a_weight(self, *given):
        done = real(self, *given)
        if next(steps) == 3:
            next(iter(self.shards.values())).data.view(-1)[0] = float("nan")
        return done

    with pytest.MonkeyPatch.context() as patch, pytest.raises(NotFiniteError, match="params at step 4"):
        patch.setattr(TorchEngine, "step", break_a_weight)
        run(tmp_path / "run", config)
    assert checkpoints.checkpoint_steps(tmp_path / "run") == [2] and not (tmp_path / "run/model").exists()

    bad = tmp_path / "bad"
    shutil.copytree(whole.out, bad)
    folder = checkpoints.checkpoint_folder(bad, 20)
    for file in ("params", "ema"):
        weights = {k: np.array(v) for k, v in read_weights(folder / f"{file}.safetensors").items()}
        weights["head.action_in_proj.weight"][0, 0] = np.inf
        (folder / f"{file}.safetensors").unlink()
        write_weights(folder / f"{file}.safetensors", weights)
        write_manifest(folder, "checkpoint")
        with pytest.raises(NotFiniteError, match=rf"{file}\.safetensors: head\.action_in_proj\.weight") as caught:
            run(bad, world.config(25), resume=True)
        assert caught.value.status == 1
        write_weights(
            folder / "params.safetensors", read_weights(checkpoints.checkpoint_folder(bad, 15) / "params.safetensors")
        )


def test_a_broken_frame_stops_with_its_number_and_loses_nothing(tmp_path):
    config = world.config(12, workers=1, prefetch=1)
    made = world.prepared(config)
    loader = Loader(
        Samples(made.dataset, made.group.inputs, 3, 0), made.train_index, made.variant, config
    )
    seen = {int(i) for k in range(7) for i in loader.ids(k)}
    frame = next(int(i) for i in loader.ids(7) if int(i) not in seen)
    with pytest.raises(DataError) as caught:
        run(tmp_path / "run", config, world.World(bad={frame: "nan"}))
    assert f"frame {frame}" in str(caught.value) and "dims [1]" in str(caught.value)
    assert checkpoints.checkpoint_steps(tmp_path / "run")[-1] == 7


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("interrupted", [True, False])
def test_only_the_process_that_writes_says_where_the_model_is(tmp_path, monkeypatch, capsys, writes, interrupted):
    from vla.cli import main

    model = tmp_path / "model" if writes and not interrupted else None
    result = TrainResult(tmp_path, 3, interrupted, model, None, {}, 15 if interrupted else None, writes)
    monkeypatch.setattr(loop, "train", lambda *a, **k: result)
    status = main(
        ["train", "--type", "pi0", "--preset", "tiny", "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    )
    said = capsys.readouterr().err
    assert status == (143 if interrupted else 0) and "None" not in said
    assert ("the model is in" in said) == (writes and not interrupted) and ("saved: nothing" in said) == (
        writes and interrupted
    )


def test_a_full_disk_does_not_stop_training(tmp_path, monkeypatch, whole, capsys):
    import errno

    from vla.training import checkpoints as module

    real = module.write_weights
    calls = []

    def sometimes(path, weights):
        calls.append(path.name)
        if len(calls) == 2:  # the first checkpoint fails in its second file
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, weights)

    monkeypatch.setattr(module, "write_weights", sometimes)
    result = run(tmp_path / "run", world.config(20))
    notes = [r["text"] for r in read_metrics(result.out, "note")]
    assert any("no checkpoint at step 5" in n and "disk is full" in n for n in notes)
    assert "no checkpoint at step 5" in capsys.readouterr().err, "said without a progress bar"
    assert not [p for p in result.out.rglob(".tmp-*")]
    assert same(state_of(result.out, 20), state_of(whole.out, 20))


def test_runs_are_not_mixed(tmp_path, whole):
    import shutil

    out = tmp_path / "run"
    shutil.copytree(whole.out, out)
    with pytest.raises(TrainingError, match="holds a run already"):
        run(out, world.config(20))
    with pytest.raises(TrainingError, match="seed: 42 -> 1"):
        run(out, world.config(30, seed=1), resume=True)
    with pytest.raises(TrainingError, match="beyond the last step"):
        run(out, world.config(10), resume=True)
    with pytest.raises(TrainingError, match="name: '.*' -> 'x'"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            world, "small_variant", lambda: world.build(type="pi0", preset="tiny", set=world.SHAPES, name="x")
        )
        run(out, world.config(30), resume=True)
    other = world.World()
    other.digest = lambda: "another"
    with pytest.raises(TrainingError, match="data: 'world' -> 'another'"):
        run(out, world.config(25), other, resume=True)
    with pytest.raises(TrainingError, match="what a run freezes cannot change"):
        run(out, world.config(25, freeze=("backbone.vision",)), resume=True, allow_change=True)
    assert run(out, world.config(25), other, resume=True, allow_change=True).step == 25
    assert run(out, world.config(2), overwrite=True).step == 2
    assert checkpoints.checkpoint_steps(out) == [2]


def test_what_stands_where_the_model_shall_be_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("not a model")
    for overwrite in (False, True):
        with pytest.raises(StoreError, match="will not be replaced"):
            run(tmp_path, world.config(2), overwrite=overwrite)
    assert [f.name for f in tmp_path.rglob("*")] == ["model", "mine.txt"]


@pytest.mark.parametrize(("framework", "name"), [("torch", "WORLD_SIZE"), ("jax", "JAX_NUM_PROCESSES")])
def test_one_of_several_processes_does_not_train_alone_unasked(tmp_path, monkeypatch, framework, name):
    monkeypatch.setenv(name, "2")
    with pytest.raises(TrainingError, match=f"none, {name}=2(?s:.*)--distributed ddp"):
        run(tmp_path / "run", world.config(2, framework=framework))
    assert not (tmp_path / "run").exists()


def test_an_average_cannot_begin_in_the_middle(tmp_path):
    run(tmp_path, world.config(1, ema_decay=0.0))
    with pytest.raises(TrainingError, match="without an average(?s:.*)--ema-decay 0"):
        run(tmp_path, world.config(2, ema_decay=0.9), resume=True, allow_change=True)


def test_two_processes_may_not_share_a_run(tmp_path):
    second = checkpoints.run_lock(tmp_path)
    with checkpoints.run_lock(tmp_path), pytest.raises(TrainingError, match=str(os.getpid())), second:
        pass


def test_old_checkpoints_go_and_marked_ones_stay(tmp_path):
    run(tmp_path / "run", world.config(12, save_every=1, keep_last=2, keep_every=5))
    assert checkpoints.checkpoint_steps(tmp_path / "run") == [5, 10, 11, 12]


def test_validation_speaks_the_robots_units(tmp_path):
    run(tmp_path / "run", world.config(4, val_episodes=1, val_every=2))
    records = read_metrics(tmp_path / "run", "validation")
    assert [r["step"] for r in records] == [2, 4]
    assert set(records[0]["action_error"]) == {"x", "y", "z", "g"}
    assert records[0]["action_error_mean"] == pytest.approx(np.mean(list(records[0]["action_error"].values())))
    assert 1 < records[0]["action_error_mean"] < 100  # tenfold units
    assert json.loads((tmp_path / "run" / "model" / "record.json").read_text())["validation_frames"] == 9


def test_listeners_hear_the_numbers(tmp_path, monkeypatch):
    """A tracker with trackio's interface: losses, rates and validation arrive with their step; nothing else does."""
    import types

    heard, ended = [], []
    fake = types.ModuleType("trackio")
    fake.__spec__ = importlib.util.spec_from_loader("trackio", None)
    fake.init = lambda project, name, config: heard.append((name, config["steps"]))
    fake.log = lambda numbers, step: heard.append((step, sorted(numbers)))
    fake.finish = lambda: ended.append(True)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    run(tmp_path / "run", world.config(2, val_episodes=1, listeners=("trackio",)))
    assert heard[0] == ("run", 2) and ended == [True]
    assert heard[1][0] == 1 and {"train/loss", "train/lr", "train/loss/actions"} <= set(heard[1][1])
    assert "validation/action_error_mean" in heard[-1][1]
