"""`vla serve` and `vla eval --policy` with a real model directory."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from serving import Echo, serving
from vla_client import RemotePolicy

import vla
from vla.cli import main
from vla.cli import serve as verb
from vla.serving import run
from vla.training.config import TrainConfig

SCENE = ["--env", "tabletop", "--preset", "tiny", "--set", "env.image_size=32"]
SHORT = [*SCENE, "--set", "env.max_steps=6"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model directory after one step of training on the tabletop."""
    folder = tmp_path_factory.mktemp("serve_verb")
    assert main(["record", *SCENE, "--episodes", "3", "--workers", "1", "--out", str(folder / "data")]) == 0
    variant = vla.build(type="pi0", robot="tabletop", preset="tiny", set={"backbone.llm.depth": 1})
    config = TrainConfig(steps=1, batch_size=2, device="cpu")
    return vla.train(variant, folder / "data", out=folder / "run", config=config).model


@pytest.fixture
def served(model, monkeypatch):
    """The verb's own server, in a thread: words -> context manager."""
    import contextlib

    plans = []
    monkeypatch.setattr(run, "run_server", lambda plan: plans.append(plan) or 0)

    @contextlib.contextmanager
    def start(*words):
        assert verb.main([str(model), "--port", "0", "--device", "cpu", *words]) == 0
        plan = plans.pop()
        made = run.server_of(plan, run.options_of(plan))
        with serving(made.policy, made.contract, made=made) as server:
            yield server

    return start


def test_a_model_is_evaluated_through_the_wire_as_it_is_here(model, served, tmp_path, capsys):
    words = [*SHORT, "--episodes", "3", "--num-workers", "0", "--num-envs", "1", "--json"]
    assert main(["eval", str(model), *words]) == 0
    here = json.loads(capsys.readouterr().out)["evaluations"][0]
    with served() as server:
        assert main(["eval", "--policy", server.url, *words, "--against", "shuffled"]) == 0
        there, shuffled = json.loads(capsys.readouterr().out)["evaluations"]
        assert there["policy"] == here["policy"] and shuffled["instruction"] == "shuffled"
        outcome = ("seed", "task", "success", "steps", "calls")
        assert [[e[k] for k in outcome] for e in there["episodes"]] == [
            [e[k] for k in outcome] for e in here["episodes"]
        ]
        row = {"images": {}, "state": np.zeros(1)}
        for name in server.contract["cameras"]:
            row["images"][name] = np.zeros((32, 32, 3), np.uint8)
        row |= {"state": np.zeros(server.contract["state_dim"], np.float32), "prompt": "touch the red block"}
        with RemotePolicy(server.url, timeout=20) as client:
            far = client.infer(row, seed=5)["actions"]
        np.testing.assert_array_equal(far, vla.open(model, device="cpu").infer(row, seed=5)["actions"])


