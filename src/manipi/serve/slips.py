"""What a robot's spec has room for, and is most likely a slip of the client: no instruction, keys that are not read.

An empty prompt changes what the policy does, so that it is refused, unless the policy was trained on such. A key too
many changes nothing, so that it is told once to each client that sends it, in the log and in the answer.
"""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches

from manipi.errors import ObservationError, shown
from manipi.robots.robot import Robot
from manipi.transforms.observation import MAX_PROMPT, as_text
from manipi.types import Observation
from manipi_client import keys

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
