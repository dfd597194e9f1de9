"""The action chunks that a robot has at hand, on the clock of the actions that it executed.

    executed so far     10   11   12   13   14   15   16   17
    chunk A              a    a    a    a    a    a               observed after 10 actions, H = 6
    chunk B                        b    b    b    b    b    b     observed after 12, there since 14
    newest               a    a    a    a    b    b    b    b     until 13 nobody knew of B
    ensemble             a    a    a    a   a·b  a·b   b    b

A control step in which the robot held still, because it had no action, does not move this clock: a plan for a robot
that did not move goes on where it stopped.

Shape letters: H action horizon, A action dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping

import numpy as np

from manipi_client.errors import ActionChunkError, shown


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
        self._chunks: list[Chunk] = []

    @property
    def newest(self) -> Chunk | None:
        return self._chunks[-1] if self._chunks else None

    def add(self, chunk: Chunk) -> None:
        self._chunks.append(chunk)

    def clear(self) -> None:
        self._chunks.clear()

    def action(self, executed: int) -> np.ndarray | None:
        """The action [A] after so many executed ones; None where no chunk reaches that far."""
        self._chunks = [chunk for chunk in self._chunks if chunk.end > executed]
        if not self._chunks:
            return None
        if self._ensemble is None:
            return self._chunks[-1].at(executed)
        weights = np.exp(-self._ensemble * np.arange(len(self._chunks)))
        actions = np.stack([chunk.at(executed) for chunk in self._chunks])
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
