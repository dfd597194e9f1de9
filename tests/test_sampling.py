"""How an answer is sampled: integration steps and temperature, by request or by flag, never by what else is asked."""

import numpy as np
import pytest
import torch

from manipi.errors import ConfigError, ObservationError
from manipi.model.autoregressive import TokenDraws, _choose
from manipi.policy import Policy
from manipi_client.keys import NUM_STEPS, SEED, TEMPERATURE


@pytest.fixture(scope="module")
def flow(trained):
    return Policy.load(trained("pi05"))


@pytest.fixture(scope="module")
def tokens(trained):
    return Policy.load(trained("pi0_fast"))


@pytest.fixture
def observation(flow):
    rng = np.random.default_rng(0)
    size = flow.config.model.vision.image_size
    pictures = {key: rng.integers(0, 256, (size, size, 3), np.uint8) for key in flow.robot.cameras.values()}
    return {
        **pictures,
        **{s.key: np.full(s.size, 0.1, np.float32) for s in flow.robot.state},
        "prompt": "reach the red block",
    }


def test_steps_of_a_request_are_those_of_the_model(flow, observation):
    own = flow.infer({**observation, SEED: 3})["actions"]
    assert np.array_equal(own, flow.infer({**observation, SEED: 3, NUM_STEPS: flow.config.num_steps})["actions"])
    two = flow.infer({**observation, SEED: 3, NUM_STEPS: 2})["actions"]
    assert not np.array_equal(own, two)
    inputs = flow.model_input([flow.encode(observation)])
    direct = flow.model.sample(inputs, torch.from_numpy(flow.draw_noise(3))[None], 2)[0].numpy()
    np.testing.assert_array_equal(flow.pipeline.decode(direct, flow.encode(observation).seen), two)


def test_a_batch_of_different_steps_answers_each_as_alone(flow, observation):
    asked = [{**observation, SEED: 3}, {**observation, SEED: 4, NUM_STEPS: 2}, {**observation, SEED: 3}]
    together = [answer["actions"] for answer in flow.infer_batch(asked)]
    for one, alone in zip(together, asked, strict=True):
        np.testing.assert_allclose(one, flow.infer(alone)["actions"], atol=1e-5)


def test_a_temperature_draws_by_the_seed_alone(tokens, observation):
    def ids(*questions):
        encoded = [tokens.encode(one) for one in questions]
        draws = [tokens._draws(one.request) for one in encoded]
        return tokens.run_model(tokens.model_input(encoded), None, None, draws)

    hot = {**observation, TEMPERATURE: 5.0}
    one, again, other = (ids({**hot, SEED: seed})[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(ids({**hot, SEED: 2}, {**hot, SEED: 1})[1], one)
    cold = ids({**observation, TEMPERATURE: 0})[0]
    np.testing.assert_array_equal(cold, ids(observation)[0])
    assert tokens.infer({**hot, SEED: 1})["actions"].shape == tokens.infer(observation)["actions"].shape


def test_tokens_are_drawn_with_the_models_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    for temperature in (0.5, 1.0, 2.0):
        drawn = [_choose(logits, TokenDraws(temperature, seed), 0) for seed in range(4_000)]
        found = np.bincount(drawn, minlength=4) / len(drawn)
        np.testing.assert_allclose(found, torch.softmax(logits / temperature, 0), atol=0.03)


@pytest.mark.parametrize(
    ("policy", "key", "value", "message"),
    [
        ("flow", NUM_STEPS, 0, "from 1 to 1000"),
        ("flow", NUM_STEPS, 1001, "from 1 to 1000"),
        ("flow", NUM_STEPS, 2.5, "from 1 to 1000"),
        ("flow", TEMPERATURE, 1.0, "for token policies"),
        ("tokens", NUM_STEPS, 3, "for flow policies"),
        ("tokens", TEMPERATURE, -1.0, "from 0 to 100"),
        ("tokens", TEMPERATURE, float("nan"), "from 0 to 100"),
        ("tokens", TEMPERATURE, "hot", "from 0 to 100"),
    ],
)
def test_what_no_policy_can_do(policy, key, value, message, observation, request):
    with pytest.raises(ObservationError, match=message):
        request.getfixturevalue(policy).infer({**observation, key: value})


def test_flags_are_the_requests_defaults(trained, observation):
    policy = Policy.load(trained("pi05"))
    expected = policy.infer({**observation, SEED: 3, NUM_STEPS: 2})["actions"]
    policy.set_sampling(num_steps=2)
    np.testing.assert_array_equal(policy.infer({**observation, SEED: 3})["actions"], expected)
    policy.fuse()
    with pytest.raises(ObservationError, match="2 integration steps, for which the engine was made"):
        policy.infer({**observation, NUM_STEPS: 3})
    with pytest.raises(ConfigError, match="one with an engine"):
        policy.set_sampling(num_steps=3)
    with pytest.raises(ConfigError, match="writes tokens"):
        policy.set_sampling(temperature=1.0)
    writer = Policy.load(trained("pi0_fast"))
    with pytest.raises(ConfigError, match="a flow policy"):
        writer.set_sampling(num_steps=3)
    writer.set_sampling(temperature=1.0)
    assert writer.temperature == 1.0
