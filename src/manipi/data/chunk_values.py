"""Every number of state and action chunks at some rows, as the model sees them, without the chunks being written down.

Each action group is taken apart from the others, for what it costs:

    Absolute      an action is in the chunks of the rows before it: each counts once, with the number of these
    Offsets       the step H of a row is a command minus the row's state: both are columns, and only differences are new
    RelativePoses offsets that are more than differences: the chunks themselves, many rows at a time

Steps beyond the end of an episode do not count.

Shape letters: N rows of the dataset, n rows asked for (ascending), D dimensions, m numbers, H steps, A and S dimensions
of command and state.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from manipi.data.dataset import Dataset
from manipi.robots.robot import EndEffector, Robot
from manipi.transforms.actions import ActionSpace

Values: TypeAlias = tuple[np.ndarray, np.ndarray | None]
"""Numbers [D, m] that have been converted, and how often each counts [m]; None: once."""


@dataclass(frozen=True, eq=False)
class Columns:
    """A vector at the rows themselves."""

    columns_ND: np.ndarray
    numbers_per_row: int = 1

    @property
    def size(self) -> int:
        return self.columns_ND.shape[1]

    def values(self, rows: np.ndarray) -> Values:
        return np.ascontiguousarray(self.columns_ND[rows].T), None


@dataclass(frozen=True, eq=False)
class Absolute:
    """An action group at some steps of the chunks that begin at the rows."""

    robot: Robot
    """With this group alone."""
    steps: range
    commands_NA: np.ndarray
    ends_N: np.ndarray
    """The row after the last of the episode, for every row."""
    numbers_per_row: int = 1

    @property
    def size(self) -> int:
        return self.robot.model_action_size

    def values(self, rows: np.ndarray) -> Values:
        rows = rows[rows + self.steps.start < self.ends_N[rows]]
        if not len(rows):
            return np.zeros((self.size, 0), np.float32), None
        begin, end = rows + self.steps.start, np.minimum(rows + self.steps.stop, self.ends_N[rows])
        first, length = begin[0], end.max() - begin[0] + 1
        chunks = np.cumsum(np.bincount(begin - first, minlength=length) - np.bincount(end - first, minlength=length))
        used = np.flatnonzero(chunks)
        seen = ActionSpace(self.robot).to_model(self.commands_NA[first + used][:, None], np.zeros((len(used), 0)))
        return np.ascontiguousarray(seen[:, 0].T, np.float32), chunks[used]


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

    def with_steps(self, rows: np.ndarray) -> np.ndarray:
        """The rows that have at least one step within their episode, which the methods below take for granted."""
        return rows[rows + self.steps.start < self.ends_N[rows]]

    def values(self, rows: np.ndarray) -> Values:
        num, left = len(self.steps), self.ends_N[rows] - rows - self.steps.start
        values, whole = np.empty(int(np.minimum(left, num).sum()), np.float32), rows[left >= num]
        self._fill_whole(whole, values[: len(whole) * num].reshape(-1, num))
        self._fill_cut(rows[left < num], values[len(whole) * num :])
        return values[None], None

    def _fill_whole(self, rows: np.ndarray, out: np.ndarray) -> None:
        """With the numbers of rows that have all steps."""
        start, runs, done = self.steps.start, list(_runs(rows)), 0
        if len(rows) < 8 * len(runs):  # runs so short do not pay
            np.subtract(self._windows[rows + start], self.state_N[rows, None], out=out)
            return
        for a, b in runs:
            np.subtract(self._windows[a + start : b + start], self.state_N[a:b, None], out=out[done : done + b - a])
            done += b - a

    def _fill_cut(self, rows: np.ndarray, out: np.ndarray) -> None:
        """With those of rows near the ends of their episodes."""
        start, done = self.steps.start, 0
        for a, b in _runs(rows, self.ends_N):
            row, step = _triangle(self.ends_N[a] - start - a, b - a)
            np.subtract(self.commands_N[a + start + step], self.state_N[a + row], out=out[done : done + len(row)])
            done += len(row)

    @cached_property
    def _windows(self) -> np.ndarray:
        return sliding_window_view(self.commands_N, len(self.steps))

    def extremes(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The smallest and the largest number of each row, float32 [n]."""
        begin, stop = rows[0] + self.steps.start, min(rows[-1] + self.steps.stop, len(self.commands_N))
        commands, ends_m = self.commands_N[begin:stop], self.ends_N[begin:stop] - begin
        ends = ends_m[[*np.flatnonzero(np.diff(ends_m)), -1]]
        found = (_sliding(extreme, commands, ends, len(self.steps)) for extreme in (np.minimum, np.maximum))
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
    parts: list[Part] = [Columns(ActionSpace(robot).state_to_model(state_NS))]
    for group, start in zip(robot.actions, accumulate((g.size for g in robot.actions), initial=0), strict=False):
        base = robot.state_start(group, start)
        command, state = commands[:, start : start + group.size], state_NS[:, base : base + group.size]
        alone = replace(robot, actions=(replace(group, state_start=0 if group.relative else base),))
        if not group.relative:
            parts.append(Absolute(alone, steps, command, ends))
        elif isinstance(group, EndEffector) and group.rotation != "none":
            parts.append(RelativePoses(alone, steps, command, state, ends))
        else:
            parts += [
                Offsets(*columns, steps, ends)
                for columns in zip(_apart(alone, command), _apart(alone, state), strict=True)
            ]
    return parts


def _apart(robot: Robot, vectors_NA: np.ndarray) -> Iterator[np.ndarray]:
    """The dimensions of a group's commands, or of states in its place, as the model sees absolute ones."""
    (group,) = robot.actions
    absolute = ActionSpace(replace(robot, actions=(replace(group, relative=False),)))
    yield from np.ascontiguousarray(absolute.to_model(vectors_NA[:, None], vectors_NA)[:, 0].T)


def _runs(rows: np.ndarray, ends_N: np.ndarray | None = None) -> Iterator[tuple[int, int]]:
    """First and last + 1 of rows that follow on one another, in the same episode if `ends_N` are given."""
    if len(rows):
        apart = np.diff(rows) != 1
        if ends_N is not None:
            apart |= np.diff(ends_N[rows]) != 0
        breaks = np.flatnonzero(apart) + 1
        yield from zip(rows[[0, *breaks]].tolist(), (rows[[*(breaks - 1), -1]] + 1).tolist(), strict=True)


@lru_cache
def _triangle(steps: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and step of all numbers of so many rows, of which the first has so many steps, the next one less, and so on.

    row 0   0 1 2 3
    row 1     1 2 3
    row 2       2 3
    """
    return np.triu_indices(rows, m=steps)


def _sliding(extreme: np.ufunc, values_m: np.ndarray, ends: np.ndarray, num: int) -> np.ndarray:
    """The extreme of the `num` values from each place on [m], or of those before the next of `ends`.

    That of a window is that of two half as long, so that it takes log2(num) looks at a value instead of `num`.
    There is no promise for places where neither the values nor an end suffice.
    """
    found, seen = values_m.copy(), 1
    while seen < num:
        more = min(seen, num - seen)
        extreme(found[:-more], found[more:], out=found[:-more])
        seen += more
    for start, end in zip((0, *ends), ends, strict=False):
        cut = slice(max(start, end - num + 1), end)
        found[cut] = extreme.accumulate(values_m[cut][::-1])[::-1]
    return found
