"""The client against real servers on this computer: a good one, and every kind of bad one."""

import contextlib
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request
from websockets.sync.server import serve

from manipi_client import (
    AccessDenied,
    ConnectError,
    ConnectionLost,
    ConnectTimeout,
    InferenceTimeout,
    InputError,
    ProtocolError,
    RemoteInferenceError,
    WebsocketPolicy,
    wire,
)
from manipi_client.errors import error_from_text, error_to_text
from manipi_client.fake import FakePolicyServer


def chunk(observation):
    return {"actions": np.outer(np.arange(1, 5), observation["state"])}


@contextlib.contextmanager
def raw_server(handle, **options):
    """A websocket server whose every connection is handled by `handle(connection)`; yields its port."""

    def quietly(connection):
        with contextlib.suppress(ConnectionClosed):
            handle(connection)

    with serve(quietly, "127.0.0.1", 0, compression=None, max_size=None, **options) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.socket.getsockname()[1]
        server.shutdown()
        thread.join()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_an_answer_and_the_metadata(observation):
    with FakePolicyServer(chunk, {"robot": "tiny"}) as server, WebsocketPolicy(port=server.port) as policy:
        assert policy.metadata == {"robot": "tiny"}
        answer = policy.infer(observation)
        np.testing.assert_array_equal(answer["actions"], [[0, 1, 2], [0, 2, 4], [0, 3, 6], [0, 4, 8]])
        policy.reset()
        np.testing.assert_array_equal(server.observations[0]["image"], observation["image"])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "ws://127.0.0.1"])
def test_host_may_be_a_name_or_a_uri(host, observation):
    with FakePolicyServer(chunk) as server, WebsocketPolicy(host, server.port) as policy:
        assert policy.infer(observation)["actions"].shape == (4, 3)


@pytest.mark.parametrize("port", [8000, None])
def test_a_uri_may_carry_port_and_path(port, observation):
    with FakePolicyServer(chunk) as server, WebsocketPolicy(f"ws://127.0.0.1:{server.port}/policy", port) as policy:
        assert policy.infer(observation)["actions"].shape == (4, 3)


def test_replays_the_golden_transcript(golden_wire):
    """The golden server's frames, sent by a script, give the golden answers; our requests are the golden requests."""
    frames = {frame["n"]: frame for frame in golden_wire("transcript.json")["frames"]}
    received = []

    def play(connection):
        first = 9 if received else 0
        connection.send(golden_wire(frames[first]["file"]))
        for n in range(first + 1, 12 if received else 9, 2):
            received.append(connection.recv() == golden_wire(frames[n]["file"]))
            reply = frames[n + 1]
            text = f"{reply.get('first_line')}\n{reply.get('last_line')}"
            connection.send(golden_wire(reply["file"]) if reply["file"] else text)
            if not reply["file"]:
                connection.close(1011, "x" * 60)

    with raw_server(play) as port, WebsocketPolicy(port=port) as policy:
        assert policy.metadata == wire.unpack(golden_wire("frame_00_server.bin"))
        for n in (1, 3, 5):
            answer = policy.infer(wire.unpack(golden_wire(frames[n]["file"])))
            assert wire.pack(answer) == golden_wire(frames[n + 1]["file"])
        with pytest.raises(RemoteInferenceError, match="RuntimeError: deliberate failure for the fixture") as failure:
            policy.infer(wire.unpack(golden_wire(frames[7]["file"])))
        assert failure.value.code == ""
        assert failure.value.text.startswith("Traceback (most recent call last):")
        answer = policy.infer(wire.unpack(golden_wire(frames[10]["file"])))
        assert "prev_total_ms" not in answer["server_timing"]
    assert received == [True] * 5


def test_sends_the_token_as_openpi_does(observation):
    headers = []

    def remember(connection, request: Request):
        headers.append(request.headers.get("Authorization"))

    def answer(connection):
        connection.send(wire.pack({}))

    with raw_server(answer, process_request=remember) as port:
        WebsocketPolicy(port=port, token="secret").close()
        WebsocketPolicy(port=port).close()
    assert headers == ["Api-Key secret", None]


@pytest.mark.parametrize(
    ("status", "kind", "advice"),
    [
        (401, AccessDenied, "check token"),
        (403, AccessDenied, "do what it says"),
        (404, ConnectError, "check host, port and path"),
        (500, ConnectError, "check host, port and path"),
        (502, ConnectTimeout, "wait until it is ready"),
        (503, ConnectTimeout, "wait until it is ready"),
        (504, ConnectTimeout, "wait until it is ready"),
    ],
)
def test_what_a_status_means(status, kind, advice):
    """Only a server that is not ready is asked again."""
    asked = []

    def refuse(connection, request):
        asked.append(request)
        return connection.respond(status, "x\n" * 5000)

    with raw_server(lambda connection: None, process_request=refuse) as port:
        with pytest.raises(ConnectError, match=f"found HTTP {status} x.*") as refused:
            WebsocketPolicy(port=port, token="wrong", connect_timeout=0.65)  # the third attempt begins at 0.3 s
    assert type(refused.value) is kind
    assert advice in refused.value.next
    assert len(str(refused.value)) < 600
    assert (len(asked) > 1) == (kind is ConnectTimeout)


