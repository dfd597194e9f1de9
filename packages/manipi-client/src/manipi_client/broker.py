"""What a policy is, and the action chunks that a robot has at hand from it.

`ActionChunkBroker` asks a policy once per chunk. `ChunkQueue` holds several, on the clock of executed actions:

    executed so far     10   11   12   13   14   15   16   17
    chunk A              a    a    a    a    a    a               observed after 10 actions, H = 6
    chunk B                        b    b    b    b    b    b     observed after 12, there since 14
    newest               a    a    a    a    b    b    b    b     B is not known until 13
    ensemble             a    a    a    a   a·b  a·b   b    b

A control step in which the robot held still, because it had no action, does not move this clock: a plan for a robot
that did not move goes on where it stopped.

Shape letters: H action horizon, A action dimensions.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Dict, Mapping, Optional, Protocol, Sequence

import numpy as np

from manipi_client.errors import ActionChunkError, InputError, shown
from manipi_client.keys import PAST


class Policy(Protocol):
    """Turns observations into actions: a server far away, a broker around it, or a function in a test."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the policy says about itself: robot, model, home pose."""
        ...

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The actions for an observation.

        Returns:
            A dict with `actions`, [H, A] for a policy that plans a chunk and [A] behind an `ActionChunkBroker`.
        """
        ...

    def reset(self) -> None:
        """Forget the episode so far."""
        ...


class Memory:
    """What a policy that remembers is shown again: observations of so many steps before each question.

    Args:
        steps: `past_steps` of the policy's metadata, the oldest first; empty: it remembers nothing.
        period: steps from a question to the next one, the first at step 0; None: they come at any step.
    """

    def __init__(self, steps: Sequence[int], period: Optional[int] = None) -> None:
        self._steps, self._period = tuple(steps), period
        self._seen: Dict[int, Mapping[str, Any]] = {}

    def wants(self, step: int) -> bool:
        """Whether a later question shows the observation of this step."""
        return any(self._period is None or (step + ago) % self._period == 0 for ago in self._steps)

    def add(self, step: int, observation: Mapping[str, Any]) -> Dict[str, Any]:
        """Keeps the observation, where it is wanted. Returns what a question at this step has beside it."""
        past = {PAST: [self._seen.get(step - ago) for ago in self._steps]} if self._steps else {}
        if self.wants(step):
            self._seen[step] = copy.deepcopy(observation)  # robots fill the same arrays again
            self._seen = {at: seen for at, seen in self._seen.items() if step - at < max(self._steps)}
        return past


class ActionChunkBroker:
    """Asks a policy once per chunk and hands out its steps in turn.

        infer call        0   1   2   3 | 4   5   6   7 | 8
        policy asked      x             | x             | x        execute_steps = 4
        step handed out   0   1   2   3 | 0   1   2   3 | 0

    A policy that remembers (`past_steps` of its metadata) is shown the older observations, too.

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
        self._step = self._executed = 0
        self._memory: Optional[Memory] = None

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._policy.metadata

    @property
    def needs_observation(self) -> bool:
        """Whether the next `infer` reads its observation; where it does not, `{}` will do, and no camera is read."""
        return self._chunk is None or self._remembers.wants(self._executed)

    @property
    def _remembers(self) -> Memory:
        if self._memory is None:
            self._memory = Memory(self._policy.metadata.get("past_steps", ()), self._execute_steps)
        return self._memory

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The next step: `actions` [A], and every other array, at any depth, that has a row per step of the chunk.

        Raises:
            ActionChunkError: the chunk has fewer steps than `execute_steps`, or its actions another shape than before.
        """
        past = self._remembers.add(self._executed, observation)
        if self._chunk is None:
            answer = self._policy.infer({**observation, **past} if past else observation)
            self._actions = read_chunk(answer, self._execute_steps, self._actions)
            self._chunk, self._step = answer, 0
        action = _take_step(self._chunk, self._step, len(self._chunk["actions"]))
        self._step, self._executed = self._step + 1, self._executed + 1
        if self._step == self._execute_steps:
            self._chunk = None
        return action

    def reset(self) -> None:
        """Drops the rest of the chunk: the next call asks the policy."""
        self._policy.reset()
        self._chunk, self._memory, self._executed = None, None, 0


def _take_step(value: Any, step: int, horizon: int) -> Any:
    """Row `step` of every array with `horizon` rows, in nested dicts, lists and tuples; all else unchanged."""
    if isinstance(value, np.ndarray):
        return value[step] if value.ndim > 0 and len(value) == horizon else value
    if isinstance(value, dict):
        return {key: _take_step(item, step, horizon) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_take_step(item, step, horizon) for item in value])
    return value


@dataclass(frozen=True)
class Chunk:
    """An answer of the policy: row i of `actions` [H, A] is the i-th action after its observation."""

    actions: np.ndarray
    first: int
    """Actions that had been executed when the observation behind it was made."""
    step: int
    """The control step of that observation; no other chunk has the same."""
    observed_at: float
    """When that was, on the clock of `time.monotonic` (s)."""

    @property
    def end(self) -> int:
        return self.first + len(self.actions)

    def at(self, executed: int) -> np.ndarray:
        return self.actions[executed - self.first]


class ChunkQueue:
    """Chunks in the order of their observations; those without a row that is still to come are dropped.

    Args:
        ensemble: None executes the newest chunk. Otherwise the mean of all chunks that reach so far is executed, with
            weights exp(-ensemble · i), i = 0 for the oldest (temporal ensembling: Zhao et al. 2023, arXiv 2304.13705).
    """

    def __init__(self, ensemble: float | None = None) -> None:
        self._ensemble = ensemble
        self.chunks: list[Chunk] = []

    @property
    def newest(self) -> Chunk | None:
        return self.chunks[-1] if self.chunks else None

    def action(self, executed: int) -> np.ndarray | None:
        """The action [A] after so many executed ones; None where no chunk reaches that far."""
        self.chunks = [chunk for chunk in self.chunks if chunk.end > executed]
        if not self.chunks:
            return None
        if self._ensemble is None:
            return self.chunks[-1].at(executed)
        weights = np.exp(-self._ensemble * np.arange(len(self.chunks)))
        actions = np.stack([chunk.at(executed) for chunk in self.chunks])
        return (weights[:, None] * actions).sum(0) / weights.sum()

    def left(self, executed: int) -> np.ndarray:
        """What is left of the newest chunk [n, A], after so many executed actions."""
        newest = self.newest
        return np.zeros((0, 0), np.float32) if newest is None else newest.actions[max(executed - newest.first, 0) :]


def read_chunk(answer: Mapping[str, Any], execute_steps: int, before: np.ndarray | None = None) -> np.ndarray:
    """The actions [H, A] of a policy's answer.

    Args:
        before: those of an earlier answer.

    Raises:
        ActionChunkError: H is less than `execute_steps`, or an action has another shape than before.
    """
    shape = np.shape(answer.get("actions", ()))
    if len(shape) == 0 or shape[0] < execute_steps:
        raise ActionChunkError(
            expected=f"actions of at least {execute_steps} steps (execute_steps)",
            found=f"actions of shape {shape}"
            if "actions" in answer
            else f"no actions, only {shown(sorted(map(str, answer)))}",
            where="the policy's answer",
            next="set execute_steps to the policy's action horizon or less",
        )
    if before is not None and before.shape[1:] != shape[1:]:
        raise ActionChunkError(
            expected=f"actions that have shape {before.shape[1:]} each, as those before",
            found=f"actions of shape {shape}",
            where="the policy's answer",
            next="look which policy answers: it is another one than at the start",
        )
    return np.asarray(answer["actions"])
