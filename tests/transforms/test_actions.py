from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manipi.robots import EndEffector, Gripper, Joints, LinkageGripper, Robot, State
from manipi.robots.aloha import aloha, aloha_sim
from manipi.robots.franka import droid, libero
from manipi.robots.robot import ROTATION_SIZE
from manipi.robots.ur5 import ur5
from manipi.transforms.actions import ActionSpace, from_matrix, to_matrix

ROBOTS = [
    aloha(),
    replace(aloha(pi_convention=False), name="aloha_raw"),
    aloha_sim(),
    droid(),
    replace(droid(action_space="joint_position"), name="droid_position"),
    libero(),
    replace(libero(relative=True), name="libero_relative"),
    ur5(),
]
groups = st.one_of(
    st.builds(Joints, st.integers(1, 4), relative=st.booleans()),
    st.builds(Joints, st.just(3), relative=st.booleans(), signs=st.tuples(*[st.sampled_from([1, -1])] * 3)),
    st.builds(
        Gripper, relative=st.booleans(), open=st.sampled_from([0.0, 1.0, 0.08]), closed=st.sampled_from([-1.0, 0.5])
    ),
    st.builds(EndEffector, st.sampled_from(sorted(ROTATION_SIZE)), relative=st.booleans()),
)


@st.composite
def robots(draw) -> Robot:
    """Random groups. The state holds the same groups, either at the same offset or after some other dimensions."""
    actions, shift, offset = draw(st.lists(groups, min_size=1, max_size=4)), draw(st.integers(0, 3)), 0
    placed = []
    for group in actions:
        placed.append(replace(group, state_start=offset + shift) if shift else group)
        offset += group.size
    state = (State("other", shift),) if shift else ()
    return Robot(
        name="random", cameras={"base": "image"}, state=(*state, State("state", offset)), actions=tuple(placed)
    )


