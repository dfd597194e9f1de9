"""A server that comes back with another robot or another checkpoint, against every kind of client."""

import asyncio
import copy
import time

import numpy as np
import pytest

from manipi_client import (
    ActionChunkBroker,
    ActionChunkError,
    AsyncWebsocketPolicy,
    ConnectError,
    Environment,
    PolicyAgent,
    PolicyChanged,
    RealTimeBroker,
    Runtime,
    WebsocketPolicy,
)
from manipi_client.address import differences
from manipi_client.fake import FakePolicyServer

METADATA = {
    "robot": {
        "name": "arm",
        "cameras": {"base": "image"},
        "state": [{"key": "state", "size": 2}],
        "default_prompt": None,
    },
    "action_space": [{"name": "x", "unit": "m", "low": -1.0}, {"name": "y", "unit": "m", "low": None}],
    "action_dim": 2,
    "control_hz": 10.0,
    "checkpoint": "0a" * 32,
    "step": 400,
    "real_time": True,
}
OPENPI = {"reset_pose": [0.0, -1.5, 1.0]}
"""openpi's server tells what its operator gave it."""


def changed(*path, to):
    """METADATA with one value changed, or a key taken out (`to=None`)."""
    metadata = copy.deepcopy(METADATA)
    inner = metadata
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return metadata


ANOTHER_ROBOT = [
    (changed("robot", "name", to="leg"), "robot.name is 'leg', was 'arm'"),
    (changed("robot", "cameras", "base", to="wrist"), "robot.cameras.base is 'wrist'"),
    (changed("robot", "state", 0, "size", to=3), r"robot.state\[0\].size is 3, was 2"),
    (changed("action_space", 1, "unit", to="rad"), r"action_space\[1\].unit is 'rad', was 'm'"),
    (changed("action_space", 0, "low", to=-2.0), r"action_space\[0\].low is -2.0, was -1.0"),
    (changed("action_dim", to=3), "action_dim is 3, was 2"),
    (changed("control_hz", to=20.0), "control_hz is 20.0, was 10.0"),
    ({key: METADATA[key] for key in METADATA if key != "robot"}, "robot is not told"),
]
ANOTHER_CHECKPOINT = [
    (changed("checkpoint", to="0b" * 32), "checkpoint is '0b0b"),
    (changed("step", to=500), "step is 500, was 400"),
    (changed("robot", "default_prompt", to="go"), "robot.default_prompt is 'go', was None"),
    ({**METADATA, "max_delay": 3}, "max_delay is 3, was not told"),
]


def websocket(port, again, **settings):
    with WebsocketPolicy(port=port, **settings) as policy:
        policy.infer({})
        again()
        return policy.infer({})["actions"]


def asyncio_(port, again, **settings):
    async def main():
        async with AsyncWebsocketPolicy(port=port, **settings) as policy:
            await policy.infer({})
            again()
            return (await policy.infer({}))["actions"]

    return asyncio.run(main())


def chunk_broker(port, again, **settings):
    with WebsocketPolicy(port=port, **settings) as policy:
        broker = ActionChunkBroker(policy, 2)
        broker.infer({})
        again()
        return [broker.infer({})["actions"] for _ in range(2)][-1]


def real_time(port, again, **settings):
    with WebsocketPolicy(port=port, **settings) as policy, RealTimeBroker(policy, 2, "ensemble") as broker:
        broker.infer({})
        again()
        for _ in range(30):
            action = broker.infer({})["actions"]
            time.sleep(0.02)
        return action


def runtime(port, again, **settings):
    actions = []

    class Arm(Environment):
        def reset(self):
            pass

        def is_episode_complete(self):
            return len(actions) == 3

        def get_observation(self):
            return {}

        def apply_action(self, action):
            actions.append(action["actions"])
            if len(actions) == 1:
                again()

    with WebsocketPolicy(port=port, **settings) as policy:
        Runtime(Arm(), PolicyAgent(ActionChunkBroker(policy, 1))).run()
        return actions[-1]


CLIENTS = [websocket, asyncio_, chunk_broker, real_time, runtime]


def meet(client, before, now, width=2, **settings):
    """What the client gets of a server that went away after its first answer and came back otherwise."""
    first = FakePolicyServer(lambda o: {"actions": np.zeros((4, 2))}, before).__enter__()
    servers = [first]

    def again():
        servers.pop().__exit__(None, None, None)
        chunk = {"actions": np.ones((4, width))}
        servers.append(FakePolicyServer(lambda o: chunk, now, port=first.port).__enter__())

    try:
        return client(first.port, again, **settings)
    finally:
        servers.pop().__exit__(None, None, None)


