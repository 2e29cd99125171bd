"""The policy server: openpi's protocol, several robots, and what it refuses. Policies here are stand-ins."""

import asyncio
import json
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from serving import CONTRACT, Echo, observation, serving
from vla_client import NoAnswer, OtherModel, RemotePolicy, ServerError, Unreachable, codec, wire
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from vla.errors import ActionError, DataError, DecodeError, SettingsError
from vla.serving.metrics import Metrics
from vla.serving.protocol import Ask
from vla.serving.server import Options, Server, bind
from vla.serving.sessions import Dispatcher


def get(server, path, **headers):
    """(status, text) of a page."""
    request = urllib.request.Request(f"{server.http}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def raw(server, **more):
    """A plain websocket, as openpi's client opens it, after the metadata frame."""
    ws = connect(server.url, compression=None, max_size=None, **more).__enter__()
    return ws, codec.unpack(ws.recv(timeout=5))


def until(what, seconds=5.0):
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.005)
    assert what()


# ---- openpi's protocol -----------------------------------------------------------------------------------------------


def test_an_exchange_as_openpi_client_does_it():
    with serving(Echo()) as server:
        ws, metadata = raw(server)
        arena = [metadata[key] for key in ("image_resolution", "needs_wrist_camera", "n_external_cameras")]
        assert arena == [[32, 32], True, 1] and metadata["vla"]["digest"] == CONTRACT["digest"]
        assert metadata["needs_stereo_camera"] is metadata["needs_session_id"] is False
        for i in range(3):
            ws.send(codec.pack(observation(i, 10 * i)))
            answer = codec.unpack(ws.recv(timeout=5))
            assert answer.keys() == {"actions", "policy_timing", "server_timing"}
            assert answer["actions"].dtype == np.float64 and answer["actions"][2].tolist() == [i + 2, 10 * i + 2]
            assert ("prev_total_ms" in answer["server_timing"]) == (i > 0)
            assert answer["server_timing"]["infer_ms"] >= 0 and answer["policy_timing"] == {"infer_ms": 0}
        ws.close()


def test_more_metadata_goes_into_the_first_frame():
    with serving(Echo(), {**CONTRACT, "metadata": {"reset_pose": [0.5], "action_space": "joint_position"}}) as server:
        ws, metadata = raw(server)
        assert metadata["reset_pose"] == [0.5] and metadata["action_space"] == "joint_position"
        assert "metadata" not in metadata["vla"]
        ws.close()


def test_pages():
    with serving(Echo(), warm=True) as server:
        RemotePolicy(server.url).infer(observation())
        assert get(server, "/healthz") == (200, "OK\n") and get(server, "/readyz") == (200, "ready\n")
        assert json.loads(get(server, "/spec")[1])["action_horizon"] == 5
        status, text = get(server, "/metrics")
        assert status == 200 and 'vla_requests_total{outcome="ok"} 1.0' in text
        for name in ("queue_wait", "infer", "request", "loop_lag"):
            assert f"vla_{name}_seconds_bucket" in text
        for name in ("vla_sessions", "vla_waiting_requests", "vla_nonfinite_actions_total", "vla_batch_rows_bucket"):
            assert name in text
        assert get(server, "/nothing")[0] == 404
        server.dispatcher.busy_since = time.monotonic() - 61
        assert get(server, "/readyz") == (503, "a forward pass does not end\n")
        server.dispatcher.busy_since = None
        server.dispatcher.draining = True
        assert get(server, "/readyz")[0] == 503 and get(server, "/healthz")[0] == 200
        with pytest.raises(ServerError, match="DRAINING"):
            RemotePolicy(server.url, timeout=0.2).infer(observation())


# ---- who may come ----------------------------------------------------------------------------------------------------


def test_a_key():
    with serving(Echo(), api_key="sesame") as server:
        for wrong in (None, "other", "sesam", "Sesame"):
            with pytest.raises(Unreachable, match="key is missing or wrong"):
                RemotePolicy(server.url, api_key=wrong).connect()
        assert RemotePolicy(server.url, api_key="sesame").infer(observation())["actions"].shape == (5, 2)
        from vla.errors import SettingsError
        from vla.evaluation import remote

        with pytest.raises(SettingsError, match="wants its key") as caught:
            remote.Remote(server.url, api_key="wrong")
        assert "VLA_API_KEY" in caught.value.fix
        assert [get(server, path)[0] for path in ("/healthz", "/readyz", "/spec", "/metrics")] == [200, 200, 401, 401]
        assert get(server, "/spec", Authorization="Api-Key sesame")[0] == 200
        assert get(server, "/spec?key=sesame")[0] == 200 and get(server, "/spec?key=x")[0] == 401
        assert "sesame" not in repr(server.options) + get(server, "/metrics?key=sesame")[1]


