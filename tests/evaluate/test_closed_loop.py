"""Every way to join chunks on the same scenes, through a real websocket, on the arm's own clock."""

import numpy as np
import pytest

from manipi.cli import main
from manipi.errors import ConfigError
from manipi.evaluate.rollout import compare
from manipi_client import WebsocketPolicy
from manipi_client.fake import FakePolicyServer

METADATA = {"robot": {"name": "tabletop"}, "action_horizon": 8, "image_size": 16, "real_time": True}


@pytest.fixture
def connect():
    """A policy that keeps the tip above the middle of the table, where there is nothing to touch."""
    chunk = np.tile(np.array([0.33, 0.0, 0.15, 0.2], np.float32), (8, 1))

    def open_server(**metadata):
        return FakePolicyServer(lambda observation: {"actions": chunk}, {**METADATA, **metadata})

    return open_server


def asked(server):
    """The steps of each episode at which the policy was asked, in order."""
    episodes = []
    for observation in server.observations:
        if observation["manipi/step"] == 0:
            episodes.append([])
        episodes[-1].append(observation["manipi/step"])
    return episodes


def test_answers_come_when_the_arm_has_made_the_steps(connect):
    with connect() as server, WebsocketPolicy(port=server.port) as policy:
        results = compare(policy, range(2), execute_steps=2, delay=3)
    assert [result.join for result in results] == ["synchronous", "asynchronous", "ensemble", "real_time"]
    # Asked 2 steps after the first observation, and then whenever an answer has come: 3 steps later.
    waiting, moving = [*range(0, 30, 2)], [0, 2, *range(5, 30, 3)]
    assert asked(server) == [waiting] * 2 + [moving] * 6
    told = [o["manipi/delay"] for o in server.observations if "manipi/prev_actions" in o]
    assert told == [3] * 2 * (len(moving) - 1)


def test_what_is_counted(connect):
    with connect() as server, WebsocketPolicy(port=server.port) as policy:
        waiting, *moving = compare(policy, range(2), execute_steps=4, delay=2)
    assert waiting.seconds == pytest.approx((30 + 2 * 8) / 10)
    assert [result.seconds for result in moving] == [pytest.approx((30 + 2) / 10)] * 3
    for result in (waiting, *moving):
        assert (result.success.n, result.success.k) == (2, 0)
        assert (result.motion.steps, result.motion.starved_steps) == (60, 0)
        np.testing.assert_allclose(result.motion.seam_jump, 0, atol=1e-9)


def test_a_policy_without_real_time_chunking_is_compared_without_it(connect):
    with connect(real_time=False) as server, WebsocketPolicy(port=server.port) as policy:
        results = compare(policy, [0], execute_steps=4, delay=2)
    assert [result.join for result in results] == ["synchronous", "asynchronous", "ensemble"]


@pytest.mark.parametrize(
    ("metadata", "steps", "found"),
    [({}, (4, 5), "4 and 5"), ({}, (4, 0), "4 and 0"), ({"robot": {"name": "aloha"}}, (4, 2), "one for 'aloha'")],
)
def test_what_cannot_be_driven(connect, metadata, steps, found):
    with (
        connect(**metadata) as server,
        WebsocketPolicy(port=server.port) as policy,
        pytest.raises(ConfigError, match=found),
    ):
        compare(policy, [0], execute_steps=steps[0], delay=steps[1])


@pytest.mark.slow
def test_the_command_serves_the_checkpoint_and_says_whose_it_is(checkpoint, capsys):
    with pytest.raises(SystemExit):
        main(["eval", str(checkpoint), "--scenes", "2", "--num-threads", "1"])
    assert "one for 'planted'" in capsys.readouterr().err
