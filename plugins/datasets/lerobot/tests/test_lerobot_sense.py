"""Data that is valid in form: read as it means, or refused with field, values and the way out. Never another picture."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lerobot_sets import CAMERA, FPS, TASKS, agrees, code, edit_info, film, make, picture, put

from vla.datasets import open_dataset
from vla.errors import DataError
from vla.settings import parse_sets

V21, V30 = "v2.1", "v3.0"


def _video(root, e):
    return root / f"videos/chunk-000/{CAMERA}/episode_{e:06d}.mp4"


def _no(*names):
    return lambda table, e: table.drop_columns([n for n in names if n in table.column_names])


def _as(name, kind, of=lambda v: v):
    return lambda table, e: put(table, name, pa.array([of(v) for v in table[name].to_pylist()], kind))


def _trim(first, *, rebase=()):
    """Rows from the `first` on of episode 0; the columns of `rebase` count from 0 again."""

    def change(table, e):
        if e:
            return table
        table = table.slice(first)
        for name in rebase:
            values = table[name].to_numpy()
            table = put(table, name, pa.array(values - values[0], table.schema.field(name).type))
        return table

    return change


# ---- read as it means -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("video", [True, False])
@pytest.mark.parametrize("how", ["1,0,2", "files swapped", "one film each", "gaps in numbers", "v2.1", "v2.0"])
def test_frames_belong_to_the_episode_whose_number_they_carry(tmp_path, how, video):
    kinds = {
        "1,0,2": {"lengths": (7, 7, 7), "order": (1, 0, 2)},
        "files swapped": {"lengths": (7,) * 4, "file_of": {0: 1, 1: 1, 2: 0, 3: 0}},
        "one film each": {"lengths": (7, 7, 7), "order": (2, 1, 0), "film_of": {0: 0, 1: 1, 2: 2}},
        "gaps in numbers": {"lengths": {1: 5, 4: 5, 7: 6}},
        "v2.1": {"version": V21, "lengths": {0: 5, 3: 4}},
        "v2.0": {"version": "v2.0"},
    }
    data = open_dataset(make(tmp_path / "set", **kinds[how], video=video))
    assert agrees(data)
    numbers = [int(data.states()[span.start, 0]) for span in data.episodes]
    assert numbers == sorted(numbers)
    for e, span in zip(numbers, data.episodes, strict=True):
        assert set(data.states()[span, 0]) == {e} and set(data.prompts()[span.start : span.stop]) == {TASKS[e % 2]}


def test_rows_in_any_order_are_sorted_by_what_they_say(tmp_path):
    rng = np.random.default_rng(0)

    def shuffled(table, e):
        return table.take(rng.permutation(len(table)))

    for video in (True, False):
        data = open_dataset(make(tmp_path / f"set{video}", change=shuffled, video=video))
        assert agrees(data)
        assert [data.states()[span, 1].tolist() for span in data.episodes] == [list(range(n)) for n in (8, 6, 7)]
    # Without frame_index nothing says the order but the clock, which is then off.
    root = make(tmp_path / "set", change=lambda t, e: shuffled(t.drop_columns(["frame_index", "index"]), e))
    with pytest.raises(DataError, match="do not follow the declared rate"):
        open_dataset(root)


@pytest.mark.parametrize("version", [V21, V30])
def test_rows_cut_off_at_the_start_keep_their_pictures(tmp_path, version):
    def untouched(row):  # the table of episodes still knows the whole video
        if row["episode_index"] == 0 and version == V30:
            row["dataset_from_index"] += 3
            row["dataset_to_index"] = row["dataset_from_index"] + row["length"]

    data = open_dataset(make(tmp_path / "set", version, change=_trim(3), episode=untouched))
    assert agrees(data) and data.states()[0].tolist() == [0, 3, 0] and len(data.episodes[0]) == 5


def test_clocks_that_start_elsewhere_need_both_to_say_so(tmp_path):
    def later(seconds):
        return lambda table, e: put(table, "timestamp", pa.array(table["timestamp"].to_numpy() + seconds, pa.float32()))

    # As in GR00T's sets: timestamps from 1/fps, a video from 0 with one picture a frame.
    assert agrees(open_dataset(make(tmp_path / "a", V21, change=later(0.1))))
    assert agrees(open_dataset(make(tmp_path / "b", V30, change=later(0.1))))
    # Both start at 0.1 s.
    root = make(tmp_path / "c", V21, change=later(0.1))
    for e, n in enumerate((8, 6, 7)):
        film(_video(root, e), [picture(e, i) for i in range(n)], start=0.1)
    assert agrees(open_dataset(root))
    # The video alone starts later, and has one picture a frame.
    root = make(tmp_path / "d", V21)
    for e, n in enumerate((8, 6, 7)):
        film(_video(root, e), [picture(e, i) for i in range(n)], start=0.3)
    assert agrees(open_dataset(root))
    # A shared video with pictures after each episode: from_timestamp + timestamp is there too, so nobody knows.
    with pytest.raises(DataError, match=r"both could be meant(.|\n)*timestamps from 0.300 s"):
        open_dataset(make(tmp_path / "e", V30, change=later(0.3), gap=0.5))
    # A video that is longer than the episode says nothing about an offset, and frame_index says another than the clock.
    root = make(tmp_path / "f", V21, change=later(0.2))
    for e, n in enumerate((8, 6, 7)):
        film(_video(root, e), [picture(e, i) for i in range(n + 6)])
    with pytest.raises(DataError, match=r"frame_index 0 and timestamp 0.200(.|\n)*data.check_fps=false"):
        open_dataset(root)
    assert agrees(open_dataset(root, {"check_fps": False}))


def test_an_end_that_is_the_last_picture_and_a_start_that_is_rounded(tmp_path):
    def rounded(row):
        begin = row[f"videos/{CAMERA}/from_timestamp"]
        row[f"videos/{CAMERA}/from_timestamp"] = begin + (0.004 if begin else 0)
        row[f"videos/{CAMERA}/to_timestamp"] = begin + (row["length"] - 1) / FPS

    assert agrees(open_dataset(make(tmp_path / "set", V30, episode=rounded)))
    assert agrees(open_dataset(make(tmp_path / "b", V30, episode=rounded), {"check_fps": False}))


def test_the_nearest_picture_of_a_video_at_another_rate(tmp_path):
    root = make(tmp_path / "set", V21, (6, 6))
    for e in range(2):  # the right one stands between two others
        shown = [picture(e, i) if k == 0 else picture(e, 25) for i in range(6) for k in range(3)]
        film(_video(root, e), shown, fps=3 * FPS)
    assert agrees(open_dataset(root))
    for e in range(2):  # irregular, with others as near as 10 ms
        times = sorted([i / FPS for i in range(6)] + [i / FPS + d for i in range(5) for d in (0.01, 0.09)])
        shown = [picture(e, round(t * FPS)) if abs(t * FPS - round(t * FPS)) < 0.01 else picture(e, 25) for t in times]
        film(_video(root, e), shown, fps=3 * FPS, times=times)
    assert agrees(open_dataset(root))


@pytest.mark.parametrize("stamp", [1.7e9, float("nan"), 0.0])
@pytest.mark.parametrize("version", [V21, V30])
def test_check_fps_false_means_the_order_of_frames(tmp_path, version, stamp):
    """Also where the timestamps are all the same, as of Unix time in float32."""

    def unix(table, e):
        return put(table, "timestamp", pa.array(stamp + np.arange(len(table)) / FPS * (stamp != 0), pa.float32()))

    root = make(tmp_path / "set", version, change=unix)
    with pytest.raises(DataError, match=r"do not follow the declared rate(.|\n)*--set data.check_fps=false"):
        open_dataset(root)
    assert agrees(open_dataset(root, {"check_fps": False}))
    edit_info(root, lambda info: info.update(fps=25))  # a rate that is not that of the video
    if version == V21:
        assert agrees(open_dataset(root, {"check_fps": False}))


def test_rows_missing_inside_an_episode(tmp_path):
    def hole(table, e):
        return pa.concat_tables([table.slice(0, 3), table.slice(5)])

    root = make(tmp_path / "set", V21, change=hole)
    with pytest.raises(DataError, match=r"do not follow the declared rate(.|\n)*row 3(.|\n)*got:      0.5"):
        open_dataset(root)
    assert agrees(open_dataset(root, {"check_fps": False}))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**16), video=st.booleans(), files=st.integers(1, 3), films=st.integers(1, 3),
    start=st.sampled_from([0.0, 0.1, 0.25, 2.0]), jitter=st.sampled_from([0.0, 1e-4, 0.02, 0.2]),
    drop=st.sampled_from([(), ("index",), ("frame_index", "index"), ("timestamp",)]), shuffle=st.booleans(),
    duplicate=st.booleans(), stale=st.booleans(),
)  # fmt: skip
def test_any_dataset_is_read_right_or_refused(
    tmp_path_factory, seed, video, files, films, start, jitter, drop, shuffle, duplicate, stale
):
    """Several bends at once; whatever opens shows every state beside its own picture."""
    rng = np.random.default_rng(seed)
    numbers = sorted(rng.choice(9, 4, replace=False).tolist())
    lengths = {e: int(rng.integers(2, 8)) for e in numbers}

    def change(table, e):
        times = table["timestamp"].to_numpy() + start + rng.uniform(-jitter, jitter, len(table))
        table = put(table, "timestamp", pa.array(times, pa.float32())).drop_columns(list(drop))
        if duplicate:
            table = table.take([*range(len(table)), 0])
        return table.take(rng.permutation(len(table))) if shuffle else table

    def episode(row):
        if stale:
            row["dataset_from_index"] += 1
            row["dataset_to_index"] += 1

    root = make(
        tmp_path_factory.mktemp("any") / "set", lengths=lengths, order=rng.permutation(numbers).tolist(), video=video,
        file_of={e: int(rng.integers(files)) for e in numbers}, film_of={e: int(rng.integers(films)) for e in numbers},
        change=change, episode=episode,
    )  # fmt: skip
    try:
        data = open_dataset(root)
    except DataError as error:
        assert error.field and error.fix, error
        assert start or jitter > 0.05 or duplicate or shuffle or stale
        return
    assert agrees(data) and [len(span) for span in data.episodes] == [lengths[e] for e in numbers]
    assert not duplicate and not (stale and not {"index"} & set(drop))
    shutil.rmtree(root)


# ---- refused --------------------------------------------------------------------------------------------------------


def _shift(name, by, at):
    """The values of a column are others from a row on in episode 1."""

    def change(table, e):
        values = table[name].to_numpy().copy()
        values[at:] += by
        return put(table, name, pa.array(values, table.schema.field(name).type)) if e == 1 else table

    return change


def _cut_film(root):
    film(_video(root, 1), [picture(1, i) for i in range(4)])


def _slow_film(root):
    film(_video(root, 1), [picture(1, i) for i in range(3)], fps=FPS / 2)


def _dropped(root):
    """A picture is missing inside, and there is one more at the end."""
    film(_video(root, 1), [picture(1, i) for i in (0, 1, 2, 4, 5, 6)], times=[i / FPS for i in (0, 1, 2, 4, 5, 6)])


def _doubled(root):
    """Two frames lie between the same two pictures."""
    film(_video(root, 1), [picture(1, i) for i in range(7)], times=[0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.61])


def _near(table, e):
    """Two timestamps that are nearer to each other than the pictures."""
    times = np.arange(len(table)) / FPS
    times[2:4] += (0.03, -0.03)
    return put(table, "timestamp", pa.array(times, pa.float32()))


def _truncated(root):
    file = _video(root, 1)
    file.write_bytes(file.read_bytes()[:-200])


REFUSED = {
    "index that jumps": ({"change": _shift("index", 5, 3)}, None, r"contradict(.|\n)*index in row(.|\n)*got:      16\b(.|\n)*expected: 11\b"),
    "frame_index that jumps": ({"version": V21, "change": _shift("frame_index", 2, 3)}, None, r"contradict each other(.|\n)*row 3(.|\n)*got:      5(.|\n)*expected: 3(.|\n)*exclude='1'"),
    "a frame twice": ({"change": _shift("frame_index", -1, 3)}, None, r"occurs twice(.|\n)*episode 1(.|\n)*got:      2"),
    "drift": ({"change": lambda t, e: put(t, "timestamp", pa.array(np.arange(len(t)) / 9, pa.float32()))}, None, "do not follow the declared rate"),
    "unknown episode": ({"change": lambda t, e: put(t, "episode_index", [7] * len(t)) if e == 1 else t}, None, r"does not list(.|\n)*got:      7(.|\n)*expected: one of 0-2"),
    "length that is not so": ({"episode": lambda row: row.update(length=5)}, None, r"another number of frames(.|\n)*got:      8 frames(.|\n)*expected: 5"),
    "bounds of others": ({"episode": lambda row: row.update(dataset_from_index=0, dataset_to_index=row["length"])}, None, r"contradicts the episode(.|\n)*got:      8(.|\n)*expected: 0 to 5"),
    "an empty episode": ({"version": V21, "lengths": (5, 0, 4)}, None, r"no frame(.|\n)*episode 1(.|\n)*got:      0(.|\n)*exclude='1'"),
    "index of halves": ({"change": _as("frame_index", pa.float64(), lambda v: v + 0.5)}, None, r"not a whole number(.|\n)*frame_index"),
    "null index": ({"change": _as("frame_index", pa.int64(), lambda v: v or None)}, None, r"not a whole number(.|\n)*frame_index"),
    "a video that is missing": ({"version": V21}, lambda r: _video(r, 1).unlink(), r"video file is missing(.|\n)*episode 1(.|\n)*exclude='1'"),
    "a video that ends early": ({"version": V21}, _cut_film, r"fewer pictures(.|\n)*4 pictures(.|\n)*expected: 6(.|\n)*exclude='1'"),
    "a video at half the rate": ({"version": V21}, _slow_film, r"fewer pictures(.|\n)*3 pictures(.|\n)*exclude='1'"),
    "a picture missing inside": ({"version": V21}, _dropped, r"no picture within half a frame(.|\n)*frame 3 of the episode at 0.300 s(.|\n)*exclude='1'"),
    "one picture for two frames": ({"version": V21, "change": _near}, _doubled, r"would get the same picture(.|\n)*frames 2 and 3(.|\n)*exclude='1'"),
    "halfway between two pictures": ({"version": V21, "lengths": (8, 6), "change": lambda t, e: put(t, "timestamp", pa.array(np.arange(len(t)) / FPS + 0.05 * e, pa.float32()))}, lambda r: film(_video(r, 1), [picture(1, i) for i in range(9)]), r"no picture within half a frame(.|\n)*exclude='1'"),
    "no column says which picture": ({"version": V21, "change": _no("timestamp", "frame_index", "index")}, lambda r: film(_video(r, 1), [picture(1, i) for i in range(8)]), r"nothing says which pictures(.|\n)*8 pictures(.|\n)*expected: 6(.|\n)*exclude='1'"),
    "a video cut off": ({"version": V21}, _truncated, r"video is damaged(.|\n)*episode 1(.|\n)*exclude='1'"),
    "shared pictures": ({"episode": lambda row: row.update({f"videos/{CAMERA}/from_timestamp": 0.0, f"videos/{CAMERA}/to_timestamp": row["length"] / FPS})}, None, r"share pictures(.|\n)*from 0.000 s"),
    "a part that is too short": ({"episode": lambda row: row.update({f"videos/{CAMERA}/to_timestamp": row[f"videos/{CAMERA}/from_timestamp"] + 0.2})}, None, r"shorter than the episode(.|\n)*0.000 s to 0.200 s"),
    "pictures beyond the file": ({"episode": lambda row: row.update({f"videos/{CAMERA}/from_timestamp": row[f"videos/{CAMERA}/from_timestamp"] + 1, f"videos/{CAMERA}/to_timestamp": row[f"videos/{CAMERA}/to_timestamp"] + 1})}, None, r"does not hold the pictures(.|\n)*2.4"),
    "another table of episodes": ({}, lambda r: pq.write_table(put(pq.read_table(r / "meta/episodes/chunk-000/file-000.parquet"), "length", [8, 6, 6]), r / "meta/episodes/chunk-000/file-001.parquet"), r"lists an episode twice(.|\n)*episode 2"),
    "lance": ({"info": {"storage_format": "lance"}}, None, r"storage_format(.|\n)*got:      lance(.|\n)*expected: parquet"),
    "features a list": ({}, lambda r: edit_info(r, lambda i: i.update(features=list(i["features"]))), r"features of a dataset are a table"),
    "dtype video, images stored": ({"video": False}, lambda r: edit_info(r, lambda i: i["features"][CAMERA].update(dtype="video")), r"does not say where the videos are(.|\n)*video_path"),
    "fps a text": ({"info": {"fps": "ten"}}, None, r"positive number(.|\n)*fps(.|\n)*ten"),
    "a camera without a file": ({"version": V21}, lambda r: shutil.rmtree(r / "videos"), r"lacks its files(.|\n)*observation.images.top"),
    "width that is not so": ({}, lambda r: edit_info(r, lambda i: i["features"]["action"].update(shape=[4])), r"not as wide(.|\n)*3 numbers(.|\n)*expected: 4"),
    "one file without task_index": ({"version": V21, "change": lambda t, e: t.drop_columns(["task_index"]) if e == 1 else t}, None, r"missing in one of the files(.|\n)*episode_000001.parquet: task_index \(episode 1\)(.|\n)*data.prompt="),
    "no task_index": ({"change": _no("task_index")}, None, r"no instruction(.|\n)*file-000.parquet: task_index \(episode 0\)(.|\n)*--set data.prompt='pick up the cube'"),
}  # fmt: skip


@pytest.mark.parametrize("how", REFUSED)
def test_what_contradicts_itself_is_refused_with_both_values(tmp_path, how):
    kinds, spoil, message = REFUSED[how]
    root = make(tmp_path / "set", **kinds)
    if spoil:
        spoil(root)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(root)
    assert caught.value.fix
    if "exclude='1'" in caught.value.fix:  # the way out, as it is typed
        typed = parse_sets(["exclude=1"])
        assert agrees(data := open_dataset(root, typed)) and set(data.states()[:, 0]) in ({0, 2}, {0})


def test_a_picture_is_known_by_its_code():
    assert code(picture(3, 7)) == (3, 7)