def test_pages_of_other_sites_may_not_use_it():
    with serving(Echo()) as server:
        own = f"http://127.0.0.1:{server.port}"
        assert (
            get(server, "/spec", Origin=own)[0] == 200 and get(server, "/spec", Origin="http://evil.example")[0] == 403
        )
        from websockets.exceptions import InvalidStatus

        with pytest.raises(InvalidStatus):
            connect(server.url, origin="http://evil.example").__enter__()


def test_other_machines_need_a_key_or_a_word():
    with pytest.raises(SettingsError, match="without a key") as caught:
        bind(Options(host="0.0.0.0", port=0))
    assert "--insecure" in caught.value.fix and "VLA_API_KEY" in caught.value.fix
    for good in ({"api_key": "k"}, {"insecure": True}):
        bind(Options(host="0.0.0.0", port=0, **good)).close()
    for host in ("127.0.0.1", "localhost", "127.0.0.9"):
        bind(Options(host=host, port=0)).close()


def test_a_port_in_use_is_said_before_anything_is_loaded():
    first = bind(Options(port=0))
    first.listen()
    port = first.getsockname()[1]
    with pytest.raises(SettingsError, match="in use") as caught:
        bind(Options(port=port))
    assert f"--port {port + 1}" in caught.value.fix
    first.close()
    loading, ready = bind(Options(port=0)), None
    ready = bind(Options(port=loading.getsockname()[1]))  # two servers that load at the same time
    ready.listen()
    with pytest.raises(SettingsError, match="in use"):
        asyncio.run(Server(Echo(), CONTRACT, None, Options()).start(loading))
    for each in (loading, ready):
        each.close()
    for host, message in (
        ("203.0.113.7", "not an address of this machine"),
        ("no.such.host.invalid", "no such address"),
    ):
        with pytest.raises(SettingsError, match=message):
            bind(Options(host=host, port=0, insecure=True))


def test_all_places_taken_is_said_at_once():
    with serving(Echo(), max_sessions=1, idle=0.3) as server:
        first = RemotePolicy(server.url)
        first.infer(observation())
        began = time.monotonic()
        with pytest.raises(ServerError, match="BUSY: all 1 places are taken"):
            RemotePolicy(server.url, timeout=0.05).connect()
        assert time.monotonic() - began < 1
        time.sleep(0.35)  # the first robot is quiet for too long: its place goes to the next
        second = RemotePolicy(server.url)
        second.infer(observation())
        assert len(server.dispatcher.sessions) == 1
        with pytest.raises((ServerError, Unreachable)):
            first.infer(observation(), timeout=0.05)


# ---- another robot, another version ----------------------------------------------------------------------------------


def test_another_robot_is_refused_at_the_handshake_with_what_differs():
    robot = {
        "robot": "other", "cameras": ["top"], "state_dim": 7, "action_dim": 7, "state_names": list("abcdefg"),
        "action_names": list("abcdefg"), "action_units": ["rad"] * 7, "hz": 10,
    }  # fmt: skip
    with serving(Echo()) as server:
        with pytest.raises(ServerError) as caught:
            RemotePolicy(server.url, embodiment=robot).connect()
        lines = str(caught.value).splitlines()
        assert caught.value.kind == "EMBODIMENT" and len(lines) <= 10
        for field in ("cameras", "state_dim", "action_dim", "state_names", "action_units", "hz"):
            assert any(line.strip().startswith(f"{field}:") for line in lines), field
        assert not server.dispatcher.sessions or until(lambda: not server.dispatcher.sessions) is None
        good = {"action_names": ["x", "y"], "cameras": ["front", "wrist"], "hz": 50}
        assert RemotePolicy(server.url, embodiment=good).infer(observation())
        with pytest.raises(ServerError, match="another order|action_names"):
            RemotePolicy(server.url, embodiment={"action_names": ["y", "x"]}).connect()


