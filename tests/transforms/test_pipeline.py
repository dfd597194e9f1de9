"""The whole way: a robot's observation to the model's arrays, and the model's output to commands."""

import importlib
import pkgutil
from dataclasses import replace

import numpy as np
import pytest

import manipi.robots
from manipi.errors import ConfigError, NormStatsError
from manipi.model.config import Pi0Config, Pi0FastConfig, Pi05Config
from manipi.robots import EndEffector, Gripper, Joints, Robot, State
from manipi.robots.aloha import aloha
from manipi.robots.franka import droid, libero
from manipi.robots.ur5 import ur5
from manipi.tokenizers import ByteTokenizer, FastTokenizer, Tokenizers
from manipi.transforms import pipeline
from manipi.transforms.actions import from_matrix, to_matrix
from manipi.transforms.normalize import normalize
from manipi.types import FieldStats, Frame, NormStats

HORIZON = 5
ROBOTS = [
    robot
    for module in pkgutil.iter_modules(manipi.robots.__path__)
    for robot in vars(importlib.import_module(f"manipi.robots.{module.name}")).values()
    if isinstance(robot, Robot)
]
ARM = Robot(
    name="arm",
    cameras={"base": "image", "left_wrist": "wrist"},
    state=(State("joints", 2), State("pose", 6), State("gripper", 1)),
    actions=(Joints(2, relative=True), EndEffector("rotvec", relative=True), Gripper(open=0.08, closed=0.0)),
    dataset_keys={"image": "observation.images.top"},
)
MODELS = {
    "pi0": Pi0Config(action_dim=16, action_horizon=HORIZON),
    "pi05": Pi05Config(action_dim=16, action_horizon=HORIZON),
    "pi0_fast": Pi0FastConfig(action_dim=16, action_horizon=HORIZON, max_token_len=300),
}
OPENPI = [aloha(), droid(action_space="joint_position"), libero(), ur5()]
every_robot = pytest.mark.parametrize("robot", [ARM, *OPENPI, *ROBOTS], ids=lambda robot: robot.name)
every_model = pytest.mark.parametrize("kind", MODELS)


def example(robot: Robot, seed: int = 0) -> tuple[dict, np.ndarray]:
    """A random observation of the robot, with commands near its state."""
    rng = np.random.default_rng(seed)
    pictures = {key: rng.integers(0, 256, (30, 40, 3), dtype=np.uint8) for key in robot.cameras.values()}
    vectors = {s.key: rng.normal(0, 0.5, s.size) for s in robot.state}
    actions = rng.normal(0, 0.5, (HORIZON, robot.action_size))
    start = 0
    for group in robot.actions:
        if isinstance(group, EndEffector) and group.rotation != "none":
            part = actions[:, start + 3 : start + group.size]
            part[:] = from_matrix(to_matrix(rng.normal(size=(HORIZON, 4)), "quat_xyzw"), group.rotation)
        if isinstance(group, Gripper):
            actions[:, start] = rng.uniform(min(group.open, group.closed), max(group.open, group.closed), HORIZON)
        start += group.size
    return {**pictures, **vectors, "prompt": "reach it"}, actions


def stats(robot: Robot, horizon: int = HORIZON) -> NormStats:
    def field(dims: int) -> FieldStats:
        one = np.ones(dims)
        return FieldStats(0.1 * one, 0.7 * one, -2 * one, 2.5 * one, -3 * one, 3 * one)

    made_for = pipeline.contract(robot, horizon)
    return NormStats(
        state=field(robot.state_size), actions=field(robot.model_action_size), num_frames=1, contract=made_for, data=""
    )


def build(robot: Robot, kind: str, mode: str = "quantile") -> pipeline.Pipeline:
    fast = None
    if kind == "pi0_fast":
        chunks = np.random.default_rng(0).uniform(-1.5, 1.5, (50, HORIZON, robot.model_action_size))
        fast = FastTokenizer.fit(chunks, scale=50, vocab_size=1024)
    room = fast.vocab_size if fast else 0
    tokenizers = Tokenizers(ByteTokenizer(ByteTokenizer.NUM_TEXT_IDS + room), fast)
    return pipeline.build(robot, MODELS[kind], stats(robot), tokenizers, mode)


@every_robot
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize("mode", ["zscore", "quantile"])
def test_decoding_undoes_encoding(robot, kind, mode):
    observation, actions = example(robot)
    steps = build(robot, kind, mode)
    encoded, seen = steps.encode(observation | {"actions": actions})
    np.testing.assert_allclose(steps.decode(encoded["actions"], seen), actions, atol=1e-5)


@every_robot
def test_decoding_undoes_encoding_through_tokens(robot):
    """π0-FAST's actions are rounded: by at most half a coefficient of 1/scale each, before unnormalisation."""
    observation, actions = example(robot)
    steps = build(robot, "pi0_fast")
    encoded, seen = steps.encode(observation | {"actions": actions})
    emitted = encoded["tokens"][encoded["token_loss"]]
    error = np.abs(steps.decode(emitted, seen) - actions)
    coefficient_error = 0.5 / 50 * np.sqrt(HORIZON) * (2.5 + 2) / 2
    assert error.max() < 3 * coefficient_error
    assert not {"actions", "action_valid"} & encoded.keys()


