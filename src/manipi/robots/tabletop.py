"""The arm of the embedded environment `tabletop`: tip position and gripper, one outside camera."""

from manipi.robots.robot import EndEffector, Gripper, Robot, State

TABLETOP = Robot(
    name="tabletop",
    cameras={"base": "observation/image"},
    state=(State("observation/state", 4, names=("x", "y", "z", "gripper"), unit="m"),),
    actions=(EndEffector(relative=True), Gripper(open=1.0, closed=0.0)),
    control_hz=10.0,
)
