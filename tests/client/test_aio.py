"""The client for asyncio, against real servers."""

import asyncio
import contextlib
import socket
import threading
import time

import numpy as np
import pytest

from manipi_client import AsyncWebsocketPolicy, ConnectTimeout, InferenceTimeout, WebsocketPolicy
from manipi_client.fake import FakePolicyServer


def echo(observation):
    return {"actions": np.zeros((1, 1)), "n": observation["n"]}


def slow_if_odd(number):
    return 0.5 if number % 2 else 0.0


def test_it_answers_while_the_loop_does_other_things():
    async def main(port):
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.01)

        ticking = asyncio.ensure_future(tick())
        async with AsyncWebsocketPolicy(port=port) as policy:
            assert policy.metadata == {"robot": "tiny"}
            assert (await policy.infer({"n": 1}))["n"] == 1
            await policy.reset()
        ticking.cancel()
        return ticks

    with FakePolicyServer(echo, {"robot": "tiny"}, delay_s=0.3) as server:
        assert asyncio.run(main(server.port)) > 5


def test_tasks_take_turns():
    async def main(port):
        async with AsyncWebsocketPolicy(port=port) as policy:
            return [answer["n"] for answer in await asyncio.gather(*(policy.infer({"n": n}) for n in range(8)))]

    with FakePolicyServer(echo) as server:
        assert asyncio.run(main(server.port)) == list(range(8))


def test_a_cancelled_task_leaves_no_answer_behind_and_no_waiting():
    async def main(port):
        async with AsyncWebsocketPolicy(port=port) as policy:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(policy.infer({"n": 1}), 0.1)
            started = time.monotonic()
            fresh = await policy.infer({"n": 2})
            return fresh["n"], time.monotonic() - started

    with FakePolicyServer(echo, delay_s=slow_if_odd) as server:
        answer, seconds = asyncio.run(main(server.port))
    assert answer == 2
    assert seconds < 0.4, "the next call did not wait for the answer that nobody wants"


def test_nobody_listens():
    async def main(port):
        async with AsyncWebsocketPolicy(port=port, connect_timeout=0.3):
            pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectTimeout):
        asyncio.run(main(port))


# ---- deadlines, for both clients


def test_a_deadline_travels_and_ends_the_wait():
    with FakePolicyServer(echo, delay_s=slow_if_odd) as server:
        with WebsocketPolicy(port=server.port, deadline=0.1) as policy:
            started = time.monotonic()
            with pytest.raises(InferenceTimeout, match=r"within 0\.1 s"):
                policy.infer({"n": 1})
            assert time.monotonic() - started < 0.4
            assert policy.infer({"n": 2})["n"] == 2, "the late answer is not taken for this one"
            assert policy.infer({"n": 4, "manipi/deadline_ms": 5000.0})["n"] == 4
            assert [o["manipi/deadline_ms"] for o in server.observations] == [100.0, 100.0, 5000.0]


def test_an_observation_whose_deadline_passed_while_connecting_is_not_sent():
    with FakePolicyServer(echo) as server:
        policy = WebsocketPolicy(port=server.port, deadline=0.2)
        assert policy.infer({"n": 1})["n"] == 1
    started = time.monotonic()
    restart = threading.Timer(0.6, lambda: servers.append(FakePolicyServer(echo, port=server.port).__enter__()))
    servers = []
    restart.start()
    with pytest.raises(InferenceTimeout, match="nothing was sent"):
        policy.infer({"n": 2})
    assert 0.5 < time.monotonic() - started < 3
    restart.join()
    assert policy.infer({"n": 3})["n"] == 3
    assert [observation["n"] for observation in servers[0].observations] == [3]
    policy.close()
    servers[0].__exit__(None, None, None)


def test_a_lazy_client_connects_when_it_is_asked():
    with FakePolicyServer(echo, {"robot": "tiny"}) as server:
        policy = WebsocketPolicy(port=server.port, lazy=True)
        assert policy.metadata == {}
        assert policy.infer({"n": 3})["n"] == 3
        assert policy.metadata == {"robot": "tiny"}
        policy.close()


def test_attempts_to_connect_become_rare():
    """0, 0.1, 0.3, 0.7, 1.5 s: five attempts in 1.6 seconds, at most; after the first one look for TLS."""
    attempts = 0
    with socket.create_server(("127.0.0.1", 0)) as tunnel:
        tunnel.settimeout(0.05)
        policy = AsyncWebsocketPolicy(port=tunnel.getsockname()[1], connect_timeout=1.6)

        async def main():
            nonlocal attempts
            connecting = asyncio.ensure_future(policy.__aenter__())
            while not connecting.done():
                with contextlib.suppress(socket.timeout):
                    tunnel.accept()[0].close()
                    attempts += 1
                await asyncio.sleep(0.01)
            with pytest.raises(ConnectTimeout):
                await connecting

        asyncio.run(main())
    assert 3 <= attempts <= 6
