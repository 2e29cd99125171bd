"""`vla tokenizer fit` and `bench`, and action tokenizers inside a variant: open, fit, save, open again."""

import json
import pickle

import numpy as np
import pytest

from vla.cli import main
from vla.codec_bench import load_chunks
from vla.compose import resolve
from vla.contracts import Spec
from vla.errors import DataError, SettingsError
from vla.testing.closeness import close
from vla.tokenizer import open_tokenizer

TEXT = {"part": "paligemma", "preset": "tiny"}


@pytest.fixture
def data(tmp_path):
    """Two episodes of 60 smooth steps, 3 dims."""
    t = np.linspace(0, 6, 60)[:, None]
    actions = np.stack([np.sin(t + np.arange(3)) * 5 + 2, np.cos(t * np.arange(1, 4)) * 3]).astype(np.float32)
    np.savez(tmp_path / "actions.npz", actions=actions)
    return tmp_path / "actions.npz"


def test_bench_table_json_and_picture(data, tmp_path, capsys):
    words = [
        "tokenizer",
        "bench",
        str(data),
        "--horizon",
        "10",
        "--tokenizer",
        "fast,binning",
        "--set",
        "fast.codes=256",
    ]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "fast" in text
    assert "max err" in text
    assert main([*words, "--json", "--picture", str(tmp_path / "p.png")]) == 0
    fast, binning = json.loads(capsys.readouterr().out)
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert fast["tokens"] < binning["tokens"] == 30
    assert binning["broken"] == 0
    units = np.diff([load_chunks(data, 10).low, load_chunks(data, 10).high], axis=0).max() / 2
    assert fast["worst"] <= fast["bound"] * units * 1.001
    assert fast["rmse"] <= fast["worst"]


