"""One action at a time from a policy that plans a chunk."""

from __future__ import annotations

from typing import Any, Mapping

import numpy as np

from manipi_client.chunks import read_chunk
from manipi_client.errors import InputError
from manipi_client.policy import Policy


class ActionChunkBroker:
    """Asks a policy once per chunk and hands out its steps in turn.

        infer call        0   1   2   3 | 4   5   6   7 | 8
        policy asked      x             | x             | x        execute_steps = 4
        step handed out   0   1   2   3 | 0   1   2   3 | 0

    Args:
        policy: returns `actions` [H, A], and maybe other things.
        execute_steps: steps to execute before the policy is asked again; at most H.
    """

    def __init__(self, policy: Policy, execute_steps: int) -> None:
        if execute_steps < 1:
            raise InputError(
                expected="at least one step to execute",
                found=str(execute_steps),
                where="ActionChunkBroker(execute_steps=…)",
                next="give a number between 1 and the policy's action horizon",
            )
        self._policy, self._execute_steps = policy, execute_steps
        self._chunk: dict[str, Any] | None = None
        self._actions: np.ndarray | None = None
        self._step = 0

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._policy.metadata

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The next step: `actions` [A], and every other array, at any depth, that has a row per step of the chunk.

        Raises:
            ActionChunkError: the chunk has fewer steps than `execute_steps`, or its actions another shape than before.
        """
        if self._chunk is None:
            answer = self._policy.infer(observation)
            self._actions = read_chunk(answer, self._execute_steps, self._actions)
            self._chunk, self._step = answer, 0
        action = _take_step(self._chunk, self._step, len(self._chunk["actions"]))
        self._step += 1
        if self._step == self._execute_steps:
            self._chunk = None
        return action

    def reset(self) -> None:
        """Drops the rest of the chunk: the next call asks the policy."""
        self._policy.reset()
        self._chunk = None


def _take_step(value: Any, step: int, horizon: int) -> Any:
    """Row `step` of every array with `horizon` rows, in nested dicts, lists and tuples; all else unchanged."""
    if isinstance(value, np.ndarray):
        return value[step] if value.ndim > 0 and len(value) == horizon else value
    if isinstance(value, dict):
        return {key: _take_step(item, step, horizon) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_take_step(item, step, horizon) for item in value])
    return value
