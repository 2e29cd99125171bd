"""What is read of a dataset: instructions, episodes, columns and their types; the ways out as they are typed."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lerobot_sets import CAMERA, TASKS, agrees, edit_info, make, png, put

from vla.datasets import DatasetInfo, create_dataset, open_dataset
from vla.errors import DataError, SettingsError, VlaError
from vla.settings import parse_sets

V21, V30 = "v2.1", "v3.0"


def _no(*names):
    return lambda table, e: table.drop_columns([n for n in names if n in table.column_names])


def _as(name, kind, of=lambda v: v):
    return lambda table, e: put(table, name, pa.array([of(v) for v in table[name].to_pylist()], kind))


# ---- instructions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [0, slice(None)])
def test_the_number_of_a_task_that_is_null_names_file_and_episode(tmp_path, where):
    def null(table, e):
        numbers = np.array(table["task_index"].to_pylist(), object)
        numbers[where] = None if e == 1 else numbers[where]
        return put(table, "task_index", pa.array(numbers.tolist(), pa.int64()))

    root = make(tmp_path / "set", V21, change=null)
    with pytest.raises(DataError, match=r"instruction is missing(.|\n)*000001.parquet(.|\n)*episode 1\)") as error:
        open_dataset(root)
    assert error.value.got == "null" and "data.prompt=" in error.value.fix and "data.exclude='1'" in error.value.fix
    assert set(open_dataset(root, {"prompt": "go on"}).prompts()) == {"go on"}
    assert len(open_dataset(root, {"exclude": 1}).prompts()) > 0


@pytest.mark.parametrize("task", ["", "  ", None, ["a", "b"], 7])
def test_an_instruction_is_a_text(tmp_path, task):
    root = make(tmp_path / "set", V21)
    lines = [json.dumps({"task_index": 0, "task": TASKS[0]}), json.dumps({"task_index": 1, "task": task})]
    (root / "meta/tasks.jsonl").write_text("\n".join(lines))
    with pytest.raises(
        DataError, match=r"instruction is (empty|missing|no text)(.|\n)*000001.parquet(.|\n)*episode 1\)"
    ):
        open_dataset(root)
    assert set(open_dataset(root, {"prompt": "go on"}).prompts()) == {"go on"}
    assert set(open_dataset(root, {"exclude": 1}).prompts()) == {TASKS[0]}
    (root / "meta/tasks.jsonl").unlink()
    with pytest.raises(DataError, match=r"tasks.jsonl"):
        open_dataset(root)
    assert open_dataset(root, parse_sets(["prompt=lift it: now"])).info.tasks == ("lift it: now",)
    with pytest.raises(SettingsError, match="prompt"):
        open_dataset(root, {"prompt": "  "})


def test_another_column_holds_the_instructions(tmp_path):
    words = {0: "take the red one", 1: "take the blue one", 2: ""}

    def change(table, e):
        table = put(table, "language_instruction", [words[e]] * len(table))
        table = put(table, "annotation.task", pa.array([1 - e % 2] * len(table)))
        return put(table, "coded", pa.array([words[e]] * len(table)).dictionary_encode()).drop_columns(["task_index"])

    root = make(tmp_path / "set", change=change)
    with pytest.raises(DataError, match=r"no instruction(.|\n)*--set data.prompt_key=language_instruction"):
        open_dataset(root)
    with pytest.raises(DataError, match=r"instruction is empty(.|\n)*episode 2(.|\n)*exclude='2'"):
        open_dataset(root, {"prompt_key": "language_instruction"})
    for key in ("language_instruction", "coded"):
        data = open_dataset(root, {"prompt_key": key, "exclude": "2"})
        assert [data.prompts()[span.start] for span in data.episodes] == [words[0], words[1]]
        assert data.sample(8, 1, images=False)["prompt"] == words[1] and data.info.tasks == (words[0], words[1])
    data = open_dataset(root, parse_sets(["prompt_key=annotation.task"]))
    assert [data.prompts()[span.start] for span in data.episodes] == [TASKS[1], TASKS[0], TASKS[1]]
    with pytest.raises(DataError, match=r"no such column(.|\n)*nothing_here"):
        open_dataset(root, {"prompt_key": "nothing_here"})


def test_language_columns_are_no_single_instruction(tmp_path):
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("style", pa.string())]))

    def change(table, e):
        row = [{"role": "user", "content": "reach", "style": "subtask"}]
        return put(table, "language_persistent", pa.array([row] * len(table), kind))

    root = make(tmp_path / "set", change=change)
    edit_info(
        root, lambda i: i["features"].update(language_persistent={"dtype": "language", "shape": [1], "names": None})
    )
    assert agrees(open_dataset(root))
    with pytest.raises(DataError, match=r"holds no instructions(.|\n)*language_persistent(.|\n)*data.prompt="):
        open_dataset(root, {"prompt_key": "language_persistent"})


# ---- which episodes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [V21, V30])
@pytest.mark.parametrize(
    ("chosen", "numbers"),
    [("episodes=0-2,5", [0, 2, 5]), ("episodes=5", [5]), ("episodes=[2, 5]", [2, 5]), ('episodes=["0-2"]', [0, 2]),
     ("exclude=0-2", [5, 9]), ("exclude=9", [0, 2, 5]), ("episodes='2 - 9'", [2, 5, 9])],
)  # fmt: skip
def test_episodes_are_chosen_by_their_numbers(tmp_path, version, chosen, numbers):
    root = make(tmp_path / "set", version, {0: 3, 2: 4, 5: 3, 9: 4})
    data = open_dataset(root, parse_sets([chosen]))
    assert [int(data.states()[span.start, 0]) for span in data.episodes] == numbers and agrees(data)
    assert data.digest() != open_dataset(root).digest()


def test_episodes_that_are_not_there_are_named(tmp_path):
    root = make(tmp_path / "set", V21, {0: 3, 2: 4, 5: 3})
    for chosen, message in {
        "episodes=0,1,7": r"no such episodes(.|\n)*got:      1, 7(.|\n)*some of 0,2,5",
        "episodes=0-9": r"no such episodes(.|\n)*got:      0-9",
        "exclude=3": r"no such episodes(.|\n)*exclude(.|\n)*got:      3",
        "exclude=0-5": r"no episode is left",
    }.items():
        with pytest.raises(DataError, match=message):
            open_dataset(root, parse_sets([chosen]))
    for chosen in ("episodes=5-0", "episodes=first", "exclude=[-1]", "episodes=0:5", "exclude=1.5"):
        with pytest.raises(SettingsError, match=r"(episodes|exclude)"):
            open_dataset(root, parse_sets([chosen]))
    (root / "data/chunk-000/episode_000002.parquet").unlink()  # what is left out need not be there
    with pytest.raises(DataError, match=r"missing(.|\n)*exclude='2'"):
        open_dataset(root)
    assert agrees(open_dataset(root, {"exclude": "2"}))


# ---- columns --------------------------------------------------------------------------------------------------------


def _robot(table, e):
    n = len(table)
    arm = np.stack([np.full(n, e), np.arange(n), np.full(n, 7.0)], 1)
    table = put(table, "observation.arm", pa.array(arm.tolist(), pa.list_(pa.float64())))
    table = put(table, "observation.gripper", pa.array(np.arange(n) % 2, pa.int32()))
    return table.drop_columns(["observation.state"])


def test_several_columns_and_slices_make_one_state(tmp_path):
    root = make(tmp_path / "set", change=_robot)
    edit_info(root, lambda i: i["features"].pop("observation.state"))
    with pytest.raises(DataError, match=r"no such column(.|\n)*observation.state(.|\n)*observation.arm"):
        open_dataset(root)
    data = open_dataset(root, parse_sets(['state_key=["observation.arm[0:2]", "observation.gripper", "action[2]"]']))
    assert data.info.state_dim == 4 and agrees(data)
    np.testing.assert_array_equal(data.states()[3], [0, 3, 1, 0.5])
    for bad in ("observation.arm[2:2]", "observation.arm[1:9]", "observation.arm[9]", "observation.leg"):
        with pytest.raises(DataError, match=bad.replace("[", r"\[")):
            open_dataset(root, {"state_key": ["observation.arm", bad]})
    with pytest.raises(DataError, match="does not hold numbers"):
        open_dataset(make(tmp_path / "b", change=lambda t, e: put(t, "action", ["x"] * len(t))))


def test_modality_json_names_parts_of_columns(tmp_path):
    root = make(tmp_path / "set", change=_robot)
    edit_info(root, lambda i: i["features"].pop("observation.state"))
    parts = {
        "state": {"arm": {"original_key": "observation.arm", "start": 0, "end": 2},
                  "gripper": {"original_key": "observation.gripper", "start": 0, "end": 1}},
        "action": {"hand": {"start": 1, "end": 3}, "arm": {"start": 0, "end": 1}},
        "video": {"front": {"original_key": CAMERA}},
    }  # fmt: skip
    file = root / "meta/modality.json"
    file.write_text(json.dumps(parts))
    data = open_dataset(root, {"action_key": ["action.hand", "arm"], "cameras": ["front"]})
    assert data.info.state_dim == 3 and agrees(data)  # no observation.state: the parts in their order
    np.testing.assert_array_equal(data.actions()[9], [1.5, 1.5, 0.5])
    with pytest.raises(DataError, match=r"no such column(.|\n)*leg(.|\n)*gripper"):
        open_dataset(root, {"state_key": "leg"})
    for bad, message in (
        ({"arm": {"original_key": "observation.arm", "start": 0, "end": 9}}, r"not in it(.|\n)*0 to 9(.|\n)*0 to 3"),
        (
            {"arm": {"original_key": "observation.leg", "start": 0, "end": 1}},
            r"the dataset lacks(.|\n)*observation.leg",
        ),
        ({"arm": {"start": "0", "end": 1}}, r"no numbers for the start"),
        ([1, 2], "does not name parts"),
    ):
        file.write_text(json.dumps({"state": bad}))
        with pytest.raises(DataError, match=message):
            open_dataset(root)
    file.write_text("{")
    with pytest.raises(DataError, match=r"cannot be read(.|\n)*modality.json"):
        open_dataset(root)


TYPES = {
    "large lists": _as("observation.state", pa.large_list(pa.float32())),
    "plain lists of doubles": _as("action", pa.list_(pa.float64())),
    "lists of lists": _as("observation.state", pa.list_(pa.list_(pa.float32())), lambda v: [v[:1], v[1:2], v[2:]]),
    "int32 beside int64": lambda t, e: _as("episode_index", pa.int32() if e else pa.int64())(t, e),
    "float indices": lambda t, e: _as("frame_index", pa.float32())(_as("task_index", pa.float64())(t, e), e),
    "lists of one": lambda t, e: _as("timestamp", pa.list_(pa.float32(), 1), lambda v: [v])(
        _as("episode_index", pa.list_(pa.int64()), lambda v: [v])(t, e), e
    ),
    "numbers in lists": _as("task_index", pa.large_list(pa.int64()), lambda v: [v]),
    "double timestamps": _as("timestamp", pa.float64()),
}


@pytest.mark.parametrize("how", TYPES)
def test_types_that_other_writers_produce(tmp_path, how):
    plain, other = make(tmp_path / "a", V21), make(tmp_path / "b", V21, change=TYPES[how])
    data = open_dataset(other)
    assert agrees(data) and data.prompts() == open_dataset(plain).prompts()
    np.testing.assert_array_equal(data.states(), open_dataset(plain).states())
    np.testing.assert_array_equal(data.actions(), open_dataset(plain).actions())


def test_tables_listed_twice_and_of_other_types(tmp_path):
    root = make(tmp_path / "set")
    file = root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    table = put(table, "episode_index", pa.array(table["episode_index"].to_pylist(), pa.int32()))
    table = put(table, "length", pa.array(table["length"].to_pylist(), pa.float64()))
    pq.write_table(table.take([2, 0, 1]), file.with_name("file-001.parquet"))
    tasks = root / "meta/tasks.parquet"
    pq.write_table(pa.concat_tables([pq.read_table(tasks)] * 2), tasks)
    assert agrees(open_dataset(root)) and open_dataset(root).info.tasks == TASKS


def test_depth_is_no_picture(tmp_path):
    def depth(table, e):
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        data = png(np.full((32, 32), 4000, np.uint16))
        return put(table, CAMERA, pa.array([{"bytes": data, "path": None}] * len(table), kind))

    data = open_dataset(make(tmp_path / "set", video=False, change=depth))
    with pytest.raises(DataError, match=r"more than 8 bits(.|\n)*frame 1 of episode 0(.|\n)*data.cameras="):
        data.sample(1, 1)


def test_cameras_that_cannot_be_columns_are_refused_by_the_writer(tmp_path):
    for name in ("a/b", "a\\b", "a\n", "{a}"):
        with pytest.raises(DataError, match=r"a name cannot be that of a column"):
            create_dataset(tmp_path / "set", DatasetInfo({name: (16, 16)}, 2, 2, 10))
    assert not list(tmp_path.iterdir())


def test_errors_are_of_one_kind(tmp_path):
    """Whatever is put into the metadata in the place of a value: read, or one error of ours."""
    root = make(tmp_path / "set", V21, (3, 3), video=False)
    (root / "meta/info.json").write_text("[]")
    with pytest.raises(DataError, match=r"info.json(.|\n)*a list"):
        open_dataset(root)
    shutil.rmtree(root)
    for key in ("fps", "features", "data_path", "video_path", "codebase_version", "chunks_size", "robot_type"):
        for value in (None, [], {}, "x", -1, 0, 1e999, True, "{", "{episode_index.__class__}"):
            root = make(tmp_path / "set", V21, (3, 3), video=False, info={key: value})
            try:
                assert len(open_dataset(root)) == 6
            except VlaError as error:
                assert error.field, (key, value)
            shutil.rmtree(root)


WIDER = pa.array([[1.0, 2.0, 3.0, 4.0]] * 6, pa.list_(pa.float32()))
SWITCHED = {
    "a file of another width": ({"change": lambda t, e: put(t, "action", WIDER) if e == 1 else t}, {}, r"not as wide(.|\n)*4 numbers(.|\n)*exclude='1'"),
    "an image column in one file only": ({"video": False, "change": lambda t, e: t.drop_columns([CAMERA]) if e == 1 else t}, {}, r"lacks a column(.|\n)*000001.parquet: observation.images.top"),
    "times as dates": ({"change": _as("timestamp", pa.timestamp("ms"), lambda v: int(v * 1000))}, {}, r"does not hold numbers(.|\n)*timestamp"),
    "numbers as words": ({"change": _as("episode_index", pa.string(), str)}, {}, r"does not hold numbers(.|\n)*episode_index"),
    "words in one file, numbers in another": ({"change": lambda t, e: put(t, "words", [e] * len(t) if e else ["go"] * len(t))}, {"prompt_key": "words"}, r"texts in one file and numbers"),
    "several texts a frame": ({"change": lambda t, e: put(t, "words", [["go", "on"]] * len(t))}, {"prompt_key": "words"}, r"list of several(.|\n)*row 0 \(episode 0\)(.|\n)*data.prompt="),
    "no text in a frame": ({"change": lambda t, e: put(t, "words", [[]] * 3 + [["go"]] * (len(t) - 3))}, {"prompt_key": "words"}, r"list of several, or of none"),
    "an index as instruction": ({}, {"prompt_key": "episode_index"}, r"holds no instructions"),
    "the state as instruction": ({}, {"prompt_key": "observation.state"}, r"holds no instructions"),
    "an index as state": ({}, {"state_key": "timestamp"}, r"no such column(.|\n)*timestamp"),
    "two cameras of one name": ({}, {"cameras": ["a=top", "a=top"]}, r"two cameras would have one name"),
}  # fmt: skip


@pytest.mark.parametrize("how", SWITCHED)
def test_columns_that_hold_something_else(tmp_path, how):
    kinds, chosen, message = SWITCHED[how]
    root = make(tmp_path / "set", V21, **kinds)
    with pytest.raises(DataError, match=message):
        open_dataset(root, chosen)


def test_lists_of_one_text_and_a_file_of_no_rows(tmp_path):
    root = make(tmp_path / "set", change=lambda t, e: put(t, "words", [[f"do {e}"]] * len(t)))
    assert open_dataset(root, {"prompt_key": "words"}).info.tasks == ("do 0", "do 1", "do 2")
    root = make(tmp_path / "empty", file_of={0: 0, 1: 1, 2: 1})
    file = root / "data/chunk-000/file-000.parquet"
    rows = pq.read_table(file)
    pq.write_table(rows.slice(0, 0), file)
    with pytest.raises(DataError, match=r"another number of frames(.|\n)*got:      0 frames(.|\n)*exclude='0'"):
        open_dataset(root)
    assert agrees(open_dataset(root, {"exclude": 0}))
    with pytest.raises(DataError, match="no frame of these episodes"):
        open_dataset(root, {"episodes": 0})


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(["action", CAMERA, "timestamp"]),
    key=st.sampled_from(["dtype", "shape", "names", "info", "video_info"]),
    value=st.sampled_from([None, [], {}, "x", -1, 0, True, 1.5, ["a"], [0], [3, -1, 3], [[3]], {"motors": 5}, [None], 10**30]),
)  # fmt: skip
def test_features_of_any_form_are_read_or_refused(tmp_path_factory, name, key, value):
    root = tmp_path_factory.getbasetemp() / "features"
    if not root.exists():
        make(root, V21, (3, 3))
        (root / "meta/info.bak").write_text((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text((root / "meta/info.bak").read_text())
    edit_info(root, lambda info: info["features"][name].update({key: value}))
    try:
        data = open_dataset(root)
    except DataError as error:
        assert error.field and error.fix
        return
    assert agrees(data) and len(data.info.action_names) in (0, 3)