def test_clients_and_servers_that_are_too_far_apart(monkeypatch):
    with serving(Echo()) as server:
        ws, _ = raw(server)
        ws.send(codec.pack({"vla": {"hello": {"version": 0}}}))
        said = ws.recv(timeout=5)
        assert said.startswith("VERSION: ") and "upgrade vla-client" in said and "\n" not in said
        with pytest.raises(ConnectionClosed) as closed:
            ws.recv(timeout=5)
        assert closed.value.rcvd.code == 1008
        monkeypatch.setattr("vla_client.remote.VERSION", 2)
        with pytest.raises(ServerError, match="upgrade the server"):
            RemotePolicy(server.url).connect()


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "no map": codec.pack([1]), "text": "hello", "pickle": b"\x80\x04\x95\x00", "numbered": b"\x81\x01\x02",
    "vla is no map": codec.pack({"vla": 3}), "step is text": codec.pack({"vla": {"step": "x"}}),
    "seed is negative": codec.pack({"vla": {"seed": -1}}), "deadline is nan": codec.pack({"vla": {"deadline_ms": np.nan}}),
    "prefix is no array": codec.pack({"vla": {"prefix": [1]}}), "hello without version": codec.pack({"vla": {"hello": {}}}),
    "prefix is nan": codec.pack({"vla": {"prefix": np.full((1, 2), np.nan)}}),
}  # fmt: skip


def test_frames_that_are_none_are_refused_and_nobody_else_notices():
    with serving(Echo()) as server, RemotePolicy(server.url) as good:
        for name, frame in BAD.items():
            ws, _ = raw(server)
            ws.send(frame)
            said = ws.recv(timeout=5)
            assert said.startswith("BAD_REQUEST: ") and len(said) <= 200 and "/" not in said, (name, said)
            with pytest.raises(ConnectionClosed) as closed:
                ws.recv(timeout=5)
            assert closed.value.rcvd.code == 1008
            assert good.infer(observation(4))["actions"][0, 0] == 4


