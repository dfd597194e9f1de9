"""From the robot's commands to the actions that the model learns, and back, group by group.

robot      x y z  rx ry rz   gripper          its own units, absolute
model      x y z  r1 … r6    0 open·1 closed  relative where the robot says so, rotations 6D
"""

from dataclasses import dataclass

import numpy as np

from manipi.robots.robot import ActionGroup, EndEffector, Gripper, Robot
from manipi.transforms.rotations import from_matrix, to_matrix
from manipi.types import Sample


@dataclass(frozen=True)
class ActionSpace:
    """Converts `actions` [..., H, A]; the base of relative groups is `state` [..., S] at the chunk's first step."""

    robot: Robot

    def encode(self, sample: Sample) -> Sample:
        if "actions" not in sample:
            return sample
        return {**sample, "actions": self.to_model(sample["actions"], sample["state"])}

    def decode(self, actions_HA: np.ndarray, sample: Sample) -> np.ndarray:
        return self.to_robot(actions_HA, sample["state"])

    def to_model(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """[..., H, robot dims], [..., S] -> [..., H, model dims]."""
        parts = []
        for group, start in _with_offsets(self.robot):
            command = actions[..., start : start + group.size]
            parts.append(_encode_group(group, command, _base(group, start, state)))
        return np.concatenate(parts, axis=-1)

    def to_robot(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """[..., H, model dims], [..., S] -> [..., H, robot dims]."""
        parts, position = [], 0
        for group, start in _with_offsets(self.robot):
            seen = actions[..., position : position + group.model_size]
            parts.append(_decode_group(group, seen, _base(group, start, state)))
            position += group.model_size
        return np.concatenate(parts, axis=-1)


def _with_offsets(robot: Robot) -> list[tuple[ActionGroup, int]]:
    offsets = np.cumsum([0, *(g.size for g in robot.actions)])
    return list(zip(robot.actions, offsets.tolist(), strict=False))


def _base(group: ActionGroup, action_start: int, state: np.ndarray) -> np.ndarray | None:
    """The state that a relative group starts from, with a horizon axis; None for an absolute group."""
    if not group.relative:
        return None
    start = action_start if group.state_start is None else group.state_start
    return state[..., None, start : start + group.size]


def _encode_group(group: ActionGroup, command: np.ndarray, base: np.ndarray | None) -> np.ndarray:
    if isinstance(group, EndEffector) and group.rotation != "none":
        return _encode_pose(group, command, base)
    if isinstance(group, Gripper):
        command = _closedness(group, command)
        base = None if base is None else _closedness(group, base)
    return command if base is None else command - base


def _decode_group(group: ActionGroup, seen: np.ndarray, base: np.ndarray | None) -> np.ndarray:
    if isinstance(group, EndEffector) and group.rotation != "none":
        return _decode_pose(group, seen, base)
    if not isinstance(group, Gripper):
        return seen if base is None else seen + base
    absolute = seen if base is None else seen + _closedness(group, base)
    return group.open + absolute * (group.closed - group.open)


def _closedness(group: Gripper, value: np.ndarray) -> np.ndarray:
    return (value - group.open) / (group.closed - group.open)


def _encode_pose(group: EndEffector, pose: np.ndarray, base: np.ndarray | None) -> np.ndarray:
    position, rotation = pose[..., :3], to_matrix(pose[..., 3:], group.rotation)
    if base is not None:
        towards_tool = np.swapaxes(to_matrix(base[..., 3:], group.rotation), -1, -2)
        position = (towards_tool @ (position - base[..., :3])[..., None])[..., 0]
        rotation = towards_tool @ rotation
    return np.concatenate([position, from_matrix(rotation, "rot6d")], axis=-1)


def _decode_pose(group: EndEffector, seen: np.ndarray, base: np.ndarray | None) -> np.ndarray:
    position, rotation = seen[..., :3], to_matrix(seen[..., 3:], "rot6d")
    if base is not None:
        frame = to_matrix(base[..., 3:], group.rotation)
        position = (frame @ position[..., None])[..., 0] + base[..., :3]
        rotation = frame @ rotation
    return np.concatenate([position, from_matrix(rotation, group.rotation)], axis=-1)
