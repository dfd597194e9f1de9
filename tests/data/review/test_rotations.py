"""`manipi check` finds rotations whose numbers leap while the robot moves on, however many episodes have them."""

import math

import numpy as np
import pytest

from manipi.data.dataset import Feature
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.data.review.check import check_dataset
from manipi.robots import EndEffector, Joints, Robot, State
from manipi.transforms.actions import from_matrix, to_matrix

T = np.arange(80) / 10


def turning(e: int) -> np.ndarray:
    """[T, 3] angles that pass a half turn, faster in some episodes than in others."""
    return np.stack([2.2 + 0.2 * T + 0.1 * e, 0.2 * np.sin(T + e), 0.3 * np.cos(0.7 * T + e)], axis=1)


def wrapped(angle: np.ndarray, turn: float = 2 * math.pi, start: float = -0.5) -> np.ndarray:
    return (angle / turn - start) % 1 * turn + start * turn


def rotated(form: str, e: int) -> np.ndarray:
    """The same motion in a form that is kept canonical, and so leaps."""
    return from_matrix(to_matrix(turning(e), "euler_xyz"), form)


def position(e: int) -> np.ndarray:
    return np.stack([np.sin(0.5 * T + e), np.cos(0.6 * T + e), np.sin(0.4 * T - e)], axis=1) / 3


MOTIONS = {
    "radians": (lambda e: wrapped(turning(e)), "wraps", (3,), "euler_xyz"),
    "radians from 0": (lambda e: wrapped(turning(e) + math.pi, start=0.0), "wraps", (3,), "euler_xyz"),
    "degrees": (lambda e: wrapped(np.degrees(turning(e)), 360.0), "wraps", (3,), "euler_xyz"),
    "rotation vector": (lambda e: rotated("rotvec", e), "rotation vector", (3, 4, 5), "rotvec"),
    "quaternion": (lambda e: rotated("quat_xyzw", e), "quaternion", (3, 4, 5, 6), "quat_xyzw"),
}


def write(root, state, action=None, episodes=range(4)):
    action = action or state
    shapes = {key: (make(0).shape[1],) for key, make in (("state", state), ("action", action))}
    features = {key: Feature(kind="vector", shape=shape, dtype="float32") for key, shape in shapes.items()}
    with LeRobotWriter(root, fps=10, features=features, robot_type="toy") as writer:
        for e in episodes:
            values = {key: make(e).astype(np.float32) for key, make in (("state", state), ("action", action))}
            writer.add_episode(values, task="turn")
    return root


def pose(turn):
    return lambda e: np.concatenate([position(e), turn(e)], axis=1)


@pytest.mark.parametrize("episodes", [range(4), range(1)])
@pytest.mark.parametrize("motion", MOTIONS)
def test_what_leaps_is_found_once_per_signal_and_is_no_jump(tmp_path, motion, episodes):
    turn, what, dims, form = MOTIONS[motion]
    findings = check_dataset(write(tmp_path / "set", pose(turn), episodes=episodes)).findings
    assert [(f.severity, f.check) for f in findings] == 2 * [("warning", "values")], findings
    for finding, key in zip(findings, ("state", "action"), strict=True):
        assert finding.what.startswith(", ".join(f"{key}[{d}]" for d in dims) + " ")
        assert what in finding.what
        assert f"in {len(episodes)} of {len(episodes)} episodes" in finding.what
        steps = np.abs(np.diff(pose(turn)(finding.episodes[0]), axis=0))[:, dims].max(axis=1)
        assert finding.frame == np.flatnonzero(steps > steps.max() / 2)[0] + 1
    state, action = findings
    assert f'EndEffector(rotation="{form}")' in action.next
    assert "6D" in state.next


@pytest.mark.parametrize("motion", ["rotation vector", "quaternion", "radians"])
def test_a_robot_that_says_what_it_is(tmp_path, motion):
    """The model sees its commands in a form without leaps, and the state as it is."""
    turn, _, _, form = MOTIONS[motion]
    root = write(tmp_path / "set", pose(turn))
    size = pose(turn)(0).shape[1]
    for group, keys in ((EndEffector(rotation=form), ["state"]), (Joints(size), ["state", "action"])):
        robot = Robot(
            name="toy",
            cameras={"base": "front"},
            state=(State("state", size),),
            actions=(group,),
            action_key="action",
            control_hz=10,
        )
        found = [f.what.partition("[")[0] for f in check_dataset(root, robot=robot).findings if f.check == "values"]
        assert found == keys


QUIET = {
    "no half turn": lambda e: turning(e) - 2.5,
    "unwrapped": lambda e: turning(e) * 3,
    "rot6d": lambda e: rotated("rot6d", e),
    "a quaternion with one sign": lambda e: from_matrix(to_matrix(turning(e) - 2.5, "euler_xyz"), "quat_xyzw"),
    "noise": lambda e: np.random.default_rng(e).uniform(-3, 3, (80, 4)),
    "a snapping gripper": lambda e: np.stack([np.where((T * 2 + e) % 4 > 2, 6.28, 0.0), np.sin(T + e)], axis=1),
    "pixels": lambda e: 180 + 170 * np.stack([np.sin(T + e), np.cos(2 * T + e)], axis=1),
}


@pytest.mark.parametrize("motion", QUIET)
def test_what_does_not_leap(tmp_path, motion):
    findings = check_dataset(write(tmp_path / "set", QUIET[motion])).findings
    assert not [f for f in findings if "wraps" in f.what or "sign" in f.what], findings


@pytest.mark.parametrize("seed", range(8))
def test_any_rotation_near_a_half_turn(seed, tmp_path):
    """The same motion by another axis: a flip is found wherever consecutive numbers change their sign."""
    rng = np.random.default_rng(seed)
    axis = rng.normal(size=3)
    axis /= np.linalg.norm(axis)
    drift = 0.02 * np.cumsum(rng.normal(size=(80, 3)), axis=0)
    matrices = to_matrix(axis * (2.6 + 0.15 * T[:, None]) + drift, "rotvec")
    for form, size in (("rotvec", 3), ("quat_xyzw", 4)):
        values = from_matrix(matrices, form)
        flips = np.linalg.norm(np.diff(values, axis=0), axis=1) > 1
        findings = check_dataset(write(tmp_path / form, lambda e, v=values: v, episodes=range(1))).findings
        found = [f for f in findings if "change their sign" in f.what or "wraps" in f.what]
        assert len(found) == (2 if flips.any() else 0), (form, size, findings)
