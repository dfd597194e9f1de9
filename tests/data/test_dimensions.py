"""One name and one unit per dimension: of commands and states, as the robot and as the model have them."""

import json
from dataclasses import replace

import numpy as np
import pytest

from manipi.cli.stats import main as stats
from manipi.data.dataset import Feature, action_labels, command_names, command_units, state_labels
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.data.open import open_dataset
from manipi.data.review.view import _sections
from manipi.robots import EndEffector, Gripper, Joints, Robot, State
from manipi.robots.aloha import aloha
from manipi.robots.franka import droid, libero
from manipi.robots.tabletop import TABLETOP
from manipi.robots.ur5 import ur5

POSES = (
    EndEffector(rotation="quat_xyzw"),
    Gripper(),
    EndEffector(rotation="euler_xyz", unit="cm"),
    Gripper(),
    Joints(2),
)
TWO_ARMS = Robot(name="two", cameras={"base": "i"}, state=(State("s", 2, names=("a", "b")),), actions=POSES)
ROBOTS = [aloha(), droid(), libero(), ur5(), TABLETOP, TWO_ARMS]


@pytest.mark.parametrize("robot", ROBOTS, ids=lambda robot: robot.name)
def test_every_dimension_has_a_name_of_its_own(robot):
    names = command_names(robot)
    assert (len(set(names)), len(command_units(robot))) == (robot.action_size, robot.action_size)
    assert len(set(action_labels(robot))) == robot.model_action_size
    assert len(set(state_labels(robot))) == robot.state_size


def test_names_and_units_of_two_arms():
    names = [*(f"pose 1 {n}" for n in "xyz"), *(f"pose 1 rotation {i}" for i in (1, 2, 3, 4)), "gripper 1"]
    assert list(command_names(TWO_ARMS))[:8] == names
    assert command_names(TWO_ARMS)[-3:] == ("gripper 2", "joint 1", "joint 2")
    labels = action_labels(replace(TWO_ARMS, actions=(Joints(1, relative=True, unit="deg"), *POSES[1:3])))
    assert labels[:5] == ["relative joint 1 [deg]", "gripper", "x [cm]", "y [cm]", "z [cm]"]
    assert labels[5:] == [f"rotation 6D {i + 1}" for i in range(6)]
    assert state_labels(TWO_ARMS) == ["a", "b"]


def test_the_datasets_names_count_everywhere(tmp_path, monkeypatch, capsys):
    """In the tables of stats, in the charts of view, in what eval and validation call their columns."""
    robot = Robot(
        name="arm", cameras={"base": "i"}, state=(State("s", 2, unit="rad"),), actions=(Joints(2),), action_key="a"
    )
    features = {
        "i": Feature(kind="image", shape=(16, 16, 3), dtype="video"),
        "s": Feature(kind="vector", shape=(2,), dtype="float32", names=("waist", "elbow")),
        "a": Feature(kind="vector", shape=(2,), dtype="float32", names=("waist", "elbow")),
    }
    rng = np.random.default_rng(0)
    with LeRobotWriter(tmp_path / "data", fps=10, features=features, robot_type="arm") as writer:
        for _ in range(2):
            values = {key: rng.normal(size=(5, 2)) for key in ("s", "a")}
            writer.add_episode({"i": np.zeros((5, 16, 16, 3), np.uint8), **values}, task="t")
    dataset = open_dataset(tmp_path / "data")
    assert command_names(robot, dataset) == ("waist", "elbow")
    assert {chart.name for _, charts in _sections(dataset, ["s", "a"]) for chart in charts} == {"waist", "elbow"}
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "from dataclasses import replace\n"
        "from manipi.tabletop.recipes import pi0_tabletop\n"
        "from manipi.robots.robot import Robot\n"
        "from manipi.train.config import DataConfig, TrainConfig\n"
        f"ROBOT = Robot.from_json({json.loads(json.dumps(robot.to_json()))!r}, 'here')\n"
        "def mine() -> TrainConfig:\n"
        f"    return replace(pi0_tabletop(), robot=ROBOT, data=DataConfig(path={str(tmp_path / 'data')!r}))\n"
    )
    stats([f"{recipe}:mine", "--per-step"])
    printed = capsys.readouterr().out
    assert printed.count("waist [rad]") == 3
    assert printed.count("elbow [rad]") == 3
