"""The server over real connections: openpi's protocol, and everything that clients and operators do to a server."""

import contextlib
import http.client
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from manipi.errors import ServeError
from manipi.serve import Access, Limits, PolicyServer
from manipi_client import ConnectionLost, RemoteInferenceError, WebsocketPolicy, wire


def raw_connect(port):
    return connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, proxy=None)


def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body


def test_replays_the_golden_transcript(port, golden_wire):
    """The golden requests give the golden answers, byte for byte but for the clock's values."""
    transcript = golden_wire("transcript.json")
    frames = [golden_wire(f["file"]) if f["file"] else None for f in transcript["frames"]]

    def same_but_for_times(answer, golden):
        answer, golden = wire.unpack(answer), wire.unpack(golden)
        assert list(answer) == list(golden)
        assert list(answer["server_timing"]) == list(golden["server_timing"])
        return wire.pack({**answer, "server_timing": golden["server_timing"]}) == wire.pack(golden)

    with raw_connect(port) as connection:
        assert connection.response.headers.get("Sec-WebSocket-Extensions") is None
        assert connection.recv() == frames[0]
        for n in (1, 3, 5):
            connection.send(frames[n])
            assert same_but_for_times(connection.recv(), frames[n + 1])
        connection.send(wire.pack({**wire.unpack(frames[7]), "prompt": "fail"}))
        assert isinstance(connection.recv(), str)
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv()
        assert closed.value.rcvd.code == transcript["close_after_error"]["code"]
        assert closed.value.rcvd.reason
    with raw_connect(port) as connection:
        assert connection.recv() == frames[9]
        connection.send(frames[10])
        assert same_but_for_times(connection.recv(), frames[11])
    health = transcript["health_check"]
    assert get(port, health["path"]) == (health["status"], health["body"].encode())


def test_timings_are_plausible(port, observation):
    with WebsocketPolicy(port=port) as client:
        first = client.infer({**observation, "prompt": "slow"})["server_timing"]
        second = client.infer(observation)["server_timing"]
    assert 800 <= first["infer_ms"] < 3000
    assert second["infer_ms"] < 500
    assert second["prev_total_ms"] >= first["infer_ms"]


def test_metadata_may_be_given(policy):
    with (
        PolicyServer(policy, port=0, metadata={"a": 1}).serve_in_thread() as port,
        WebsocketPolicy(port=port) as client,
    ):
        assert client.metadata == {"a": 1}


