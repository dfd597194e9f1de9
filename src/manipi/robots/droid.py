"""Stand-in until the robots branch is merged."""

from typing import Literal

from manipi.robots.robot import Gripper, Joints, Robot, State


def droid(
    *,
    action_space: Literal["joint_position", "joint_velocity"] = "joint_velocity",
    wrist_slot: str = "left_wrist",
    default_prompt: str | None = None,
) -> Robot:
    keys = ("exterior_image_1_left", "wrist_image_left", "joint_position", "gripper_position")
    return Robot(
        name="droid",
        cameras={"base": "observation/exterior_image_1_left", wrist_slot: "observation/wrist_image_left"},
        state=(State("observation/joint_position", 7, unit="rad"), State("observation/gripper_position", 1)),
        actions=(Joints(7, relative=action_space == "joint_position"), Gripper(open=0.0, closed=1.0)),
        control_hz=15.0,
        default_prompt=default_prompt,
        dataset_keys={f"observation/{key}": key for key in keys},
    )
