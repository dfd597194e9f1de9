"""The last look at an action chunk before it leaves for the robot: NaN, limits, rates of change."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float

from manipi.errors import ActionError
from manipi.robots.robot import Robot
from manipi.transforms.observation import ReadRobot
from manipi.types import Observation

GuardMode: TypeAlias = Literal["clamp", "refuse", "off"]

_ROUNDING = 1e-6
"""By how much, relative to 1 or to the value, a command may be beyond a limit that it was trained on in float32."""


@dataclass(frozen=True)
class Guarded:
    """A chunk that may leave, and how many of its numbers were moved for which reason."""

    actions: Float[np.ndarray, "H A"]
    beyond_limits: int = 0
    too_fast: int = 0


class ActionGuard:
    """Keeps chunks within what the robot states: `low` and `high` of its groups, and its `max_rates`.

    The first step is measured from the current state in the dimensions of relative groups, whose commands and state
    are in the same units, and is free in the others. Every later step is measured from the one before it, as it
    leaves.

    Args:
        mode: `clamp` moves a command to the nearest allowed one, `refuse` raises; `off` looks at nothing. NaN and
            infinity have no nearest command and are refused in both.
    """

    def __init__(self, robot: Robot, mode: GuardMode = "clamp"):
        self._robot, self._mode, self._read = robot, mode, ReadRobot(robot)
        self._low_A, self._high_A = (np.array(limit, np.float32).astype(np.float64) for limit in robot.limits)
        rates = robot.max_rates or (np.inf,) * robot.action_size
        self._step_A = np.array(rates, np.float64) / robot.control_hz
        self._state_A = _state_dimensions(robot)

    def __call__(self, observation: Observation, actions_HA: np.ndarray) -> Guarded:
        """Raises ActionError for NaN, another shape, and in mode `refuse` for whatever is beyond the robot."""
        if self._mode == "off":
            return Guarded(actions_HA)
        wanted_HA = self._require_numbers(actions_HA)
        limited_HA = np.clip(wanted_HA, self._low_A, self._high_A)
        allowed_HA = self._slow_down(observation, limited_HA)
        beyond_HA, fast_HA = _differs(wanted_HA, limited_HA), _differs(limited_HA, allowed_HA)
        if not (beyond_HA.any() or fast_HA.any()):
            return Guarded(actions_HA)
        if self._mode == "refuse":
            raise self._refusal(wanted_HA, allowed_HA, beyond_HA if beyond_HA.any() else fast_HA)
        return Guarded(allowed_HA.astype(actions_HA.dtype), int(beyond_HA.sum()), int(fast_HA.sum()))

    def _require_numbers(self, actions_HA: np.ndarray) -> np.ndarray:
        shape = np.shape(actions_HA)
        if len(shape) != 2 or shape[1] != self._robot.action_size:
            raise self._error(f"a chunk [H, {self._robot.action_size}]", f"{list(shape)}")
        wanted_HA = np.asarray(actions_HA, np.float64)
        if len(bad := np.argwhere(~np.isfinite(wanted_HA))):
            step, dimension = bad[0].tolist()
            raise self._error("finite actions", f"{wanted_HA[step, dimension]} in {self._place(step, dimension)}")
        return wanted_HA

    def _slow_down(self, observation: Observation, limited_HA: np.ndarray) -> np.ndarray:
        if not (np.isfinite(self._step_A).any() and len(limited_HA)):
            return limited_HA
        state = self._read.read_state(observation)
        before_A = np.where(self._state_A >= 0, state[self._state_A] if state.size else 0, limited_HA[0])
        allowed_HA = limited_HA.copy()
        for step_A in allowed_HA:
            np.clip(step_A, before_A - self._step_A, before_A + self._step_A, out=step_A)
            before_A = step_A
        return allowed_HA

    def _refusal(self, wanted_HA: np.ndarray, allowed_HA: np.ndarray, broken_HA: np.ndarray) -> ActionError:
        step, d = np.argwhere(broken_HA)[0].tolist()
        low, high, rate = self._low_A[d], self._high_A[d], self._step_A[d] * self._robot.control_hz
        return self._error(
            f"commands from {low:g} to {high:g} that change by at most {rate:g} per second",
            f"{wanted_HA[step, d]:g} in {self._place(step, d)}; the nearest allowed one is {allowed_HA[step, d]:g}",
        )

    def _place(self, step: int, dimension: int) -> str:
        return f"step {step}, dimension {dimension} ({self._robot.action_space[dimension].name})"

    def _error(self, expected: str, found: str) -> ActionError:
        next = "look at the observation and the prompt; --guard clamp moves commands to the nearest allowed ones"
        return ActionError(
            expected=expected, found=found, where=f"the action chunk for robot {self._robot.name!r}", next=next
        )


def _state_dimensions(robot: Robot) -> np.ndarray:
    """[A] Which number of the state is the current value of each command, -1 where none is."""
    dimensions: list[int] = []
    for group in robot.actions:
        start = robot.state_start(group, len(dimensions))
        dimensions += range(start, start + group.size) if group.relative else [-1] * group.size
    return np.array(dimensions)


def _differs(wanted_HA: np.ndarray, allowed_HA: np.ndarray) -> np.ndarray:
    return np.abs(wanted_HA - allowed_HA) > _ROUNDING * np.maximum(1, np.abs(wanted_HA))