def test_fit_writes_a_source_that_a_variant_uses(data, tmp_path, capsys):
    out = tmp_path / "fitted"
    assert main(["tokenizer", "fit", str(data), "--horizon", "10", "--set", "codes=256", "--out", str(out)]) == 0
    assert "tokens per chunk" in capsys.readouterr().out
    tree = {"part": "fast", "text": TEXT, "codes": 256, "source": str(out)}
    tokenizer = open_tokenizer(resolve("tokenizer", tree, "tokenizer"), Spec(max_token_len=200))
    assert tokenizer.fitted
    chunk = load_chunks(data, 10).normalised()[3]
    tokens = tokenizer.tokenize("go", np.zeros(2), chunk)["tokenized_prompt"]
    assert np.abs(tokenizer.decode(tokens, 10, 3) - chunk).max() <= tokenizer.codec.error_bound(10, 3)
    assert main(["tokenizer", "fit", str(data), "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize("words", [
    ["tokenizer", "melt"],
    ["tokenizer", "fit", "DATA"],
    ["tokenizer", "bench", "DATA", "--tokenizer", "paligemma"],
    ["tokenizer", "bench", "DATA", "--tokenizer", "nope"],
    ["tokenizer", "bench", "DATA", "--set", "codes=3"],
    ["tokenizer", "bench", "DATA", "--tokenizer", "fast", "--horizon", "0"],
    ["tokenizer", "bench", "absent.npz", "--tokenizer", "fast"],
])  # fmt: skip
def test_mistakes_exit_2_with_one_message(words, data, capsys):
    assert main([str(data) if w == "DATA" else w for w in words]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.startswith("vla tokenizer:") or "\nvla tokenizer:" in err


def test_chunks_of_npz_files(tmp_path):
    flat = np.arange(20, dtype=np.float64).reshape(10, 2)
    np.savez(tmp_path / "a.npz", action=flat, step_type=np.asarray([0, 1, 1, 2, 0, 1, 1, 1, 1, 2]))
    raw = load_chunks(tmp_path / "a.npz", 3).raw
    assert raw.shape == (10, 3, 2)
    assert raw[3, :, 0].tolist() == [6, 6, 6]  # the last step of the first episode repeats
    assert raw[2, :, 0].tolist() == [4, 6, 6]
    np.savez(tmp_path / "c.npz", chunks=np.zeros((4, 5, 6)))
    assert load_chunks(tmp_path / "c.npz", 99).raw.shape == (4, 5, 6)
    np.savez(tmp_path / "d.npz", actions=np.full((4, 2), np.nan))
    with pytest.raises(DataError, match="NaN"):
        load_chunks(tmp_path / "d.npz", 2)
    np.savez(tmp_path / "e.npz", states=flat)
    with pytest.raises(DataError, match="no actions"):
        load_chunks(tmp_path / "e.npz", 2)


@pytest.mark.parametrize("kind", ["fast", "binning", "fsq"])
def test_saved_assets_open_again(kind, tmp_path):
    """A model directory's assets hold all of it: text model, codec, id map."""
    if kind == "fsq":
        pytest.importorskip("torch")
    chunks = np.sin(np.linspace(0, 9, 40 * 8 * 2)).reshape(40, 8, 2).astype(np.float32)
    tree = {"part": kind, "preset": "tiny", "text": TEXT} | ({"steps": 5} if kind == "fsq" else {})
    chosen, spec = resolve("tokenizer", tree, "tokenizer"), Spec(max_token_len=80)
    tokenizer = open_tokenizer(chosen, spec).fit(chunks)
    tokenizer.save(tmp_path)
    again = pickle.loads(pickle.dumps(open_tokenizer(chosen, spec, tmp_path)))  # as data workers get it
    assert again.fitted
    want, got = (t.tokenize("lift it", np.zeros(3), chunks[1]) for t in (tokenizer, again))
    assert all(np.array_equal(want[k], got[k]) for k in want)
    assert np.array_equal(
        tokenizer.decode(want["tokenized_prompt"], 8, 2), again.decode(want["tokenized_prompt"], 8, 2)
    )
    grammar = again.grammar(8, 2)
    ids = want["tokenized_prompt"][want["token_loss_mask"]][len(grammar.prefix) : -len(grammar.suffix)]
    assert grammar.lengths[again.id_map.to_codec(ids)].sum() == grammar.total
    # Another skip in the settings does not move ids that a model was trained with.
    moved = open_tokenizer(resolve("tokenizer", tree | {"skip": 7}, "tokenizer"), spec, tmp_path)
    assert np.array_equal(moved.id_map.text_ids, tokenizer.id_map.text_ids)


def test_a_vocabulary_too_small_is_refused_before_loading(capsys):
    assert main(["build", "--type", "pi0_fast", "--preset", "tiny", "--set", "tokenizer.codes=4096"]) == 2
    err = capsys.readouterr().err
    assert "vocab_size >= 4228" in err
    assert "one change that fits" in err
    for kind in ("fast", "binning"):  # and again when opened without the checks of a variant
        with pytest.raises(SettingsError, match="too small"):
            open_tokenizer(resolve("tokenizer", {"part": kind, "codes": 4000, "text": TEXT}, "tokenizer"), Spec())


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    """A dataset of two episodes of 30 frames: state and action [5], the last dim a gripper that rests."""
    pytest.importorskip("vla_dataset_lerobot")
    from vla.datasets import DatasetInfo, create_dataset

    folder, rng = tmp_path_factory.mktemp("arm") / "data", np.random.default_rng(0)
    with create_dataset(folder, DatasetInfo({"front": (16, 16)}, 5, 5, 10.0)) as writer:
        for _ in range(2):
            walk = np.cumsum(rng.normal(size=(90, 5)), 0).astype(np.float32)
            walk[:, 4] = np.arange(90) == 40
            for row in walk:
                image = np.zeros((16, 16, 3), np.uint8)
                writer.add({"images": {"front": image}, "state": row, "action": row + 100, "prompt": "go"})
            writer.end_episode()
    return str(folder)


def test_chunks_are_normalised_as_training_does(arm):
    from vla.cli.stats import variant_of
    from vla.datasets import open_dataset
    from vla.training.prepare import normalised_chunks
    from vla.transforms.stats import compute_stats

    dataset = open_dataset(arm)
    sets = {"robot.delta": [2], "spec.action_horizon": 6}
    found = load_chunks(arm, 6, variant=lambda dataset: variant_of("", "", sets, dataset)).normalised()
    variant = variant_of("", "", sets, dataset)
    want = normalised_chunks(variant, dataset, compute_stats(dataset, variant), np.arange(len(dataset)))
    close(found, want, 1e-5)
    assert np.abs(found).max() <= 10.001  # the gripper rests in 99 % of the frames


def test_settings_of_data_and_robot(arm, tmp_path, capsys):
    words = ["tokenizer", "bench", arm, "--tokenizer", "binning", "--horizon", "6", "--json"]
    assert main([*words, "--set", "data.stride=3", "--set", "robot.delta=[2]"]) == 0
    strided = json.loads(capsys.readouterr().out)[0]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)[0]["rmse"] != strided["rmse"]
    out = ["--out", str(tmp_path / "fit"), "--set", "codes=256", "--set", "robot.delta=[2]", "--set", "data.stride=3"]
    assert main(["tokenizer", "fit", arm, "--horizon", "6", *out]) == 0
    assert "on 60 chunks" in capsys.readouterr().err
    for mistake in (["--set", "data.strid=3"], ["--set", "robot.delto=[2]"], ["--robot", "nope"]):
        assert main([*words, *mistake]) == 2
        assert mistake[1].partition("=")[0].rpartition(".")[2] in capsys.readouterr().err
    np.savez(tmp_path / "a.npz", chunks=np.zeros((4, 5, 6)))
    assert main(["tokenizer", "bench", str(tmp_path / "a.npz"), "--set", "data.stride=3"]) == 2
    assert "no settings and no robot" in capsys.readouterr().err


def test_a_slow_fit_says_its_cost_and_is_cut_in_a_comparison(arm, capsys):
    pytest.importorskip("torch")
    small = ["fsq.embed_dim=64", "fsq.num_layers=1", "fsq.num_tokens=4", "fsq.codes=256", "fsq.steps=100000"]
    words = [word for setting in small for word in ("--set", setting)]
    assert main(["tokenizer", "bench", arm, "--tokenizer", "fsq", "--horizon", "6", "--limit", "0.5", *words]) == 0
    said = capsys.readouterr().err
    assert "fsq: the fit takes about" in said and "of its steps" in said and "--limit 0" in said
