"""Other people's clients: vla-eval runs an evaluation against our server; openpi-client, where it is installed."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import vla_eval.api
from serving import Echo, observation, serving
from vla_client import RemotePolicy, ServerError

HERE = Path(__file__).parent
# The Python of an environment with openpi-client 0.1.2 (make interop-serve makes one): it wants numpy below 2.
OPENPI = os.environ.get("VLA_OPENPI_CLIENT", "")


class Reacher(Echo):
    """Goes to the target that the first pixel names, a quarter of the way with each action of a chunk."""

    def answer(self, row):
        target = row["images"]["front"][0, 0, :2].astype(np.float64) / 100 - 1
        return {"actions": np.stack([row["state"][:2] + (target - row["state"][:2]) * k / 4 for k in (1, 2, 3, 4)])}


@pytest.mark.parametrize(("execute", "passes"), [(0, 2), (2, 6)])
def test_vla_eval_completes_an_evaluation(tmp_path, execute, passes):
    policy = Reacher()
    settings = {"execute": execute, "cameras": ["front=agentview", "wrist=hand"]}
    with serving(policy, protocol="vla-eval", settings=settings) as server:
        found = vla_eval.api.run(
            {"benchmarks": [{"benchmark": "reach_benchmark:Reach", "episodes_per_task": 1}]},
            server_url=server.url, output_dir=tmp_path, docker=False, no_save=True,
        )  # fmt: skip
        tasks = found[0]["tasks"]
        assert len(tasks) == 2 and found[0]["mean_success"] == 1.0, found
        if execute == 0:  # whole chunks: one pass per episode, four steps
            assert sum(policy.batches) == passes
        assert sum(policy.batches) >= 2


def test_vla_eval_is_told_what_is_wrong(tmp_path):
    for settings, message in (
        ({"cameras": ["front=top", "wrist=hand"]}, "BAD_OBSERVATION: no camera"),
        ({"state": "proprio"}, "BAD_OBSERVATION: no "),
    ):
        with serving(Reacher(), protocol="vla-eval", settings=settings) as server:
            found = vla_eval.api.run(
                {"benchmarks": [{"benchmark": "reach_benchmark:Reach", "max_tasks": 1}]},
                server_url=server.url, output_dir=tmp_path, docker=False, no_save=True,
            )  # fmt: skip
            episode = found[0]["tasks"][0]["episodes"][0]
            assert message in episode["failure_detail"] and not episode["metrics"]["success"]


needs_openpi = pytest.mark.skipif(not OPENPI, reason="VLA_OPENPI_CLIENT is not set: make interop-serve")


def side(*words):
    script = HERE / "helpers" / "openpi_side.py"
    done = subprocess.run([OPENPI, "-W", "ignore", str(script), *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_openpi
def test_openpi_client_runs_unchanged():
    with serving(Echo()) as server:
        assert side("client", str(server.port), "200") == "200 exchanges"
        assert server.dispatcher.policy.batches == [1] * 201


@needs_openpi
def test_our_client_against_openpis_framing():
    script = HERE / "helpers" / "openpi_side.py"
    process = subprocess.Popen([OPENPI, "-W", "ignore", str(script), "server"], stdout=subprocess.PIPE, text=True)
    try:
        url = f"ws://127.0.0.1:{int(process.stdout.readline())}"
        with RemotePolicy(url, timeout=10) as client:
            for i in range(200):
                assert client.infer(observation(i, 3 * i))["actions"][4].tolist() == [i, 3 * i]
            assert client.metadata == {"reset_pose": [0.0, 1.0]}
            with pytest.raises(ServerError, match="KeyError"):
                client.infer(observation(prompt="fail"))
            assert client.infer(observation(1))["actions"][0, 0] == 1 and client.connections == 2
    finally:
        process.kill()
        process.wait()


@needs_openpi
def test_the_golden_frames_are_openpi_clients():
    path = HERE.parent / "clients" / "vla-client" / "tests" / "openpi_frames.json"
    assert side("frames", str(path)) == "5 frames"
