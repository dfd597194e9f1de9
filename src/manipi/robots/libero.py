"""The Franka arm of the LIBERO simulator: an outside and a wrist camera, 10 commands per second.

    state      tool position 3 (m) · rotation vector 3 (rad) · fingers 2 (m)
    command    tool motion 3 · rotation 3, each from -1 to 1 · gripper (-1 open to 1 closed)

The rate is the published dataset's; the simulator itself makes 20 steps per second. Commands are small motions already,
so there is nothing relative about them. There are no published norm stats of a base model for it. Keys are openpi's,
feature names those of `physical-intelligence/libero`. The simulator's controller cuts commands off at -1 and 1.
"""

from manipi.robots.robot import Joints, Robot, State


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
