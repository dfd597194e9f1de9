"""What the dimensions of states and commands are called, wherever people read of them.

The dataset's own names count, where it has one for each dimension; else the robot's, which are all that a server and a
checkpoint know. Units are the robot's. Two columns that show the same number show it under the same name.
"""

import math
from collections.abc import Sequence

from manipi.data.dataset import Dataset
from manipi.robots.robot import EndEffector, Gripper, LinkageGripper, Robot


def feature_names(dataset: Dataset, key: str, otherwise: Sequence[str] = ()) -> tuple[str, ...]:
    """Of a vector, one per dimension; without names in the dataset `otherwise`, or else its numbers."""
    feature = dataset.features[key]
    size = math.prod(feature.shape)
    complete = (names for names in (feature.names, otherwise) if len(names) == size)
    return tuple(next(complete, map(str, range(size))))


def command_names(robot: Robot, dataset: Dataset | None = None) -> tuple[str, ...]:
    """Of the robot's commands."""
    own = tuple(dimension.name for dimension in robot.action_space)
    return own if dataset is None else feature_names(dataset, robot.dataset_key(robot.action_key), own)


def command_units(robot: Robot) -> tuple[str, ...]:
    """The unit of each dimension of a command; empty where there is none."""
    return tuple(dimension.unit for dimension in robot.action_space)


def state_labels(robot: Robot, dataset: Dataset | None = None) -> list[str]:
    """Of the states, with their units."""
    labels: list[str] = []
    for state in robot.state:
        own = state.names or tuple(f"{state.key}[{d}]" for d in range(state.size))
        names = own if dataset is None else feature_names(dataset, robot.dataset_key(state.key), own)
        labels += [label(name, state.unit) for name in names]
    return labels


def action_labels(robot: Robot, dataset: Dataset | None = None) -> list[str]:
    """Of the commands as the model sees them, with their units: relative ones, 6D rotations, grippers from 0 to 1."""
    names, units, labels = command_names(robot, dataset), list(command_units(robot)), list[str]()
    start = 0
    for group in robot.actions:
        span = slice(start, start := start + group.size)
        mine, of_mine = names[span], units[span]
        if isinstance(group, EndEffector) and group.rotation != "none":
            rotation = robot.action_space[span.start + 3].name.removesuffix(" 1")
            mine, of_mine = (*mine[:3], *(f"{rotation} 6D {i + 1}" for i in range(6))), [*of_mine[:3], *[""] * 6]
        if isinstance(group, Gripper | LinkageGripper):
            of_mine = [""]
        relative = "relative " if group.relative else ""
        labels += [label(f"{relative}{name}", unit) for name, unit in zip(mine, of_mine, strict=True)]
    return labels


def label(name: str, unit: str) -> str:
    """`left_waist [rad]`."""
    return f"{name} [{unit}]" if unit else name