@every_robot
@every_model
def test_what_the_model_gets(robot, kind):
    model = MODELS[kind]
    observation, actions = example(robot)
    steps = build(robot, kind)
    encoded, _ = steps.encode(observation)
    size = model.vision.image_size
    assert encoded["images"].shape == (3, size, size, 3)
    assert encoded["images"].dtype == np.uint8
    present = [slot in robot.cameras for slot in model.cameras]
    assert encoded["image_valid"].tolist() == [p or kind == "pi0_fast" for p in present]
    assert [bool(image.any()) for image in encoded["images"]] == present
    assert encoded["state"].shape == (16,)
    assert not encoded["state"][robot.state_size :].any()
    # Sampling needs to know the padded dimensions as much as training does.
    assert encoded["action_dim_valid"].tolist() == [d < robot.model_action_size for d in range(16)]
    assert encoded["tokens"].shape == encoded["token_valid"].shape == (model.max_token_len,)
    assert "actions" not in encoded
    with_actions, _ = steps.encode(observation | {"actions": actions})
    if kind != "pi0_fast":
        for key, value in encoded.items():
            np.testing.assert_array_equal(with_actions[key], value)
        assert with_actions["actions"].shape == (HORIZON, 16)
        assert not with_actions["actions"][:, robot.model_action_size :].any()


def test_the_state_is_text_in_pi05_and_pi0_fast_only():
    observation, _ = example(ARM)
    moved = observation | {"gripper": observation["gripper"] + 1}
    for kind in MODELS:
        steps = build(ARM, kind)
        same = np.array_equal(steps.encode(observation)[0]["tokens"], steps.encode(moved)[0]["tokens"])
        assert same == (kind == "pi0"), kind
        assert not np.array_equal(steps.encode(observation)[0]["state"], steps.encode(moved)[0]["state"])
    without = replace(MODELS["pi05"], state_in_prompt=False)
    tokenizers = Tokenizers(ByteTokenizer())
    steps = pipeline.build(ARM, without, stats(ARM), tokenizers, "quantile")
    np.testing.assert_array_equal(steps.encode(observation)[0]["tokens"], steps.encode(moved)[0]["tokens"])


def test_a_frame_becomes_the_same_sample():
    observation, actions = example(ARM)
    recorded = {ARM.dataset_key(key): value for key, value in observation.items() if key != "prompt"}
    valid = np.arange(HORIZON) < 3
    frame = Frame(recorded, actions.astype(np.float32), valid, "reach it", episode=0, index=0)
    steps = build(ARM, "pi0")
    encoded = steps.encode_frame(frame)
    expected, _ = steps.encode(observation | {"actions": actions.astype(np.float32)})
    assert encoded.keys() == expected.keys() | {"action_valid"}
    for key, value in expected.items():
        np.testing.assert_array_equal(encoded[key], value)
    assert encoded["action_valid"] is valid


def test_the_state_is_normalised_after_the_actions_became_relative():
    observation, actions = example(ARM)
    encoded, _ = build(ARM, "pi0").encode(observation | {"actions": actions})
    offset = normalize(
        np.append((actions[0, :2] - observation["joints"]), np.zeros(10)), stats(ARM).actions, "quantile"
    )
    np.testing.assert_allclose(encoded["actions"][0, :2], offset[:2], rtol=1e-4)


def test_statistics_of_another_robot_horizon_or_size():
    tokenizers = Tokenizers(ByteTokenizer())
    names = ("mean", "std", "q01", "q99", "min", "max")
    narrow = FieldStats(*(getattr(stats(ARM).state, name)[:3] for name in names))
    others = {
        "horizon 5": stats(ARM, horizon=6),
        "of 9 state and 12 action dimensions": stats(replace(ARM, actions=(*ARM.actions[:2], Gripper()))),
        "found statistics of 3 state and 12 action dimensions": replace(stats(ARM), state=narrow),
    }
    for message, wrong in others.items():
        with pytest.raises(NormStatsError, match=message) as error:
            pipeline.build(ARM, MODELS["pi0"], wrong, tokenizers, "zscore")
        assert "robot 'arm'" in error.value.expected


def test_a_robot_that_does_not_fit_the_model():
    tokenizers = Tokenizers(ByteTokenizer())
    with pytest.raises(ConfigError, match="at most 11 dimensions\n   found cameras base, left_wrist; 12 dimensions"):
        pipeline.build(ARM, replace(MODELS["pi0"], action_dim=11), stats(ARM), tokenizers, "zscore")
    with pytest.raises(ConfigError, match="cameras among base; at most"):
        pipeline.build(ARM, replace(MODELS["pi0"], cameras=("base",)), stats(ARM), tokenizers, "zscore")


def test_tokenizers_that_do_not_fit_the_model():
    with pytest.raises(ConfigError, match="at most 700 ids"):
        pipeline.build(ARM, replace(MODELS["pi0"], vocab_size=700), stats(ARM), Tokenizers(ByteTokenizer()), "zscore")
    with pytest.raises(ConfigError, match="an action tokenizer"):
        pipeline.build(ARM, MODELS["pi0_fast"], stats(ARM), Tokenizers(ByteTokenizer()), "zscore")