def vectors(robot: Robot, rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random commands of the robot, with rotations that their form can spell in one way only."""
    parts = []
    for group in robot.actions:
        value = rng.normal(size=(*shape, group.size))
        if isinstance(group, EndEffector) and group.rotation != "none":
            matrix = to_matrix(rng.normal(size=(*shape, 4)), "quat_xyzw")
            value[..., 3:] = from_matrix(matrix, group.rotation)
        parts.append(value)
    return np.concatenate(parts, axis=-1)


@settings(max_examples=150, deadline=None)
@given(robot=robots(), seed=st.integers(0, 2**31), batch=st.sampled_from([(), (3,), (2, 2)]))
def test_decoding_undoes_encoding(robot, seed, batch):
    rng = np.random.default_rng(seed)
    actions = vectors(robot, rng, *batch, 5)
    state = vectors(robot, rng, *batch)
    state = np.concatenate([rng.normal(size=(*batch, robot.state_size - robot.action_size)), state], axis=-1)
    space = ActionSpace(robot)
    encoded = space.encode({"actions": actions, "state": state})
    assert encoded["actions"].shape == (*batch, 5, robot.model_action_size)
    decoded = space.decode(encoded["actions"], {"state": state})
    np.testing.assert_allclose(decoded, actions, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(robot=robots(), seed=st.integers(0, 2**31))
def test_staying_put_is_the_same_action_everywhere(robot, seed):
    """Relative groups see zero, and the identity rotation, whatever the state; absolute ones see the command."""
    rng = np.random.default_rng(seed)
    here = vectors(robot, rng)
    state = np.concatenate([np.zeros(robot.state_size - robot.action_size), here])
    encoded = ActionSpace(robot).to_model(here[None], state)[0]
    position = 0
    for group in robot.actions:
        seen = encoded[position : position + group.model_size]
        position += group.model_size
        if group.relative:
            expected = [0] * 3 + [1, 0, 0, 0, 1, 0] if group.model_size == 9 else [0] * group.model_size
            np.testing.assert_allclose(seen, expected, atol=1e-7)


def pose_matrix(pose: np.ndarray, form: str) -> np.ndarray:
    """[7 or so] -> 4 x 4, tool to base."""
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = to_matrix(pose[3:], form), pose[:3]
    return matrix


@pytest.mark.parametrize("form", [form for form in ROTATION_SIZE if form != "none"])
def test_relative_poses_compose_as_rigid_motions(form):
    robot = Robot(
        name="arm",
        cameras={"base": "image"},
        state=(State("pose", 3 + ROTATION_SIZE[form]),),
        actions=(EndEffector(form, relative=True),),
    )
    rng = np.random.default_rng(0)
    state, targets = vectors(robot, rng), vectors(robot, rng, 6)
    encoded = ActionSpace(robot).to_model(targets, state)
    for target, seen in zip(targets, encoded, strict=True):
        expected = np.linalg.inv(pose_matrix(state, form)) @ pose_matrix(target, form)
        np.testing.assert_allclose(seen[:3], expected[:3, 3], atol=1e-9)
        np.testing.assert_allclose(seen[3:].reshape(2, 3).T, expected[:3, :2], atol=1e-9)


def test_without_a_rotation_relative_is_the_difference_in_the_base_frame():
    robot = Robot(
        name="arm", cameras={"base": "image"}, state=(State("p", 3),), actions=(EndEffector("none", relative=True),)
    )
    seen = ActionSpace(robot).to_model(np.array([[1.0, 2.0, 3.0]]), np.array([0.5, 0.5, 5.0]))
    np.testing.assert_array_equal(seen, [[0.5, 1.5, -2.0]])


def test_the_model_sees_the_gripper_from_0_open_to_1_closed():
    robot = Robot(
        name="arm",
        cameras={"base": "image"},
        state=(State("gripper", 1),),
        actions=(Gripper(open=0.08, closed=0.0), Gripper(open=0.08, closed=0.0, relative=True, state_start=0)),
    )
    commands = np.array([[0.08, 0.08], [0.0, 0.0], [0.04, 0.04]])
    seen = ActionSpace(robot).to_model(commands, np.array([0.04]))
    np.testing.assert_allclose(seen, [[0, -0.5], [1, 0.5], [0.5, 0]], atol=1e-12)


def test_a_sample_without_actions_passes():
    robot = Robot(name="arm", cameras={"base": "image"}, state=(), actions=(Joints(1),))
    sample = {"state": np.zeros(0)}
    encoded = ActionSpace(robot).encode(sample)
    assert encoded.keys() == {"state"}
    assert encoded["state"] is sample["state"]


LINKAGE = LinkageGripper(horn=0.02, rod=0.04, finger=(0.02, 0.06), motor=(-0.5, 1.5), angle=(0.5, 1.5), state_start=0)
SIGNED = Robot(
    name="arm",
    cameras={"base": "image"},
    state=(State("gripper", 1), State("joints", 2), State("force", 1)),
    actions=(Joints(2, relative=True, signs=(1, -1), state_start=1), LINKAGE),
)


def test_signs_turn_state_and_commands_before_relative_ones_are_subtracted():
    space, state = ActionSpace(SIGNED), np.array([0.5, 1.0, 2.0, 9.0], np.float32)
    encoded = space.encode({"state": state, "actions": np.array([[1.5, 2.5, 0.0]], np.float32)})
    np.testing.assert_array_equal(encoded["state"][1:], [1.0, -2.0, 9.0])
    np.testing.assert_array_equal(encoded["actions"][0, :2], [0.5, -0.5])
    assert encoded["state"].dtype == encoded["actions"].dtype == np.float32
    assert state[2] == 2.0, "the observation itself stays as it was"


def test_a_linkage_turns_the_fingers_way_into_the_motors_angle():
    """At angle a, horn and rod reach horn·sin a + √(rod² - (horn·cos a)²): the state at that way is the angle again."""
    space = ActionSpace(SIGNED)
    for angle in (-0.4, 0.0, 0.5, 1.2):
        finger = 0.02 * np.sin(angle) + np.sqrt(0.04**2 - (0.02 * np.cos(angle)) ** 2)
        state = np.array([(finger - 0.02) / 0.04, 0.0, 0.0, 0.0])
        np.testing.assert_allclose(space.state_to_model(state)[0], angle - 0.5, atol=1e-12)
    # Beyond the linkage's reach the angle stays at its end.
    assert space.state_to_model(np.array([1.1, 0, 0, 0]))[0] == pytest.approx(np.pi / 2 - 0.5)
    # A command of 0.25 is the motor at 0 rad, 0.5 rad before the model's zero.
    np.testing.assert_allclose(space.to_model(np.array([[0.0, 0.0, 0.25]]), np.zeros(4))[0, 2], -0.5)


@pytest.mark.parametrize("robot", ROBOTS, ids=lambda robot: robot.name)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), batch=st.sampled_from([(), (2,)]))
def test_decoding_undoes_encoding_for_every_robot_of_ours(robot, seed, batch):
    rng, space = np.random.default_rng(seed), ActionSpace(robot)
    state, actions = rng.uniform(-1, 1.5, (*batch, robot.state_size)), rng.normal(size=(*batch, 5, robot.action_size))
    sample = {"state": state, "actions": actions}
    np.testing.assert_allclose(space.decode(space.encode(sample)["actions"], sample), actions, atol=1e-12)
