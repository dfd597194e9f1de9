"""The arm of the simulated tabletop: tip position, gripper, one outside camera.

Limits are the environment's workspace.
"""

from manipi.robots.robot import EndEffector, Gripper, Robot, State

TABLETOP = Robot(
    name="tabletop",
    cameras={"base": "observation/image"},
    state=(State("observation/state", 4, names=("x", "y", "z", "gripper"), unit="m"),),
    actions=(
        EndEffector(relative=True, low=(0.16, -0.20, 0.02), high=(0.50, 0.20, 0.20)),
        Gripper(open=1.0, closed=0.0, low=(0.0,), high=(1.0,)),
    ),
    control_hz=10.0,
)
