"""A robot in motion while its server is stopped with SIGTERM, or killed, in the middle of another client's request, and
is started again: what is left of the chunk, then the last action, then on from there."""

import contextlib
import http.client
import json
import os
import signal
import socket
import sys
import threading
import time

import numpy as np
import pytest
from tests.commands import Interpreter

from manipi_client import (
    AccessDenied,
    ActionChunkBroker,
    ManipiClientError,
    PolicyChanged,
    RealTimeBroker,
    WebsocketPolicy,
    wire,
)

PACE, H = 0.01, 20

"""As in straight.py."""
TOKEN = "t0ken-of-the-lab"


@contextlib.contextmanager
def serving(port=0, robot="arm", checkpoint="a", token=TOKEN):
    """A process, and the port that it serves at."""
    command = [sys.executable, "-m", "tests.serve.straight", str(port), robot, checkpoint, token]
    read, write = os.pipe()
    with open(read) as said:
        with open(write, "w") as stdout:
            process = Interpreter(command, stdout=stdout)
        try:
            yield process, int(said.readline())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.wait(5)


class Robot:
    """An arm that is where it was told to be, at 100 Hz."""

    def __init__(self, broker):
        self.broker, self.position, self.commands, self.errors = broker, np.zeros(1), [0.0], set()

    def move(self, until, seconds=20.0):
        """Steps until something holds; fails where it does not in time."""
        end = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < end, f"{self.broker.state}: {self.broker.error}"
            self.position = self.broker.infer({"state": self.position})["actions"]
            self.commands.append(self.position.item())
            if self.broker.error is not None:
                self.errors.add(str(self.broker.error.found))
            time.sleep(0.01)

    @property
    def largest_step(self):
        return np.abs(np.diff(self.commands)).max()


def ask_slowly(port, answers):
    with WebsocketPolicy(port=port, token=TOKEN) as other:
        answers.append(other.infer({"state": np.zeros(1), "seconds": 1.5})["actions"])


@pytest.mark.parametrize(
    ("number", "join"),
    [(signal.SIGTERM, "real_time"), (signal.SIGTERM, "ensemble"), (signal.SIGKILL, "asynchronous")],
)
def test_a_server_that_stops_and_comes_back(number, join):
    with contextlib.ExitStack() as stack:
        process, port = stack.enter_context(serving())
        policy = stack.enter_context(WebsocketPolicy(port=port, token=TOKEN, connect_timeout=0.2))
        broker = stack.enter_context(RealTimeBroker(policy, 8, join))
        robot, answers = Robot(broker), []
        robot.move(lambda: len(robot.commands) > 30 and broker.age is None)  # its next question meets the end
        other = threading.Thread(target=ask_slowly, args=[port, answers])
        if number == signal.SIGTERM:
            other.start()
            time.sleep(0.3)
        os.kill(process.pid, number)
        robot.move(lambda: broker.state == "starved" and process.poll() is not None and bool(robot.errors))
        if number == signal.SIGTERM:
            other.join()
            assert len(answers) == 1, "what had arrived was answered"
            assert any("HTTP 503 the server is stopping" in error for error in robot.errors)
        stack.enter_context(serving(port))
        moved = len(robot.commands)
        robot.move(lambda: broker.state == "running" and len(robot.commands) > moved + 30)
        assert broker.error is None
        assert robot.largest_step < 1.001 * PACE
        executed = [later for before, later in zip(robot.commands, robot.commands[1:]) if later != before]
        np.testing.assert_allclose(executed, PACE * np.arange(1, len(executed) + 1))


