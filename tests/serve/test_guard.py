import numpy as np
import pytest

from manipi.errors import ActionError, ConfigError
from manipi.robots.aloha import aloha
from manipi.robots.franka import droid, libero
from manipi.robots.robot import EndEffector, Gripper, Joints, Robot, State
from manipi.robots.tabletop import TABLETOP
from manipi.robots.ur5 import ur5
from manipi.serve import PolicyServer
from manipi.serve.guard import ActionGuard
from manipi.tabletop.environment.tabletop import WORKSPACE_HIGH
from manipi_client import RemoteInferenceError, WebsocketPolicy

ROBOT = Robot(
    name="two",
    cameras={"base": "image"},
    state=(State("gripper", 1), State("joints", 2)),
    actions=(
        Joints(2, relative=True, state_start=1, low=(-1.0, -1.0), high=(1.0, 1.0)),
        Gripper(low=(0.0,), high=(1.0,)),
    ),
    control_hz=10.0,
    max_rates=(2.0, 1.0, float("inf")),
)
"""The joints move by at most 0.2 and 0.1 per step."""

PICTURE = np.zeros((4, 4, 3), np.uint8)
OBSERVATION = {"image": PICTURE, "prompt": "go", "gripper": np.zeros(1), "joints": np.array([0.5, -0.5])}


def guard(actions, mode="clamp", robot=ROBOT):
    return ActionGuard(robot, mode)(OBSERVATION, np.array(actions, np.float32))


def test_what_is_within_limits_leaves_as_it_came():
    actions = np.array([[0.6, -0.5, 0.0], [0.8, -0.6, 1.0], [1.0, -0.7, 0.0]], np.float32)
    for mode in ("clamp", "refuse", "off"):
        assert ActionGuard(ROBOT, mode)(OBSERVATION, actions)[0] is actions


def test_limits_and_rates_by_hand():
    actions, moved = guard([[0.9, -0.45, 1.3], [2.0, -0.45, -0.1], [2.0, 0.4, 0.5]])
    # From joint 1 at 0.5: 0.7, 0.9, then the limit. The gripper is as quick as it likes.
    np.testing.assert_allclose(actions, [[0.7, -0.45, 1.0], [0.9, -0.45, 0.0], [1.0, -0.35, 0.5]], atol=1e-6)
    assert actions.dtype == np.float32
    assert moved == {"beyond_limits": 4, "too_fast": 3}


def test_without_a_state_of_the_same_kind_the_first_step_is_free():
    robot = Robot(name="v", cameras={"base": "i"}, state=(), actions=(Joints(1),), max_rates=(1.0,), control_hz=10.0)
    actions, _ = ActionGuard(robot)({"i": PICTURE, "prompt": "go"}, np.array([[5.0], [6.0]]))
    np.testing.assert_allclose(actions, [[5.0], [5.1]])


def test_rounding_is_no_violation():
    limit = float(np.nextafter(np.float32(1.57), np.float32(2)))
    robot = Robot(name="r", cameras={"base": "i"}, state=(), actions=(Joints(1, low=(-1.57,), high=(1.57,)),))
    assert ActionGuard(robot, "refuse")({}, np.array([[limit]], np.float32))[1] == {}


@pytest.mark.parametrize(
    ("actions", "found"),
    [
        (
            [[0.5, -0.5, 0.0], [0.5, -1.5, 0.0]],
            r"-1.5 in step 1, dimension 1 \(joint 2\); the nearest allowed one is -0.6",
        ),
        ([[0.8, -0.5, 0.0]], r"0.8 in step 0, dimension 0 \(joint 1\)"),
    ],
)
def test_refused_with_the_number_and_its_place(actions, found):
    with pytest.raises(ActionError, match=found):
        guard(actions, "refuse")


