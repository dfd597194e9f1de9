"""A robot as data: its cameras, its state and the groups of its command.

Enough to read its datasets, check its observations and convert its actions.

    camera slots        base          left_wrist     right_wrist
                          │               │               └ not named by this robot: absent
    observation keys   "image"      "wrist_image"

    state    = joints(7) · gripper(1)            the vectors, concatenated in the order given
    actions  = Joints(7, relative) · Gripper()   groups of consecutive dimensions

There are no functions in it, so it compares, prints, and travels as JSON inside a checkpoint and in the server's
metadata. A robot needs no place inside this package: any Python file that builds a `Robot` will do.
"""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, ClassVar, Literal, TypeAlias

from manipi.errors import ConfigError
from manipi.records import fingerprint, from_json, to_json

Rotation: TypeAlias = Literal["none", "rotvec", "euler_xyz", "quat_xyzw", "rot6d"]
ROTATION_SIZE: dict[Rotation, int] = {"none": 0, "rotvec": 3, "euler_xyz": 3, "quat_xyzw": 4, "rot6d": 6}


@dataclass(frozen=True)
class State:
    """One vector of the observation."""

    key: str
    size: int
    names: tuple[str, ...] = ()
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class _Group:
    relative: bool = False
    """The model sees offsets from the current state instead of absolute values."""
    state_start: int | None = None
    """Where the matching state dimensions begin; None: at the same offset as in the action vector."""
    low: tuple[float, ...] | None = None
    """Lower limits, one per dimension, in the robot's own unit."""
    high: tuple[float, ...] | None = None

    @property
    def converts_state(self) -> bool:
        """The matching state dimensions are converted too, before normalisation, and only once by all groups."""
        return False


@dataclass(frozen=True)
class Joints(_Group):
    """Joint positions or velocities (rad, rad/s), or any other vector whose offsets are plain differences."""

    size: int
    unit: str = "rad"
    signs: tuple[int, ...] = ()
    """1 or -1 per dimension: which way the model counts it, in commands and state; empty: as the robot does."""

    @property
    def converts_state(self) -> bool:
        return bool(self.signs)

    @property
    def model_size(self) -> int:
        return self.size


@dataclass(frozen=True)
class _OneDimension(_Group):
    size: ClassVar[int] = 1
    model_size: ClassVar[int] = 1


@dataclass(frozen=True)
class Gripper(_OneDimension):
    """One gripper dimension. The model always sees 0 (open) to 1 (closed)."""

    open: float = 0.0
    closed: float = 1.0
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class LinkageGripper(_OneDimension):
    """One gripper dimension whose fingers are pushed by a motor's horn and a rod, and which the model sees as an angle.

        motor ●──horn──○───rod────○ finger      horn² + finger² - rod² = 2 · horn · finger · sin(angle)
              └──────finger───────┘

    state    0 to 1 over the finger's way    model: 0 to 1 over `angle`
    command  0 to 1 over the motor's way     model: rad beyond `angle[0]`, not scaled

    Commands and state are in different units, so the group is never relative.
    """

    horn: float
    """Length in m, as `rod`."""
    rod: float
    finger: tuple[float, float]
    """Distance between finger and motor (m) where the state is 0, and where it is 1."""
    motor: tuple[float, float]
    """Motor angle (rad) where the command is 0, and where it is 1."""
    angle: tuple[float, float]
    """Motor angle (rad) where the model's state is 0, and where it is 1."""

    @property
    def converts_state(self) -> bool:
        return True


@dataclass(frozen=True)
class EndEffector(_Group):
    """A tool pose: position (m), then its rotation.

    The model sees a rotation as the first two columns of the rotation matrix (6D; Zhou et al., CVPR 2019), which has
    no jumps. Relative poses are composed as rigid motions: the target seen from the current tool frame when there is
    a rotation, the plain difference in the base frame when there is none.
    """

    rotation: Rotation = "none"
    unit: str = "m"

    @property
    def size(self) -> int:
        return 3 + ROTATION_SIZE[self.rotation]

    @property
    def model_size(self) -> int:
        return 3 if self.rotation == "none" else 9


