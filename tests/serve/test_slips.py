"""Observations that match the robot's spec, and in which something is not as it was meant."""

import logging
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from manipi.robots.tabletop import TABLETOP
from manipi.serve import PolicyServer
from manipi.serve.guard import require_prompt, unknown_keys
from manipi_client import ActionChunkBroker, RemoteInferenceError, WebsocketPolicy


class Still:
    def __init__(self):
        self.metadata = {"robot": TABLETOP.to_json()}

    def infer(self, observation, noise=None):
        return {"actions": np.tile(np.array([0.3, 0.0, 0.15, 0.2], np.float32), (4, 1))}


def observe(**more):
    return {
        "observation/image": np.zeros((16, 16, 3), np.uint8),
        "observation/state": np.array([0.3, 0.0, 0.15, 0.2]),
        "prompt": "reach it",
        **more,
    }


@pytest.fixture
def client():
    with PolicyServer(Still(), port=0, robot=TABLETOP).serve_in_thread() as port, WebsocketPolicy(port=port) as client:
        yield client


EMPTY = ["", "  \n", b"", np.array(""), np.array(["  "]), np.array(b"")]


@pytest.mark.parametrize("prompt", EMPTY, ids=repr)
def test_an_empty_prompt_is_refused(client, prompt):
    with pytest.raises(RemoteInferenceError, match="an instruction, as the policy was trained with") as refused:
        client.infer(observe(prompt=prompt))
    assert refused.value.code == "ObservationError"
    assert "--empty-prompts" in refused.value.next
    assert client.infer(observe())["actions"].shape == (4, 4)


@pytest.mark.parametrize("prompt", EMPTY, ids=repr)
def test_an_empty_prompt_where_the_policy_knows_it(prompt):
    with (
        PolicyServer(Still(), port=0, robot=TABLETOP, empty_prompts=True).serve_in_thread() as port,
        WebsocketPolicy(port=port) as client,
    ):
        assert client.infer(observe(prompt=prompt))["actions"].shape == (4, 4)


@pytest.mark.parametrize(("default", "allowed"), [(None, False), ("pick", False), ("", True)])
def test_an_empty_prompt_and_the_default(default, allowed):
    robot = replace(TABLETOP, default_prompt=default)
    with PolicyServer(Still(), port=0, robot=robot).serve_in_thread() as port, WebsocketPolicy(port=port) as client:
        if allowed:
            client.infer(observe(prompt=""))
        else:
            with pytest.raises(RemoteInferenceError, match="send what the robot is to do") as refused:
                client.infer(observe(prompt=""))
            assert ("leave the key out for 'pick'" in refused.value.next) == (default == "pick")


def test_an_unknown_key_is_told_once_to_each_client(caplog):
    asked = observe(**{"observation/imge": np.zeros(3), "task": {"suite": 1}, "manipi/prev_action": 0})
    with PolicyServer(Still(), port=0, robot=TABLETOP).serve_in_thread() as port, caplog.at_level(logging.WARNING):
        for _ in range(2):
            with WebsocketPolicy(port=port) as client:
                assert client.infer(asked)["unknown_keys"] == [
                    "'observation/imge', which is not read",
                    "'task/suite', which is not read",
                    "'manipi/prev_action', which is not read (is it 'manipi/prev_actions'?)",
                ]
                assert "unknown_keys" not in client.infer(asked)
                assert "unknown_keys" in client.infer({**asked, "extra": 1})
    sent = [record.message for record in caplog.records if "'observation/imge'" in record.message]
    assert sum("sends" in message for message in sent) == 2, "in the server's log"
    assert sum("was sent" in message for message in sent) == 2, "in the client's"


def test_keys_that_the_robot_or_the_server_knows_are_not_told(client):
    known = {
        "manipi/step": 3,
        "manipi/seed": 1,
        "manipi/deadline_ms": 1e4,
        "manipi/reset": True,
        "actions": np.zeros((4, 4)),
    }
    assert "unknown_keys" not in client.infer(observe(**known))
    nested = {"observation": {"image": np.zeros((16, 16, 3), np.uint8), "state": np.zeros(4)}, "prompt": "go"}
    assert "unknown_keys" not in client.infer(nested)


def test_a_client_of_many_keys_is_told_of_some(client, caplog):
    with caplog.at_level(logging.WARNING, "manipi.serve.server"):
        for n in range(3):
            client.infer(observe(**{f"{'x' * 300}\n{n}-{i}": i for i in range(100)}))
    told = [record.getMessage() for record in caplog.records if record.name == "manipi.serve.server"]
    assert 1 <= len(told) <= 10
    assert all(len(text) < 300 and "\n" not in text for text in told)


@pytest.mark.parametrize(
    "more",
    [
        {"prompt": np.array(" " * 5_000_000)},
        {"prompt": b" " * 5_000_000},
        {"prompt": [""]},
        {"prompt": np.array(["", ""])},
        {b"x" * 5_000_000: 1},
        {"a": {b"x" * 5_000_000: 1}},
        {"x" * 5_000_000: 1},
    ],
    ids=["array", "bytes", "list", "two texts", "bytes as key", "nested", "long key"],
)
def test_what_is_no_slip_is_left_to_others(more):
    """Quickly, and without a copy of it."""
    tracemalloc.start()
    asked = observe() | more
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    require_prompt(asked, TABLETOP)
    assert all(len(text) < 200 for text in unknown_keys(asked, TABLETOP, set()))
    assert tracemalloc.get_traced_memory()[1] - before < 1_000_000
    tracemalloc.stop()


def test_brokers_hand_out_the_same_steps(client):
    broker = ActionChunkBroker(client, 4)
    assert [broker.infer(observe(extra=1))["actions"].shape for _ in range(5)] == [(4,)] * 5


def test_the_nearest_key_is_one_that_is_missing():
    asked = {"observation/image": 0, "observation/stat": 0, "prompt": "go"}
    assert unknown_keys(asked, TABLETOP, set()) == [
        "'observation/stat', which is not read (is it 'observation/state'?)"
    ]
