"""The trackers as they really are: a run writes to each, and what it wrote is read back from the disk.

tensorboardX is among the development requirements; the others are tried where they are installed.
"""

import importlib.util
import json
import sqlite3
import struct
from pathlib import Path

import pytest

for needed in ("torch", "vla_head_flow", "vla_llm_gemma", "vla_vision_siglip", "vla_backbone_paligemma"):
    pytest.importorskip(needed)

from vla.errors import SettingsError  # noqa: E402
from vla.training import loop, metrics  # noqa: E402

_path = Path(__file__).parent / "training_world.py"
_spec = importlib.util.spec_from_file_location("training_world", _path)
world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world)
STEPS = 3


def train(out, listener):
    config = world.config(STEPS, val_episodes=1, listeners=(listener,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "prepare", lambda *a: world.prepared(config))
        loop.train("world", "world", out=out, config=config)


def expected(out):
    """step -> the numbers of the JSONL file, by the names that trackers get."""
    found = {}
    for event, prefix in (("step", "train"), ("validation", "validation")):
        for record in metrics.read_metrics(out, event):
            numbers = {f"{prefix}/{k}": v for k, v in record.items() if k not in ("step", "event")}
            numbers = {k: v for k, v in numbers.items() if isinstance(v, int | float)}
            found.setdefault(record["step"], {}).update(numbers)
    return found


def check(found, out):
    want = expected(out)
    assert set(want) == set(found) == set(range(1, STEPS + 1)) and "validation/loss" in want[STEPS]
    for step, numbers in want.items():
        # float32 in TensorBoard
        assert found[step] == pytest.approx(numbers, rel=1e-6), step


def tfrecords(path):
    """The payloads of a TFRecord file: length, its checksum, data, its checksum."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        yield data[at + 12 : at + 12 + size]
        at += 12 + size + 4


def leveldb_log(path):
    """The records of a file in blocks of 32 KiB, as wandb writes them: 7 bytes of its own, then checksum, size, kind."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


def test_tensorboard_events_can_be_read_back(tmp_path, monkeypatch):
    """Through tensorboardX, which needs no framework."""
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    train(tmp_path / "run", "tensorboard")
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    found = {}
    for record in tfrecords(file):
        event = Event.FromString(record)
        for value in event.summary.value:
            found.setdefault(event.step, {})[value.tag] = value.simple_value
    check(found, tmp_path / "run")


def test_tensorboards_own_writer_serves_too(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    monkeypatch.setattr(metrics, "find_spec", lambda name: None if name == "tensorboardX" else object())
    train(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = {}
    for tag in events.Tags()["tensors"]:
        for event in events.Tensors(tag):
            found.setdefault(event.step, {})[tag] = float(make_ndarray(event.tensor_proto))
    check(found, tmp_path / "run")


def test_trackio_keeps_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("TRACKIO_PROJECT", "test-of-vla")
    pytest.importorskip("trackio")
    train(tmp_path / "run", "trackio")
    found = {}
    with sqlite3.connect(tmp_path / "trackio" / "test-of-vla.db") as table:
        for step, numbers in table.execute("select step, metrics from metrics"):
            found.setdefault(step, {}).update(json.loads(numbers))
    check(found, tmp_path / "run")


def test_wandb_offline_keeps_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    train(tmp_path / "run", "wandb")
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    found = {}
    for data in leveldb_log(file):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            found[items["_step"]] = {k: v for k, v in items.items() if not k.startswith("_")}
    check(found, tmp_path / "run")


@pytest.mark.parametrize("name", metrics.LISTENERS)
def test_a_missing_tracker_is_named_before_the_first_step(tmp_path, monkeypatch, name):
    monkeypatch.setattr(metrics, "find_spec", lambda package: None)
    with pytest.raises(SettingsError) as caught:
        train(tmp_path / "run", name)
    assert f'pip install "vla-core[{name}]"' in str(caught.value)
    assert not (tmp_path / "run").exists()
