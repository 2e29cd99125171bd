"""Statistics against numpy on the whole data, norm_stats.json, and `vla stats` on real data."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from shared_data import SHARED, needs

from vla.errors import DataError, StoreError
from vla.testing.closeness import close
from vla.transforms import DeltaActions, FunctionStep, Stats, load_stats, save_stats
from vla.transforms.numbers import normalize, unnormalize
from vla.transforms.quantiles import quantiles, summarise_batches
from vla.transforms.stats import about_stats, findings, report, stats_of, summarise

REAL = SHARED / "data/robot/gr00t_picknplace"
FIELDS = ("mean", "std", "q01", "q99")


def numpy_summary(x):
    x = np.asarray(x, np.float64)
    q = np.quantile(x, [0.01, 0.99], axis=0)
    return {"mean": x.mean(0), "std": x.std(0), "q01": q[0], "q99": q[1], "min": x.min(0), "max": x.max(0)}


def same_summary(got, x, bound=1e-12):
    """Relative to the largest value that was summarised: a mean near zero is a difference of larger numbers."""
    for name, value in numpy_summary(x).items():
        close(getattr(got, name), value, bound, name, scale=float(np.abs(x).max(initial=0)))
    assert got.count == len(x)


# ---- order statistics -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 300), st.integers(1, 3)),
        elements=st.one_of(st.floats(-1e6, 1e6, width=32), st.sampled_from([0.0, -0.0, 1.0, -1.0])),
    ),
    st.integers(1, 100),
)
def test_equal_to_numpy_however_the_rows_are_cut(x, size):
    got = summarise_batches(lambda: ((x[i : i + size], None) for i in range(0, len(x), size)))
    want = numpy_summary(x)
    largest = float(np.abs(x).max())
    for name, bound in (("q01", 1e-15), ("q99", 1e-15), ("mean", 1e-12), ("std", 1e-12)):
        close(getattr(got, name), want[name], bound, name, scale=largest)
    np.testing.assert_array_equal(got.below, (x.astype(np.float64) < got.q01).mean(0))
    close(got.above, (x.astype(np.float64) > got.q99).mean(0), 1e-15, scale=1)


@settings(deadline=None, max_examples=25)
@given(
    arrays(np.float32, (20, 2), elements=st.floats(-100, 100, width=32)),
    arrays(np.int64, 20, elements=st.integers(1, 9)),
)
def test_counts_are_repetitions(x, counts):
    got = summarise_batches(lambda: [(x[:7], counts[:7]), (x[7:], counts[7:])])
    same_summary(got, np.repeat(x, counts, axis=0))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e20])
def test_long_tails_ties_and_constants(scale):
    rng = np.random.default_rng(0)
    x = np.stack(
        [
            rng.standard_cauchy(20_000),
            rng.random(20_000) > 0.995,
            np.full(20_000, 0.3),
            np.round(rng.normal(size=20_000)),
        ],
        1,
    )
    x = (x * scale).astype(np.float32)
    same_summary(summarise_batches(lambda: [(x, None)]), x)


def test_float64_data_within_the_stated_bound():
    x = np.random.default_rng(0).normal(size=(5000, 4)) + [0, 5, 100, 1e6]
    want = np.quantile(x, [0.01, 0.99], axis=0)
    for got, exact in zip(quantiles(x), want):
        assert (np.abs(got - exact) <= 6e-8 * np.abs(exact)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_values_that_are_not_finite_are_named(bad):
    x = np.zeros((10, 3))
    x[7, 1] = bad
    with pytest.raises(DataError, match="actions, row 7, dim 1"):
        summarise_batches(lambda: [(x[:5], None), (x[5:], None)], "actions")


def test_no_rows():
    with pytest.raises(DataError, match="no rows"):
        summarise_batches(lambda: [])
    with pytest.raises(DataError, match="rows of numbers"):
        summarise_batches(lambda: [(np.zeros(3), None)])


# ---- datasets ---------------------------------------------------------------------------------------------------------


def dataset(lengths=(7, 1, 30), s=3, a=2, seed=0):
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    states, actions = rng.normal(size=(n, s)).astype(np.float32), rng.normal(size=(n, a)).astype(np.float32)
    ends = np.cumsum(lengths)
    episodes = [range(int(e - length), int(e)) for e, length in zip(ends, lengths)]
    return SimpleNamespace(states=lambda: states, actions=lambda: actions, episodes=episodes, digest=lambda: "d1")


def all_chunks(data, horizon, delta=False):
    """Every real (not repeated) action of every chunk, the slow way."""
    rows = []
    for e in data.episodes:
        for i in e:
            for k in range(i, min(i + horizon, e.stop)):
                a = data.actions()[k].astype(np.float64)
                rows.append(np.concatenate([a[:1] - data.states()[i, :1] * delta, a[1:]]))
    return np.array(rows)


def test_actions_of_all_chunks_count_as_often_as_they_occur():
    data = dataset()
    got = summarise(data, (), 5)
    same_summary(got["actions"], all_chunks(data, 5), 1e-6)
    same_summary(got["state"], data.states(), 1e-6)


@pytest.mark.parametrize("horizon", [1, 4, 100])
def test_delta_actions_are_relative_to_the_start_of_each_chunk(horizon):
    data = dataset()
    step = DeltaActions((True, False))
    same_summary(summarise(data, (step,), horizon)["actions"], all_chunks(data, horizon, True), 1e-6)


def test_a_step_without_promises_runs_sample_by_sample():
    data = dataset()
    seen = []

    def delta(d):
        seen.append(np.shape(d["state"]))
        return {**d, "actions": np.concatenate([d["actions"][:, :1] - d["state"][0], d["actions"][:, 1:]], 1)}

    step = FunctionStep("mine", delta, ("state", "actions"), ("actions",))
    same_summary(summarise(data, (step,), 4)["actions"], all_chunks(data, 4, True), 1e-6)
    assert set(seen) == {(3,)}


def test_blocks_do_not_matter(monkeypatch):
    from vla.transforms import stats

    data = dataset()
    want = summarise(data, (DeltaActions((True, False)),), 4)["actions"]
    monkeypatch.setattr(stats, "_CHUNK_VALUES", 8)
    got = summarise(data, (DeltaActions((True, False)),), 4)["actions"]
    for name in FIELDS:
        close(getattr(got, name), getattr(want, name), 1e-12)


def test_constant_dims_and_outliers_are_reported():
    x = np.random.default_rng(0).normal(size=(1000, 4))
    x[:, 1], x[:, 2] = 3, 0
    x[5, 2], x[6, 3] = 1, 1e4
    s = {"state": summarise_batches(lambda: [(x, None)])}
    for norm, word in (("quantile", "rests"), ("zscore", "reaches")):
        text = "\n".join(findings(s, norm))
        assert "constant dims 1 (3)" in text and f"state[3] {word}" in text and "state[0]" not in text
    assert "state[2] rests" in "\n".join(findings(s, "quantile"))
    assert report(s, {"state": ("x",)})[0][:2] == ("state[0]", "x") and report(s)[1][-1] == "constant"


def test_empty_datasets():
    with pytest.raises(DataError, match="no frames"):
        summarise(
            SimpleNamespace(states=lambda: np.zeros((0, 2)), actions=lambda: np.zeros((0, 2)), episodes=[]), (), 4
        )
    with pytest.raises(DataError, match="horizon"):
        summarise(dataset(), (), 0)


# ---- files ------------------------------------------------------------------------------------------------------------


def some_stats():
    rng = np.random.default_rng(0)
    return {
        k: Stats(rng.normal(size=d), rng.random(d), -rng.random(d), rng.random(d), "d1")
        for k, d in (("state", 3), ("actions", 2))
    }


def test_files_are_openpis_and_exact(tmp_path):
    stats = some_stats()
    path = save_stats(stats, tmp_path, {"frames": 5})
    assert path == tmp_path / "norm_stats.json" and [p.name for p in tmp_path.iterdir()] == ["norm_stats.json"]
    table = json.loads(path.read_text())
    assert set(table["norm_stats"]["state"]) == set(FIELDS)
    back = load_stats(path)
    for key in stats:
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(back[key], name), getattr(stats[key], name))
        assert back[key].data == "d1"
    assert about_stats(tmp_path)["frames"] == 5


def test_openpis_files_may_lack_quantiles(tmp_path):
    file = tmp_path / "norm_stats.json"
    file.write_text(
        '{"norm_stats": {"state": {"mean": [0], "std": [1], "q01": null, "q99": null}, "actions": {"mean": [0, 1], "std": [1, 1]}}}'
    )
    stats = load_stats(tmp_path)
    assert stats["state"].q01 is None and stats["actions"].q99 is None and about_stats(file) == {}
    save_stats(stats, file)
    assert load_stats(file)["state"].q01 is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "a list"),
        ("{}", "not a norm_stats.json"),
        ('{"norm_stats": {"state": []}}', "table"),
        ('{"norm_stats": {"state": {"mean": [0]}}}', "std"),
        ('{"norm_stats": {"state": {"mean": [0], "std": ["x"]}}}', "numbers"),
        ('{"norm_stats": {"state": {"mean": [0], "std": [1, 2]}}}', "one length"),
        ('{"norm_stats": {"state": {"mean": [NaN], "std": [1]}}}', "finite"),
        ('{"norm_stats": {"state": {"mean": [0], "std": [-1]}}}', "negative"),
        ('{"norm_stats": {"state": {"mean": [0], "std": [1], "q01": [2], "q99": [1]}}}', "below"),
    ],
)
def test_damaged_files(tmp_path, text, words):
    file = tmp_path / "norm_stats.json"
    file.write_text(text)
    with pytest.raises(StoreError, match=words):
        load_stats(file)


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(StoreError, match="vla stats"):
        load_stats(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    save_stats(some_stats(), tmp_path)
    before = (tmp_path / "norm_stats.json").read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        save_stats(some_stats(), tmp_path, {"x": float("nan")})
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="could not be written"):
        save_stats(some_stats(), tmp_path / "file" / "norm_stats.json")
    assert (tmp_path / "norm_stats.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "norm_stats.json"]


# ---- the verb ---------------------------------------------------------------------------------------------------------


@needs(REAL)
def test_vla_stats_on_real_robot_data(tmp_path, capsys, monkeypatch):
    from vla.cli import main
    from vla.datasets import open_dataset

    def decode(*a, **k):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(pytest.importorskip("vla_dataset_lerobot.video").Videos, "frame", decode)
    assert main(["stats", str(REAL), "--horizon", "16", "--out", str(tmp_path), "--set", "robot.delta=[7]"]) == 0
    shown = capsys.readouterr()
    assert "2096 frames in 5 episodes" in shown.out and "constant dims" in shown.err
    stats, data = load_stats(tmp_path), open_dataset(str(REAL))
    assert isinstance(stats["state"], Stats) and stats["state"].data == data.digest()
    states, actions = data.states().astype(np.float64), data.actions().astype(np.float64)
    rows = []
    for e in data.episodes:
        for i in e:
            chunk = actions[i : min(i + 16, e.stop)].copy()
            chunk[:, :7] -= states[i, :7]
            rows.append(chunk)
    for key, x in (("state", states), ("actions", np.concatenate(rows))):
        for name, value in numpy_summary(x).items():
            if name in FIELDS:
                same = np.abs(getattr(stats[key], name) - value) <= 1e-6 * np.abs(value).max()
                assert same.mean() > 0.7, f"{key} {name}"  # the others rest, or have a long tail
        for norm in ("quantile", "zscore"):
            assert np.abs(normalize(x, stats[key], norm)).max() < 10.001


@needs(REAL)
def test_vla_stats_refuses(tmp_path, capsys):
    from vla.cli import main

    (tmp_path / "model.safetensors").write_bytes(b"")
    assert main(["stats", str(REAL), "--out", str(tmp_path)]) == 2
    assert "part of a trained model" in capsys.readouterr().err
    assert main(["stats", str(REAL), "--out", str(tmp_path / "a.json"), "--robot", "aloha"]) == 2
    assert not (tmp_path / "a.json").exists()


def test_a_dim_that_rarely_moves_is_not_divided_by_epsilon():
    """openpi's formula with equal quantiles turns one rare turn of the wrist into a value of millions."""
    x = np.zeros((1000, 3))
    x[:5, 0] = 0.4  # rare
    x[:, 1] = 7.0  # constant
    x[:, 2] = np.linspace(-1, 1, 1000)
    stats = stats_of({"actions": summarise_batches(lambda: [(x, None)])})["actions"]
    assert np.abs(normalize(x, stats, "quantile")).max() < 1.1
    assert (stats.q01[0], stats.q99[0]) == pytest.approx((0.0, 0.4))
    assert (stats.q01[1], stats.q99[1]) == (7.0, 7.0)
    assert stats.q99[2] == pytest.approx(np.quantile(x[:, 2], 0.99), rel=1e-6)


