import json
from dataclasses import replace

import pytest

from manipi.errors import ConfigError, UnknownNameError
from manipi.robots import EndEffector, Gripper, Joints, Robot, State
from manipi.robots.aloha import GRIPPER, aloha
from manipi.robots.franka import droid, libero
from manipi.robots.tabletop import TABLETOP
from manipi.robots.ur5 import ur5

ARM = Robot(
    name="arm",
    cameras={"base": "image", "left_wrist": "wrist_image"},
    state=(State("joints", 6, names=tuple("abcdef"), unit="rad"), State("pose", 7), State("gripper", 1)),
    actions=(
        Joints(6, relative=True, low=(-3.0,) * 6, high=(3.0,) * 6),
        EndEffector("quat_xyzw", relative=True),
        Gripper(open=0.08, closed=0.0, unit="m"),
    ),
    default_prompt="tidy up",
    dataset_keys={"image": "observation.images.top"},
)


ROBOTS = [ARM, TABLETOP, aloha(), droid(), libero(), ur5(default_prompt="pick")]


@pytest.mark.parametrize("robot", ROBOTS, ids=lambda robot: robot.name)
def test_json_round_trip(robot):
    text = json.dumps(robot.to_json())
    back = Robot.from_json(json.loads(text), "robot.json")
    assert back == robot
    assert back.contract() == robot.contract()


def test_sizes():
    assert (ARM.state_size, ARM.action_size, ARM.model_action_size) == (14, 14, 16)
    assert [EndEffector(form).size for form in ("none", "rotvec", "euler_xyz", "quat_xyzw", "rot6d")] == [3, 6, 6, 7, 9]
    assert ARM.dataset_key("image") == "observation.images.top"
    assert ARM.dataset_key("pose") == "pose"


CONTRADICTIONS = {
    "camera and one action": {"cameras": {}},
    "at least one camera": {"actions": ()},
    "every observation key once": {"cameras": {"base": "joints"}},
    r"state dimensions 0 to 5 for the relative group Joints\n   found a state of 1 dimensions": {
        "state": (State("gripper", 1),)
    },
    "state dimensions -1 to 4": {"actions": (Joints(6, relative=True, state_start=-1),)},
    "state dimensions 10 to 15": {"actions": (Joints(6, relative=True, state_start=10),)},
    "6 limits\n   found 2\n   where robot 'arm', Joints.low": {"actions": (Joints(6, low=(0.0, 1.0)),)},
    "1 limits\n   found 2\n   where robot 'arm', Gripper.high": {"actions": (Gripper(high=(0.0, 1.0)),)},
    "two different gripper positions": {"actions": (Gripper(open=1.0, closed=1.0),)},
    "a rotation among none, rotvec": {"actions": (EndEffector("axis_angle"),)},
    r"at least one dimension\n   found 0\n   where robot 'arm', State\.size": {"state": (State("joints", 0),)},
    r"found -2\n   where robot 'arm', Joints\.size": {"actions": (Joints(-2),)},
    "a positive control rate": {"control_hz": 0.0},
    r"6 signs, each 1 or -1\n   found \(1, -1\)": {"actions": (Joints(6, signs=(1, -1)),)},
    r"6 signs, each 1 or -1\n   found \(1, 1, 1, 1, 1, 0\)": {"actions": (Joints(6, signs=(1, 1, 1, 1, 1, 0)),)},
    "state dimensions 9 to 14 for the converted group Joints": {"actions": (Joints(6, signs=(1,) * 6, state_start=9),)},
    "state dimensions 14 to 14 for the converted group LinkageGripper": {
        "actions": (replace(GRIPPER, state_start=14),)
    },
    "an absolute group\n   found relative=True": {"actions": (replace(GRIPPER, relative=True),)},
    r"every state dimension converted once\n   found \[5\]": {
        "actions": (Joints(6, signs=(1,) * 6), replace(GRIPPER, state_start=5))
    },
    r"camera slots among base, left_wrist\n   found \['right_wrist'\]": {"optional": ("right_wrist",)},
    "once\n   found .*'image', 'image'": {"ignored": ("image",)},
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_contradictions(message):
    with pytest.raises(ConfigError, match=message) as error:
        replace(ARM, **CONTRADICTIONS[message])
    assert error.value.where.startswith("robot 'arm'")
    assert error.value.next == "correct the Robot(...)"


def test_a_robot_file_of_another_version_is_refused():
    data = ARM.to_json()
    data["state"][0]["type"] = "Stat"
    with pytest.raises(UnknownNameError, match="did you mean State"):
        Robot.from_json(data, "robot.json")
    with pytest.raises(ConfigError, match=r"unexpected \['speed'\]"):
        Robot.from_json(ARM.to_json() | {"speed": 1}, "robot.json")
    del data["state"]
    with pytest.raises(ConfigError, match=r"missing \['state'\]"):
        Robot.from_json(data, "robot.json")


SAME_LAYOUT = [
    {"name": "other"},
    {"cameras": {"base": "front"}},
    {"default_prompt": None},
    {"control_hz": 50.0},
    {"dataset_keys": {}},
    {"action_key": "action"},
    {"optional": ("left_wrist",)},
    {"ignored": ("depth",)},
    {"actions": (replace(ARM.actions[0], low=None, high=(2.0,) * 6), *ARM.actions[1:])},
]
OTHER_LAYOUT = [
    {"state": ARM.state[::-1]},
    {"state": (*ARM.state, State("torque", 1))},
    {"actions": ARM.actions[:2]},
    {"actions": (replace(ARM.actions[0], relative=False), *ARM.actions[1:])},
    {"actions": (replace(ARM.actions[0], state_start=1), *ARM.actions[1:])},
    {"actions": (*ARM.actions[:2], Gripper(open=0.0, closed=0.08, unit="m"))},
    {"actions": (replace(ARM.actions[0], signs=(1, 1, 1, 1, 1, -1)), *ARM.actions[1:])},
    {"actions": (*ARM.actions[:2], GRIPPER)},
    {"actions": (*ARM.actions[:2], replace(GRIPPER, rod=0.04))},
    {"actions": (ARM.actions[0], EndEffector("rotvec", state_start=6), ARM.actions[2])},
]


@pytest.mark.parametrize("change", SAME_LAYOUT, ids=lambda change: next(iter(change)))
def test_the_contract_ignores_what_norm_stats_do_not_depend_on(change):
    assert replace(ARM, **change).contract() == ARM.contract()


def test_the_contract_changes_with_the_layout():
    contracts = {replace(ARM, **change).contract() for change in OTHER_LAYOUT} | {ARM.contract()}
    assert len(contracts) == len(OTHER_LAYOUT) + 1
