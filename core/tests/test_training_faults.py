"""What a run does when something around it fails: signals, a full disk, listeners, and that it leaves the same records."""

import errno
import importlib.util
import json
import os
import signal
from pathlib import Path

import pytest

pytest.importorskip("torch")
for plugin in ("vla_head_flow", "vla_llm_gemma", "vla_vision_siglip", "vla_backbone_paligemma"):
    pytest.importorskip(plugin)

from vla.errors import StoreError  # noqa: E402
from vla.training import checkpoints, loop, metrics  # noqa: E402
from vla.training.metrics import FILE, WALL_CLOCK, read_metrics  # noqa: E402

_path = Path(__file__).parent / "training_world.py"
_spec = importlib.util.spec_from_file_location("training_world", _path)
world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world)

# Steps are logged, validated and saved at different steps, and at the same ones now and then.
PLAN = {"log_every": 2, "save_every": 4, "val_episodes": 1, "val_every": 3, "lr_decay_steps": 12}


def run(out, config, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "prepare", lambda *a: world.prepared(config))
        return loop.train("world", "world", out=out, config=config, **options)


def records(out):
    """All lines of a run, without what the clock and the place decide."""
    lines = [json.loads(line) for line in (out / FILE).read_text().splitlines()]
    apart = {*WALL_CLOCK, "folder"}
    return [{name: value for name, value in line.items() if name not in apart} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole") / "run", world.config(12, **PLAN)).out


class Stop(BaseException):
    """As a kill: nothing gets to clean up after it."""


def at(event, step, act):
    def listen(told, record):
        if (told, record["step"]) == (event, step):
            act()

    return listen


def killed():
    raise Stop


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_saves_and_stops_and_the_records_are_those_of_an_uninterrupted_run(tmp_path, whole, number):
    if number == "SIGHUP":  # a suite under nohup ignores it, and a run leaves it so
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stop = at("step", 6, lambda: os.kill(os.getpid(), getattr(signal, number)))
    result = run(tmp_path / "run", world.config(12, **PLAN), listeners=[stop])
    assert (result.interrupted, result.step, result.signal) == (True, 6, getattr(signal, number))
    assert checkpoints.checkpoint_steps(result.out) == [4, 6]
    run(result.out, world.config(12, **PLAN), resume=True)
    assert records(result.out) == records(whole)


@pytest.mark.parametrize(
    ("event", "step"),
    [("start", 0), ("step", 4), ("step", 6), ("validation", 9), ("checkpoint", 8), ("validation", 12)],
)
def test_the_records_of_a_killed_run_are_those_of_an_uninterrupted_one(tmp_path, monkeypatch, whole, event, step):
    """Before and after the record of every kind, by which time the checkpoint of its step is there or is not."""
    out = tmp_path / "run"
    monkeypatch.setattr(loop._Run, "_rescue", lambda *a: None)  # a killed process does not get there
    for late in (False, True):
        original = metrics.Jsonl.__call__

        def told(self, name, record, late=late, original=original):
            if (name, record["step"]) == (event, step) and not late:
                raise Stop
            said = original(self, name, record)
            if (name, record["step"]) == (event, step):
                raise Stop
            return said

        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(metrics.Jsonl, "__call__", told)
            run(out, world.config(12, **PLAN), resume=bool(checkpoints.checkpoint_steps(out)))
    run(out, world.config(12, **PLAN), resume=bool(checkpoints.checkpoint_steps(out)))
    assert records(out) == records(whole)


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        stop = at("step", 2, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert not run(tmp_path, world.config(4), listeners=[stop]).interrupted
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_signal_may_follow_the_same_one_acts_at_once(tmp_path):
    def both():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)

    result = run(tmp_path / "a", world.config(4), listeners=[at("step", 2, both)])
    assert (result.interrupted, result.step, result.signal) == (True, 2, signal.SIGUSR1)

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", world.config(4), listeners=[at("step", 2, twice)])


def test_a_listener_that_raises_is_reported_and_dropped(tmp_path, capsys):
    heard = []

    def good(event, record):
        heard.append((event, record["step"]))

    def bad(event, record):
        if event == "step" and record["step"] >= 2:
            heard.append("bad")
            raise ZeroDivisionError("of mine")

    result = run(tmp_path, world.config(4), listeners=[bad, good])
    assert not result.interrupted and heard.count("bad") == 1 and ("end", 4) in heard
    (note,) = read_metrics(tmp_path, "note")
    assert note["step"] == 2 and "bad: ZeroDivisionError: of mine" in note["text"]
    assert note["text"] in capsys.readouterr().err  # there is no progress line


def full(number=errno.ENOSPC):
    def fail(*args, **options):
        raise OSError(number, os.strerror(number))

    return fail


def test_a_full_disk_costs_no_record_and_is_said_once(tmp_path, monkeypatch, whole, capsys):
    """The disk is full, in the middle of a line, from the 2nd to the 8th step."""
    real, broken = os.write, []

    def write(handle, data):
        if broken:
            real(handle, data[: len(data) // 2])
            full()()
        return real(handle, data)

    switch = [at("step", 2, lambda: broken.append(1)), at("step", 8, broken.clear)]
    monkeypatch.setattr(metrics.os, "write", write)
    result = run(tmp_path / "run", world.config(12, **PLAN), listeners=switch)
    assert result.step == 12
    said = capsys.readouterr().err
    assert said.count("cannot be written (No space left on device)") == 1
    assert [r for r in records(result.out) if r["event"] != "note"] == [
        r for r in records(whole) if r["event"] != "note"
    ]


def test_records_that_are_lost_at_the_end_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics.os, "write", full())
    run(tmp_path / "run", world.config(2))
    assert "records are lost" in capsys.readouterr().err and (tmp_path / "run" / "model").is_dir()


def test_a_last_checkpoint_that_is_not_there_is_an_error_at_the_end(tmp_path, monkeypatch, capsys):
    real = checkpoints.write_weights

    def write(path, weights):
        if "step-00000010" in str(path) or "step-00000005" in str(path):
            full()()
        real(path, weights)

    monkeypatch.setattr(checkpoints, "write_weights", write)
    out = tmp_path / "run"
    with pytest.raises(StoreError, match=r"newest: none; the model is in [\s\S]*disk is full"):
        run(out, world.config(10))
    assert "no checkpoint at step 5; training goes on" in capsys.readouterr().err
    assert (out / "model" / "model.safetensors").is_file() and not [*out.rglob(".tmp-*")]
    assert run(tmp_path / "b", world.config(7)).step == 7  # the one at step 5 failed, the last did not


def test_old_checkpoints_that_cannot_be_removed_do_not_stop_training(tmp_path, monkeypatch, capsys):
    from vla import files

    real = os.rename
    monkeypatch.setattr(files.os, "rename", lambda a, b: full(errno.EACCES)() if ".gone-" in str(b) else real(a, b))
    run(tmp_path, world.config(4, save_every=1, keep_last=1))
    assert checkpoints.checkpoint_steps(tmp_path) == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("Permission denied") == 1


def test_a_users_file_in_an_old_checkpoint_keeps_it(tmp_path, capsys):
    notes = checkpoints.checkpoint_folder(tmp_path, 1) / "notes.txt"
    run(
        tmp_path,
        world.config(3, save_every=1, keep_last=1),
        listeners=[at("step", 2, lambda: notes.write_text("mine"))],
    )
    assert checkpoints.checkpoint_steps(tmp_path) == [1, 3] and notes.read_text() == "mine"
    assert capsys.readouterr().err.count("a file that vla did not write: notes.txt") == 1
    run(tmp_path, world.config(2), overwrite=True)
    (aside,) = (tmp_path / "checkpoints").glob("aside-*/notes.txt")
    assert aside.read_text() == "mine" and checkpoints.checkpoint_steps(tmp_path) == [2]


def test_a_run_does_not_store_itself_through_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(StoreError, match="a symbolic link"):
        run(tmp_path / "run", world.config(2))
    assert not (tmp_path / "elsewhere.json").exists()


@pytest.mark.parametrize("name", [FILE, ".lock"])
def test_a_runs_own_files_are_not_opened_through_links_nor_over_others(tmp_path, name):
    mine = tmp_path / "thesis.tex"
    mine.write_text("years of work")
    for place in ("link", "other"):
        (tmp_path / place).mkdir()
    (tmp_path / "link" / name).symlink_to(mine)
    (tmp_path / "other" / name).write_text("of another program\n")
    for place in ("link", "other"):
        with pytest.raises(StoreError, match="something else is in the place|did not write"):
            run(tmp_path / place, world.config(2), overwrite=True)
        assert [p.name for p in (tmp_path / place).iterdir() if p.name != ".lock"] == [name] * (name != ".lock")
    assert mine.read_text() == "years of work" and (tmp_path / "other" / name).read_text() == "of another program\n"


def test_a_checkpoint_under_a_wrong_name_is_refused(tmp_path):
    run(tmp_path, world.config(4, save_every=2))
    checkpoints.checkpoint_folder(tmp_path, 4).rename(checkpoints.checkpoint_folder(tmp_path, 3))
    with pytest.raises(StoreError, match=r"do not agree[\s\S]*--resume-step 2"):
        run(tmp_path, world.config(6, lr_decay_steps=4), resume=True)


def test_what_is_read_of_a_checkpoint_is_in_its_manifest(tmp_path):
    run(tmp_path, world.config(2))
    more = checkpoints.checkpoint_folder(tmp_path, 2) / "assets" / "more"
    more.mkdir(parents=True)
    (more / "codec.json").write_text("{}")
    with pytest.raises(StoreError, match="not in the manifest[\\s\\S]*codec.json"):
        run(tmp_path, world.config(4, lr_decay_steps=2), resume=True)
