"""The tabletop's arm and scene: sizes, kinematics, and the MJCF that MuJoCo compiles.

Four hinges; the tool always points down. The table frame has its origin at the foot of the arm on the table top: x
forward, y to the left, z up; metres. There are no asset files: the scene is MJCF, written here.

    side view: r is the distance from the base axis, z the height above the table

                   elbow
       UPPER_ARM  /     \\  FOREARM            joints [4], radians
                 /       \\                       yaw       base about z
     shoulder  o          o wrist                shoulder  elevation of the upper arm
               |          | TOOL                 elbow     relative to the upper arm (< 0: elbow up)
     ──────────┴──────────v tip ────  r          wrist     relative to the forearm
"""

# MuJoCo's bindings are compiled and come without stubs.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Sequence

import mujoco
import numpy as np
from jaxtyping import Float

from manipi.errors import ConfigError

SHOULDER_HEIGHT = 0.22
UPPER_ARM = 0.30
FOREARM = 0.30
TOOL = 0.14
"""From the wrist axis to the tip, the point between the fingertips."""

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.16, 0.14),
    "green": (0.20, 0.66, 0.24),
    "blue": (0.14, 0.34, 0.86),
    "yellow": (0.97, 0.80, 0.10),
    "purple": (0.55, 0.22, 0.72),
    "orange": (0.98, 0.52, 0.10),
}
"""The colours that a block can have, by the name that a prompt uses."""

BLOCK_HALF = 0.0225
"""Half the side of a block, metres."""
SHAPES: dict[str, tuple[str, tuple[float, ...], str]] = {
    "cube": ("box", (BLOCK_HALF,) * 3, 'friction="0.4 0.005 0.0001"'),
    "cylinder": ("cylinder", (0.016, 0.025), 'friction="0.4 0.005 0.0001"'),
    "ball": ("sphere", (BLOCK_HALF,), 'friction="0.4 0.005 0.002" condim="6"'),  # it rolls, but not by itself
    "plate": ("cylinder", (0.036, 0.008), 'friction="0.4 0.005 0.0001"'),
}
"""What a block can be: MuJoCo's name of it, its half sizes in metres (the last is half its height), its friction."""
PAIRED_COLORS, PAIRED_SHAPES = ("red", "green", "blue"), ("cube", "plate")
"""Of `pairs`; the shapes differ in a picture of 56 pixels, and each word is one token."""
UNSEEN_PAIRS = ("red plate", "blue cube")
"""Pairs of colour and shape that no demonstration of `pairs` shows, though it shows every colour and every shape."""
TRAY_CENTER = (0.34, 0.0)
TRAY_HALF = 0.05
"""The tray is a flat square pad of this half side, metres."""
FINGER_TRAVEL = 0.025
"""How far each finger moves from closed (opening 0) to open (opening 1), metres."""
TIMESTEP = 0.01
"""Physics time step, seconds."""

_FINGER_HALF = 0.008


# Kinematics -----------------------------------------------------------------------------------------------------------


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
            where="manipi.tabletop.environment.scene.inverse",
            next="keep the tip inside Tabletop.WORKSPACE",
        )
    # Law of cosines in the triangle shoulder, elbow, wrist.
    inner = np.arccos((UPPER_ARM**2 + FOREARM**2 - distance**2) / (2 * UPPER_ARM * FOREARM))
    lift = np.arccos((UPPER_ARM**2 + distance**2 - FOREARM**2) / (2 * UPPER_ARM * distance))
    shoulder = np.arctan2(height, r) + lift
    elbow = inner - np.pi
    return np.array([np.arctan2(y, x), shoulder, elbow, -np.pi / 2 - shoulder - elbow])


# The scene ------------------------------------------------------------------------------------------------------------