def test_an_unknown_host_is_not_asked_again():
    with pytest.raises(ConnectError, match="check host and port"):
        WebsocketPolicy("no-such-host.invalid")


def test_nobody_listens():
    port = free_port()
    started = time.monotonic()
    with pytest.raises(ConnectTimeout) as failure:
        WebsocketPolicy(port=port, connect_timeout=0.5)
    assert time.monotonic() - started < 2
    assert str(failure.value) == (
        "expected a policy server within 0.5 s\n"
        "   found [Errno 111] Connection refused\n"
        f"   where ws://127.0.0.1:{port}\n"
        "    next start the server, or wait until it is ready; check host and port, or raise connect_timeout"
    )


def test_waits_for_a_server_that_starts_late(observation):
    port = free_port()

    def start_late():
        time.sleep(0.6)
        with serve(lambda c: c.send(wire.pack({"late": True})), "127.0.0.1", port) as server:
            threading.Timer(1.0, server.shutdown).start()
            server.serve_forever()

    thread = threading.Thread(target=start_late)
    thread.start()
    with WebsocketPolicy(port=port, connect_timeout=10) as policy:
        assert policy.metadata == {"late": True}
    thread.join()


@pytest.mark.parametrize("hang_up_after", [0, 4096], ids=["at once", "after the request"])
def test_a_tunnel_that_hangs_up_is_a_server_that_is_not_up(hang_up_after):
    with socket.create_server(("127.0.0.1", 0)) as tunnel:
        stop = threading.Event()

        def hang_up():
            while not stop.is_set():
                connection, _ = tunnel.accept()
                connection.recv(hang_up_after)
                connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(ConnectTimeout):
            WebsocketPolicy(port=tunnel.getsockname()[1], connect_timeout=0.7)
        stop.set()
        socket.create_connection(tunnel.getsockname()).close()
        thread.join()


def test_a_port_where_something_else_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet():
            connection, _ = listener.accept()
            connection.sendall(b"SSH-2.0-OpenSSH_9.0\r\n\r\n")
            connection.recv(4096)
            time.sleep(0.1)
            connection.close()

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(ConnectError, match="a policy server that lets this client in"):
            WebsocketPolicy(port=listener.getsockname()[1])
        thread.join()


def test_a_port_that_says_nothing():
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ConnectTimeout):
        WebsocketPolicy(port=silent.getsockname()[1], connect_timeout=0.3)


def test_a_server_without_metadata():
    with raw_server(lambda connection: connection.recv()) as port, pytest.raises(ConnectTimeout, match="timed out"):
        WebsocketPolicy(port=port, connect_timeout=0.3)


@pytest.mark.parametrize("frame", [b"\xc1", wire.pack([1, 2])])
def test_metadata_that_is_none(frame):
    with raw_server(lambda connection: connection.send(frame)) as port, pytest.raises(ProtocolError):
        WebsocketPolicy(port=port)


def test_after_a_timeout_a_late_answer_is_never_read_as_a_fresh_one(observation):
    def late_once(observed):
        if observed["prompt"] == "slow":
            time.sleep(0.6)
        return {"actions": np.zeros((1, 1)), "for": observed["prompt"]}

    with FakePolicyServer(late_once) as server, WebsocketPolicy(port=server.port, request_timeout=0.3) as policy:
        with pytest.raises(InferenceTimeout, match=r"actions within 0\.3 s"):
            policy.infer({**observation, "prompt": "slow"})
        time.sleep(0.5)
        assert policy.infer({**observation, "prompt": "fresh"})["for"] == "fresh"


def test_pictures_arrive_whole_after_whatever_went_wrong():
    """They travel in parts, out of memory that is used again, which the errors' tracebacks still hold."""
    rng, answered = np.random.default_rng(0), threading.Event()

    def echo(observation):
        if "slow" in observation:
            answered.wait(5)
        return {"actions": observation["image"]}

    with FakePolicyServer(echo) as server, WebsocketPolicy(port=server.port, request_timeout=1.0) as policy:
        for side in (10, 209, 210, 500, 300):  # 131,043 and 132,300 bytes are below and above one part
            image = rng.integers(0, 256, (side, side, 3), np.uint8)
            np.testing.assert_array_equal(policy.infer({"image": image})["actions"], image)
            with pytest.raises(InputError):
                policy.infer({"image": image, "x": object()})
        with pytest.raises(InferenceTimeout) as failure:
            policy.infer({"image": image, "slow": True})
        answered.set()
        np.testing.assert_array_equal(policy.infer({"image": image})["actions"], image)
        assert failure.value.__traceback__ is not None


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_call_leaves_no_answer_behind(observation):
    def slow(observed):
        time.sleep(0.4 if observed["prompt"] == "slow" else 0)
        return {"actions": np.zeros((1, 1)), "for": observed["prompt"]}

    with FakePolicyServer(slow) as server, WebsocketPolicy(port=server.port) as policy:
        threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            policy.infer({**observation, "prompt": "slow"})
        assert policy.infer({**observation, "prompt": "fresh"})["for"] == "fresh"