def test_bytes_that_are_no_http_are_nobodys_traceback(caplog):
    import socket

    with serving(Echo()) as server:
        for data in (b"", b"\x00" * 100, b"POST / HTTP/1.1\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"GET /" + b"a" * 10_000):
            with socket.create_connection(("127.0.0.1", server.port), 5) as link:
                link.sendall(data)
                link.shutdown(socket.SHUT_WR)
                answer = link.recv(10_000)
                assert b"Traceback" not in answer and b".py" not in answer
        assert RemotePolicy(server.url).infer(observation(2))["actions"][0, 0] == 2
    assert not [r for r in caplog.records if r.name == "vla.serve" and r.levelname in ("ERROR", "CRITICAL")]


def test_frames_that_are_too_long_end_the_connection():
    with serving(Echo(), max_frame=2000) as server:
        ws, _ = raw(server)
        with pytest.raises(ConnectionClosed) as closed:
            ws.send(codec.pack({"state": np.zeros(1000)}))
            ws.recv(timeout=5)
        assert (closed.value.rcvd or closed.value.sent).code == 1009


@pytest.mark.parametrize(
    ("row", "where"),
    [
        (observation(np.nan), r"state\[0\]"), (observation(0, np.inf), r"state\[1\]"),
        (observation(images={"front": np.full((2, 2, 3), np.nan, np.float32)}), r"images/front\[0, 0, 0\]"),
        (observation(state=[1.0, float("nan")]), r"state\[1\]"), (observation(extra=float("inf")), "extra"),
    ],
)  # fmt: skip
def test_observations_that_are_not_finite_never_reach_the_policy(row, where):
    policy = Echo()
    with serving(policy) as server, RemotePolicy(server.url) as client:
        with pytest.raises(ServerError, match=where) as caught:
            client.infer(row)
        assert caught.value.kind == "BAD_OBSERVATION" and not policy.batches
        assert client.infer(observation()) and client.connections == 1  # the connection lives


def explode(row):
    raise {"data": DataError("the state has another width", field="state", got=3, expected=7, fix="send 7"),
           "action": ActionError("the model produced a chunk with NaN"), "far": ActionError("far beyond"),
           "tokens": DecodeError("no chunk"), "bug": ZeroDivisionError("/secret/path.py")}[
        row["prompt"]
    ]  # fmt: skip


def test_what_the_policy_refuses_is_told_and_what_it_breaks_is_logged(caplog):
    with serving(Echo(fail=explode)) as server, RemotePolicy(server.url) as client:
        kinds = {}
        for prompt in ("data", "action", "far", "tokens", "bug"):
            with pytest.raises(ServerError) as caught:
                client.infer(observation(prompt=prompt))
            kinds[prompt] = caught.value
        found = [e.kind for e in kinds.values()]
        assert found == ["BAD_OBSERVATION", "NONFINITE_ACTION", "BAD_ACTION", "BAD_ACTION", "INTERNAL"]
        assert "send 7" in kinds["data"].text and "expected: 7" in kinds["data"].text
        assert "secret" not in kinds["bug"].text and len(kinds["bug"].error) == 8
        assert kinds["bug"].error in caplog.text and "secret" in caplog.text
        assert client.connections == 1


def test_a_policy_that_ends_its_thread_leaves_nobody_waiting(caplog):
    def quit(row):
        raise SystemExit(3)

    with serving(Echo(fail=quit)) as server, RemotePolicy(server.url, timeout=5) as client:
        for text in ("ended with SystemExit", "started anew"):
            with pytest.raises(ServerError, match=text) as caught:
                client.infer(observation())
            assert caught.value.kind == "INTERNAL"
        assert get(server, "/readyz")[0] == 503 and get(server, "/healthz")[0] == 200
    assert "SystemExit" in caplog.text


@pytest.mark.parametrize("answers", [[], [{"actions": np.zeros((5, 2))}] * 2, [{}], [3], None])
def test_a_policy_that_answers_nonsense_is_told_so(answers):
    class Odd(Echo):
        def infer_batch(self, rows, *, seeds=None):
            return answers

    with serving(Odd()) as server, RemotePolicy(server.url, timeout=5) as client:
        for _ in range(2):
            with pytest.raises(ServerError) as caught:
                client.infer(observation())
            assert caught.value.kind == "INTERNAL"


@pytest.mark.parametrize(
    ("actions", "kind"),
    [
        (np.full((3, 2), np.nan), "NONFINITE_ACTION"), (np.full((3, 2), np.inf), "NONFINITE_ACTION"),
        (np.zeros((3, 5)), "INTERNAL"), (np.zeros((0, 2)), "INTERNAL"), (np.zeros(2), "INTERNAL"),
    ],
)  # fmt: skip
def test_chunks_that_no_robot_may_execute_are_never_sent(actions, kind):
    with serving(Echo(fail=lambda row: {"actions": actions})) as server, RemotePolicy(server.url) as client:
        with pytest.raises(ServerError) as caught:
            client.infer(observation())
        assert caught.value.kind == kind
        if kind == "NONFINITE_ACTION":
            assert "vla_nonfinite_actions_total 1.0" in get(server, "/metrics")[1]


# ---- several robots --------------------------------------------------------------------------------------------------


def test_each_robot_gets_its_own_chunk_and_all_get_the_same_share():
    with serving(Echo(0.002)) as server:
        counts, wrong = [0] * 4, []
        end = time.monotonic() + 1.5

        def robot(number):
            with RemotePolicy(server.url, timeout=5) as client:
                while time.monotonic() < end:
                    mark = number * 1000 + counts[number]
                    if client.infer(observation(mark, number))["actions"][0].tolist() != [mark, number]:
                        wrong.append(number)
                    counts[number] += 1

        threads = [threading.Thread(target=robot, args=(i,)) for i in range(4)]
        [t.start() for t in threads]
        [t.join(20) for t in threads]
        jain = sum(counts) ** 2 / (4 * sum(n * n for n in counts))
        assert not wrong and min(counts) > 10 and jain > 0.95, counts


def test_robots_that_wait_are_taken_together_where_that_is_faster():
    policy = Echo(0.05)
    with serving(policy, warm=True) as server:
        assert sorted(server.dispatcher.costs) == [1, 2, 4, 8]
        policy.batches.clear()
        client = RemotePolicy(server.url, timeout=5)
        answers = client.infer_batch([observation(i) for i in range(6)], seeds=range(6))
        assert [a["actions"][0, 0] for a in answers] == list(range(6))
        assert max(policy.batches) >= 4 and sum(policy.batches) == 6
        assert sorted(policy.seeds[-6:]) == list(range(6))
        client.close()


def test_a_bad_observation_costs_the_others_in_its_pass_nothing():
    def pick(row):
        if row["prompt"] == "bad":
            raise DataError("no")
        return Echo().answer(row)

    dispatcher = Dispatcher(Echo(fail=pick), Metrics())
    answers = dispatcher.forward([Ask(observation(i, prompt="bad" if i == 1 else "")) for i in range(3)], [0, 1, 2])
    assert [getattr(a, "kind", "ok") for a in answers] == ["ok", "BAD_OBSERVATION", "ok"]


@pytest.mark.parametrize(
    ("costs", "sizes"),
    [
        ({1: 1.0}, {1: 1, 5: 1}),
        ({1: 1.0, 2: 1.0, 4: 1.0}, {1: 1, 2: 2, 3: 2, 4: 4, 9: 4}),  # a pass costs the same for all
        ({1: 1.0, 2: 2.0, 4: 4.0}, {2: 1, 4: 1}),  # together is no faster: nobody waits for the others
        ({1: 1.0, 2: 1.4, 4: 3.0}, {2: 2, 4: 2}),
    ],
)
def test_the_rule_for_passes(costs, sizes):
    dispatcher = Dispatcher(Echo(), Metrics())
    dispatcher.costs = costs
    assert {n: dispatcher.rows_for(n) for n in sizes} == sizes


def test_turns_go_round():
    async def main():
        dispatcher = Dispatcher(Echo(), Metrics())
        a, b, c = (dispatcher.open(name) for name in "abc")
        order = []
        for waiting in ((a, b, c), (a, b, c), (a, c), (a, b)):
            for session in waiting:
                if session.waiting is None:
                    asyncio.ensure_future(dispatcher.ask(session, Ask(observation())))
            await asyncio.sleep(0)
            order += [session.peer for session, _ in dispatcher._choose()]
        return order

    assert asyncio.run(main()) == ["a", "b", "c", "a"]


def test_the_newest_observation_of_a_robot_wins():
    policy = Echo(0.2)
    with serving(policy) as server:
        ws, _ = raw(server)
        for step in range(4):
            ws.send(codec.pack(observation(step) | {"vla": {"step": step}}))
            time.sleep(0.02)
        said = [ws.recv(timeout=5) for _ in range(4)]
        errors = [wire.ServerError.read(s) for s in said if isinstance(s, str)]
        assert [(e.kind, e.step) for e in errors] == [("SUPERSEDED", 1), ("SUPERSEDED", 2)]
        answers = [codec.unpack(s) for s in said if not isinstance(s, str)]
        assert [(a["vla"]["step"], a["actions"][0, 0]) for a in answers] == [(0, 0), (3, 3)]
        assert answers[1]["vla"]["digest"] == CONTRACT["digest"] and answers[1]["vla"]["age_ms"] > 100
        ws.close()


def test_a_deadline_is_kept_by_a_word_not_by_silence():
    with serving(Echo(0.4)) as server:
        slow, quick = RemotePolicy(server.url, timeout=5), raw(server)[0]
        thread = threading.Thread(target=slow.infer, args=(observation(),))
        thread.start()
        until(lambda: server.dispatcher.busy_since)
        began = time.monotonic()
        quick.send(codec.pack(observation() | {"vla": {"deadline_ms": 50.0, "step": 9}}))
        error = wire.ServerError.read(quick.recv(timeout=5))
        assert (error.kind, error.step) == ("STALE", 9) and time.monotonic() - began < 0.3
        thread.join()
        # what a pass takes is known now: a request that cannot make it is told at once
        thread = threading.Thread(target=slow.infer, args=(observation(),))
        thread.start()
        until(lambda: server.dispatcher.busy_since)
        quick.send(codec.pack(observation() | {"vla": {"deadline_ms": 50.0}}))
        error = wire.ServerError.read(quick.recv(timeout=5))
        assert error.kind == "BUSY" and error.retry_after_ms > 100
        thread.join()


def test_a_robot_that_vanishes_leaves_nothing_behind():
    policy = Echo(0.1)
    with serving(policy) as server:
        for _ in range(5):
            ws, _ = raw(server)
            ws.send(codec.pack(observation()))
            ws.socket.close()
        until(lambda: not server.dispatcher.sessions)
        assert not server.dispatcher._turns and not server.connections
        assert RemotePolicy(server.url, timeout=3).infer(observation(1))["actions"][0, 0] == 1


def test_the_loop_is_free_while_the_policy_computes():
    with serving(Echo(1.0)) as server:
        client = RemotePolicy(server.url, timeout=5)
        thread = threading.Thread(target=client.infer, args=(observation(),))
        thread.start()
        until(lambda: server.dispatcher.busy_since)
        began = time.monotonic()
        assert get(server, "/healthz") == (200, "OK\n")
        assert time.monotonic() - began < 0.5
        thread.join()


def test_stopping_finishes_what_was_taken_and_says_goodbye():
    policy = Echo(0.3)
    with serving(policy) as server:
        ws, _ = raw(server)
        ws.send(codec.pack(observation(5)))
        until(lambda: server.dispatcher.busy_since)
        kept = ws
    assert codec.unpack(kept.recv(timeout=1))["actions"][0, 0] == 5
    with pytest.raises(ConnectionClosed) as closed:
        kept.recv(timeout=1)
    assert closed.value.rcvd.code == 1001


def test_noise_of_a_robot_does_not_depend_on_the_others():
    policy = Echo()
    with serving(policy) as server, RemotePolicy(server.url) as client:
        for _ in range(3):
            client.infer(observation())
        first = policy.seeds[-3:]
        client.reset()
        client.infer(observation())
        assert len(set(first)) == 3 and policy.seeds[-1] == first[0]
        assert client.infer(observation(), seed=77) and policy.seeds[-1] == 77


def test_what_real_time_chunking_needs_reaches_the_policy():
    seen = []

    class Takes(Echo):
        def infer_batch(self, rows, *, seeds=None, **more):
            seen.append(more)
            return super().infer_batch(rows, seeds=seeds)

    with serving(Takes()) as server, RemotePolicy(server.url) as client:
        client.infer(observation())
        client.infer(observation(), prefix=np.ones((3, 2)), delay=2)
        client.infer(observation(), prefix=np.ones((3, 2)), rtc="guided")
        assert seen[0] == {}
        assert seen[1].pop("prefixes")[0].tolist() == [[1, 1]] * 3 and seen[1] == {"delays": [2]}
        assert seen[2].pop("prefixes")[0].shape == (3, 2) and seen[2] == {"delays": [0], "rtc": "guided"}
        seen.clear()
        rows, prefixes = [observation(1), observation(2)], [None, np.ones((3, 2))]
        client.infer_batch(rows, seeds=[1, 2], prefixes=prefixes, delays=[0, 3], rtc="guided")
        told = sorted((m.get("delays", [0]), m.get("rtc", "")) for m in seen)
        assert told in ([([0], ""), ([3], "guided")], [([0, 3], "guided")], [([3, 0], "guided")])


def test_robots_with_and_without_a_prefix_share_a_pass():
    seen = []

    class Takes(Echo):
        def infer_batch(self, rows, *, seeds=None, **more):
            seen.append((len(rows), more))
            return super().infer_batch(rows, seeds=seeds)

    dispatcher = Dispatcher(Takes(), Metrics())
    with_it = {"prefix": np.ones((1, 2)), "delay": 1}
    answers = dispatcher.forward([Ask(observation(1)), Ask(observation(2), with_it)], [0, 1])
    assert [a["actions"][0, 0] for a in answers] == [1, 2] and seen[0][1]["delays"] == [0, 1]
    assert seen[0][1]["prefixes"][0] is None
    seen.clear()
    answers = dispatcher.forward([Ask(observation(n), {**with_it, "rtc": f"way {n}"}) for n in (1, 2)], [0, 1])
    assert [a["actions"][0, 0] for a in answers] == [1, 2] and [(n, m["rtc"]) for n, m in seen] == [
        (1, "way 1"),
        (1, "way 2"),
    ]


# ---- the client ------------------------------------------------------------------------------------------------------


def test_a_restarted_server_is_found_again_and_other_weights_are_refused():
    with serving(Echo()) as server:
        client = RemotePolicy(server.url, timeout=3)
        client.infer(observation())
        port = server.port
    for digest, good in ((CONTRACT["digest"], True), ("e" * 64, False)):
        with serving(Echo(), {**CONTRACT, "digest": digest}, port=port):
            if good:
                try:
                    client.infer(observation())
                except Unreachable:  # the goodbye of the old server
                    client.infer(observation())
                assert client.connections == 2
            else:
                with pytest.raises((OtherModel, Unreachable)):
                    client.infer(observation(), timeout=0.5)
                with pytest.raises(OtherModel, match="other weights now: eeee"):
                    client.infer(observation())
                client.accept_model()
                assert client.infer(observation()) and client.digest == digest
            client.close()


def test_a_silent_server_costs_no_more_than_the_timeout():
    import socket

    quiet = socket.create_server(("127.0.0.1", 0))  # accepts, and says nothing
    url = f"127.0.0.1:{quiet.getsockname()[1]}"
    began = time.monotonic()
    with pytest.raises((Unreachable, NoAnswer)):
        RemotePolicy(url, timeout=0.3).infer(observation())
    assert time.monotonic() - began < 2
    quiet.close()
    with serving(Echo(1.0)) as server:
        client = RemotePolicy(server.url, timeout=0.3)
        client.connect()
        began = time.monotonic()
        with pytest.raises(NoAnswer):
            client.infer(observation())
        assert time.monotonic() - began < 1
        # the late answer is not taken for the next one's
        assert client.infer(observation(8), timeout=5)["actions"][0, 0] == 8 and client.connections == 2


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "ws://", "127.0.0.1:1"])
def test_addresses_where_nobody_serves(url):
    began = time.monotonic()
    with pytest.raises(Unreachable):
        RemotePolicy(url, timeout=0.2).infer(observation())
    assert time.monotonic() - began < 2