RESTING = st.tuples(
    st.sampled_from([0.0, 1e-9, 1e-5, 1e-3, 1.0]),  # what the dim does while it rests
    st.sampled_from([1e-4, 1.0, 1e4, 1e8]),  # how far it goes
    st.sampled_from([1, 3, 8, 40, 400]),  # in how many of 2,000 frames
    st.sampled_from([0.0, 5.0, -1e3]),  # where it rests
)


@settings(deadline=None, max_examples=60)
@given(st.lists(RESTING, min_size=1, max_size=4), st.integers(0, 99))
def test_no_value_of_the_data_leaves_ten(dims, seed):
    """Whatever rests and however rarely it moves; and what comes back is what went in."""
    rng = np.random.default_rng(seed)
    x = np.empty((2000, len(dims)))
    for d, (noise, jump, count, middle) in enumerate(dims):
        x[:, d] = middle + noise * rng.normal(size=2000)
        x[rng.permutation(2000)[:count], d] += jump
    stats = stats_of({"actions": summarise_batches(lambda: [(x.astype(np.float32), None)])})["actions"]
    for norm in ("quantile", "zscore"):
        z = normalize(x.astype(np.float32).astype(np.float64), stats, norm)
        assert np.abs(z).max() <= 10.001
        back = unnormalize(z, stats, norm)
        for d in range(len(dims)):
            close(back[:, d], x[:, d], 1e-5, f"dim {d} {dims[d]}")


def test_usual_dims_keep_openpis_numbers():
    x = np.random.default_rng(0).normal(size=(20_000, 3)) * [1.0, 1e-3, 1e5] + [0, 50, 0]
    x[:, 1] = np.random.default_rng(1).laplace(size=20_000)
    summary = summarise_batches(lambda: [(x, None)])
    stats = stats_of({"actions": summary})["actions"]
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(stats, name), getattr(summary, name))


@pytest.mark.parametrize("norm", ["quantile", "zscore"])
def test_a_constant_dim_answers_another_value_with_a_small_number(norm):
    x = np.full((100, 2), [7.0, 0.0])
    stats = stats_of({"state": summarise_batches(lambda: [(x, None)])})["state"]
    z = normalize(np.array([[7.0, 0.0], [7.1, -1e6], [-1e9, 1e-3]]), stats, norm)
    assert np.abs(z).max() <= 2 and np.isfinite(z).all()
    rest = -1.0 if norm == "quantile" else 0.0  # as in openpi
    close(z[0], rest, 1e-9, scale=1)
    close(unnormalize(np.array([[0.3, -0.8]]), stats, norm), np.array([[7.0, 0.0]]), 1e-6)  # always the constant