SERVER = """
import sys, time
import numpy as np
from manipi_client.fake import FakePolicyServer
with FakePolicyServer(lambda o: time.sleep(o["delay"]) or {"actions": np.zeros((2, 2))}) as server:
    print(server.port, flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def server_process():
    """A fake server in a process of its own; yields the process and the port."""
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_a_killed_server(observation):
    with server_process() as (process, port):
        policy = WebsocketPolicy(port=port, connect_timeout=0.5)
        assert policy.infer({**observation, "delay": 0})["actions"].shape == (2, 2)
        threading.Timer(0.3, process.kill).start()
        with pytest.raises(ConnectionLost, match="a closed connection") as lost:
            policy.infer({**observation, "delay": 30})
        assert "look at the server's log" in lost.value.next
        with pytest.raises(ConnectTimeout):
            policy.infer({**observation, "delay": 0})


@pytest.mark.parametrize("limit", ["request_timeout", "deadline"])
@pytest.mark.parametrize("num_bytes", [10, 50_000_000], ids=["small observation", "larger than the socket's buffers"])
def test_a_frozen_server_is_a_timeout(num_bytes, limit):
    """A large observation does not even get out: sending it is what would take forever."""
    with server_process() as (process, port):
        policy = WebsocketPolicy(port=port, **{limit: 0.3})
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)  # Until then it may still answer.
        started = time.monotonic()
        with pytest.raises(InferenceTimeout):
            policy.infer({"image": np.zeros(num_bytes, np.uint8), "delay": 0})
        assert time.monotonic() - started < 3
        policy.close()


def test_connects_again_when_the_server_came_back(observation):
    with FakePolicyServer(chunk, {"run": 1}) as first:
        port = first.port
        policy = WebsocketPolicy(port=port, allow_new_checkpoint=True)

    def answer(connection):
        connection.send(wire.pack({"run": 2}))
        connection.recv()
        connection.send(wire.pack({"actions": np.zeros((1, 1))}))

    with serve(answer, "127.0.0.1", port) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        assert policy.infer(observation)["actions"].shape == (1, 1)
        assert policy.metadata == {"run": 2}
        policy.close()
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("code", "answered"), [(1001, True), (1012, True), (1011, False), (1009, False), (1000, False)]
)
def test_a_server_that_goes_away_before_it_answers_is_asked_again_once(code, answered, observation):
    """The observation and the server's farewell may cross on their way."""
    asked = []

    def answer(connection):
        connection.send(wire.pack({}))
        asked.append(connection.recv())
        if len(asked) == 1 or not answered:
            connection.close(code)
        else:
            connection.send(wire.pack({"actions": np.zeros((1, 1))}))

    with raw_server(answer) as port, WebsocketPolicy(port=port) as policy:
        if answered:
            assert policy.infer(observation)["actions"].shape == (1, 1)
        else:
            with pytest.raises(ConnectionLost, match=f"received {code}"):
                policy.infer(observation)
    assert asked == asked[:1] * (2 if answered else 1)


def test_a_reason_to_close_is_shown_on_one_line(observation):
    def leave(connection):
        connection.send(wire.pack({}))
        connection.recv()
        connection.close(1011, "\x1b[2J\n2026 manipi stopped")

    with raw_server(leave) as port, WebsocketPolicy(port=port) as policy:
        with pytest.raises(ConnectionLost, match="2026 manipi stopped") as lost:
            policy.infer(observation)
    assert lost.value.found.isprintable()


def test_a_server_that_always_goes_away(observation):
    def leave(connection):
        connection.send(wire.pack({}))
        connection.recv()
        connection.close(1001)

    with raw_server(leave) as port, WebsocketPolicy(port=port) as policy:
        with pytest.raises(ConnectionLost, match="received 1001") as lost:
            policy.infer(observation)
    assert "when it is back" in lost.value.next


