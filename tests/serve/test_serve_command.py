"""`manipi serve` on a real checkpoint, as a process: what it says of itself, and whom it lets in."""

import contextlib
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from tests.commands import Command

from manipi.cli.serve import _was_trained_without_prompt
from manipi.data.dataset import Feature
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.policy import Policy
from manipi.train.loop import train
from manipi_client import ConnectError, RemoteInferenceError, WebsocketPolicy


@contextlib.contextmanager
def serving(checkpoint, folder, *flags, **environment):
    ready = folder / "port"
    server = Command("serve", checkpoint, "--port", "0", "--ready-file", ready, *flags, **environment)
    try:
        while not ready.exists():
            assert server.poll() is None, server.said()
            time.sleep(0.05)
        yield int(ready.read_text()), server
    finally:
        os.kill(server.pid, signal.SIGTERM)
        done = server.communicate(20)
        assert done.returncode == 0, done.stderr


def observation(prompt="reach it"):
    picture = np.full((30, 40, 3), 90, np.uint8)
    return {"observation/image": picture, "observation/state": np.array([0.01, -0.02, 0.03, 1.0]), "prompt": prompt}


def ask_together(port, token, observations):
    """The chunks that as many clients get, who ask at the same time."""
    ready = threading.Barrier(len(observations))

    def ask(one):
        with WebsocketPolicy(port=port, token=token) as client:
            ready.wait()
            return client.infer(one)["actions"]

    with ThreadPoolExecutor(len(observations)) as pool:
        return list(pool.map(ask, observations))


@pytest.mark.slow
def test_a_checkpoint_served_with_a_token(trained, tmp_path):
    checkpoint = trained("pi05")
    with serving(checkpoint, tmp_path, "--seed", "3", "--num-threads", "1", MANIPI_TOKEN="k3y-of-the-lab") as (
        port,
        server,
    ):
        with pytest.raises(ConnectError, match="401"):
            WebsocketPolicy(port=port)
        with (
            WebsocketPolicy(port=port, token="k3y-of-the-lab") as first,
            WebsocketPolicy(port=port, token="k3y-of-the-lab") as second,
        ):
            metadata = first.metadata
            policy = Policy.load(checkpoint, seed=3)
            limits = policy.robot.limits  # which the server's guard keeps; two steps of training do not
            expected = [np.clip(policy.infer(observation())["actions"], *limits) for _ in range(2)]
            # Each client's noise begins at the seed, whoever asks in between.
            served = [client.infer(observation())["actions"] for client in (first, second, first)]
            for got, wanted in zip(served, (expected[0], expected[0], expected[1]), strict=True):
                np.testing.assert_allclose(got, wanted, atol=1e-5)
            with pytest.raises(RemoteInferenceError) as refused:
                first.infer({**observation(), "observation/state": np.zeros(3)})
            assert refused.value.expected == "4 finite numbers"
            assert refused.value.found == "float64 [3]"
            assert "'observation/state'" in refused.value.where
        together = ask_together(port, "k3y-of-the-lab", [observation(prompt) for prompt in ("reach it", "push it") * 3])
        policy.reset()
        pushed = np.clip(policy.infer(observation("push it"))["actions"], *limits)
        for got, wanted in zip(together, (expected[0], pushed) * 3, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-5)
        assert "k3y-of-the-lab" not in server.said()
    assert metadata["robot"]["name"] == "tabletop"
    assert [dimension["name"] for dimension in metadata["action_space"]] == ["x", "y", "z", "gripper"]
    assert [dimension["unit"] for dimension in metadata["action_space"]] == ["m", "m", "m", ""]
    assert (metadata["control_hz"], metadata["image_size"], metadata["action_horizon"]) == (10.0, 16, 4)
    assert len(metadata["checkpoint"]) == 64


def test_a_policy_that_was_trained_without_instructions_takes_none(tiny, trained, toy_episodes, tmp_path):
    features = {
        "observation/image": Feature(kind="image", shape=(16, 16, 3), dtype="video"),
        "observation/state": Feature(kind="vector", shape=(4,), dtype="float32"),
        "actions": Feature(kind="vector", shape=(4,), dtype="float32"),
    }
    with LeRobotWriter(
        tmp_path / "data", fps=10, features=features, robot_type="tabletop", pix_fmt="yuv444p"
    ) as writer:
        for episode in toy_episodes:
            writer.add_episode(episode, task="")
    data = replace(tiny("pi05").data, path=str(tmp_path / "data"))
    checkpoint = train(tiny("pi05", steps=1, data=data), tmp_path / "run", show=False)
    assert _was_trained_without_prompt(checkpoint)
    assert not _was_trained_without_prompt(trained("pi05"))
