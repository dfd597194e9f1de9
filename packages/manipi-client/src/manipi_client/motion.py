"""How smoothly and how promptly a robot moves, in numbers that need no more memory the longer it runs.

    action      ─ ─ ─ ─┐         seam: the executed action comes from another chunk than the one before
                       └─ ─ ─    jump: how far the command moves there
    observation  ●─────────►     reaction: how old the observation behind an executed action is

Shape letter: A action dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Motion:
    """What was measured, [A] in the robot's units for what depends on the dimension."""

    steps: int
    starved_steps: int
    """Steps for which there was no action in time."""
    seams: int
    seam_jump: np.ndarray
    """The largest change of the command at a seam."""
    seam_change: np.ndarray
    """The mean change at seams."""
    step_change: np.ndarray
    """The mean change from a step to the next of the same chunk, to compare with."""
    jerk: np.ndarray
    """The mean third difference of the commands, per step³."""
    reaction_s: float
    """The mean age of the observation behind an executed action, when it was handed out."""
    reaction_max_s: float


class MotionMeter:
    """Takes every executed action in turn."""

    def __init__(self) -> None:
        self._last: list[np.ndarray] = []
        self._chunk: int | None = None
        self._steps = self._starved = self._seams = self._inner = self._jerks = self._reactions = 0
        self._jump = self._seam_sum = self._inner_sum = self._jerk_sum = np.zeros(())
        self._reaction_sum, self._reaction_max = 0.0, math.nan

    def add(self, action: np.ndarray, chunk: int | None, age_s: float = math.nan) -> None:
        """An executed action [A].

        Args:
            chunk: tells chunks apart; None: the robot had none, and starved. Its jump counts when it has one again.
            age_s: of the observation behind the action.
        """
        action = np.asarray(action, np.float64)
        if self._last and chunk is not None:
            self._add_change(np.abs(action - self._last[-1]), is_seam=chunk != self._chunk)
        if len(self._last) == 3:
            first, second, third = self._last
            self._jerk_sum = self._jerk_sum + np.abs(action - 3 * third + 3 * second - first)
            self._jerks += 1
        self._last, self._chunk = [*self._last[-2:], action], self._chunk if chunk is None else chunk
        self._steps += 1
        self._starved += chunk is None
        if not math.isnan(age_s):
            self._reaction_sum, self._reactions = self._reaction_sum + age_s, self._reactions + 1
            self._reaction_max = max(age_s, self._reaction_max) if self._reactions > 1 else age_s

    def begin_episode(self) -> None:
        """The next action does not continue the last one."""
        self._last, self._chunk = [], None

    def read(self) -> Motion:
        """What was measured so far; NaN where there was nothing to measure."""
        return Motion(
            steps=self._steps,
            starved_steps=self._starved,
            seams=self._seams,
            seam_jump=self._jump,
            seam_change=_mean(self._seam_sum, self._seams),
            step_change=_mean(self._inner_sum, self._inner),
            jerk=_mean(self._jerk_sum, self._jerks),
            reaction_s=self._reaction_sum / self._reactions if self._reactions else math.nan,
            reaction_max_s=self._reaction_max,
        )

    def _add_change(self, change: np.ndarray, *, is_seam: bool) -> None:
        if is_seam:
            self._seams += 1
            self._seam_sum, self._jump = self._seam_sum + change, np.maximum(self._jump, change)
        else:
            self._inner += 1
            self._inner_sum = self._inner_sum + change


def _mean(total: np.ndarray, count: int) -> np.ndarray:
    return total / count if count else np.full(total.shape, np.nan)