def test_many_clients_at_once_get_their_own_answers(port):
    wrong = []

    def ask(number):
        with WebsocketPolicy(port=port) as client:
            for step in range(10):
                state = np.array([number, step], np.float32)
                if not np.array_equal(client.infer({"state": state})["actions"][0], state):
                    wrong.append((number, step))

    threads = [threading.Thread(target=ask, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_policy_is_never_called_by_two_threads(policy, observation):
    running, most = [], []

    class Watched:
        metadata = policy.metadata

        def infer(self, observation, noise=None):
            running.append(1)
            most.append(len(running))
            time.sleep(0.02)
            running.pop()
            return policy.infer(observation)

    with PolicyServer(Watched(), port=0).serve_in_thread() as port:

        def ask():
            with WebsocketPolicy(port=port) as client:
                client.infer(observation)

        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(most) == 5
    assert max(most) == 1


def test_a_bad_observation_is_told_in_four_parts_and_others_go_on(port, observation):
    with WebsocketPolicy(port=port) as good, WebsocketPolicy(port=port) as bad:
        with pytest.raises(RemoteInferenceError) as refused:
            bad.infer({"prompt": "go"})
        assert refused.value.code == "ObservationError"
        assert str(refused.value) == (
            "expected a state\n"
            "   found only ['prompt']\n"
            f"   where the observation (told by ws://127.0.0.1:{port})\n"
            "    next send `state`"
        )
        assert good.infer(observation)["actions"].shape == (4, 3)
        assert bad.infer(observation)["actions"].shape == (4, 3)


def test_a_failing_policy_tells_clients_an_id_and_the_log_the_traceback(port, observation, caplog):
    with (
        caplog.at_level(logging.ERROR),
        WebsocketPolicy(port=port) as client,
        pytest.raises(RemoteInferenceError) as failure,
    ):
        client.infer({**observation, "prompt": "fail"})
    assert failure.value.code == "PolicyFailure"
    assert "secret" not in failure.value.text
    assert "Traceback" not in failure.value.text
    incident = failure.value.found.split("id ")[1].rstrip(")")
    assert incident in caplog.text
    assert "RuntimeError: secret /home/user/weights" in caplog.text


def test_what_clients_say_makes_no_line_of_the_log(observation, caplog):
    """Neither in a traceback, nor as the reason of a close, nor before a websocket is one."""
    forged = "\x1b[2J\n2026-01-01 manipi.serve.server stopped\u2028"

    class Echo:
        def __init__(self):
            self.metadata = {}

        def infer(self, observation, noise=None):
            raise KeyError(observation["prompt"]) from ValueError(observation["prompt"] * 400)

    with caplog.at_level(logging.INFO), PolicyServer(Echo(), port=0).serve_in_thread() as port:
        with raw_connect(port) as connection:
            connection.recv()
            connection.send(wire.pack({**observation, "prompt": forged}))
            assert connection.recv().startswith("PolicyFailure\n")
        with raw_connect(port) as connection:
            connection.recv()
            connection.close(4000, forged)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(f"GET / HTTP/1.1\r\n{forged}: x\r\n\r\n".encode())
            connection.recv(1_000)
    records = [record.getMessage() for record in caplog.records]
    assert any("manipi.serve.server stopped" in record and "left" in record for record in records)
    assert any("KeyError" in record and "ValueError" in record for record in records)
    for first, *others in (record.split("\n") for record in records):
        assert len(first) < 1_000
        assert all(line.isprintable() for line in (first, *others))
        assert all(line.startswith("    | ") for line in others)
    assert sum(map(len, records)) < 25_000


def test_an_answer_that_does_not_travel(port, observation):
    with WebsocketPolicy(port=port) as client, pytest.raises(RemoteInferenceError, match="set") as failure:
        client.infer({**observation, "prompt": "unsendable"})
    assert failure.value.code == "InputError"


@pytest.mark.parametrize(
    ("frame", "found"),
    [
        ("hello", "found a text frame"),
        (b"\xc1\x00", "found FormatError"),
        (b"", "found "),
        (wire.pack([1, 2]), "found a list"),
        (wire.pack({"state": np.zeros(3)})[:-9], "found "),
        (b"\x91" * 100_000, "found StackError"),
        (wire.pack({"state": [0.0] * 5_000}), "found 5000 exceeds"),
        (wire.pack({"a": [[0] * 500] * 500}), "expected at most 2,048 items"),
        (wire.pack({"prompt": "word " * 2_000}), "found 10000 exceeds"),
    ],
    ids=["text", "malformed", "empty", "no map", "truncated", "deep", "long list", "many lists", "long text"],
)
def test_a_bad_frame_is_told_and_the_server_lives(port, observation, frame, found):
    with raw_connect(port) as connection:
        connection.recv()
        connection.send(frame)
        text = connection.recv()
        assert text.startswith("ProtocolError\nexpected ")
        assert found in text
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv()
        assert closed.value.rcvd.code == 1011
    with WebsocketPolicy(port=port) as client:
        assert client.infer(observation)["actions"].shape == (4, 3)


def test_a_message_over_the_limit_is_refused_unread(policy, observation):
    with PolicyServer(policy, port=0, limits=Limits(max_message_mb=0.001)).serve_in_thread() as port:
        with WebsocketPolicy(port=port) as client, pytest.raises(ConnectionLost, match="1009"):
            client.infer({"state": np.zeros(5_000_000, np.uint8)})
        with WebsocketPolicy(port=port) as client:
            assert client.infer(observation)["actions"].shape == (4, 3)


def test_a_message_of_many_cameras_fits_the_default_limit(port):
    with WebsocketPolicy(port=port) as client:
        images = {f"camera_{n}": np.zeros((1080, 1920, 3), np.uint8) for n in range(8)}
        assert client.infer({"state": np.zeros(3), **images})["actions"].shape == (4, 3)


def test_health_and_pings_are_answered_during_inference(port, observation):
    with raw_connect(port) as connection:
        connection.recv()
        connection.send(wire.pack({**observation, "prompt": "slow"}))
        started = time.monotonic()
        assert get(port, "/healthz") == (200, b"OK\n")
        assert connection.ping().wait(0.5)
        with raw_connect(port) as other:
            assert wire.unpack(other.recv())["robot"] == "tiny"
        assert time.monotonic() - started < 0.6
        assert wire.unpack(connection.recv())["actions"].shape == (4, 3)
        assert time.monotonic() - started >= 0.7


def test_a_client_that_leaves_during_inference_harms_nobody(port, observation):
    with raw_connect(port) as connection:
        connection.recv()
        connection.send(wire.pack({**observation, "prompt": "slow"}))
        connection.socket.shutdown(socket.SHUT_RDWR)
    with WebsocketPolicy(port=port) as client:
        assert client.infer(observation)["actions"].shape == (4, 3)


def test_a_port_in_use(policy):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for serve in (PolicyServer(policy, port=port).serve_forever, lambda: serve_in_thread(policy, port)):
            with pytest.raises(ServeError) as refused:
                serve()
            assert str(refused.value) == (
                "expected a free port\n"
                "   found a port that is in use\n"
                f"   where 127.0.0.1:{port}\n"
                f"    next stop what listens there, or choose another port: --port {port + 1} (0 picks a free one)"
            )


def serve_in_thread(policy, port):
    with PolicyServer(policy, port=port).serve_in_thread():
        pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7"])
def test_a_public_address_must_be_allowed(policy, host):
    with pytest.raises(ServeError, match="let everyone in with --insecure") as refused:
        PolicyServer(policy, host)
    assert refused.value.where == ("[::]:8000" if host == "::" else f"{host}:8000")


@pytest.mark.parametrize(("host", "reached"), [("0.0.0.0", ["127.0.0.1"]), ("::", ["127.0.0.1", "[::1]"])])
def test_a_public_address_can_be_allowed(policy, observation, host, reached):
    if host == "::" and not socket.has_dualstack_ipv6():
        pytest.skip("this computer has no IPv6")
    with PolicyServer(policy, host, 0, access=Access(insecure=True)).serve_in_thread() as port:
        for address in reached:
            with WebsocketPolicy(f"{address}:{port}") as client:
                assert client.infer(observation)["actions"].shape == (4, 3)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.7"])
def test_an_address_that_is_not_ours(policy, host):
    with pytest.raises(ServeError, match=r"check --host|choose another --host"):
        PolicyServer(policy, host, 0, access=Access(insecure=True)).serve_forever()


def test_localhost_is_this_computer(policy, observation):
    with PolicyServer(policy, "localhost", 0).serve_in_thread() as port, WebsocketPolicy("localhost", port) as client:
        assert client.infer(observation)["actions"].shape == (4, 3)


def test_a_stopped_server_frees_its_port(policy, observation):
    with PolicyServer(policy, port=0).serve_in_thread() as port, WebsocketPolicy(port=port) as client:
        client.infer(observation)
    with PolicyServer(policy, port=port).serve_in_thread() as again:
        assert again == port


PROGRAM = """
import runpy, sys
from manipi.serve import Access, Limits, PolicyServer
policy = runpy.run_path(sys.argv[1])["TinyPolicy"]()
PolicyServer(policy, port=0).serve_forever(on_ready=lambda host, port: print(host, port, flush=True))
print("stopped", flush=True)
"""


def test_ctrl_c_stops_the_server_after_what_has_arrived_is_answered(observation):
    """SIGTERM: the next test."""
    conftest = Path(__file__).with_name("conftest.py")
    command = [sys.executable, "-c", PROGRAM, str(conftest)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        host, port = process.stdout.readline().split()
        assert host == "127.0.0.1"
        with raw_connect(port) as connection:
            connection.recv()
            connection.send(wire.pack({**observation, "prompt": "slow"}))
            time.sleep(0.2)
            os.kill(process.pid, signal.SIGINT)
            assert wire.unpack(connection.recv())["actions"].shape == (4, 3)
            with pytest.raises(ConnectionClosed) as closed:
                connection.recv()
            assert closed.value.rcvd.code == 1001
        assert process.wait(5) == 0
        assert process.stdout.read() == "stopped\n"


def test_while_it_stops_answers_arrive_and_clients_are_told_that_it_goes(observation):
    """One observation is computed, one waits behind it; a third client is idle, a fourth comes when it is too late."""
    conftest = Path(__file__).with_name("conftest.py")
    command = [sys.executable, "-c", PROGRAM, str(conftest)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, contextlib.ExitStack() as stack:
        port = int(process.stdout.readline().split()[1])
        computed, waiting, idle = (stack.enter_context(raw_connect(port)) for _ in range(3))
        for client in (computed, waiting, idle):
            client.recv()
        computed.send(wire.pack({**observation, "prompt": "slow"}))
        time.sleep(0.2)
        waiting.send(wire.pack(observation))
        process.terminate()
        time.sleep(0.1)
        with pytest.raises(ConnectionClosed) as closed:
            idle.recv(0.4)
        assert closed.value.rcvd.code == 1001
        with pytest.raises(InvalidStatus) as refused:
            raw_connect(port).__enter__()
        assert refused.value.response.status_code == 503
        assert refused.value.response.headers["Retry-After"] == "1"
        assert b"stopping" in refused.value.response.body
        look = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        look.request("GET", "/readyz")
        ready = look.getresponse()
        ready.read()  # else it keeps the socket for as long as it lives
        assert (ready.status, ready.getheader("Retry-After")) == (503, "1")
        look.close()
        assert get(port, "/healthz")[0] == 200
        for client in (computed, waiting):
            assert wire.unpack(client.recv(5))["actions"].shape == (4, 3)
            with pytest.raises(ConnectionClosed) as closed:
                client.recv(5)
            assert closed.value.rcvd.code == 1001
        assert process.wait(5) == 0
        assert process.stdout.read() == "stopped\n"


def test_serving_does_not_need_torch():
    code = "import sys, manipi.serve; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"
