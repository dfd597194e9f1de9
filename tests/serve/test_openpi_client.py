"""openpi's published client and server against ours, over real connections.

Each test runs where the package that it needs can be imported: `openpi_client` (or the environment variable
MANIPI_OPENPI_CLIENT names its `src` folder) and, for its server, `openpi`.
"""

import asyncio
import contextlib
import os
import socket
import threading

import numpy as np
import pytest

from manipi_client import ActionChunkBroker, RemoteInferenceError, WebsocketPolicy, wire

# Their client does not enter the connection that it opens; websockets 17.1 and later warn about that.
pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager:DeprecationWarning")


@pytest.fixture
def load(monkeypatch):
    """`load(module)` imports one of their modules, or skips the test."""
    if folder := os.environ.get("MANIPI_OPENPI_CLIENT"):
        monkeypatch.syspath_prepend(folder)

    def load(module):
        reason = f"{module} and its dependencies cannot be imported (set MANIPI_OPENPI_CLIENT to openpi-client's src)"
        return pytest.importorskip(module, reason=reason, exc_type=ImportError)

    return load


@pytest.fixture
def their_client(load, port):
    client = load("openpi_client.websocket_client_policy").WebsocketClientPolicy("127.0.0.1", port, api_key="unused")
    yield client
    client._ws.close()


@pytest.fixture
def pictures(observation):
    """An observation with three cameras."""
    rng = np.random.default_rng(0)
    return {**observation, **{f"camera_{n}": rng.integers(0, 256, (224, 224, 3), np.uint8) for n in range(3)}}


def test_their_client_gets_metadata_and_actions_from_our_server(their_client, policy, pictures):
    assert their_client.get_server_metadata() == policy.metadata
    for expected_keys in ({"infer_ms"}, {"infer_ms", "prev_total_ms"}):
        answer = their_client.infer(pictures)
        np.testing.assert_array_equal(answer["actions"], policy.infer(pictures)["actions"])
        assert answer["policy_timing"] == {"infer_ms": 10.0}
        assert set(answer["server_timing"]) == expected_keys


def test_their_client_shows_our_error(their_client):
    with pytest.raises(RuntimeError, match="Error in inference server:\nObservationError\nexpected a state"):
        their_client.infer({"prompt": "go"})


def test_their_broker_and_ours_hand_out_the_same_steps(load, their_client, port, observation):
    theirs = load("openpi_client.action_chunk_broker").ActionChunkBroker(their_client, 3)
    with WebsocketPolicy(port=port) as client:
        ours = ActionChunkBroker(client, 3)
        for _ in range(7):
            np.testing.assert_array_equal(
                ours.infer(observation)["actions"], theirs.infer(observation)["actions"], strict=True
            )


def test_their_bytes_are_ours(load, pictures):
    theirs = load("openpi_client.msgpack_numpy")
    assert theirs.packb(pictures) == wire.pack(pictures)
    for key, value in theirs.unpackb(wire.pack(pictures)).items():
        np.testing.assert_array_equal(value, pictures[key], strict=isinstance(value, np.ndarray))


def test_our_client_talks_to_their_server(load, policy, pictures):
    serving = load("openpi.serving.websocket_policy_server")
    server = serving.WebsocketPolicyServer(policy, metadata=policy.metadata)
    with running(server) as port, WebsocketPolicy(port=port) as client:
        assert client.metadata == policy.metadata
        np.testing.assert_array_equal(client.infer(pictures)["actions"], policy.infer(pictures)["actions"])
        with pytest.raises(RemoteInferenceError, match="secret") as failure:
            client.infer({**pictures, "prompt": "fail"})
        assert failure.value.text.startswith("Traceback")
        assert client.infer(pictures)["actions"].shape == (4, 3)


@contextlib.contextmanager
def running(their_server):
    """Runs their server in a thread, on a free port. It has no way to stop, so its loop is cancelled."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        their_server._host, their_server._port = probe.getsockname()
    loop = asyncio.new_event_loop()
    task = loop.create_task(their_server.run())

    def run():
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=run)
    thread.start()
    yield their_server._port
    loop.call_soon_threadsafe(task.cancel)
    thread.join()
    loop.close()
