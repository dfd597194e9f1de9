"""Every number of state and action chunks at some rows, as the model sees them, without the chunks being written down.

Each action group is taken apart from the others, for what it costs:

    Absolute      an action is in the chunks of the rows before it: each counts once, with the number of these
    Offsets       the step H of a row is a command minus the row's state: both are columns, and only differences are new
    RelativePoses offsets that are more than differences: the chunks themselves, many rows at a time

Steps beyond the end of an episode do not count.

Dimensions come first in memory, so that one is looked at after the other.

Shape letters: N rows of the dataset, n rows asked for (ascending), D dimensions, m numbers, H steps, A and S dimensions
of command and state.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from manipi.data.dataset import Dataset
from manipi.robots.robot import EndEffector, Robot
from manipi.transforms.actions import ActionSpace

_ROWS = 4096

Values: TypeAlias = tuple[np.ndarray, np.ndarray | None]
"""Numbers [D, m] that have been converted, and how often each counts [m]; None: once."""


@dataclass(frozen=True, eq=False)
class Columns:
    """A vector at the rows themselves."""

    columns_DN: np.ndarray
    numbers_per_row: int = 1

    @property
    def size(self) -> int:
        return len(self.columns_DN)

    def values(self, rows: np.ndarray) -> Values:
        return _at(self.columns_DN, rows), None


@dataclass(frozen=True, eq=False)
class Absolute:
    """An action group at some steps of the chunks that begin at the rows."""

    commands_DN: np.ndarray
    """As the model sees them."""
    steps: range
    ends_N: np.ndarray
    """The row after the last of the episode, for every row."""
    numbers_per_row: int = 1

    @property
    def size(self) -> int:
        return len(self.commands_DN)

    def values(self, rows: np.ndarray) -> Values:
        rows = rows[rows + self.steps.start < self.ends_N[rows]]
        if not len(rows):
            return self.commands_DN[:, :0], None
        begin, end = rows + self.steps.start, np.minimum(rows + self.steps.stop, self.ends_N[rows])
        first, length = begin[0], end.max() - begin[0] + 1
        chunks = np.cumsum(np.bincount(begin - first, minlength=length) - np.bincount(end - first, minlength=length))
        used = np.flatnonzero(chunks)
        return _at(self.commands_DN, first + used), chunks[used]


@dataclass(frozen=True, eq=False)
class Offsets:
    """One dimension at some steps of the chunks that begin at the rows, minus the state of the row."""

    commands_N: np.ndarray
    """As the model would see them were they absolute; so is the state."""
    state_N: np.ndarray
    steps: range
    ends_N: np.ndarray
    size: int = 1

    @property
    def numbers_per_row(self) -> int:
        return len(self.steps)

    def values(self, rows: np.ndarray) -> Values:
        num, left = len(self.steps), self.ends_N[rows] - rows - self.steps.start
        values, whole = np.empty(int(np.clip(left, 0, num).sum()), np.float32), rows[left >= num]
        self._fill_whole(whole, values[: len(whole) * num].reshape(-1, num))
        near_end = (left > 0) & (left < num)
        beyond_or_not = self._offsets(rows[near_end])
        values[len(whole) * num :] = beyond_or_not[np.arange(num) < left[near_end, None]]
        return values[None], None

    def _fill_whole(self, rows: np.ndarray, out: np.ndarray) -> None:
        """With the numbers of rows that have all steps."""
        start, breaks, done = self.steps.start, np.flatnonzero(np.diff(rows) != 1) + 1, 0
        if len(rows) < 8 * (len(breaks) + 1):  # runs so short do not pay
            out[...] = self._offsets(rows)
            return
        for a, b in zip(rows[[0, *breaks]].tolist(), (rows[[*(breaks - 1), -1]] + 1).tolist(), strict=True):
            np.subtract(self._windows[a + start : b + start], self.state_N[a:b, None], out=out[done : done + b - a])
            done += b - a

    def _offsets(self, rows: np.ndarray) -> np.ndarray:
        """All steps of some rows [n, H]; those beyond the end of an episode are of what comes next."""
        return self._windows[rows + self.steps.start] - self.state_N[rows, None]

    @cached_property
    def _windows(self) -> np.ndarray:
        return sliding_window_view(self._padded, len(self.steps))

    @cached_property
    def _padded(self) -> np.ndarray:
        return np.concatenate([self.commands_N, np.repeat(self.commands_N[-1:], self.steps.stop)])

    def bounds(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """No number of a row is smaller or larger than these, float32 [n]; some are near the end of an episode."""
        commands = self._padded[rows[0] + self.steps.start : rows[-1] + self.steps.stop]
        found = (_sliding(extreme, commands, len(self.steps)) for extreme in (np.minimum, np.maximum))
        low, high = (np.subtract(one[rows - rows[0]], self.state_N[rows], dtype=np.float32) for one in found)
        return low, high


@dataclass(frozen=True, eq=False)
class RelativePoses:
    """A pose at some steps of the chunks that begin at the rows, seen from the pose of the row."""

    robot: Robot
    """With this group alone."""
    steps: range
    commands_NA: np.ndarray
    state_NS: np.ndarray
    """The dimensions that match the commands."""
    ends_N: np.ndarray

    @property
    def size(self) -> int:
        return self.robot.model_action_size

    @property
    def numbers_per_row(self) -> int:
        return len(self.steps)

    def values(self, rows: np.ndarray) -> Values:
        steps = rows[:, None] + np.array(self.steps)
        valid = steps < self.ends_N[rows][:, None]
        commands = self.commands_NA[np.minimum(steps, len(self.commands_NA) - 1)]
        seen = ActionSpace(self.robot).to_model(commands, self.state_NS[rows])
        return np.ascontiguousarray(seen[valid].T, np.float32), None


Part: TypeAlias = Columns | Absolute | Offsets | RelativePoses


def parts_of(dataset: Dataset, robot: Robot, state_NS: np.ndarray, steps: range) -> list[Part]:
    """The state, and each action group; relative dimensions, each apart, so that blocks stay small.

    Args:
        state_NS: the robot's own state of every row, not yet converted.
        steps: of the chunks, which begin at step 0.
    """
    commands = dataset.column(robot.dataset_key(robot.action_key))
    ends = np.repeat(dataset.ends, dataset.ends - dataset.starts)
    parts: list[Part] = [Columns(transposed(ActionSpace(robot).state_to_model(state_NS)))]
    for group, start in zip(robot.actions, accumulate((g.size for g in robot.actions), initial=0), strict=False):
        base = robot.state_start(group, start)
        command, state = commands[:, start : start + group.size], state_NS[:, base : base + group.size]
        alone = replace(robot, actions=(replace(group, state_start=0 if group.relative else base),))
        if not group.relative:
            parts.append(Absolute(_apart(alone, command).astype(np.float32, copy=False), steps, ends))
        elif isinstance(group, EndEffector) and group.rotation != "none":
            parts.append(RelativePoses(alone, steps, command, state, ends))
        else:
            parts += [
                Offsets(*columns, steps, ends)
                for columns in zip(_apart(alone, command), _apart(alone, state), strict=True)
            ]
    return parts


def _apart(robot: Robot, vectors_NA: np.ndarray) -> np.ndarray:
    """The dimensions of a group's commands, or of states in its place, as the model sees absolute ones, [D, N]."""
    (group,) = robot.actions
    absolute = ActionSpace(replace(robot, actions=(replace(group, relative=False),)))
    return transposed(absolute.to_model(vectors_NA[:, None], vectors_NA)[:, 0])


def transposed(vectors_ND: np.ndarray) -> np.ndarray:
    """[D, N] in memory, a quarter of the time that it takes at once: blocks of rows stay in a processor's own cache."""
    columns = np.empty(vectors_ND.shape[::-1], vectors_ND.dtype)
    for start in range(0, len(vectors_ND), _ROWS):
        columns[:, start : start + _ROWS] = vectors_ND[start : start + _ROWS].T
    return columns


def _at(columns_DN: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[D, n], without a copy where the rows follow on one another."""
    together = len(rows) and rows[-1] - rows[0] + 1 == len(rows)
    return columns_DN[:, rows[0] : rows[-1] + 1] if together else columns_DN[:, rows]


def _sliding(extreme: np.ufunc, values_m: np.ndarray, num: int) -> np.ndarray:
    """The extreme of the `num` values from each place on [m]; nothing is promised for the last `num` - 1 places.

    That of a window is that of two half as long, so that it takes log2(num) looks at a value instead of `num`.
    """
    found, seen = values_m.copy(), 1
    while seen < num:
        more = min(seen, num - seen)
        extreme(found[:-more], found[more:], out=found[:-more])
        seen += more
    return found