ActionGroup: TypeAlias = Joints | Gripper | LinkageGripper | EndEffector


@dataclass(frozen=True, kw_only=True)
class ActionDimension:
    """One number of a command, for people and clients."""

    name: str
    unit: str
    low: float | None
    """The least command; None: no limit is stated."""
    high: float | None
    max_rate: float | None
    """The largest change per second, in unit/s; None: no limit is stated."""


@dataclass(frozen=True, kw_only=True)
class Robot:
    """The embodiment's contract. Raises ConfigError where its parts contradict each other."""

    name: str
    cameras: Mapping[str, str]
    """Camera slot -> key of the picture in the observation."""
    state: tuple[State, ...]
    actions: tuple[ActionGroup, ...]
    action_key: str = "actions"
    """Key of the action vector in datasets."""
    control_hz: float = 10.0
    default_prompt: str | None = None
    """Used where an observation brings no prompt; None: a prompt is required."""
    dataset_keys: Mapping[str, str] = field(default_factory=dict)
    """Observation key -> feature name in datasets, where the two differ."""
    optional: tuple[str, ...] = ()
    """Camera slots whose pictures may be absent from an observation or a dataset; the model is then told so."""
    ignored: tuple[str, ...] = ()
    """Observation keys beside those of optional cameras that clients may send and that are not read."""
    max_rates: tuple[float, ...] = ()
    """Largest change of each command dimension per second, in its unit/s; empty: none is stated."""

    def __post_init__(self) -> None:
        for part in (*self.state, *(g for g in self.actions if isinstance(g, Joints))):
            if part.size < 1:
                raise self._contradiction("at least one dimension", f"{part.size}", f"{type(part).__name__}.size")
        if not self.control_hz > 0:
            raise self._contradiction("a positive control rate in Hz", f"{self.control_hz}", "control_hz")
        offset, converted = 0, set()
        for group in self.actions:
            self._check_group(group, offset)
            start, offset = self.state_start(group, offset), offset + group.size
            dims = set(range(start, start + group.size)) if group.converts_state else set()
            if twice := sorted(dims & converted):
                raise self._contradiction("every state dimension converted once", f"{twice}", "actions")
            converted |= dims
        if self.max_rates and (len(self.max_rates) != offset or not all(rate > 0 for rate in self.max_rates)):
            raise self._contradiction(f"{offset} positive rates per second", f"{self.max_rates}", "max_rates")
        if strange := sorted(set(self.optional) - set(self.cameras)):
            raise self._contradiction(f"camera slots among {', '.join(self.cameras)}", f"{strange}", "optional")
        if not self.cameras or not self.actions:
            raise self._contradiction("at least one camera and one action group", "none", "cameras, actions")
        keys = [*self.cameras.values(), *(s.key for s in self.state), *self.ignored]
        if len(set(keys)) < len(keys):
            raise self._contradiction("every observation key once", f"{sorted(keys)}", "cameras, state, ignored")

    def _check_group(self, group: ActionGroup, offset: int) -> None:
        kind = type(group).__name__
        if isinstance(group, Gripper) and group.open == group.closed:
            raise self._contradiction("two different gripper positions", f"open = closed = {group.open}", kind)
        if isinstance(group, EndEffector) and group.rotation not in ROTATION_SIZE:
            raise self._contradiction(f"a rotation among {', '.join(ROTATION_SIZE)}", repr(group.rotation), kind)
        if isinstance(group, LinkageGripper) and group.relative:
            raise self._contradiction("an absolute group", "relative=True", kind)
        if isinstance(group, Joints) and group.signs and [abs(sign) for sign in group.signs] != [1] * group.size:
            raise self._contradiction(f"{group.size} signs, each 1 or -1", f"{group.signs}", f"{kind}.signs")
        start = self.state_start(group, offset)
        if (group.relative or group.converts_state) and not 0 <= start <= self.state_size - group.size:
            why = "relative" if group.relative else "converted"
            raise self._contradiction(
                f"state dimensions {start} to {start + group.size - 1} for the {why} group {kind}",
                f"a state of {self.state_size} dimensions",
                "actions",
            )
        for name, limits in (("low", group.low), ("high", group.high)):
            if limits is not None and len(limits) != group.size:
                raise self._contradiction(f"{group.size} limits", f"{len(limits)}", f"{kind}.{name}")

    def _contradiction(self, expected: str, found: str, where: str) -> ConfigError:
        return ConfigError(
            expected=expected, found=found, where=f"robot {self.name!r}, {where}", next="correct the Robot(...)"
        )

    @staticmethod
    def state_start(group: ActionGroup, action_start: int) -> int:
        """Where the state dimensions begin that match a group at `action_start` of the action vector."""
        return action_start if group.state_start is None else group.state_start

    @property
    def state_size(self) -> int:
        return sum(s.size for s in self.state)

    @property
    def action_size(self) -> int:
        """Dimensions of the command that the robot takes."""
        return sum(g.size for g in self.actions)

    @property
    def model_action_size(self) -> int:
        """Dimensions of an action as the model sees it (rotations are 6D there)."""
        return sum(g.model_size for g in self.actions)

    @property
    def limits(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Lowest and highest command, [A] each, in the robot's own units; infinite where a group states none."""
        low = tuple(value for group in self.actions for value in group.low or (-math.inf,) * group.size)
        return low, tuple(value for group in self.actions for value in group.high or (math.inf,) * group.size)

    @property
    def action_space(self) -> tuple[ActionDimension, ...]:
        """The command's dimensions, in order."""
        rates = self.max_rates or (math.inf,) * self.action_size
        columns = ([value if math.isfinite(value) else None for value in values] for values in (*self.limits, rates))
        return tuple(
            ActionDimension(name=name, unit=unit, low=low, high=high, max_rate=rate)
            for (name, unit), low, high, rate in zip(_dimensions(self.actions), *columns, strict=True)
        )

    def dataset_key(self, key: str) -> str:
        return self.dataset_keys.get(key, key)

    def cameras_in(self, features: Container[str]) -> dict[str, str]:
        """`cameras` without the optional ones that a dataset with these features lacks."""
        absent = {slot for slot in self.optional if self.dataset_key(self.cameras[slot]) not in features}
        return {slot: key for slot, key in self.cameras.items() if slot not in absent}

    def to_json(self) -> dict[str, Any]:
        return to_json(self)

    @staticmethod
    def from_json(data: Any, where: str) -> "Robot":
        return from_json(data, ROBOT_TYPES, where)

    def contract(self) -> str:
        """Fingerprint of what norm stats depend on: the state and action layout. Limits are not part of it."""
        return fingerprint([self.state, [replace(group, low=None, high=None) for group in self.actions]])


def _dimensions(groups: Sequence[ActionGroup]) -> list[tuple[str, str]]:
    """Name and unit of each. Joints are numbered through, poses and grippers where there are several: no two alike."""
    poses = sum(isinstance(group, EndEffector) for group in groups)
    grippers = sum(isinstance(group, Gripper | LinkageGripper) for group in groups)
    found, joint, pose, gripper = list[tuple[str, str]](), count(1), count(1), count(1)
    for group in groups:
        if isinstance(group, EndEffector):
            prefix = f"pose {next(pose)} " if poses > 1 else ""
            angle = "rad" if group.rotation in ("rotvec", "euler_xyz") else ""
            found += [(f"{prefix}{axis}", group.unit) for axis in ("x", "y", "z")]
            found += [(f"{prefix}rotation {i + 1}", angle) for i in range(group.size - 3)]
        elif isinstance(group, Joints):
            found += [(f"joint {next(joint)}", group.unit) for _ in range(group.size)]
        else:
            unit = "" if isinstance(group, LinkageGripper) else group.unit
            found.append((f"gripper {next(gripper)}" if grippers > 1 else "gripper", unit))
    return found


ROBOT_TYPES = (Robot, State, Joints, Gripper, LinkageGripper, EndEffector)
"""What a robot is made of, for `manipi.records.from_json`."""
