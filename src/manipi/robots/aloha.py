"""ALOHA: two Trossen ViperX arms with grippers, up to three cameras, at 50 Hz.

    state, command    left arm 6 (rad) · gripper (0 closed to 1 open) · right arm 6 · gripper
    pictures          a map `images` of cameras, [3, height, width]

The released models were pretrained with other conventions (`pi_convention`): two joints of each arm count the other
way, and a gripper is the angle of its motor instead of the way of its fingers. Their norm stats have the asset id
`trossen`. Keys and constants are openpi's. Joints are limited as in Interbotix' description of the ViperX 300 S; no
limits of the grippers' commands are known.
"""

from collections.abc import Sequence
from dataclasses import replace

from manipi.errors import ConfigError, unknown_name
from manipi.robots.robot import Joints, LinkageGripper, Robot, State

SLOTS = {"cam_high": "base", "cam_left_wrist": "left_wrist", "cam_right_wrist": "right_wrist"}
GRIPPER = LinkageGripper(
    horn=0.022, rod=0.036, finger=(0.01844, 0.05800), motor=(-0.6213, 1.4910), angle=(0.5476, 1.6296)
)
"""Interbotix' linkage; finger and motor ranges from the ALOHA driver; the angles are encoder counts 2405 and 3110."""

_JOINT_LOW = (-3.14158, -1.85005, -1.76278, -3.14158, -1.8675, -3.14158)
_JOINT_HIGH = (3.14158, 1.25664, 1.6057, 3.14158, 2.23402, 3.14158)


def aloha(
    *,
    cameras: Sequence[str] = tuple(SLOTS),
    pi_convention: bool = True,
    relative: bool = True,
    default_prompt: str | None = None,
) -> Robot:
    """The robot with openpi's keys. Wrist cameras may be absent from an observation; `cam_low` is never read.

    Args:
        cameras: those that the robot has, `cam_high` among them.
        pi_convention: convert to the conventions of the released models and back.
        relative: the joints are offsets from the current state; the grippers never are.

    Raises:
        ConfigError: no `cam_high`, or a camera that ALOHA has not.
    """
    for camera in cameras:
        if camera not in SLOTS:
            raise unknown_name("camera of ALOHA", camera, SLOTS, next="leave it out")
    if "cam_high" not in cameras:
        raise ConfigError(expected="cam_high", found=f"{tuple(cameras)}", where="aloha(cameras=…)", next="add cam_high")
    signs = (1, -1, -1, 1, 1, 1) if pi_convention else ()
    arm = Joints(6, relative=relative, signs=signs, low=_JOINT_LOW, high=_JOINT_HIGH)
    gripper = GRIPPER if pi_convention else Joints(1, unit="")
    features = {f"images/{camera}": f"observation.images.{camera}" for camera in cameras}
    return Robot(
        name="aloha",
        cameras={SLOTS[camera]: f"images/{camera}" for camera in cameras},
        optional=tuple(SLOTS[camera] for camera in cameras if camera != "cam_high"),
        ignored=("images/cam_low",),
        state=(State("state", 14),),
        actions=(arm, gripper, arm, gripper),
        control_hz=50.0,
        default_prompt=default_prompt,
        dataset_keys={**features, "state": "observation.state", "actions": "action"},
    )


def aloha_sim(*, relative: bool = False, default_prompt: str | None = None) -> Robot:
    """The simulated ALOHA of gym_aloha: one camera from above, which its datasets call `top`."""
    robot = aloha(cameras=("cam_high",), relative=relative, default_prompt=default_prompt)
    keys = {**robot.dataset_keys, "images/cam_high": "observation.images.top"}
    return replace(robot, name="aloha_sim", dataset_keys=keys)