def test_a_server_of_openpi_is_evaluated_with_its_own_names(model, capsys):
    """A stand-in that looks for the keys of openpi's LIBERO policy."""
    seen = set()

    def answer(row):
        seen.update(row)
        return {"actions": np.zeros((4, width))}

    import gymnasium  # noqa: F401

    from vla.compose import load_object, resolve

    chosen = resolve("env", {"part": "tabletop", "preset": "tiny"}, "env")
    made = load_object(chosen.part.numpy, "env")(chosen.settings)
    width, camera = made.action_space.shape[0], next(iter(made.reset(seed=0)[0]["images"]))
    made.close()
    send = ["--send", f"observation/image=images/{camera}", "--send", "observation/state=state"]
    words = [*SHORT, "--episodes", "2", "--num-workers", "0", "--json"]
    with serving(Echo(fail=answer), {"action_horizon": 4}) as server:
        assert main(["eval", "--policy", server.url, *send, *words]) == 0
        assert seen == {"observation/image", "observation/state", "prompt"}
        capsys.readouterr()
        assert main(["eval", "--policy", server.url, "--send", "x=images/none", *words]) == 2
        assert "no such path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one policy is evaluated"), (["here", "--policy", "ws://x"], "one policy is evaluated"),
        (["--policy", "ws://127.0.0.1:1"], "no policy answers there"), (["--policy", "http://a"], "is no address"),
        (["--policy", "ws://127.0.0.1:1", "--against", "untrained"], "neither weights nor demonstrations"),
        (["--policy", "ws://127.0.0.1:1", "--against", "nearest"], "add --data"),
        (["--policy", "ws://127.0.0.1:1", "--send", "a"], "KEY=PATH"),
    ],
)  # fmt: skip
def test_wrong_policies_are_one_clear_error(words, message, capsys, monkeypatch):
    monkeypatch.setattr("vla.evaluation.remote.PATIENCE", 0.3)
    assert main(["eval", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and len(said.splitlines()) <= 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "without a key"), (["--port", "70000"], "out of range"),
        (["--max-batch", "0"], "--max-batch"), (["--deadline", "0"], "--deadline"),
        (["--protocol", "opnpi"], "did you mean 'openpi'?"), (["--set", "protocol.x=1"], "unknown setting 'x'"),
        (["--certificate", "a.pem"], "come together"), (["--metadata", "none.json"], "metadata cannot be read"),
        (["--certificate", "a.pem", "--private-key", "b.pem"], "certificate cannot be used"),
        (["--check", "--protocol", "vla-eval"], "leave --protocol out"), (["--check", "--seconds", "0"], "--seconds"),
        (["--set", "data.x=1"], "data that is not named"), (["--data", "nowhere/x"], "nowhere/x"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_clear_error(model, words, message, capsys):
    given = words if "--port" in words else ["--port", "0", *words]
    assert main(["serve", str(model), *given]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and len(said.splitlines()) <= 8


def test_a_damaged_model_is_not_served(model, tmp_path, capsys):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert main(["serve", str(copy), "--port", "0"]) == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_the_contract_says_what_the_robot_is(served):
    with served("--hz", "20") as server:
        spec = json.loads(urllib.request.urlopen(f"{server.http}/spec", timeout=5).read())
        assert spec["hz"] == 20 and spec["embodiment"]["robot"] == "tabletop" and len(spec["digest"]) == 64
        assert spec["action_dim"] == len(spec["embodiment"]["action_names"]) or "action_names" not in spec["embodiment"]
        frames = server.live.frames
        assert frames.count() > 0 and "actions" in frames.sample(0)  # the data it was trained on is here
        assert "actions" not in frames.row(0) and "images" in frames.row(0)


def test_the_check_of_a_policy_that_keeps_up_and_of_one_that_does_not(model, capsys):
    assert main(["serve", str(model), "--check", "--seconds", "0.5", "--hz", "0.5", "--max-batch", "1"]) == 0
    said = capsys.readouterr().out
    assert "it keeps up" in said and re.search(r"\d+ chunks: [\d.]+ ms \(p50\)", said)
    assert main(["serve", str(model), "--check", "--seconds", "0.2", "--hz", "5000", "--max-batch", "1"]) == 1
    assert "does not keep up" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_from_start_to_sigterm(model, tmp_path):
    log = tmp_path / "log"
    with log.open("w") as file:
        words = [sys.executable, "-m", "vla.cli", "serve", str(model), "--port", "0", "--device", "cpu"]
        process = subprocess.Popen(words, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            for _ in range(1200):
                if found := re.search(r"ws://127\.0\.0\.1:(\d+)", log.read_text()):
                    break
                assert process.poll() is None, log.read_text()
                process.wait(0.05) if process.poll() is not None else __import__("time").sleep(0.05)
            port = int(found[1])
            busy = subprocess.run([*words[:5], "--port", str(port)], capture_output=True, text=True, timeout=60)
            assert busy.returncode == 2 and "the port is in use" in busy.stderr and f"--port {port + 1}" in busy.stderr
            with RemotePolicy(f"127.0.0.1:{port}", timeout=20) as client:
                spec = client.connect()["vla"]
                row = {"images": {n: np.zeros((8, 8, 3), np.uint8) for n in spec["cameras"]}, "prompt": "go"}
                assert (
                    client.infer({**row, "state": np.zeros(spec["state_dim"])})["actions"].shape[1]
                    == spec["action_dim"]
                )
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()
    said = Path(log).read_text()
    assert "shutting down" in said and "Traceback" not in said


def test_a_chunk_that_the_far_policy_refuses_ends_its_episode_alone(capsys):
    """As it does here: counted, and the other episodes go on."""
    from vla.errors import ActionError

    answers = []

    def answer(row):
        answers.append(row)
        if len(answers) == 2:
            raise ActionError("far beyond what was recorded")
        return {"actions": np.zeros((4, 7))}

    with serving(Echo(fail=answer), {"action_horizon": 4}, max_batch=1) as server:
        words = [*SHORT, "--episodes", "3", "--num-workers", "0", "--num-envs", "1", "--json"]
        assert main(["eval", "--policy", server.url, *words]) == 0
        (found,) = json.loads(capsys.readouterr().out)["evaluations"]
        refused = [episode.get("refused", "") for episode in found["episodes"]]
        assert len(found["episodes"]) == 3 and sum("far beyond" in text for text in refused) == 1


def test_a_policy_that_refuses_what_it_makes_of_nothing_is_served_all_the_same(served, monkeypatch, capsys, model):
    """The warm-up and the check show noise, and a chunk far beyond what was recorded is refused: that is no fault."""
    from vla.errors import ActionError
    from vla.policy import Policy

    def refuse(self, out, row, state):
        raise ActionError("far beyond what was recorded")

    monkeypatch.setattr(Policy, "_answer", refuse)
    assert main(["serve", str(model), "--check", "--seconds", "0.3", "--hz", "0.5", "--max-batch", "1"]) == 0
    said = capsys.readouterr()
    assert "it keeps up" in said.out and "chunks were refused (far beyond" in said.err


def test_a_robot_with_names_of_its_own_is_warmed_up_with_its_data(served, monkeypatch):
    from vla.errors import DataError
    from vla.transforms import Group

    real = Group.inputs

    def picky(self, sample, until=None):
        if sample.get("prompt") == "do something":
            raise DataError("unknown names")
        return real(self, sample, until)

    with served() as server:
        monkeypatch.setattr(Group, "inputs", picky)
        assert run.usable(server)["prompt"] != "do something"
        server.live.frames = type(server.live.frames)(lambda: (_ for _ in ()).throw(DataError("gone")), 4)
        with pytest.raises(DataError, match="no observation is known") as caught:
            run.usable(server)
        assert "--data" in caught.value.fix


def test_real_time_chunking_through_the_wire_is_that_of_the_policy(model, served):
    from vla_client import ChunkPlayer

    policy = vla.open(model, device="cpu", guard=None)
    with served("--guard", "none") as server:
        assert server.contract["rtc"] == ["guided", "inpaint"]  # no "trained": the model was not trained for it
        images = {name: np.zeros((32, 32, 3), np.uint8) for name in server.contract["cameras"]}
        row = {
            "images": images,
            "state": np.zeros(server.contract["state_dim"], np.float32),
            "prompt": "touch the red block",
        }
        with RemotePolicy(server.url, timeout=60) as client:
            first = client.infer(row, seed=5)["actions"]
            rest = first[1:].astype(np.float32)
            for mode in (None, "guided"):
                far = client.infer(row, seed=6, prefix=rest, delay=1, rtc=mode)["actions"]
                here = policy.infer(row, seed=6, prefix=rest, delay=1, rtc=mode or "")["actions"]
                np.testing.assert_array_equal(far, here)
                assert not np.array_equal(far, client.infer(row, seed=6)["actions"])
            with ChunkPlayer(client, hz=20, fallback="hold", rtc="best") as player:
                import time

                for _ in range(40):
                    player.tick(row)
                    time.sleep(0.05)
            assert player.error == "" and player.counts["chunks"] >= 2
