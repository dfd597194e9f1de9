"""Stand-in until the robots branch is merged."""

from collections.abc import Sequence
from dataclasses import replace

from manipi.robots.robot import Joints, Robot, State

SLOTS = {"cam_high": "base", "cam_left_wrist": "left_wrist", "cam_right_wrist": "right_wrist"}


def aloha(
    *,
    cameras: Sequence[str] = tuple(SLOTS),
    pi_convention: bool = True,
    relative: bool = True,
    default_prompt: str | None = None,
) -> Robot:
    arm, gripper = Joints(6, relative=relative), Joints(1, unit="")
    features = {f"images/{camera}": f"observation.images.{camera}" for camera in cameras}
    return Robot(
        name="aloha",
        cameras={SLOTS[camera]: f"images/{camera}" for camera in cameras},
        state=(State("state", 14),),
        actions=(arm, gripper, arm, gripper),
        control_hz=50.0,
        default_prompt=default_prompt,
        dataset_keys={**features, "state": "observation.state", "actions": "action"},
    )


def aloha_sim(*, relative: bool = False, default_prompt: str | None = None) -> Robot:
    robot = aloha(cameras=("cam_high",), relative=relative, default_prompt=default_prompt)
    keys = {**robot.dataset_keys, "images/cam_high": "observation.images.top"}
    return replace(robot, name="aloha_sim", dataset_keys=keys)
