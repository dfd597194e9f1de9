"""From the robot's commands and state to what the model learns from, and back, group by group.

robot      x y z  rx ry rz   gripper          its own units, absolute
model      x y z  r1 … r6    0 open·1 closed  relative where the robot says so, rotations 6D

The state stays as the robot sends it but for groups with signs or a linkage.

Rotation matrices are [..., 3, 3], column vectors: `R @ p_tool = p_base`. All angles in radians.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from manipi.robots.robot import ActionGroup, EndEffector, Gripper, Joints, LinkageGripper, Robot, Rotation
from manipi.types import Sample

_ROUNDING = 1e-6
"""By how much, relative to 1 or to the value, a command may be beyond a limit that it was trained on in float32."""


class CommandLimits:
    """What a robot states of its commands: `low` and `high` of its groups, and its `max_rates`.

    The first step is measured from the current state in the dimensions of relative groups, whose commands and state
    are in the same units, and is free in the others. Every later step is measured from the one before it, as allowed.
    """

    def __init__(self, robot: Robot):
        self.low_A, self.high_A = (np.array(limit, np.float32).astype(np.float64) for limit in robot.limits)
        rates = robot.max_rates or (np.inf,) * robot.action_size
        self.step_A = np.array(rates, np.float64) / robot.control_hz
        self.has_rates = bool(np.isfinite(self.step_A).any())
        dimensions: list[int] = []  # which number of the state is the current value of each command, -1: none is
        for group in robot.actions:
            start = robot.state_start(group, len(dimensions))
            dimensions += range(start, start + group.size) if group.relative else [-1] * group.size
        self._state_A = np.array(dimensions)

    def allowed(self, wanted: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Commands [..., H, A] at the nearest within the limits, and of these the nearest within the rates, too.

        Args:
            state: [S], the robot's own; not looked at without rates.
        """
        limited = np.clip(wanted, self.low_A, self.high_A)
        if not self.has_rates or not wanted.shape[-2]:
            return limited, limited
        allowed = limited.copy()
        before = np.where(self._state_A >= 0, state[self._state_A] if state.size else 0, limited[..., 0, :])
        for step in np.moveaxis(allowed, -2, 0):  # views
            np.clip(step, before - self.step_A, before + self.step_A, out=step)
            before = step
        return limited, allowed


