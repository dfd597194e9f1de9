"""Numbers that leap while the robot moves on: angles that wrap, and rotations that are written with the other sign.

    angle              3.1 → -3.1                 a step of nearly a whole turn, 2π or 360
    rotation vector    v → -v (2π - |v|) / |v|    near a half turn, where both are the same rotation
    quaternion         q → -q                     which always are

A leap is one that the reverse of it makes as small as the other steps are. It is found in every single episode, also
where most of them leap.

Shape letters: N rows, d dimensions, k dimensions of one rotation.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from manipi.data.dataset import Dataset
from manipi.data.review.describe import is_action
from manipi.data.review.report import Finding, warning
from manipi.data.review.values import SNAPPING_VALUES, Signal
from manipi.robots.robot import EndEffector, Robot

TURNS = (2 * math.pi, 360.0)
SLACK = 0.02
"""Of a turn, or of a quaternion's length: how far numbers may lie outside of where they belong."""
FAST, SMOOTH = 4.0, 0.1
"""Without the leap the step may be so many times the 99th percentile of all others, or `SLACK` of a turn. Numbers whose
other steps are larger than this share of a turn move too fast for anything to be said."""


@dataclass(frozen=True)
class Leaps:
    """Where some dimensions of a signal leap together."""

    what: str
    form: str
    """The rotation of an `EndEffector` that has no such leaps."""
    dims: tuple[int, ...]
    rows: np.ndarray
    """The row behind each leap, ascending."""
    left: np.ndarray
    """How large the step to each is without the leap."""


def find_leaps(dataset: Dataset, signal: Signal) -> list[Leaps]:
    """All leaps of a signal; no dimension is in two of them."""
    values_Nd = signal.values_Nd.astype(np.float64)
    inside_N = np.ones(len(values_Nd), bool)
    inside_N[dataset.starts] = False  # there is no step from one episode to the next
    wraps = [leap for d in range(values_Nd.shape[1]) if (leap := _wraps(values_Nd[:, d], d, inside_N))]
    alone_Nd = np.diff(values_Nd, axis=0, prepend=values_Nd[:1])
    for wrap in wraps:
        alone_Nd[wrap.rows, wrap.dims[0]] = wrap.left
    found = list[Leaps]()
    for size, look in ((4, _quaternion), (3, _rotation_vector)):
        spans = [tuple(range(d, d + size)) for d in range(values_Nd.shape[1] - size + 1)]
        leaps = [leap for span in spans if (leap := look(values_Nd[:, span], span, inside_N))]
        # A rotation vector along one axis leaps as an angle does: whatever explains more of the steps is what it is.
        others = [np.linalg.norm(alone_Nd[leap.rows][:, leap.dims], axis=1).sum() for leap in leaps]
        leaps = [leap for leap, other in zip(leaps, others, strict=True) if leap.left.sum() < other]
        for leap in sorted(leaps, key=lambda leap: -len(leap.rows)):
            if not {d for other in found for d in other.dims} & set(leap.dims):
                found.append(leap)
    taken = {d for leap in found for d in leap.dims}
    return [*found, *(wrap for wrap in wraps if wrap.dims[0] not in taken)]


def _wraps(values_N: np.ndarray, d: int, inside_N: np.ndarray) -> Leaps | None:
    step_N = _steps(values_N[:, None], values_N[:, None])
    low, high = values_N.min(), values_N.max()
    if len(np.unique(values_N)) <= SNAPPING_VALUES:
        return None
    for turn in TURNS:
        if not any(first * turn <= low and high <= last * turn for first, last in _within()):
            continue
        left_N = np.abs(step_N - turn)
        rows = _leaping(step_N > 0.75 * turn, left_N, step_N, turn, inside_N)
        if rows.size:
            return Leaps("wraps: it is an angle that steps by a whole turn", "euler_xyz", (d,), rows, left_N[rows])
    return None


def _within() -> Iterator[tuple[float, float]]:
    """The ends of the ranges of an angle, in turns: -½ to ½, and 0 to 1."""
    for start in (-0.5, 0.0):
        yield start - SLACK, start + 1 + SLACK


