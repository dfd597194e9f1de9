import numpy as np
import pytest
import torch
from tests.train.sizes import with_layers

from manipi.errors import ConfigError, ObservationError
from manipi.model import VLA
from manipi.policy import Policy
from manipi.robots import Robot

RECIPE_TYPES = {"pi05": "Pi05Config", "pi0": "Pi0Config", "pi0_fast": "Pi0FastConfig"}
KINDS = tuple(RECIPE_TYPES)


def observation() -> dict:
    return {
        "observation/image": np.full((30, 40, 3), 90, np.uint8),
        "observation/state": np.array([0.01, -0.02, 0.03, 1.0]),
        "prompt": "reach it",
    }


@pytest.fixture(scope="module", params=KINDS)
def policy(request, trained) -> Policy:
    return Policy.load(trained(request.param), seed=3)


@pytest.fixture(scope="module", params=KINDS)
def deeper(request, tiny, undisturbed) -> Policy:
    """Of two layers: a π0-FAST of one answers all pictures alike after two steps."""
    return Policy.load(undisturbed(with_layers(tiny(request.param, steps=2), 2)) / "checkpoints/2", seed=3)


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


def observations() -> list[dict]:
    """Other pictures, and prompts of other lengths."""
    words = ("reach it", "reach the block that is far away", "go")
    pictures = [np.full((30, 40, 3), grey, np.uint8) for grey in (90, 10, 200)]
    pairs = zip(words, pictures, strict=True)
    return [observation() | {"prompt": prompt, "observation/image": picture} for prompt, picture in pairs]


def test_a_batch_answers_what_each_would_get_alone(deeper):
    policy = deeper
    noises = [policy.draw_noise() for _ in range(3)]
    alone = [policy.infer(o, n)["actions"] for o, n in zip(observations(), noises, strict=True)]
    together = policy.infer_batch(observations(), noises)
    for one, answer in zip(alone, together, strict=True):
        np.testing.assert_allclose(answer["actions"], one, atol=1e-5)
    assert np.abs(alone[0] - alone[1]).max() > 1e-4


def test_a_batch_draws_the_noise_of_one_by_one(policy):
    policy.reset()
    alone = [policy.infer(o)["actions"] for o in observations()]
    policy.reset()
    for one, answer in zip(alone, policy.infer_batch(observations()), strict=True):
        np.testing.assert_allclose(answer["actions"], one, atol=1e-5)


def test_one_bad_observation_stops_a_batch_before_the_model(policy, monkeypatch):
    called = []
    monkeypatch.setattr(policy, "run_model", lambda *_: called.append(1))
    with pytest.raises(ObservationError, match="observation/image"):
        policy.infer_batch([observation(), {"prompt": "reach it"}])
    assert not called


def test_many_noises_share_one_observation(trained):
    policy = Policy.load(trained("pi05"))
    noises = np.stack([policy.draw_noise() for _ in range(3)])
    chunks = policy.infer(observation(), noises)["actions"]
    assert chunks.shape == (3, 4, 4)
    for noise, chunk in zip(noises, chunks, strict=True):
        np.testing.assert_allclose(chunk, policy.infer(observation(), noise)["actions"], atol=1e-5)


@pytest.mark.parametrize("shapes", [[(4, 5)], [(4, 6)], [(2, 4, 32), (4, 32)], [(1, 1, 4, 32)]])
def test_noise_of_another_shape_is_refused(trained, shapes):
    policy = Policy.load(trained("pi05"))
    with pytest.raises(ConfigError, match="draw_noise"):
        policy.infer_batch(observations()[: len(shapes)], [np.zeros(shape, np.float32) for shape in shapes])


def test_a_fused_policy_acts_like_the_plain_one(policy, trained):
    fused = Policy.load(trained(next(k for k, v in RECIPE_TYPES.items() if v in str(type(policy.config.model)))))
    fused.fuse()
    noises = [policy.draw_noise() for _ in range(3)]
    plain = policy.infer_batch(observations(), noises)
    for one, answer in zip(plain, fused.infer_batch(observations(), noises), strict=True):
        np.testing.assert_allclose(answer["actions"], one["actions"], atol=1e-5)


@pytest.mark.parametrize("where", ["to", "sample"])
def test_a_gpu_without_room_for_the_policy(trained, monkeypatch, where):
    """What torch would raise there, while the weights move or while the self-test is computed."""

    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB.")

    monkeypatch.setattr(VLA, where, no_room)
    with pytest.raises(ConfigError, match=r"(?s)expected room for 0\.0\d GiB of weights on cpu.*to allocate 4.00 GiB"):
        Policy.load(trained("pi05"))