def differs(wanted: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Which commands had to be moved, by more than rounding."""
    return np.abs(wanted - allowed) > _ROUNDING * np.maximum(1, np.abs(wanted))


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
        converting = [(group, span) for group, _, _, span in self._spans() if group.converts_state]
        converted = state.copy() if converting else state
        for group, span in converting:
            converted[..., span] = _encode_state(group, state[..., span])
        return converted

    def to_model(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """[..., H, robot dims], [..., S] -> [..., H, model dims]."""
        spans = self._spans()
        parts = [encode_group(group, actions[..., own], _base(group, state, at)) for group, own, _, at in spans]
        return np.concatenate(parts, axis=-1)

    def to_robot(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """[..., H, model dims], [..., S] -> [..., H, robot dims]."""
        spans = self._spans()
        parts = [_decode_group(group, actions[..., seen], _base(group, state, at)) for group, _, seen, at in spans]
        return np.concatenate(parts, axis=-1)

    def _spans(self) -> Iterator[tuple[ActionGroup, slice, slice, slice]]:
        """Where each group stands in the robot's actions, in the model's, and in the state."""
        own = seen = 0
        for group in self.robot.actions:
            at = Robot.state_start(group, own)
            spans = (slice(own, own + group.size), slice(seen, seen + group.model_size), slice(at, at + group.size))
            yield group, *spans
            own, seen = own + group.size, seen + group.model_size


def _base(group: ActionGroup, state: np.ndarray, at: slice) -> np.ndarray | None:
    """The state that a relative group starts from, with a horizon axis; None for an absolute group."""
    return state[..., None, at] if group.relative else None


def encode_group(group: ActionGroup, command: np.ndarray, base: np.ndarray | None) -> np.ndarray:
    """Commands [..., H, D] as the model sees them, from the state [..., 1, D] where they are relative to it."""
    if isinstance(group, EndEffector) and group.rotation != "none":
        position, rotation = command[..., :3], to_matrix(command[..., 3:], group.rotation)
        if base is not None:
            towards_tool = np.swapaxes(to_matrix(base[..., 3:], group.rotation), -1, -2)
            position = (towards_tool @ (position - base[..., :3])[..., None])[..., 0]
            rotation = towards_tool @ rotation
        return np.concatenate([position, from_matrix(rotation, "rot6d")], axis=-1)
    if isinstance(group, LinkageGripper):
        return _between(*group.motor, command) - group.angle[0]
    if isinstance(group, Gripper):
        command = _fraction(group.open, group.closed, command)
        base = None if base is None else _fraction(group.open, group.closed, base)
    return _flip(group, command if base is None else command - base)


def _decode_group(group: ActionGroup, seen: np.ndarray, base: np.ndarray | None) -> np.ndarray:
    if isinstance(group, EndEffector) and group.rotation != "none":
        position, rotation = seen[..., :3], to_matrix(seen[..., 3:], "rot6d")
        if base is not None:
            frame = to_matrix(base[..., 3:], group.rotation)
            position = (frame @ position[..., None])[..., 0] + base[..., :3]
            rotation = frame @ rotation
        return np.concatenate([position, from_matrix(rotation, group.rotation)], axis=-1)
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


# Rotations of a tool pose, as the robot writes them and in the 6D form that the model sees ----------------------------


def to_matrix(rotation: np.ndarray, form: Rotation) -> np.ndarray:
    """[..., n] in the given form -> [..., 3, 3]."""
    if form == "rot6d":
        # Gram-Schmidt on two columns, so that any prediction is a rotation (Zhou et al., CVPR 2019, eq. 15).
        first = rotation[..., :3] / np.linalg.norm(rotation[..., :3], axis=-1, keepdims=True)
        second = rotation[..., 3:] - np.sum(first * rotation[..., 3:], axis=-1, keepdims=True) * first
        second = second / np.linalg.norm(second, axis=-1, keepdims=True)
        return np.stack([first, second, np.cross(first, second)], axis=-1)
    if form == "quat_xyzw":
        return _from_quaternion(rotation / np.linalg.norm(rotation, axis=-1, keepdims=True))
    if form == "euler_xyz":
        x, y, z = (_from_rotvec(rotation[..., i : i + 1] * np.eye(3)[i]) for i in range(3))
        return z @ y @ x
    return _from_rotvec(rotation)


def from_matrix(matrix: np.ndarray, form: Rotation) -> np.ndarray:
    """[..., 3, 3] -> [..., n] in the given form. Quaternions have w >= 0."""
    if form == "rot6d":
        return np.concatenate([matrix[..., :, 0], matrix[..., :, 1]], axis=-1)
    if form == "euler_xyz":
        return _to_euler_xyz(matrix)
    quaternion = _to_quaternion(matrix)
    if form == "quat_xyzw":
        return quaternion
    sine = np.linalg.norm(quaternion[..., :3], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, quaternion[..., 3:])
    return quaternion[..., :3] * np.where(sine > 1e-12, angle / np.where(sine > 1e-12, sine, 1.0), 2.0)


def _from_quaternion(q: np.ndarray) -> np.ndarray:
    x, y, z, w = np.moveaxis(q, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def _from_rotvec(v: np.ndarray) -> np.ndarray:
    """Rodrigues' formula through the unit quaternion."""
    angle = np.linalg.norm(v, axis=-1, keepdims=True)
    # sin(a/2)/a, whose limit at 0 is 1/2.
    scale = np.where(angle > 1e-12, np.sin(angle / 2) / np.where(angle > 1e-12, angle, 1.0), 0.5)
    return _from_quaternion(np.concatenate([v * scale, np.cos(angle / 2)], axis=-1))


def _to_quaternion(m: np.ndarray) -> np.ndarray:
    """The numerically largest of the four usual branches (Shepperd, 1978), vectorised."""
    trace = np.trace(m, axis1=-2, axis2=-1)
    diagonal = np.diagonal(m, axis1=-2, axis2=-1)
    # 4x², 4y², 4z², 4w²
    squares = np.concatenate([1 + 2 * diagonal - trace[..., None], (1 + trace)[..., None]], axis=-1)
    off = lambda i, j, sign: m[..., i, j] + sign * m[..., j, i]  # noqa: E731
    products = np.stack(  # row k: 4·q_k·(x, y, z, w)
        [
            np.stack([squares[..., 0], off(1, 0, 1), off(0, 2, 1), off(2, 1, -1)], axis=-1),
            np.stack([off(1, 0, 1), squares[..., 1], off(2, 1, 1), off(0, 2, -1)], axis=-1),
            np.stack([off(0, 2, 1), off(2, 1, 1), squares[..., 2], off(1, 0, -1)], axis=-1),
            np.stack([off(2, 1, -1), off(0, 2, -1), off(1, 0, -1), squares[..., 3]], axis=-1),
        ],
        axis=-2,
    )
    best = np.argmax(squares, axis=-1)[..., None, None]
    q = np.take_along_axis(products, best, axis=-2)[..., 0, :]
    q = q / np.linalg.norm(q, axis=-1, keepdims=True)
    return np.where(q[..., 3:] < 0, -q, q)


def _to_euler_xyz(m: np.ndarray) -> np.ndarray:
    """Angles about the fixed x, y, z axes; y stays within ±pi/2.

    Where y is ±pi/2 (a tool that points straight down, say), only the difference or sum of x and z is defined. So z is
    what is left once whatever x came out has been undone: `m @ rotation_x(-x) = rotation_z @ rotation_y`.
    """
    x = np.arctan2(m[..., 2, 1], m[..., 2, 2])
    y = np.arctan2(-m[..., 2, 0], np.hypot(m[..., 2, 1], m[..., 2, 2]))
    sin_x, cos_x = np.sin(x), np.cos(x)
    z = np.arctan2(
        m[..., 0, 2] * sin_x - m[..., 0, 1] * cos_x,
        m[..., 1, 1] * cos_x - m[..., 1, 2] * sin_x,
    )
    return np.stack([x, y, z], axis=-1)
