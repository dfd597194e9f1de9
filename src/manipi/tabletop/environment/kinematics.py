"""Forward and inverse kinematics of the tabletop arm: four hinges, the tool always points down.

    side view: r is the distance from the base axis, z the height above the table

                   elbow
       UPPER_ARM  /     \\  FOREARM            joints [4], radians
                 /       \\                       yaw       base about z
     shoulder  o          o wrist                shoulder  elevation of the upper arm
               |          | TOOL                 elbow     relative to the upper arm (< 0: elbow up)
     ──────────┴──────────v tip ────  r          wrist     relative to the forearm

The table frame has its origin at the foot of the arm on the table top: x forward, y to the left, z up; metres.
"""

import numpy as np
from jaxtyping import Float

from manipi.errors import ConfigError

SHOULDER_HEIGHT = 0.22
UPPER_ARM = 0.30
FOREARM = 0.30
TOOL = 0.14
"""From the wrist axis to the tip, the point between the fingertips."""


def forward(joints: Float[np.ndarray, "4"]) -> Float[np.ndarray, "3"]:
    """The tip's position for these joint angles, metres in the table frame."""
    yaw, *pitches = joints
    elevations = np.cumsum(pitches)
    lengths = (UPPER_ARM, FOREARM, TOOL)
    r = np.dot(lengths, np.cos(elevations))
    return np.array([r * np.cos(yaw), r * np.sin(yaw), SHOULDER_HEIGHT + np.dot(lengths, np.sin(elevations))])


def inverse(tip: Float[np.ndarray, "3"]) -> Float[np.ndarray, "4"]:
    """The joint angles, elbow up and tool pointing down, that put the tip there.

    Raises:
        ConfigError: the arm is too short or too long for this point.
    """
    x, y, z = (float(v) for v in tip)
    r, height = np.hypot(x, y), z + TOOL - SHOULDER_HEIGHT
    distance = np.hypot(r, height)
    if not abs(UPPER_ARM - FOREARM) < distance < UPPER_ARM + FOREARM:
        raise ConfigError(
            expected=f"a wrist within {UPPER_ARM + FOREARM} m of the shoulder",
            found=f"{distance:.3f} m for the tip ({x:.3f}, {y:.3f}, {z:.3f})",
            where="manipi.tabletop.environment.kinematics.inverse",
            next="keep the tip inside Tabletop.WORKSPACE",
        )
    # Law of cosines in the triangle shoulder, elbow, wrist.
    inner = np.arccos((UPPER_ARM**2 + FOREARM**2 - distance**2) / (2 * UPPER_ARM * FOREARM))
    lift = np.arccos((UPPER_ARM**2 + distance**2 - FOREARM**2) / (2 * UPPER_ARM * distance))
    shoulder = np.arctan2(height, r) + lift
    elbow = inner - np.pi
    return np.array([np.arctan2(y, x), shoulder, elbow, -np.pi / 2 - shoulder - elbow])
