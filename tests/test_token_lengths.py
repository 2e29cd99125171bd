"""Tokens that do not fit: measured and refused before the first step, counted during a run, an error at inference."""

import re

import numpy as np
import pytest

for needed in ("torch", "vla_dataset_lerobot", "vla_head_ar", "vla_tokenizer_binning", "vla_tokenizer_paligemma"):
    pytest.importorskip(needed)

import vla  # noqa: E402
from vla.cli import main  # noqa: E402
from vla.datasets import DatasetInfo, create_dataset, open_dataset  # noqa: E402
from vla.errors import DataError  # noqa: E402
from vla.store import open_model  # noqa: E402
from vla.token_lengths import TokenLengths, measure_token_lengths  # noqa: E402
from vla.tokenizer import open_tokenizer  # noqa: E402
from vla.training.config import TrainConfig, TrainingError  # noqa: E402
from vla.training.cuts import Cuts, cut_samples, empty_losses  # noqa: E402
from vla.training.metrics import read_metrics  # noqa: E402
from vla.transforms import build_group  # noqa: E402
from vla.transforms.stats import compute_stats  # noqa: E402

SETS = {
    "spec.image_size": [16, 16], "spec.cameras": ["base_0_rgb"], "spec.action_horizon": 3, "spec.action_dim": 4,
    "spec.state_dim": 4, "backbone.vision.depth": 1, "backbone.vision.width": 32, "backbone.vision.mlp_dim": 32,
    "backbone.vision.num_heads": 2, "backbone.vision.patch_size": 8, "backbone.llm.depth": 1,
    "backbone.llm.width": 32, "backbone.llm.mlp_dim": 32, "backbone.llm.num_heads": 2, "backbone.llm.head_dim": 16,
}  # fmt: skip
LONG = "put the red cube into the blue box and then close the lid of the box with the left hand"
TRAIN = ["--batch-size", "8", "--steps", "2", "--log-every", "1", "--no-progress"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three episodes of ten frames; the instruction of the last is long."""
    folder, rng = tmp_path_factory.mktemp("data") / "arm", np.random.default_rng(0)
    with create_dataset(folder, DatasetInfo({"base_0_rgb": (16, 16)}, 4, 4, 10.0)) as writer:
        for prompt in ("go", "stop", LONG):
            for _ in range(10):
                image = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                state, action = rng.normal(size=(2, 4)).astype(np.float32)
                writer.add({"images": {"base_0_rgb": image}, "state": state, "action": action, "prompt": prompt})
            writer.end_episode()
    return folder


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    built = vla.build(head="ar", tokenizer="binning", preset="tiny", set={**SETS, "spec.max_token_len": 52})
    folder = tmp_path_factory.mktemp("variant")
    (folder / "variant.toml").write_text(built.to_toml())
    return built, str(folder)


def lengths_of(data, variant, most=4096):
    dataset = open_dataset(data)
    stats = compute_stats(dataset, variant)
    tokenizer = open_tokenizer(variant.parts["tokenizer"], variant.spec, None)
    tokenizer.fit(np.zeros((1, 3, 4), np.float32))
    group = build_group(variant, stats=stats, tokenizer=tokenizer)
    return tokenizer, measure_token_lengths(dataset, group, tokenizer, 3, most=most)


def test_lengths_are_those_of_the_tokenizer(data, variant, monkeypatch):
    def decode(*a, **k):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr("PIL.Image.open", decode, raising=False)
    tokenizer, found = lengths_of(data, variant[0])
    assert found.frames == len(found.prompts) == 30
    assert set(found.targets) == {12 + len(tokenizer._prefix) + len(tokenizer._suffix)}
    tokenizer.max_len = found.longest
    assert found.prompts[20:].min() > found.prompts[:20].max() + 10 and found.longest == found.fits
    assert found.over(52) == pytest.approx(1 / 3) and found.over(found.fits) == 0
    assert "all 30 frames" in found.summary(52)


def test_of_many_frames_every_instruction_is_measured(data, variant):
    _, found = lengths_of(data, variant[0], most=6)
    assert len(found.prompts) == 6 and found.frames == 30
    _, whole = lengths_of(data, variant[0])
    assert found.prompts.max() >= whole.prompts.min() + 15  # the long one is among them
    assert found.fits == found.prompts.max() + found.targets.max()
    assert "6 of 30 frames" in found.summary(52)
    assert TokenLengths(np.array([3, 9]), np.array([5, 0]), 100).fits == 14  # the longest parts may meet elsewhere


def test_too_small_a_prompt_is_refused_with_the_number_that_fits(tmp_path, data, variant, capsys):
    words = ["train", variant[1], "--data", str(data), "--out", str(tmp_path / "run"), *TRAIN]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "spec.max_token_len" in error and "33.3% of the samples are longer" in error and "--fit-lengths" in error
    assert not (tmp_path / "run").exists()
    number = int(re.search(r"--set spec.max_token_len=(\d+)", error)[1])
    assert main([*words, "--set", f"spec.max_token_len={number - 1}"]) == 2
    assert main([*words, "--set", f"spec.max_token_len={number}"]) == 0
    assert main([*words, "--fit-lengths", "--overwrite"]) == 0
    fitted = open_model(tmp_path / "run" / "model").variant.spec.max_token_len
    assert number <= fitted < number + 16
    records = read_metrics(tmp_path / "run")
    assert [(r["samples_cut"], r["batches_without_targets"]) for r in records] == [(0, 0)] * 2


def test_what_is_lost_is_in_every_record_and_limits_hold(tmp_path, data, variant, capsys):
    words = ["train", variant[1], "--data", str(data), "--out", str(tmp_path / "run"), *TRAIN]
    assert main(words) == 2
    allowed = re.search(r"--max-cut [\d.]+", capsys.readouterr().err)[0].split()
    assert main([*words, *allowed]) == 0
    records = read_metrics(tmp_path / "run")
    assert sum(r["samples_cut"] for r in records) > 0
    assert any("33.33% of the samples are cut" in r["text"] for r in read_metrics(tmp_path / "run", "note"))
    policy = vla.open(tmp_path / "run" / "model")
    with pytest.raises(DataError, match="instruction is too long"):
        policy.infer(
            {"images": {"base_0_rgb": np.zeros((16, 16, 3), np.uint8)}, "state": np.zeros(4), "prompt": LONG * 2}
        )


def test_counts_and_limits():
    cuts = Cuts(TrainConfig(max_cut=0.01, max_bad_steps=3))
    cuts.add(0, 32, 2, ())
    assert cuts.record() == {"samples_cut": 2, "batches_without_targets": 0}
    again = Cuts(TrainConfig(max_cut=0.01, max_bad_steps=3))
    again.load(cuts.state())
    assert again.state() == cuts.state()
    cuts.add(1, 32, 0, ("tokens",))
    assert cuts.record() == {"samples_cut": 0, "batches_without_targets": 1}
    with pytest.raises(TrainingError, match="lose tokens") as found:
        for step in range(2, 9):
            cuts.add(step, 32, 4, ())
    assert "10 of 128" in str(found.value) and "--max-cut 0.08" in str(found.value)
    cuts = Cuts(TrainConfig(max_bad_steps=3))
    for step in range(2):
        cuts.add(step, 8, 0, ("tokens",))
    cuts.add(2, 8, 0, ())
    with pytest.raises(TrainingError, match="nothing to learn from"):
        for step in range(3, 6):
            cuts.add(step, 8, 0, ("tokens",))


def test_a_loss_without_targets_is_seen():
    losses = {"tokens": "target", "actions": "action"}
    none, some = np.zeros(4, bool), np.array([False, True])
    rows = [
        {"token_loss_mask": none, "actions_mask": some, "tokens_cut": 3},
        {"token_loss_mask": none, "tokens_cut": 0},
    ]
    assert empty_losses(rows, losses) == ("tokens",) and cut_samples(rows) == 1
    assert empty_losses([*rows, {"token_loss_mask": some, "actions_mask": some}], losses) == ()


@pytest.mark.parametrize("words", [["--robot", "droid"], ["--set", "spec.action_dim=7"]])
def test_a_variant_that_can_never_hold_a_chunk_is_refused(tmp_path, words, capsys):
    assert main(["build", "--head", "ar", "--tokenizer", "binning", *words, "--out", str(tmp_path / "v")]) == 2
    error = capsys.readouterr().err
    assert "tokens" in error and "max_token_len >=" in error and "--robot" not in error.partition("one change")[2]
    fits = re.search(r"--set spec.max_token_len=\d+", error)[0].split()
    assert main(["build", "--head", "ar", "--tokenizer", "binning", *words, *fits, "--out", str(tmp_path / "v")]) == 0
