"""A policy that goes on from a previous chunk, in the robot's commands: relative actions, norm stats, requests."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from manipi.errors import ConfigError, ObservationError
from manipi.model.config import Pi05Config
from manipi.policy import Policy
from manipi.robots import Gripper, Joints
from manipi.robots.tabletop import TABLETOP
from manipi.train.loop import train
from manipi.train.step.step import draw_delay

RELATIVE = replace(TABLETOP, actions=(Joints(3, relative=True), Gripper()))


def observe(x: float = 0.01, **more) -> dict:
    return {
        "observation/image": np.full((16, 16, 3), 90, np.uint8),
        "observation/state": np.array([x, -0.02, 0.03, 1.0]),
        "prompt": "reach it",
        **more,
    }


PREVIOUS = np.array([[0.02, 0.0, 0.01, 1.0], [0.03, 0.01, 0.0, 1.0], [0.04, 0.02, -0.01, 0.0]], np.float32)


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def prefix_trained(request, tiny, tmp_path_factory) -> Policy:
    config = tiny(request.param, steps=2, max_delay=2, robot=RELATIVE)
    return Policy.load(train(config, tmp_path_factory.mktemp("run") / "delayed", show=False))


def test_the_committed_commands_come_back_wherever_the_robot_is_now(prefix_trained):
    """Relative actions: the same commands are other offsets from another state."""
    assert prefix_trained.metadata["max_delay"] == 2
    for x in (0.01, 0.015, -0.03):
        asked = observe(x, **{"manipi/prev_actions": PREVIOUS, "manipi/delay": 2})
        actions = prefix_trained.infer(asked)["actions"]
        np.testing.assert_allclose(actions[:2], PREVIOUS[:2], atol=1e-5)
        assert np.abs(actions[2] - PREVIOUS[2]).max() > 1e-3


def test_warm_up_calls_what_real_time_chunking_will(prefix_trained):
    """Without a previous chunk, by prefix (norms differ by token), by guidance (gradients are wanted)."""
    p = prefix_trained
    policy = Policy(deepcopy(p.model), p.config, p.robot, p.norm_stats, p.tokenizers)
    policy.fuse()
    seen = set()

    def look(_, inputs, results):
        _, conds, *_ = inputs
        if "action" in results[0]:
            per_token = conds["action"] is not None and conds["action"][0].ndim > 1
            seen.add((results[0]["action"].requires_grad, 3 if per_token else 1))

    policy.model.gemma.blocks[-1].register_forward_hook(look)
    policy._warm_up()
    by_prefix = (False, 3 if isinstance(p.config.model, Pi05Config) else 1)
    assert seen == {(False, 1), (True, 1), by_prefix}


def test_a_longer_delay_than_trained_is_guided(prefix_trained):
    asked = observe(**{"manipi/prev_actions": PREVIOUS, "manipi/delay": 3, "manipi/seed": 4})
    guided = prefix_trained.infer(asked)["actions"]
    free = prefix_trained.infer(observe(**{"manipi/seed": 4}))["actions"]
    assert 1e-6 < np.abs(guided[:3] - PREVIOUS).mean() < 0.8 * np.abs(free[:3] - PREVIOUS).mean()


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_a_policy_without_prefixes_is_guided(trained, kind):
    policy = Policy.load(trained(kind))
    assert (policy.metadata["real_time"], policy.metadata["max_delay"]) == (True, 0)
    asked = observe(**{"manipi/prev_actions": PREVIOUS, "manipi/delay": np.int32(1), "manipi/seed": 4})
    free, guided = policy.infer(observe(**{"manipi/seed": 4}))["actions"], policy.infer(asked)["actions"]
    assert np.abs(guided[0] - PREVIOUS[0]).sum() < 0.7 * np.abs(free[0] - PREVIOUS[0]).sum()


def test_the_same_seed_asks_the_same_question(trained):
    policy = Policy.load(trained("pi05"))
    first, second, third = (policy.infer(observe(**{"manipi/seed": s}))["actions"] for s in (7, 8, 7))
    np.testing.assert_array_equal(first, third)
    assert not np.array_equal(first, second)


def test_fast_policies_say_that_they_cannot(trained):
    policy = Policy.load(trained("pi0_fast"))
    assert policy.metadata["real_time"] is False
    with pytest.raises(ObservationError, match="this policy cannot go on from"):
        policy.infer(observe(**{"manipi/prev_actions": PREVIOUS, "manipi/delay": 1}))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"manipi/prev_actions": PREVIOUS[:, :3]}, "prev_actions"),
        ({"manipi/prev_actions": PREVIOUS[0]}, "prev_actions"),
        ({"manipi/prev_actions": np.zeros((5, 4))}, "prev_actions"),
        ({"manipi/prev_actions": np.zeros((0, 4))}, "prev_actions"),
        ({"manipi/prev_actions": PREVIOUS * np.nan}, "NaN or infinity"),
        ({"manipi/prev_actions": "all of them"}, "prev_actions"),
        ({"manipi/delay": 5}, "delay"),
        ({"manipi/delay": -1}, "delay"),
        ({"manipi/delay": 1.0}, "delay"),
        ({"manipi/seed": "x"}, "seed"),
    ],
)
def test_what_does_not_fit_is_refused_by_key(trained, changes, key):
    asked = observe(**{"manipi/prev_actions": PREVIOUS, "manipi/delay": 1, **changes})
    with pytest.raises(ObservationError, match=key):
        Policy.load(trained("pi05")).infer(asked)


def test_a_delay_needs_a_previous_chunk(trained):
    with pytest.raises(ObservationError, match="prev_actions"):
        Policy.load(trained("pi05")).infer(observe(**{"manipi/delay": 1}))


def test_delays_are_a_function_of_seed_and_step():
    delays = draw_delay(1, 2, 4000, 3)
    assert torch.equal(delays, draw_delay(1, 2, 4000, 3))
    assert not torch.equal(delays, draw_delay(1, 3, 4000, 3))
    assert all(900 < count < 1100 for count in torch.bincount(delays).tolist())
    assert len(torch.bincount(delays)) == 4


def test_a_run_with_delays_learns_otherwise(tiny, trained, tmp_path):
    delayed = Policy.load(train(tiny("pi05", steps=2, max_delay=3), tmp_path / "run", show=False)).model.state_dict()
    plain = Policy.load(trained("pi05")).model.state_dict()
    assert any(not torch.equal(plain[key], delayed[key]) for key in plain)


@pytest.mark.parametrize(("kind", "delay"), [("pi05", 4), ("pi05", -1), ("pi0_fast", 1)])
def test_delays_that_cannot_be_trained(tiny, kind, delay):
    with pytest.raises(ConfigError, match="--max-delay"):
        tiny(kind, max_delay=delay)
