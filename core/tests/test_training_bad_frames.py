"""Frames that cannot be used: one error with the way out, or within a budget counted and replaced, the same every time."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
for plugin in ("vla_head_flow", "vla_llm_gemma", "vla_vision_siglip", "vla_backbone_paligemma"):
    pytest.importorskip(plugin)

from vla.errors import DataError, SettingsError  # noqa: E402
from vla.training import checkpoints, loop  # noqa: E402
from vla.training.bad_frames import allowed, budget_for  # noqa: E402
from vla.training.loader import Loader, Samples  # noqa: E402
from vla.training.metrics import read_metrics  # noqa: E402
from vla.training.order import stand_ins  # noqa: E402
from vla.training.prepare import _first_good  # noqa: E402

_path = Path(__file__).parent / "training_world.py"
_spec = importlib.util.spec_from_file_location("training_world", _path)
world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world)


class Broken(world.World):
    """Some frames cannot be decoded."""

    def sample(self, index, horizon, cameras=None, images=True):
        self.asked.append(index)
        if index in self.bad:
            raise DataError("a video is damaged", field=f"film.mp4 (frame {index % 9} of episode {index // 9})",
                            got="at 1.0 s", fix="copy the file again")  # fmt: skip
        return super().sample(index, horizon, cameras, images)


def run(out, config, bad=(), **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "prepare", lambda *a: world.prepared(config, Broken(bad=dict.fromkeys(bad, ""))))
        return loop.train("world", "world", out=out, config=config, **options)


def loader_of(config, data, index=None, shares=()):
    made = world.prepared(config)
    index = made.train_index if index is None else index
    return Loader(Samples(data, made.group.inputs, 3, 0), index, made.variant, config, shares=shares)


def weights(out, step):
    found = checkpoints.load_checkpoint(out, step)
    return {f"{part}/{name}": a.copy() for part, arrays in found.arrays.items() for name, a in arrays.items()}


def test_without_a_budget_the_frame_is_named_with_the_way_out_which_works(tmp_path):
    config = world.config(8, save_every=3)
    bad = int(loader_of(config, world.World()).ids(5)[1])
    with pytest.raises(DataError) as caught:
        run(tmp_path / "run", config, [bad])
    text = str(caught.value)
    assert f"film.mp4 (frame {bad % 9} of episode {bad // 9}) (frame {bad} of the data)" in text
    assert "copy the file again; or let other frames stand in: --skip-bad 0.001" in text and "at 1.0 s" in text
    assert checkpoints.checkpoint_steps(tmp_path / "run") == [3, 5]
    with pytest.raises(DataError):  # the same frame again, while nothing is said
        run(tmp_path / "run", config, [bad], resume=True)
    done = run(tmp_path / "run", world.config(8, save_every=3, skip_bad=0.001), [bad], resume=True)
    assert done.step == 8
    [report] = read_metrics(tmp_path / "run", "bad_frame")
    assert report["frame"] == bad and report["step"] == 5 and "film.mp4" in report["text"]
    assert [r["bad_frames"] for r in read_metrics(tmp_path / "run")[-3:]] == [1, 1, 1]


def test_a_resumed_run_has_the_same_stand_ins_and_goes_on_counting(tmp_path):
    plan = {"lr_decay_steps": 12, "save_every": 4, "skip_bad": 0.1}
    bad = [3, 17, 30, 44]
    run(tmp_path / "whole", world.config(12, **plan), bad)
    run(tmp_path / "parts", world.config(5, **plan), bad)
    run(tmp_path / "parts", world.config(12, workers=1, prefetch=1, **plan), bad, resume=True)
    whole, parts = weights(tmp_path / "whole", 12), weights(tmp_path / "parts", 12)
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    for out in ("whole", "parts"):
        assert [r["frame"] for r in read_metrics(tmp_path / out, "bad_frame")].count(17) == 1
        assert read_metrics(tmp_path / out)[-1]["bad_frames"] == 4
    assert checkpoints.load_checkpoint(tmp_path / "parts", 12).state["bad_frames"] == bad


def test_stand_ins_are_good_frames_and_a_function_of_seed_step_and_row():
    config = world.config(12, skip_bad=0.9)
    bad = set(range(0, 45, 2))
    one, other = (loader_of(config, Broken(bad=dict.fromkeys(bad, ""))) for _ in range(2))
    for step in (3, 0, 11):  # in any order, from any state
        a, b = one.batch(step), other.batch(step)
        asked = one.ids(step)
        assert a.ids.tolist() == b.ids.tolist() and not bad & set(a.ids.tolist())
        assert bad & set(asked.tolist()) <= set(a.bad) <= bad
        assert all(x == y for x, y in zip(a.ids.tolist(), asked.tolist(), strict=True) if y not in bad)
    halves = [Loader(one.samples, one.index, one.variant, config, rows=slice(k, k + 2)) for k in (0, 2)]
    assert [i for half in halves for i in half.batch(3).ids.tolist()] == one.batch(3).ids.tolist()
    assert stand_ins(1, 2, 3, 45, 32).tolist() == stand_ins(1, 2, 3, 45, 32).tolist()
    assert len({tuple(stand_ins(1, s, r, 45, 32)) for s in range(4) for r in range(4)}) == 16
    assert stand_ins(1, 2, 3, 5, 32).tolist() != stand_ins(2, 2, 3, 5, 32).tolist()
    assert sorted(stand_ins(1, 2, 3, 5, 32)) == [0, 1, 2, 3, 4]


def test_in_a_mixture_a_frame_of_the_same_dataset_stands_in():
    config = world.config(6, skip_bad=0.9)
    index, shares = np.arange(45), ((18, 0.5), (27, 0.5))
    loader = loader_of(config, Broken(bad=dict.fromkeys([*range(0, 18, 2), *range(19, 45, 2)], "")), index, shares)
    for step in range(6):
        ids, asked = loader.batch(step).ids, loader.ids(step)
        assert ((ids < 18) == (asked < 18)).all()


def test_more_bad_frames_than_the_budget_end_the_run(tmp_path):
    config = world.config(12, skip_bad=0.05)
    with pytest.raises(DataError) as caught:
        run(tmp_path / "run", config, range(0, 45, 3))
    text = str(caught.value)
    assert "too many frames" in text and "3 of 45 frames" in text and "at most 2 (--skip-bad 0.05)" in text
    assert "--skip-bad 0.07" in text and allowed(0.07, 45) == 3
    with pytest.raises(DataError, match="video is damaged"):  # nothing is left that could stand in
        run(tmp_path / "all", world.config(3, skip_bad=0.9), range(45))


def test_held_out_frames_too(tmp_path):
    config = world.config(2, skip_bad=0.1, val_episodes=1, val_every=1, val_batches=9)
    held = world.prepared(config).val_index
    run(tmp_path / "run", config, held[:2].tolist())
    assert {r["frame"] for r in read_metrics(tmp_path / "run", "bad_frame")} == set(held[:2].tolist())
    assert len(read_metrics(tmp_path / "run", "validation")) == 2


def test_a_run_begins_although_the_first_frame_is_bad():
    data, index = Broken(bad=dict.fromkeys([0, 1, 5], "")), np.arange(45)
    with pytest.raises(DataError, match=r"frame 0 of the data(.|\n)*--skip-bad 0.001"):
        _first_good(data, world.small_variant(), index, world.config(1))
    found = _first_good(data, world.small_variant(), index, world.config(1, skip_bad=0.1))
    assert np.array_equal(found["state"], data.state[2])
    with pytest.raises(DataError, match="video is damaged"):
        everything = Broken(bad=dict.fromkeys(range(45), ""))
        _first_good(everything, world.small_variant(), index, world.config(1, skip_bad=0.9))


def test_budgets_that_are_advised_are_enough_and_taken():
    for frames in (1, 7, 45, 999, 10**6):
        assert allowed(0.0, frames) == 0 and allowed(0.001, frames) == max(1, frames // 1000)
        for count in {1, 2, max(1, frames // 3)}:
            share = float(budget_for(count, frames))
            assert 0.001 <= share < 1 and (allowed(share, frames) >= count or share == 0.99)
            world.config(1, skip_bad=share)
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(SettingsError, match="skip_bad"):
            world.config(1, skip_bad=wrong)