def _rotation_vector(v_N3: np.ndarray, dims: tuple[int, ...], inside_N: np.ndarray) -> Leaps | None:
    length_N1 = np.linalg.norm(v_N3, axis=1, keepdims=True)
    if length_N1.max() > (1 + 2 * SLACK) * math.pi:
        return None
    safe_N1 = np.maximum(length_N1, 1e-9)
    other_N3 = -v_N3 * (2 * math.pi - safe_N1) / safe_N1
    step_N, left_N = _steps(v_N3, v_N3), _steps(v_N3, other_N3)
    rows = _leaping(step_N > 1.5 * math.pi, left_N, step_N, 2 * math.pi, inside_N)
    what = "change their sign together: they are a rotation vector near a half turn"
    return Leaps(what, "rotvec", dims, rows, left_N[rows]) if rows.size else None


def _quaternion(q_N4: np.ndarray, dims: tuple[int, ...], inside_N: np.ndarray) -> Leaps | None:
    if np.abs(np.linalg.norm(q_N4, axis=1) - 1).max() > SLACK:
        return None
    step_N, left_N = _steps(q_N4, q_N4), _steps(q_N4, -q_N4)
    rows = _leaping(step_N > 1.5, left_N, step_N, 2 * math.pi, inside_N)
    what = "change their sign together: they are a quaternion, whose negative is the same rotation"
    return Leaps(what, "quat_xyzw", dims, rows, left_N[rows]) if rows.size else None


def _steps(values_Nk: np.ndarray, before_Nk: np.ndarray) -> np.ndarray:
    """[N]: how far each row is from another form of the row before."""
    return np.concatenate([[0.0], np.linalg.norm(values_Nk[1:] - before_Nk[:-1], axis=1)])


def _leaping(
    large_N: np.ndarray, left_N: np.ndarray, step_N: np.ndarray, turn: float, inside_N: np.ndarray
) -> np.ndarray:
    """Rows with a large step that is small without the leap."""
    large_N = large_N & inside_N
    others = step_N[inside_N & ~large_N]
    usual = np.quantile(others, 0.99) if others.size else 0.0
    return np.flatnonzero(large_N & (usual <= SMOOTH * turn) & (left_N <= max(FAST * usual, SLACK * turn)))


def report_leaps(dataset: Dataset, signal: Signal, leaps: Sequence[Leaps], robot: Robot | None) -> Iterator[Finding]:
    """One warning per rotation, unless the robot says what it is, and the model never sees it leap."""
    commands = is_action(signal.key) if robot is None else signal.key == robot.dataset_key(robot.action_key)
    known = _described(robot) if robot is not None and commands else set()
    for leap in leaps:
        if known.issuperset(leap.dims):
            continue
        positions, counts = np.unique(dataset.episode_of(leap.rows), return_counts=True)
        first, numbers = dataset.episodes[positions[0]], [dataset.episodes[p].index for p in positions.tolist()]
        named = ", ".join(signal.names[d] for d in leap.dims)
        what = f"{named} {leap.what}; {counts.sum()} times, in {len(numbers)} of {len(dataset.episodes)} episodes"
        next = "unwrap it (numpy.unwrap), or" if len(leap.dims) == 1 else "give it one sign throughout, or"
        next += f" record the rotation in 6D: the model sees {'the state' if not commands else 'Joints'} as recorded"
        if commands:
            next = f'in the robot: EndEffector(rotation="{leap.form}"), which the model sees without leaps'
            next += "; of a joint: unwrap it (numpy.unwrap)" if len(leap.dims) == 1 else ""
        yield warning("values", what, next, numbers, int(leap.rows[0]) - first.start)


def _described(robot: Robot) -> set[int]:
    """The action dimensions that the robot calls the rotation of a pose."""
    dims, start = set[int](), 0
    for group in robot.actions:
        if isinstance(group, EndEffector) and group.rotation != "none":
            dims |= set(range(start + 3, start + group.size))
        start += group.size
    return dims
