"""Which of our robots a recorded observation belongs to, and how its slots are called."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from manipi.robots import Robot, State
from manipi.robots.aloha import aloha
from manipi.robots.franka import droid, libero
from manipi.robots.ur5 import ur5


def slot_of(recorded: str) -> str:
    """`base_0_rgb` -> `base`, `base_1_rgb` -> `base_1`."""
    return recorded.removesuffix("_0_rgb").removesuffix("_rgb")


def robot_of(
    observation: Mapping[str, np.ndarray],
    slots: tuple[str, ...],
    *,
    relative: bool,
    pi_convention: bool,
    prompt: str | None,
) -> Robot:
    """The robot that has the keys of an observation, with states of its sizes.

    Args:
        observation: with "/" between the names of nested maps.
        slots: the model's.
        relative: whether the recorded transforms make actions relative.
        pi_convention: whether they convert ALOHA to the pretraining convention.
        prompt: the default one.
    """
    robot = _robot_with(set(observation), slots, relative, pi_convention, prompt)
    return replace(robot, state=tuple(State(s.key, np.size(observation[s.key])) for s in robot.state))


def _robot_with(
    keys: set[str], slots: tuple[str, ...], relative: bool, pi_convention: bool, prompt: str | None
) -> Robot:
    if any(key.startswith("images/") for key in keys):
        return aloha(pi_convention=pi_convention, relative=relative, default_prompt=prompt)
    if "observation/joint_position" in keys:
        space, wrist = "joint_position" if relative else "joint_velocity", "wrist" if "wrist" in slots else "left_wrist"
        return droid(action_space=space, wrist_slot=wrist, default_prompt=prompt)
    if "observation/state" in keys:
        return libero(relative=relative, default_prompt=prompt)
    assert "joints" in keys, f"no robot has the keys {sorted(keys)}"
    return ur5(relative=relative, default_prompt=prompt)
