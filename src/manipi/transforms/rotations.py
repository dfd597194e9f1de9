"""Rotations of a tool pose, as the robot writes them, to matrices and to the 6D form that the model sees.

Matrices are [..., 3, 3], column vectors: `R @ p_tool = p_base`. All angles in radians.
"""

import numpy as np

from manipi.robots.robot import Rotation


def to_matrix(rotation: np.ndarray, form: Rotation) -> np.ndarray:
    """[..., n] in the given form -> [..., 3, 3]."""
    if form == "rot6d":
        return _from_rot6d(rotation)
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
    return quaternion if form == "quat_xyzw" else _quaternion_to_rotvec(quaternion)


def _from_rot6d(rotation: np.ndarray) -> np.ndarray:
    """Gram-Schmidt on two columns, so that any prediction is a rotation (Zhou et al., CVPR 2019, eq. 15)."""
    first = rotation[..., :3] / np.linalg.norm(rotation[..., :3], axis=-1, keepdims=True)
    second = rotation[..., 3:] - np.sum(first * rotation[..., 3:], axis=-1, keepdims=True) * first
    second = second / np.linalg.norm(second, axis=-1, keepdims=True)
    return np.stack([first, second, np.cross(first, second)], axis=-1)


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


def _quaternion_to_rotvec(q: np.ndarray) -> np.ndarray:
    sine = np.linalg.norm(q[..., :3], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, q[..., 3:])
    return q[..., :3] * np.where(sine > 1e-12, angle / np.where(sine > 1e-12, sine, 1.0), 2.0)


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
