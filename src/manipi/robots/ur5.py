"""A UR5 arm with a gripper, an outside and a wrist camera, at 20 Hz.

    state, command    joints 6 (rad) · gripper (0 open to 1 closed)

The released base models' norm stats have the asset id `ur5e`. Keys are those of openpi's example. Limits are the data
sheet's, of UR5 and UR5e alike: every joint within 360 degrees to either side, at 180 degrees per second at most.
"""

import math

from manipi.robots.robot import Gripper, Joints, Robot, State


def ur5(*, relative: bool = True, default_prompt: str | None = None) -> Robot:
    """The robot. Its joints are offsets from the current state unless `relative` is off; the gripper never is."""
    turn = (2 * math.pi,) * 6
    return Robot(
        name="ur5",
        cameras={"base": "base_rgb", "left_wrist": "wrist_rgb"},
        state=(State("joints", 6, unit="rad"), State("gripper", 1)),
        actions=(
            Joints(6, relative=relative, low=tuple(-limit for limit in turn), high=turn),
            Gripper(open=0.0, closed=1.0, low=(0.0,), high=(1.0,)),
        ),
        control_hz=20.0,
        max_rates=(math.pi,) * 6 + (20.0,),  # a gripper may be sent all the way by one command
        default_prompt=default_prompt,
        dataset_keys={"base_rgb": "image", "wrist_rgb": "wrist_image"},
    )
