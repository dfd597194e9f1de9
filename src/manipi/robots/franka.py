"""Franka arms: those of the DROID setup and of the LIBERO simulator.

DROID: a parallel gripper, an outside and a wrist camera, 15 commands per second.

    state      joints 7 (rad) · gripper (0 open to 1 closed)
    command    joints 7, positions in rad or velocities from -1 to 1 · gripper (0 open to 1 closed)

The released models' norm stats have the asset id `droid`. Keys are openpi's: one of DROID's
two outside cameras has one. Positions are limited as in the Franka Panda's data sheet, velocities to what DROID's
controller takes. No rate is stated: DROID's commands run ahead of the arm by more than it moves in a step.

LIBERO: an outside and a wrist camera, 10 commands per second.

    state      tool position 3 (m) · rotation vector 3 (rad) · fingers 2 (m)
    command    tool motion 3 · rotation 3, each from -1 to 1 · gripper (-1 open to 1 closed)

The rate is the published dataset's; the simulator itself makes 20 steps per second. Commands are small motions already,
so there is nothing relative about them. There are no published norm stats of a base model for it. Keys are openpi's,
feature names those of `physical-intelligence/libero`. The simulator's controller cuts commands off at -1 and 1.
"""

from typing import Literal

from manipi.errors import ConfigError
from manipi.robots.robot import Gripper, Joints, Robot, State

_JOINT_LOW = (-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973)
_JOINT_HIGH = (2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973)


def droid(
    *,
    action_space: Literal["joint_position", "joint_velocity"] = "joint_velocity",
    wrist_slot: str = "left_wrist",
    relative: bool | None = None,
    default_prompt: str | None = None,
) -> Robot:
    """The robot with openpi's keys, and the feature names that its converter to LeRobot writes.

    Args:
        wrist_slot: the model's slot for the wrist camera; `wrist` with the released π0-FAST, whose slots are `base`,
            `base_1` and `wrist`.
        relative: joint positions are offsets from the current state; None: they are, and velocities are not.

    Raises:
        ConfigError: an unknown action space, or relative velocities.
    """
    if action_space not in ("joint_position", "joint_velocity") or (relative and action_space == "joint_velocity"):
        raise ConfigError(
            expected="action_space='joint_position', or 'joint_velocity' with absolute actions",
            found=f"action_space={action_space!r}, relative={relative}",
            where="droid(…)",
            next="velocities have no current state to start from: leave relative out",
        )
    positions = action_space == "joint_position"
    keys = ("exterior_image_1_left", "wrist_image_left", "joint_position", "gripper_position")
    low, high = (_JOINT_LOW, _JOINT_HIGH) if positions else ((-1.0,) * 7, (1.0,) * 7)
    is_relative, unit = positions if relative is None else relative, "rad" if positions else ""
    return Robot(
        name="droid",
        cameras={"base": "observation/exterior_image_1_left", wrist_slot: "observation/wrist_image_left"},
        state=(State("observation/joint_position", 7, unit="rad"), State("observation/gripper_position", 1)),
        actions=(
            Joints(7, relative=is_relative, unit=unit, low=low, high=high),
            Gripper(open=0.0, closed=1.0, low=(0.0,), high=(1.0,)),
        ),
        control_hz=15.0,
        default_prompt=default_prompt,
        dataset_keys={f"observation/{key}": key for key in keys},
    )


def libero(*, relative: bool = False, default_prompt: str | None = None) -> Robot:
    """The robot with openpi's keys.

    Args:
        relative: subtract the first six state dimensions from the commands all the same, number by number, as
            openpi's `pi0_libero` and `pi0_fast_libero` were trained.
    """
    return Robot(
        name="libero",
        cameras={"base": "observation/image", "left_wrist": "observation/wrist_image"},
        state=(State("observation/state", 8),),
        # Plain dimensions: the released models saw the numbers of the gripper, too, as they are.
        actions=(
            Joints(6, relative=relative, unit="", low=(-1.0,) * 6, high=(1.0,) * 6),
            Joints(1, unit="", low=(-1.0,), high=(1.0,)),
        ),
        control_hz=10.0,
        default_prompt=default_prompt,
        dataset_keys={f"observation/{key}": key for key in ("image", "wrist_image", "state")},
    )
