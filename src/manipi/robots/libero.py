"""Stand-in until the robots branch is merged."""

from manipi.robots.robot import Joints, Robot, State


def libero(*, relative: bool = False, default_prompt: str | None = None) -> Robot:
    return Robot(
        name="libero",
        cameras={"base": "observation/image", "left_wrist": "observation/wrist_image"},
        state=(State("observation/state", 8),),
        actions=(Joints(6, relative=relative, unit=""), Joints(1, unit="")),
        control_hz=10.0,
        default_prompt=default_prompt,
        dataset_keys={f"observation/{key}": key for key in ("image", "wrist_image", "state")},
    )
