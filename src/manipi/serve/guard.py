"""Looks at what comes in and goes out: slips in observations, and action chunks that must not reach the robot.

An empty prompt changes what the policy does, so that it is refused, unless the policy was trained on such. A key too
many changes nothing, so that it is told once to each client that sends it, in the log and in the answer. Chunks are
looked at for NaN, limits and rates of change, just before they leave.
"""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Literal, TypeAlias

import numpy as np

from manipi.errors import ActionError, ObservationError, shown
from manipi.robots.robot import Robot
from manipi.transforms.actions import CommandLimits, differs
from manipi.transforms.observation import MAX_PROMPT, ReadRobot, as_text
from manipi.types import Observation
from manipi_client import keys

GuardMode: TypeAlias = Literal["clamp", "refuse", "off"]

_KNOWN_TO_ALL = ("prompt", "actions", "action_valid", "delay", *(v for k, v in vars(keys).items() if k.isupper()))
"""Beside the robot's own: what a recorded frame brings along, and what the server and the policy are told."""

_MOST = 10
"""Unknown keys that one client is told of."""


def require_prompt(observation: Observation, robot: Robot) -> None:
    """Raises ObservationError for a prompt without a character but spaces, unless it is the robot's default."""
    try:
        prompt = as_text(observation.get("prompt", robot.default_prompt), MAX_PROMPT)
    except ValueError:  # the policy refuses it, and says why
        return
    if prompt is None or prompt.strip() or robot.default_prompt == "":
        return
    default = "" if robot.default_prompt is None else f", or leave the key out for {shown(robot.default_prompt)}"
    raise ObservationError(
        expected="an instruction, as the policy was trained with",
        found="an empty text",
        where=f"observation key 'prompt' of robot {robot.name!r}",
        next=f"send what the robot is to do{default}; manipi serve --empty-prompts takes none",
    )


def unknown_keys(observation: Observation, robot: Robot, told: set[str]) -> list[str]:
    """Texts about the keys that neither robot, policy nor server reads, each with the nearest key that one does.

    Args:
        told: of which the client was told before; they are left out, and the new ones added.
    """
    known = {*robot.cameras.values(), *(s.key for s in robot.state), *robot.ignored, *_KNOWN_TO_ALL}
    texts = []
    for key in _flat_keys(observation):
        if key in known or key in told or len(told) >= _MOST:
            continue
        told.add(key)
        close = get_close_matches(key, sorted(known - observation.keys()), n=1)
        texts.append(f"{shown(key)}, which is not read" + (f" (is it {shown(close[0])}?)" if close else ""))
    return texts


def _flat_keys(observation: Mapping, folder: str = "") -> Iterator[str]:
    for name, value in observation.items():
        if not isinstance(name, str):  # the policy refuses it
            continue
        key = f"{folder}{name[:256]}"[:256]
        if isinstance(value, Mapping):
            yield from _flat_keys(value, f"{key}/")
        else:
            yield key


class ActionGuard:
    """Keeps chunks within what the robot states (`CommandLimits`).

    Args:
        mode: `clamp` moves a command to the nearest allowed one, `refuse` raises; `off` looks at nothing. NaN and
            infinity have no nearest command and are refused in both.
    """

    def __init__(self, robot: Robot, mode: GuardMode = "clamp"):
        self._robot, self._mode, self._read = robot, mode, ReadRobot(robot)
        self._limits = CommandLimits(robot)

    def __call__(self, observation: Observation, actions_HA: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
        """The chunk [H, A] that may leave, and how many of its numbers were moved for which reason; {}: none was.

        Raises ActionError for NaN, another shape, and in mode `refuse` for whatever is beyond the robot.
        """
        if self._mode == "off":
            return actions_HA, {}
        shape = np.shape(actions_HA)
        if len(shape) != 2 or shape[1] != self._robot.action_size:
            raise self._error(f"a chunk [H, {self._robot.action_size}]", f"{list(shape)}")
        wanted_HA = np.asarray(actions_HA, np.float64)
        if len(bad := np.argwhere(~np.isfinite(wanted_HA))):
            step, dimension = bad[0].tolist()
            raise self._error("finite actions", f"{wanted_HA[step, dimension]} in {self._place(step, dimension)}")
        limits = self._limits
        state = self._read.read_state(observation) if limits.has_rates and len(wanted_HA) else np.zeros(0)
        limited_HA, allowed_HA = limits.allowed(wanted_HA, state)
        beyond_HA, fast_HA = differs(wanted_HA, limited_HA), differs(limited_HA, allowed_HA)
        if not (beyond_HA.any() or fast_HA.any()):
            return actions_HA, {}
        if self._mode == "refuse":
            step, d = np.argwhere(beyond_HA if beyond_HA.any() else fast_HA)[0].tolist()
            low, high, rate = limits.low_A[d], limits.high_A[d], limits.step_A[d] * self._robot.control_hz
            raise self._error(
                f"commands from {low:g} to {high:g} that change by at most {rate:g} per second",
                f"{wanted_HA[step, d]:g} in {self._place(step, d)}; the nearest allowed one is {allowed_HA[step, d]:g}",
            )
        moved = {"beyond_limits": int(beyond_HA.sum()), "too_fast": int(fast_HA.sum())}
        return allowed_HA.astype(actions_HA.dtype), moved

    def _place(self, step: int, dimension: int) -> str:
        return f"step {step}, dimension {dimension} ({self._robot.action_space[dimension].name})"

    def _error(self, expected: str, found: str) -> ActionError:
        next = "look at the observation and the prompt; --guard clamp moves commands to the nearest allowed ones"
        return ActionError(
            expected=expected, found=found, where=f"the action chunk for robot {self._robot.name!r}", next=next
        )
