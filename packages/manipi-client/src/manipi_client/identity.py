"""Whether a server that was connected again still serves the same policy, by what it says about itself.

    robot, action_space, action_dim, control_hz     have to be the same, always
    everything else (checkpoint, model, step, …)    has to be the same, unless another checkpoint is allowed

openpi's server says whatever its operator gave it; that is compared in the same way.
"""

from __future__ import annotations

from typing import Any, List, Mapping

from manipi_client import wire
from manipi_client.errors import PolicyChanged, one_line, shown

_OF_THE_ROBOT = ("robot", "action_space", "action_dim", "control_hz")

_OF_TRAINING = ("default_prompt", "dataset_keys")
"""What a robot's description says of data and recipe; another checkpoint of the same robot may have another."""

_SHOWN, _DEEPEST = 4, 8

_OTHER_ROBOT = "start the server of this robot again; a run with another robot needs a new client"
_OTHER_CHECKPOINT = (
    "serve the former checkpoint; allow_new_checkpoint=True lets a client go on with another one of the same robot"
)


def require_same(before: Mapping[str, Any], now: Mapping[str, Any], uri: str, *, allow_new_checkpoint: bool) -> None:
    """Compares two servers' metadata. Raises PolicyChanged, which names what is different."""
    if robot := differences(_robot(before), _robot(now)):
        raise policy_changed(robot, uri, robot=True)
    if not allow_new_checkpoint and (checkpoint := differences(before, now)):
        raise policy_changed(checkpoint, uri, robot=False)


def policy_changed(changes: List[str], uri: str, *, robot: bool) -> PolicyChanged:
    """The error for these differences, of the robot or of the checkpoint alone."""
    more = f"; and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
    return PolicyChanged(
        expected=f"the {'robot' if robot else 'policy'} that this client began with",
        found=f"another {'robot or action space' if robot else 'policy'}: {'; '.join(changes[:_SHOWN])}{more}",
        where=f"{uri}, connected again",
        next=_OTHER_ROBOT if robot else _OTHER_CHECKPOINT,
    )


def differences(before: Any, now: Any, name: str = "", depth: int = 0) -> List[str]:
    """What is different in two values of metadata, each as a short text with the name of the key."""
    if depth < _DEEPEST and isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [*before, *(key for key in now if key not in before)]
        named = [(one_line(f"{name}.{key}" if name else str(key), 80), key) for key in keys]
        inner = [(label, before.get(key, _NONE), now.get(key, _NONE)) for label, key in named]
        return [text for label, one, other in inner for text in differences(one, other, label, depth + 1)]
    if depth < _DEEPEST and isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now))
        return [text for i, (one, other) in pairs for text in differences(one, other, f"{name}[{i}]", depth + 1)]
    if before is not _NONE and now is not _NONE and wire.pack(before) == wire.pack(now):
        return []
    return [f"{name} is {_told(now)}, was {_told(before)}"]


_NONE = object()


def _told(value: Any) -> str:
    return "not told" if value is _NONE else shown(value)


def _robot(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    told = {key: metadata[key] for key in _OF_THE_ROBOT if key in metadata}
    if isinstance(told.get("robot"), Mapping):
        told["robot"] = {key: value for key, value in told["robot"].items() if key not in _OF_TRAINING}
    return told