_MJCF = """
<mujoco model="tabletop">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{timestep}" integrator="implicitfast" cone="elliptic" impratio="5"/>
  <default>
    <geom solimp="0.97 0.995 0.001"/>
    <default class="link"><geom contype="0" conaffinity="0" rgba="0.86 0.88 0.91 1"/></default>
    <default class="hub"><geom type="cylinder" contype="0" conaffinity="0" rgba="0.20 0.23 0.28 1"/></default>
    <default class="finger">
      <geom type="box" size="0.032 {finger} {finger}" rgba="0.13 0.13 0.15 1" friction="0.3 0.005 0.0001" mass="0.02"/>
      <joint type="slide" axis="0 1 0" armature="0.05" range="0 {travel}"/>
    </default>
    <default class="arm">
      <joint type="hinge" axis="0 -1 0" armature="0.1"/>
      <position kp="900" dampratio="1" forcerange="-12 12"/>
    </default>
  </default>
  <worldbody>
    <geom name="table" type="box" size="0.42 0.42 0.02" pos="0.28 0 -0.02" friction="0.4 0.005 0.0001"
          rgba="0.66 0.64 0.61 1"/>
    <geom name="tray" type="box" size="{tray} {tray} 0.0005" pos="{tray_x} {tray_y} 0.0005" contype="0" conaffinity="0"
          rgba="0.97 0.96 0.93 1"/>
    <geom class="hub" size="0.065 0.02" pos="0 0 0.02"/>
    <camera name="image" {image} fovy="20"/>
    <camera name="studio" {studio} fovy="36"/>
    <body name="base" gravcomp="1">
      <joint class="arm" name="yaw" axis="0 0 1"/>
      <geom class="link" type="cylinder" size="0.045 0.09" pos="0 0 0.12" mass="0.5"/>
      <geom class="hub" size="0.05 0.05" pos="0 0 {shoulder}" euler="1.5708 0 0" mass="0.2"/>
      <body name="upper_arm" pos="0 0 {shoulder}" gravcomp="1">
        <joint class="arm" name="shoulder"/>
        <geom class="link" type="capsule" size="0.03" fromto="0.03 0 0 {upper_arm} 0 0" mass="0.2"/>
        <body name="forearm" pos="{upper_arm} 0 0" gravcomp="1">
          <joint class="arm" name="elbow"/>
          <geom class="hub" size="0.036 0.036" euler="1.5708 0 0" mass="0.1"/>
          <geom class="link" type="capsule" size="0.024" fromto="0.03 0 0 {forearm} 0 0" mass="0.15"/>
          <body name="tool" pos="{forearm} 0 0" gravcomp="1">
            <joint class="arm" name="wrist"/>
            <geom class="hub" size="0.028 0.03" euler="1.5708 0 0" mass="0.05"/>
            <geom class="link" type="capsule" size="0.017" fromto="0.01 0 0 0.06 0 0" mass="0.05"/>
            <geom type="box" size="0.010 0.036 0.014" pos="0.07 0 0" friction="0.3 0.005 0.0001" mass="0.05"
                  rgba="0.20 0.23 0.28 1"/>
            <camera name="wrist_image" mode="fixed" pos="0.02 0 0.07" xyaxes="0 -1 0 0.26 0 0.97" fovy="80"/>
            <site name="tip" pos="{tool} 0 0"/>
            <body name="left_finger" pos="{finger_x} {finger} 0" gravcomp="1">
              <joint class="finger" name="left_finger"/><geom class="finger"/>
            </body>
            <body name="right_finger" pos="{finger_x} -{finger} 0" gravcomp="1">
              <joint class="finger" name="right_finger" axis="0 -1 0"/><geom class="finger"/>
            </body>
          </body>
        </body>
      </body>
    </body>
    {blocks}
  </worldbody>
  <actuator>
    <position class="arm" joint="yaw"/>
    <position class="arm" joint="shoulder"/>
    <position class="arm" joint="elbow"/>
    <position class="arm" joint="wrist"/>
    <position joint="left_finger" kp="200" dampratio="1"/>
    <position joint="right_finger" kp="200" dampratio="1"/>
  </actuator>
</mujoco>
"""

_BLOCK = """<body name="{name}" pos="0 0 {height}">
      <freejoint name="{name}"/>
      <geom type="{type}" size="{size}" mass="0.05" {friction} rgba="{rgb} 1"/>
    </body>"""

IMAGE_VIEW = np.array([[1.05, 0.12, 0.90], [0.32, -0.005, 0.03]])
_STUDIO_VIEW = np.array([[1.05, 0.85, 0.72], [0.20, 0.0, 0.16]])
"""A camera's position and the point that it looks at, metres."""


def camera_axes(view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Right and up of a camera that stands at view[0] and looks at view[1], upright; of any length."""
    forward = view[1] - view[0]
    right = np.cross(forward, [0.0, 0.0, 1.0])
    return right, np.cross(right, forward)


def _camera_pose(view: np.ndarray) -> str:
    """MJCF attributes of that camera."""
    axes = np.concatenate(camera_axes(view))
    return 'pos="{}" xyaxes="{}"'.format(*(" ".join(f"{v:.9f}" for v in values) for values in (view[0], axes)))


def build_scene(names: Sequence[str]) -> mujoco.MjModel:
    """Compiles the scene with these blocks, a colour or a colour and a shape each, in this order.

    Its cameras: `image` (outside, where blocks lie), `wrist_image` (along the tool) and `studio` (all of the arm).
    The first six positions are yaw, shoulder, elbow, wrist, left and right finger; then seven for each block.
    """
    blocks = []
    for name in names:
        color, _, shape = name.partition(" ")
        kind, sizes, friction = SHAPES[shape or "cube"]
        looks = {"size": " ".join(map(str, sizes)), "height": sizes[-1], "rgb": " ".join(map(str, COLORS[color]))}
        blocks.append(_BLOCK.format(name=name, type=kind, friction=friction, **looks))
    return mujoco.MjModel.from_xml_string(
        _MJCF.format(
            timestep=TIMESTEP,
            finger=_FINGER_HALF,
            finger_x=TOOL - 0.032,
            travel=FINGER_TRAVEL,
            tray=TRAY_HALF,
            tray_x=TRAY_CENTER[0],
            tray_y=TRAY_CENTER[1],
            shoulder=SHOULDER_HEIGHT,
            upper_arm=UPPER_ARM,
            forearm=FOREARM,
            tool=TOOL,
            image=_camera_pose(IMAGE_VIEW),
            studio=_camera_pose(_STUDIO_VIEW),
            blocks="\n    ".join(blocks),
        )
    )