@pytest.mark.parametrize("token", ["t0ken-of-the-lab\n", " t0ken-of-the-lab\r\n"])
def test_a_token_as_its_file_holds_it(token):
    shown = []
    with raw_server(lambda connection: shown.append(connection.request.headers["Authorization"])) as port:
        with pytest.raises(ConnectTimeout):
            WebsocketPolicy(port=port, token=token, connect_timeout=0.1)
    assert shown[0] == "Api-Key t0ken-of-the-lab"


@pytest.mark.parametrize("token", ["t0ken\r\nHost: x", "t0ken\0", "t0k\u00e9n", b"t0ken", 70])
def test_what_is_no_token_is_not_repeated(token):
    with pytest.raises(InputError, match="a token") as refused:
        WebsocketPolicy(token=token, lazy=True)
    assert "t0k" not in str(refused.value)


@pytest.mark.parametrize("name", ["connect_timeout", "request_timeout", "deadline"])
@pytest.mark.parametrize("value", ["1" * 10_000, -1, math.nan, math.inf, 1e308, True, [1]])
def test_what_is_no_time(name, value):
    with pytest.raises(InputError, match="seconds, from 0 to") as refused:
        WebsocketPolicy(lazy=True, **{name: value})
    assert name in refused.value.where
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("value", ["1" * 10_000, 0, -1, math.nan, math.inf, True, None, np.zeros(10_000)])
def test_what_is_no_deadline(value, observation):
    with pytest.raises(InputError, match="milliseconds, more than 0") as refused:
        WebsocketPolicy(lazy=True).infer({**observation, "manipi/deadline_ms": value})
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("value", [np.float32(5_000), np.int64(5_000)])
def test_a_deadline_may_be_a_scalar_of_numpy(value, observation):
    with FakePolicyServer(chunk) as server, WebsocketPolicy(port=server.port) as policy:
        assert policy.infer({**observation, "manipi/deadline_ms": value})["actions"].shape == (4, 3)


def test_an_interrupted_client_waits_no_longer_for_a_port_that_says_nothing(observation):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        policy = WebsocketPolicy(port=silent.getsockname()[1], lazy=True)
        calls = ThreadPoolExecutor(1)
        call = calls.submit(policy.infer, observation)
        with silent.accept()[0] as connection:
            assert connection.recv(3) == b"GET"  # it waits for the answer to its handshake now
            started = time.monotonic()
            policy.interrupt()
            with pytest.raises(ConnectTimeout):
                call.result(10)
            assert time.monotonic() - started < 3
        calls.shutdown()


@pytest.mark.parametrize("frame", [b"\xc1", wire.pack([1]), wire.pack(None)])
def test_an_answer_that_is_none(frame, observation):
    def answer(connection):
        connection.send(wire.pack({}))
        connection.recv()
        connection.send(frame)

    with raw_server(answer) as port, WebsocketPolicy(port=port) as policy, pytest.raises(ProtocolError):
        policy.infer(observation)


def test_an_observation_that_does_not_travel_keeps_the_connection(observation):
    with FakePolicyServer(chunk) as server, WebsocketPolicy(port=server.port) as policy:
        with pytest.raises(InputError):
            policy.infer({"state": {1, 2}})
        assert policy.infer(observation)["actions"].shape == (4, 3)


def test_threads_take_turns(observation):
    def echo(observed):
        return {"actions": np.zeros((1, 1)), "n": observed["n"]}

    with FakePolicyServer(echo) as server, WebsocketPolicy(port=server.port) as policy:
        wrong = []

        def ask(n):
            for _ in range(20):
                if policy.infer({"n": n})["n"] != n:
                    wrong.append(n)

        threads = [threading.Thread(target=ask, args=[n]) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_a_fake_server_whose_function_raises_sends_the_traceback():
    def broken(observation):
        raise ValueError("no camera")

    with FakePolicyServer(broken) as server, WebsocketPolicy(port=server.port) as policy:
        with pytest.raises(RemoteInferenceError, match="found ValueError: no camera") as failure:
            policy.infer({})
        assert "Traceback" in failure.value.text


def test_an_error_survives_the_text_frame():
    sent = InferenceTimeout(expected="a\nb", found="c", where="d", next="e")
    received = error_from_text(error_to_text(sent), "ws://server")
    assert (received.code, received.expected, received.found) == ("InferenceTimeout", "a\\nb", "c"), (
        "a part is one line"
    )
    assert (received.where, received.next) == ("d (told by ws://server)", "e")
    assert error_from_text("", "ws://server").found == "(an empty message)"


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(RemoteInferenceError(expected="a", found="b", where="c", next="d", code="X")))
    assert (str(error), error.code) == ("expected a\n   found b\n   where c\n    next d", "X")


def test_the_package_needs_neither_manipi_nor_torch():
    code = "import sys, manipi_client, manipi_client.fake, manipi_client.images; print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "'torch'" not in modules
    assert "'manipi'" not in modules
    assert "'PIL'" not in modules
