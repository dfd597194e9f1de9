import numpy as np
import pytest

from manipi.errors import ObservationError
from manipi.policy import Policy
from manipi.robots import Robot

KINDS = ("pi05", "pi0", "pi0_fast")


def observation() -> dict:
    return {
        "observation/image": np.full((30, 40, 3), 90, np.uint8),
        "observation/state": np.array([0.01, -0.02, 0.03, 1.0]),
        "prompt": "reach it",
    }


@pytest.fixture(scope="module", params=KINDS)
def policy(request, trained) -> Policy:
    return Policy.load(trained(request.param), seed=3)


def test_the_noise_decides_alone(policy):
    policy.reset()
    noise = policy.draw_noise()
    first, second = (policy.infer(observation(), noise)["actions"] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_reset_begins_the_same_episode_again(policy):
    policy.reset()
    first = [policy.infer(observation())["actions"] for _ in range(2)]
    policy.reset()
    again = [policy.infer(observation())["actions"] for _ in range(2)]
    np.testing.assert_array_equal(first, again)
    # Within an episode the noise goes on; π0-FAST has none.
    differs = not np.array_equal(first[0], first[1])
    assert differs == (type(policy.config.model).__name__ != "Pi0FastConfig")


def test_the_seed_is_the_policys(trained):
    chunks = [Policy.load(trained("pi05"), seed=seed).infer(observation())["actions"] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(chunks[0], chunks[1])
    assert not np.array_equal(chunks[0], chunks[2])


def test_the_policy_does_not_look_at_recorded_actions(policy):
    noise = policy.draw_noise()
    recorded = {"actions": np.ones((4, 4), np.float32), "action_valid": np.ones(4, bool)}
    alone, beside = (policy.infer(o, noise)["actions"] for o in (observation(), observation() | recorded))
    np.testing.assert_array_equal(alone, beside)


def test_the_observation_is_not_changed(policy):
    given = observation()
    policy.infer(given)
    for key, value in observation().items():
        np.testing.assert_array_equal(given[key], value)


def test_a_bad_observation_is_refused(policy):
    with pytest.raises(ObservationError, match="observation/image"):
        policy.infer({"prompt": "reach it"})


def test_what_it_tells_its_clients(policy):
    metadata = policy.metadata
    assert Robot.from_json(metadata["robot"], "metadata") == policy.robot
    assert (metadata["action_horizon"], metadata["action_dim"], metadata["image_size"]) == (4, 4, 16)
    assert metadata["control_hz"] == 10.0
    assert policy.infer(observation())["policy_timing"]["infer_ms"] > 0