@pytest.mark.parametrize("client", CLIENTS)
def test_the_same_policy_goes_on(client):
    assert meet(client, METADATA, dict(reversed(list(METADATA.items())))).max() == 1


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("allowed", [False, True])
def test_another_robot_is_refused(client, allowed):
    for now, found in ANOTHER_ROBOT[:4] if client is websocket else ANOTHER_ROBOT[:1]:
        with pytest.raises(ConnectError, match=f"found another robot or action space: {found}") as refused:
            meet(client, METADATA, now, allow_new_checkpoint=allowed)
        assert isinstance(refused.value, PolicyChanged)


@pytest.mark.parametrize("client", CLIENTS)
def test_another_checkpoint_is_refused_unless_it_is_allowed(client):
    now, found = ANOTHER_CHECKPOINT[0]
    with pytest.raises(PolicyChanged, match=f"found another policy: {found}") as refused:
        meet(client, METADATA, now)
    assert "allow_new_checkpoint=True" in refused.value.next
    assert meet(client, METADATA, now, allow_new_checkpoint=True).max() == 1


@pytest.mark.parametrize(("now", "found"), ANOTHER_ROBOT + ANOTHER_CHECKPOINT)
def test_every_difference(now, found):
    is_robot = (now, found) in ANOTHER_ROBOT
    with pytest.raises(PolicyChanged, match=found):
        meet(websocket, METADATA, now, allow_new_checkpoint=is_robot)
    if not is_robot:
        meet(websocket, METADATA, now, allow_new_checkpoint=True)


def test_a_server_that_says_nothing_of_robots():
    assert meet(websocket, OPENPI, dict(OPENPI)).max() == 1
    with pytest.raises(PolicyChanged, match=r"reset_pose\[1\] is -1.2, was -1.5"):
        meet(websocket, OPENPI, {"reset_pose": [0.0, -1.2, 1.0]})
    assert meet(websocket, OPENPI, {}, allow_new_checkpoint=True).max() == 1


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("allowed", [False, True])
def test_a_server_that_says_nothing_at_all_is_known_by_its_actions(client, allowed):
    with pytest.raises(PolicyChanged, match=r"has shape \(3,\), was \(2,\)"):
        meet(client, {}, {}, width=3, allow_new_checkpoint=allowed)


def test_names_that_a_server_made_up_are_shown_on_one_line():
    with pytest.raises(PolicyChanged) as refused:
        meet(websocket, {}, {"\x1b[2J\n" * 10: {"\n" * 500: "\n" * 500}})
    assert refused.value.found.isprintable()
    assert len(refused.value.found) < 300


def test_once_refused_stays_refused():
    with FakePolicyServer(lambda o: {"actions": np.zeros((4, 2))}) as first:
        policy = WebsocketPolicy(port=first.port)
        policy.infer({})
    with FakePolicyServer(lambda o: {"actions": np.zeros((4, 3))}, port=first.port):
        for _ in range(3):
            with pytest.raises(PolicyChanged):
                policy.infer({})
    with FakePolicyServer(lambda o: {"actions": np.zeros((4, 2))}, {"robot": "b"}, port=first.port):
        for _ in range(3):
            with pytest.raises(PolicyChanged):
                policy.infer({})
    with FakePolicyServer(lambda o: {"actions": np.zeros((4, 2))}, port=first.port):
        assert policy.infer({})["actions"].shape == (4, 2)
        policy.close()


@pytest.mark.parametrize("make", [lambda p: ActionChunkBroker(p, 1), lambda p: RealTimeBroker(p, 1, "ensemble")])
def test_actions_that_change_their_shape_on_the_way(make):
    widths = iter([2, 3, 3, 3, 3])
    with FakePolicyServer(lambda o: {"actions": np.zeros((4, next(widths)))}) as server:
        with WebsocketPolicy(port=server.port) as policy:
            broker = make(policy)

            def drive():
                for _ in range(20):
                    broker.infer({})
                    time.sleep(0.02)

            with pytest.raises(ActionChunkError, match=r"shape \(2,\) each.*\n.*found actions of shape \(4, 3\)"):
                drive()
            getattr(broker, "close", lambda: None)()


def test_differences_are_short_whatever_is_told():
    before, now = (
        {"x": ["a" * 10_000] * 100, "y": np.zeros(5), "z": float("nan")},
        {"x": b"b" * 10_000, "z": float("nan")},
    )
    told = differences(before, now)
    assert len(told) == 2
    assert all(len(text) < 250 for text in told)
    assert differences(before, before) == []
    deep, deeper = 1, 2
    for _ in range(100):
        deep, deeper = {"a": [deep]}, {"a": [deeper]}
    assert len(differences(deep, deeper)) == 1
    assert differences(deep, deep) == []
