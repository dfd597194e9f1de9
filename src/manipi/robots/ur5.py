"""A UR5 arm with a parallel gripper, an outside and a wrist camera, 20 commands per second.

    state, command    joints 6 (rad) · gripper (0 open to 1 closed)

The released base models' norm stats have the asset id `ur5e`. Keys are those of openpi's example.
"""

from manipi.robots.robot import Gripper, Joints, Robot, State


def ur5(*, relative: bool = True, default_prompt: str | None = None) -> Robot:
    """The robot. Its joints are offsets from the current state unless `relative` is off; the gripper never is."""
    return Robot(
        name="ur5",
        cameras={"base": "base_rgb", "left_wrist": "wrist_rgb"},
        state=(State("joints", 6, unit="rad"), State("gripper", 1)),
        actions=(Joints(6, relative=relative), Gripper(open=0.0, closed=1.0)),
        control_hz=20.0,
        default_prompt=default_prompt,
        dataset_keys={"base_rgb": "image", "wrist_rgb": "wrist_image"},
    )