@pytest.mark.parametrize("mode", ["clamp", "refuse"])
@pytest.mark.parametrize("actions", [[[0.5, np.nan, 0.0]], [[np.inf, 0.0, 0.0]], [[0.0, 0.0]], [0.0, 0.0, 0.0]])
def test_what_has_no_nearest_command_is_refused(mode, actions):
    with pytest.raises(ActionError):
        guard(actions, mode)


def test_off_is_off():
    assert guard([[9.0, np.nan, 0.0]], "off")[0][0, 0] == 9.0


def test_the_action_space_says_what_each_number_is():
    robot = Robot(
        name="tool",
        cameras={"base": "i"},
        state=(State("pose", 6), State("gripper", 1)),
        actions=(EndEffector("rotvec", low=(0.0,) * 6), Gripper(unit="m")),
    )
    space = robot.action_space
    assert [d.name for d in space] == ["x", "y", "z", "rotation 1", "rotation 2", "rotation 3", "gripper"]
    assert [d.unit for d in space] == ["m"] * 3 + ["rad"] * 3 + ["m"]
    assert (space[0].low, space[0].high, space[0].max_rate, space[6].low) == (0.0, None, None, None)
    assert ROBOT.action_space[1].max_rate == 1.0
    assert Robot.from_json(ROBOT.to_json(), "here") == ROBOT


@pytest.mark.parametrize("rates", [(1.0,), (1.0, 1.0, 0.0), (1.0, 1.0, float("nan"))])
def test_rates_that_cannot_be(rates):
    with pytest.raises(ConfigError, match="max_rates"):
        Robot(name="x", cameras={"base": "i"}, state=(), actions=(Joints(3),), max_rates=rates)


class Wild:
    def __init__(self):
        self.metadata = {}

    def infer(self, observation, noise=None):
        return {"actions": np.array([[0.5, -0.5, observation["gripper"][0]]], np.float32)}


def test_served_clamped_and_told():
    with PolicyServer(Wild(), port=0, robot=ROBOT).serve_in_thread() as port, WebsocketPolicy(port=port) as client:
        fine = client.infer(OBSERVATION)
        assert "guarded" not in fine
        answer = client.infer({**OBSERVATION, "gripper": np.array([7.0])})
    assert answer["actions"][0, 2] == 1.0
    assert answer["guarded"] == {"beyond_limits": 1, "too_fast": 0}


def test_served_refused():
    server = PolicyServer(Wild(), port=0, robot=ROBOT, guard="refuse")
    with (
        server.serve_in_thread() as port,
        WebsocketPolicy(port=port) as client,
        pytest.raises(RemoteInferenceError) as refused,
    ):
        client.infer({**OBSERVATION, "gripper": np.array([7.0])})
    assert refused.value.code == "ActionError"


@pytest.mark.parametrize(
    ("robot", "highest"),
    [
        (aloha(), [3.14158, 1.25664, 1.6057, 3.14158, 2.23402, 3.14158, np.inf] * 2),
        (droid(action_space="joint_position"), [2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973, 1]),
        (droid(), [1] * 8),
        (libero(), [1] * 7),
        (ur5(), [2 * np.pi] * 6 + [1]),
        (TABLETOP, [*WORKSPACE_HIGH, 1]),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_built_in_robots_are_kept_within_what_they_can_do(robot, highest):
    state = {part.key: np.zeros(part.size) for part in robot.state}
    observation = {**dict.fromkeys(robot.cameras.values(), PICTURE), **state, "prompt": "go"}
    wanted = np.full((200, robot.action_size), 1e3)  # long enough to get there at the largest rate
    actions, _ = ActionGuard(robot)(observation, wanted)
    np.testing.assert_allclose(actions[-1], np.minimum(highest, 1e3), rtol=1e-6)
    if robot.max_rates:
        np.testing.assert_allclose(actions[0, :6], np.pi / robot.control_hz)
    lowest = ActionGuard(robot)(observation, -wanted)[0][-1]
    assert (lowest[np.isfinite(highest)] > -7).all()