@pytest.mark.parametrize(
    ("again", "error", "found"),
    [
        ({"robot": "leg"}, PolicyChanged, "robot.name is 'leg', was 'arm'"),
        ({"checkpoint": "b"}, PolicyChanged, "checkpoint is 'b', was 'a'"),
        ({"token": "an0ther-token"}, AccessDenied, "HTTP 401"),
    ],
)
def test_another_robot_checkpoint_or_token_ends_the_run(again, error, found):
    with contextlib.ExitStack() as stack:
        process, port = stack.enter_context(serving())
        policy = stack.enter_context(WebsocketPolicy(port=port, token=TOKEN, connect_timeout=0.2))
        robot = Robot(stack.enter_context(RealTimeBroker(policy, 8, "asynchronous")))
        robot.move(lambda: len(robot.commands) > 20)
        process.terminate()
        robot.move(lambda: process.poll() is not None)
        stack.enter_context(serving(port, **again))
        with pytest.raises(error, match=found):
            robot.move(lambda: False)


def test_a_broker_that_waits_asks_the_server_that_came_back():
    with contextlib.ExitStack() as stack:
        process, port = stack.enter_context(serving())
        policy = stack.enter_context(WebsocketPolicy(port=port, token=TOKEN, connect_timeout=20))
        broker, answers, commands, done = ActionChunkBroker(policy, 5), [], [], threading.Event()

        def drive():
            position = np.zeros(1)
            while not done.is_set():
                try:
                    position = broker.infer({"state": position})["actions"]
                except ManipiClientError as error:
                    answers.append(error)
                    return
                commands.append(position.item())
                time.sleep(0.02)

        driving = threading.Thread(target=drive)
        driving.start()
        other = threading.Thread(target=ask_slowly, args=[port, answers])
        other.start()
        time.sleep(0.5)
        process.terminate()
        process.wait()
        before = len(commands)
        stack.enter_context(serving(port))
        end = time.monotonic() + 10
        while len(commands) < before + 20 and driving.is_alive() and time.monotonic() < end:
            time.sleep(0.05)
        done.set()
        driving.join()
        other.join()
    assert [type(answer) for answer in answers] == [np.ndarray]
    np.testing.assert_allclose(commands, PACE * np.arange(1, len(commands) + 1))
    assert len(commands) >= before + 20


def raw_client(port, *sent, receive_bytes=2**16):
    """Sends bytes, and reads nothing."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    client.connect(("127.0.0.1", port))
    for part in sent:
        client.sendall(part)
    return client


def test_clients_that_let_the_server_wait_do_not_keep_it_from_stopping():
    request = f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Api-Key {TOKEN}\r\nConnection: Upgrade\r\n"
    request += "Upgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    frame = wire.pack({"state": np.zeros(100_000)})  # whose answer of 16 MB fills every buffer
    header = b"\x82\xff" + len(frame).to_bytes(8, "big") + bytes(4)  # a mask of zeros changes nothing
    with serving() as (process, port), contextlib.ExitStack() as stack:
        for sent in (
            [],
            [request[:50].encode()],
            [request.encode(), header + frame[:1_000]],
            [request.encode(), header + frame],
        ):
            stack.enter_context(raw_client(port, *sent))
        with WebsocketPolicy(port=port, token=TOKEN) as policy:
            policy.infer({"state": np.zeros(1)})  # the one before it is answered, or being
            process.terminate()
            assert process.wait(9) == 0  # 5 s for the last one's answer, 2 s to say farewell


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_server_at_once(first, second):
    with serving() as (process, port), WebsocketPolicy(port=port, token=TOKEN) as policy:
        answer = threading.Thread(target=lose, args=(policy,))
        answer.start()
        while not any(client["busy"] for client in json.loads(look(port, "/state.json")[1])["clients"]):
            time.sleep(0.02)
        os.kill(process.pid, first)
        while look(port, "/readyz")[0] == 200:
            time.sleep(0.02)
        os.kill(process.pid, second)
        assert process.wait(5) == -second
        answer.join()


def look(port, path):
    """Status and text of a page."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", path, headers={"Authorization": f"Api-Key {TOKEN}"})
    response = connection.getresponse()
    said = response.read()
    connection.close()
    return response.status, said


def lose(policy):
    with contextlib.suppress(ManipiClientError):
        policy.infer({"state": np.zeros(1), "seconds": 10})