def test_a_server_of_openpi():
    """Its framing: no "vla" key is sent, a traceback comes back as text and the connection ends."""
    from websockets.sync.server import serve as sync_serve

    seen = []

    def handler(ws):
        ws.send(codec.pack({"reset_pose": [1]}))
        for frame in ws:
            row = codec.unpack(frame)
            seen.append(sorted(row))
            if row["prompt"] == "fail":
                ws.send("Traceback (most recent call last):\n  File \"x\"\nKeyError: 'state'\n")
                ws.close(1011)
                return
            nan = np.nan if row["prompt"] == "nan" else 0.0
            ws.send(codec.pack({"actions": np.ones((4, 2)) + nan, "server_timing": {"infer_ms": 1.0}}))

    with sync_serve(handler, "127.0.0.1", 0, compression=None, max_size=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = RemotePolicy(f"ws://127.0.0.1:{server.socket.getsockname()[1]}", embodiment={"hz": 1})
        for _ in range(200):
            assert client.infer(observation(), step=3, seed=4)["actions"].shape == (4, 2)
        assert (
            seen[0] == ["images", "prompt", "state"]
            and client.metadata == {"reset_pose": [1]}
            and client.contract == {}
        )
        with pytest.raises(ServerError, match="KeyError"):
            client.infer(observation(prompt="fail"))
        with pytest.raises(ServerError, match="NONFINITE"):
            client.infer(observation(prompt="nan"))
        client.reset()
        assert client.infer(observation()) and client.connections == 2
        client.close()
        server.shutdown()


def test_encrypted(tmp_path):
    import shutil
    import ssl
    import subprocess

    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    names = [str(tmp_path / name) for name in ("cert.pem", "key.pem")]
    words = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    ]
    subprocess.run([*words, "-out", names[0], "-keyout", names[1]], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*names)
    with serving(Echo(), tls=context) as server:
        url = server.url.replace("ws://", "wss://")
        trusting = ssl.create_default_context(cafile=names[0])
        with RemotePolicy(url, ssl=trusting, timeout=5) as client:
            assert client.infer(observation(3))["actions"][0, 0] == 3
            assert len(client.infer_batch([observation(1), observation(2)])) == 2
        with pytest.raises(Unreachable, match="certificate"):
            RemotePolicy(url, timeout=5).connect()
        with pytest.raises((Unreachable, NoAnswer)):
            RemotePolicy(server.url, timeout=0.5).connect()
