"""From the robot's commands and state to what the model learns from, and back, group by group.

robot      x y z  rx ry rz   gripper          its own units, absolute
model      x y z  r1 … r6    0 open·1 closed  relative where the robot says so, rotations 6D

The state stays as the robot sends it but for groups with signs or a linkage.
"""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from manipi.robots.robot import ActionGroup, EndEffector, Gripper, Joints, LinkageGripper, Robot
from manipi.transforms.rotations import from_matrix, to_matrix
from manipi.types import Sample


@dataclass(frozen=True)
class ActionSpace:
    """Converts `state` [..., S] and `actions` [..., H, A]; relative groups start from the chunk's first state.

    Everywhere here, `state` is the robot's own, not yet converted.
    """

    robot: Robot

    def encode(self, sample: Sample) -> Sample:
        converted = {**sample, "state": self.state_to_model(sample["state"])}
        if "actions" in sample:
            converted["actions"] = self.to_model(sample["actions"], sample["state"])
        return converted

    def decode(self, actions_HA: np.ndarray, sample: Sample) -> np.ndarray:
        return self.to_robot(actions_HA, sample["state"])

    def state_to_model(self, state: np.ndarray) -> np.ndarray:
        """[..., S] -> [..., S]; the very same array where no group converts it."""
        converting = [(group, start) for group, start in _with_offsets(self.robot) if group.converts_state]
        if not converting:
            return state
        converted = state.copy()
        for group, action_start in converting:
            start = self.robot.state_start(group, action_start)
            span = slice(start, start + group.size)
            converted[..., span] = _encode_state(group, state[..., span])
        return converted

    def to_model(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """[..., H, robot dims], [..., S] -> [..., H, model dims]."""
        parts = []
        for group, start in _with_offsets(self.robot):
            command = actions[..., start : start + group.size]
            parts.append(encode_group(group, command, _base(group, start, state)))
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
    offsets = accumulate((g.size for g in robot.actions), initial=0)
    return list(zip(robot.actions, offsets, strict=False))


def _base(group: ActionGroup, action_start: int, state: np.ndarray) -> np.ndarray | None:
    """The state that a relative group starts from, with a horizon axis; None for an absolute group."""
    if not group.relative:
        return None
    start = Robot.state_start(group, action_start)
    return state[..., None, start : start + group.size]


def encode_group(group: ActionGroup, command: np.ndarray, base: np.ndarray | None) -> np.ndarray:
    """Commands [..., H, D] as the model sees them, from the state [..., 1, D] where they are relative to it."""
    if isinstance(group, EndEffector) and group.rotation != "none":
        return _encode_pose(group, command, base)
    if isinstance(group, LinkageGripper):
        return _between(*group.motor, command) - group.angle[0]
    if isinstance(group, Gripper):
        command = _fraction(group.open, group.closed, command)
        base = None if base is None else _fraction(group.open, group.closed, base)
    return _flip(group, command if base is None else command - base)


def _decode_group(group: ActionGroup, seen: np.ndarray, base: np.ndarray | None) -> np.ndarray:
    if isinstance(group, EndEffector) and group.rotation != "none":
        return _decode_pose(group, seen, base)
    if isinstance(group, LinkageGripper):
        return _fraction(*group.motor, seen + group.angle[0])
    if isinstance(group, Gripper):
        absolute = seen if base is None else seen + _fraction(group.open, group.closed, base)
        return _between(group.open, group.closed, absolute)
    seen = _flip(group, seen)
    return seen if base is None else seen + base


def _encode_state(group: ActionGroup, value: np.ndarray) -> np.ndarray:
    if not isinstance(group, LinkageGripper):
        return _flip(group, value)
    # float64, because the arc sine is steep where horn and rod stand in line.
    finger = _between(*group.finger, value.astype(np.float64))
    sine = (group.horn**2 + finger**2 - group.rod**2) / (2 * group.horn * finger)
    return _fraction(*group.angle, np.arcsin(np.clip(sine, -1.0, 1.0)))


def _flip(group: ActionGroup, value: np.ndarray) -> np.ndarray:
    signs = group.signs if isinstance(group, Joints) else ()
    return value * np.array(signs, value.dtype) if signs else value


def _fraction(zero: float, one: float, value: np.ndarray) -> np.ndarray:
    return (value - zero) / (one - zero)


def _between(zero: float, one: float, fraction: np.ndarray) -> np.ndarray:
    return zero + fraction * (one - zero)


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
