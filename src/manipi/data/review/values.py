"""What is odd in a dataset's numbers, in the movement of whole episodes, and in what they are told.

Numbers may not be finite, jump, be clipped or forbidden; rotations leap; episodes pause, shake, or are alike.

Episodes are compared with each other, not steps, because a gripper that snaps shut does so in most episodes and in
hardly any frame. What is usual is what most episodes (`USUAL_SHARE`) stay below.

Rotations leap while the robot moves on:

    angle              3.1 → -3.1                 a step of nearly a whole turn, 2π or 360
    rotation vector    v → -v (2π - |v|) / |v|    near a half turn, where both are the same rotation
    quaternion         q → -q                     which always are

A leap is one that the reverse of it makes as small as the other steps are. It is found in every single episode, also
where most of them leap.

Shape letters: N rows, E episodes, d dimensions, k dimensions of one rotation.
"""

import math
import string
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from manipi.data.dataset import Dataset
from manipi.data.lerobot.language import question_pairs
from manipi.data.norm_stats import NEAR_CONSTANT
from manipi.data.review.describe import is_action, is_gripper, is_rate, state_and_action_keys
from manipi.data.review.filters import idle_frames, true_ranges
from manipi.data.review.report import Finding, error, frames, from_error, warning
from manipi.errors import DataError
from manipi.robots.robot import EndEffector, Robot

SPACING = 0.1
"""Timestamps may be off by this share of a frame."""
JUMP, USUAL_SHARE = 8.0, 0.9
"""A jump is a step of this many times the usual largest step of an episode."""
SHAKING, LEAST_JERK = 8.0, 1e-3
"""An episode shakes whose jerk is this many times the median episode's, and this share of the range."""
CLIPPED_S, CLIPPED_SHARE, SNAPPING_SHARE, SNAPPING_VALUES = 0.2, 0.01, 0.5, 16
"""A command is clipped that stays exactly at its lowest or highest value for this many seconds while others move, in
this share of the frames. Dimensions that are called so, are there most of the time or know few values, are grippers."""

IDLE_SHARE = 0.5
"""An episode that pauses in more of its frames is worth a look."""
ALIKE, POINTS, BLOCK = 0.01, 16, 512
"""Episodes are alike whose dimensions all differ by less than this share of their range, at this many moments."""
BINS = 40
"""Points of the speed curve in `EpisodeFacts`."""

TURNS = (2 * math.pi, 360.0)
SLACK = 0.02
"""Of a turn, or of a quaternion's length: how far numbers may lie outside of where they belong."""
FAST, SMOOTH = 4.0, 0.1
"""Without the leap the step may be so many times the 99th percentile of all others, or `SLACK` of a turn. Numbers whose
other steps are larger than this share of a turn move too fast for anything to be said."""


@dataclass(frozen=True)
class Signal:
    """A float feature through the whole dataset."""

    key: str
    names: tuple[str, ...]
    """Of each dimension, for messages."""
    values_Nd: np.ndarray
    """Finite: what is not is bridged from its neighbours."""
    range_d: np.ndarray
    """q99 - q01."""

    @property
    def moving_d(self) -> np.ndarray:
        return self.range_d >= NEAR_CONSTANT


def read_signals(dataset: Dataset, keys: Collection[str] | None = None) -> tuple[list[Signal], list[Finding]]:
    """The float features (of `keys`), and what in them is not finite or cannot be read."""
    signals, findings = [], list[Finding]()
    for key, feature in dataset.features.items():
        if feature.kind != "vector" or "float" not in feature.dtype or key == "timestamp":
            continue
        if keys is not None and key not in keys:
            continue
        try:
            values_Nd = dataset._read_column(key)
        except DataError as e:
            findings.append(from_error(e, "tables", features=(key,)))
            continue
        if values_Nd.dtype.kind != "f":  # what info.json calls floats, tables may store as whole numbers
            values_Nd = values_Nd.astype(np.float64)
        size = values_Nd.shape[1]
        labels = [f" {name!r}" for name in feature.names] if len(feature.names) == size else size * [""]
        names = tuple(f"{key}[{d}]{label}" for d, label in enumerate(labels))
        bad_Nd, rows = ~np.isfinite(values_Nd), np.arange(len(values_Nd))
        bad = np.argwhere(bad_Nd)
        positions, first, counts = np.unique(dataset.episode_of(bad[:, 0]), return_index=True, return_counts=True)
        for position, (row, d), count in zip(positions.tolist(), bad[first].tolist(), counts.tolist(), strict=True):
            episode = dataset.episodes[position]
            what = f"{values_Nd[row, d]} in {names[d]} ({count} value{'s' if count > 1 else ''} in the episode)"
            next = "repair the values, or leave the episode out; training stops at them"
            at = (episode.index,), row - episode.start
            findings.append(error("values", what, next, *at, (key,), where=dataset.place(row)))
        if len(bad):
            values_Nd = values_Nd.copy()
            for d in np.flatnonzero(bad_Nd.any(axis=0)):
                good = ~bad_Nd[:, d]
                values_Nd[~good, d] = np.interp(rows[~good], rows[good], values_Nd[good, d]) if good.any() else 0
        low_d, high_d = np.quantile(values_Nd, (0.01, 0.99), axis=0)
        signals.append(Signal(key, names, values_Nd, high_d - low_d))
    return signals, findings


def still(signal: Signal) -> Iterator[Finding]:
    """One warning about all dimensions that stay within `NEAR_CONSTANT`."""
    if not signal.moving_d.all():
        named = ", ".join(name for name, moves in zip(signal.names, signal.moving_d) if not moves)
        what = f"98 % of the values lie within {NEAR_CONSTANT:g} in {named}"
        next = "leave out what the robot does not use; normalisation would turn its noise into large numbers"
        yield warning("values", what, next)


def jumps(
    dataset: Dataset, signal: Signal, explained: Sequence[tuple[np.ndarray, tuple[int, ...]]]
) -> Iterator[Finding]:
    """Steps of one episode that are too large for the others; `explained`: rows and dimensions of what is none."""
    steps_Nd = np.abs(np.diff(signal.values_Nd, axis=0, prepend=signal.values_Nd[:1]))
    steps_Nd[dataset.starts] = 0  # there is no step from one episode to the next
    for rows, dims in explained:
        steps_Nd[rows[:, None], list(dims)] = 0
    largest_Ed = np.maximum.reduceat(steps_Nd, dataset.starts, axis=0)
    usual_d = np.quantile(largest_Ed, USUAL_SHARE, axis=0, method="lower")
    for e, d in _outliers(largest_Ed, usual_d, JUMP):
        episode = dataset.episodes[e]
        frame = int(steps_Nd[episode.start : episode.start + episode.length, d].argmax())
        what = f"{signal.names[d]} steps by {largest_Ed[e, d]:.3g}, in most episodes by at most {usual_d[d]:.3g}"
        next = "look at the frame: a lost packet, a sensor that was reset, a wrong unit?"
        yield warning("values", what, next, (episode.index,), frame)


def jerk(dataset: Dataset, signal: Signal) -> np.ndarray:
    """Median third difference of each episode and dimension as a share of its range, [E, d]; 0 where it is constant.

    The median, so that one jump is not taken for shaking.
    """
    scaled_Nd = np.divide(signal.values_Nd, signal.range_d, out=np.zeros_like(signal.values_Nd), where=signal.moving_d)
    third = [np.abs(np.diff(scaled_Nd[e.start : e.start + e.length], n=3, axis=0)) for e in dataset.episodes]
    return np.stack([np.median(t, axis=0) if len(t) else np.zeros(scaled_Nd.shape[1]) for t in third])


def shaking(dataset: Dataset, signal: Signal, jerk_Ed: np.ndarray) -> Iterator[Finding]:
    """Episodes whose jerk, as `jerk` has it, is far above the median episode's."""
    usual_d = np.median(jerk_Ed, axis=0)
    for e, d in _outliers(np.where(jerk_Ed > LEAST_JERK, jerk_Ed, 0), usual_d, SHAKING):
        what = f"{signal.names[d]} has a jerk of {jerk_Ed[e, d]:.2%} of its range per frame³, usually {usual_d[d]:.2%}"
        next = "look at the episode: a nervous operator, a noisy sensor, rows that are mixed up?"
        yield warning("movement", what, next, (dataset.episodes[e].index,))


def _outliers(found_Ed: np.ndarray, usual_d: np.ndarray, factor: float) -> Iterator[tuple[int, int]]:
    """Episodes that exceed what is usual by a factor, with the worst dimension of each."""
    # A dimension that rests in most episodes has no usual value to compare with.
    excess_Ed = np.divide(found_Ed, usual_d, out=np.zeros_like(found_Ed), where=usual_d > 0)
    for e in np.flatnonzero((excess_Ed > factor).any(axis=1)).tolist():
        yield e, int(excess_Ed[e].argmax())


def clipped(dataset: Dataset, signal: Signal, idle_N: np.ndarray) -> Iterator[Finding]:
    """One warning about all commands that rest at exactly their lowest or highest value while others move."""
    shortest, longest, shares = max(round(CLIPPED_S * dataset.fps), 2), (0, 0), {}
    for d in np.flatnonzero(signal.moving_d).tolist():
        if is_gripper(signal.names[d]):
            continue
        values_N = signal.values_Nd[:, d]
        low_N, high_N = values_N == values_N.min(), values_N == values_N.max()
        ranges = [*true_ranges(low_N & ~idle_N), *true_ranges(high_N & ~idle_N)]
        runs, ends_N = [(end - start, start) for start, end in ranges if end - start >= shortest], low_N | high_N
        share = sum(length for length, _ in runs) / len(values_N)
        if CLIPPED_SHARE < share <= ends_N.mean() < SNAPPING_SHARE and len(np.unique(values_N)) > SNAPPING_VALUES:
            shares[signal.names[d]], longest = share, max(longest, *runs)
    if shares:
        length, row = longest
        episode = dataset.episodes[int(dataset.episode_of(np.asarray(row)))]
        named = ", ".join(f"{name} ({share:.1%})" for name, share in shares.items())
        what = f"commands that rest at exactly their lowest or highest value, here for {frames(length)}: {named}"
        next = "look whether they were cut off; the policy would learn the limit, not the intent"
        yield warning("values", what, next, (episode.index,), row - episode.start)


def beyond_limits(dataset: Dataset, robot: Robot, signals: list[Signal]) -> Iterator[Finding]:
    """Commands outside the low and high of the robot's action groups."""
    low_A, high_A = (np.array(limits, np.float32) for limits in robot.limits)
    for signal in signals:
        if signal.key != robot.dataset_key(robot.action_key) or signal.values_Nd.shape[1] != robot.action_size:
            continue
        outside_NA = (signal.values_Nd < low_A) | (signal.values_Nd > high_A)
        for d in np.flatnonzero(outside_NA.any(axis=0)).tolist():
            row, count = int(outside_NA[:, d].argmax()), frames(int(outside_NA[:, d].sum()))
            episode = dataset.episodes[int(dataset.episode_of(np.asarray(row)))]
            found = f"{signal.names[d]} is {signal.values_Nd[row, d]:.4g}, outside {low_A[d]:g} to {high_A[d]:g}"
            next = "correct the robot's low and high, or leave the episode out"
            yield warning("robot", f"{found} ({count} in all)", next, (episode.index,), row - episode.start)


def uneven_timestamps(number: int, seconds: np.ndarray, fps: float) -> Iterator[Finding]:
    """A warning where the timestamps [T] of an episode ascend, but not by 1/fps."""
    step = np.diff(seconds.astype(np.float64))
    rounding = np.spacing(np.abs(seconds[1:]).astype(np.float32))  # of both, at the most; most tables store float32
    if (step > 0).all() and (off := np.flatnonzero(np.abs(step * fps - 1) > SPACING + rounding * fps)).size:
        at = int(off[0])
        what = f"{step[at]:.4f} s after the frame before, not 1/{fps:g} s ({frames(off.size)} in all)"
        next = "resample the episode, or correct fps in the metadata"
        yield warning("timestamps", what, next, (number,), at + 1)


# Rotations ----------------------------------------------------------------------------------------------------------


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
    for size in (4, 3):
        spans = [tuple(range(d, d + size)) for d in range(values_Nd.shape[1] - size + 1)]
        leaps = [leap for span in spans if (leap := _sign_changes(values_Nd[:, span], span, inside_N))]
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
        # An angle is within -½ to ½ or within 0 to 1 of a turn.
        if not any((start - SLACK) * turn <= low and high <= (start + 1 + SLACK) * turn for start in (-0.5, 0.0)):
            continue
        left_N = np.abs(step_N - turn)
        rows = _leaping(step_N > 0.75 * turn, left_N, step_N, turn, inside_N)
        if rows.size:
            return Leaps("wraps: it is an angle that steps by a whole turn", "euler_xyz", (d,), rows, left_N[rows])
    return None


def _sign_changes(values_Nk: np.ndarray, dims: tuple[int, ...], inside_N: np.ndarray) -> Leaps | None:
    """Of a quaternion where there are four dimensions, of a rotation vector where there are three."""
    length_N1 = np.linalg.norm(values_Nk, axis=1, keepdims=True)
    if len(dims) == 4 and np.abs(length_N1 - 1).max() <= SLACK:
        what, form, large = "a quaternion, whose negative is the same rotation", "quat_xyzw", 1.5
        other_Nk = -values_Nk
    elif len(dims) == 3 and length_N1.max() <= (1 + 2 * SLACK) * math.pi:
        what, form, large = "a rotation vector near a half turn", "rotvec", 1.5 * math.pi
        safe_N1 = np.maximum(length_N1, 1e-9)
        other_Nk = -values_Nk * (2 * math.pi - safe_N1) / safe_N1
    else:
        return None
    step_N, left_N = _steps(values_Nk, values_Nk), _steps(values_Nk, other_Nk)
    rows = _leaping(step_N > large, left_N, step_N, 2 * math.pi, inside_N)
    return Leaps(f"change their sign together: they are {what}", form, dims, rows, left_N[rows]) if rows.size else None


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
    known, start = set[int](), 0  # the action dimensions that the robot calls the rotation of a pose
    for group in robot.actions if robot is not None and commands else ():
        if isinstance(group, EndEffector) and group.rotation != "none":
            known |= set(range(start + 3, start + group.size))
        start += group.size
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


# Whole episodes -----------------------------------------------------------------------------------------------------


def find_idle(dataset: Dataset, signals: Sequence[Signal], robot: Robot | None) -> np.ndarray:
    """`idle_frames` [N] of what the robot calls state and action, or the features' names do."""
    state_keys, action_keys = state_and_action_keys(dataset)
    if robot is not None:
        state_keys = tuple(robot.dataset_key(s.key) for s in robot.state)
        action_keys = (robot.dataset_key(robot.action_key),)
    actions = [s for s in signals if s.key in action_keys]
    # A dataset without either says nothing about pauses in names that are known: then everything counts.
    state = [s for s in signals if s.key in state_keys] or [s for s in signals if s.key not in action_keys]
    if not state and not actions:
        return np.zeros(dataset.num_frames, bool)
    empty = np.zeros((dataset.num_frames, 0), np.float32)
    rates = [is_rate(name) for s in actions for name in s.names]
    return idle_frames(
        np.concatenate([empty, *(s.values_Nd for s in state)], axis=1),
        np.concatenate([empty, *(s.values_Nd for s in actions)], axis=1),
        fps=dataset.fps,
        starts=dataset.starts,
        rates_A=np.array(rates, bool),
    )


def pauses(dataset: Dataset, idle_N: np.ndarray) -> Iterator[Finding]:
    """One warning about all episodes that pause in more than `IDLE_SHARE` of their frames."""
    shares = {e.index: float(idle_N[e.start : e.start + e.length].mean()) for e in dataset.episodes}
    if long := [number for number, share in shares.items() if share > IDLE_SHARE]:
        worst = max(long, key=lambda number: shares[number])
        what = f"nothing moves in more than {IDLE_SHARE:.0%} of the frames; in {shares[worst]:.0%} of episode {worst}"
        next = "manipi filter <folder> --idle 0.5 --out keep.json  # else a policy learns to stand still"
        yield warning("movement", what, next, long)


def alike(dataset: Dataset, signals: Sequence[Signal]) -> Iterator[Finding]:
    """Pairs of episodes with the same, or nearly the same, movement. Each is named with the first that it is like."""
    moving = [s for s in signals if s.moving_d.any()]
    if not moving or len(dataset.episodes) < 2:
        return
    # Each episode at moments spread evenly over it, every dimension divided by its range: [E, POINTS, d].
    moments_EP = np.rint(np.linspace(0, 1, POINTS) * (dataset.ends - dataset.starts - 1)[:, None]).astype(int)
    rows_EP, parts = dataset.starts[:, None] + moments_EP, []
    for s in moving:
        values_Nd = s.values_Nd[:, s.moving_d] / s.range_d[s.moving_d]
        values_Nd -= values_Nd.mean(axis=0)
        parts.append(values_Nd[rows_EP].astype(np.float32))
    points_EPd = np.concatenate(parts, axis=-1)
    flat_EF = points_EPd.reshape(len(points_EPd), -1)
    norms_E = (flat_EF**2).sum(axis=1)
    for start in range(0, len(flat_EF), BLOCK):
        block_BF = flat_EF[start : start + BLOCK]
        squares_BE = norms_E[start : start + BLOCK, None] + norms_E - 2 * block_BF @ flat_EF.T
        # A matrix product finds the pairs whose sum over all moments and dimensions is small enough to compare.
        near = np.argwhere(squares_BE <= (1.01 * ALIKE) ** 2 * flat_EF.shape[1] + 1e-5 * norms_E.max())
        seen = set[int]()
        for i, j in ((start + int(i), int(j)) for i, j in near):
            if j >= i or i in seen or np.abs(points_EPd[i] - points_EPd[j]).max() > ALIKE:
                continue
            seen.add(i)
            a, b = dataset.episodes[i], dataset.episodes[j]
            a_T, b_T = slice(a.start, a.start + a.length), slice(b.start, b.start + b.length)
            same = a.length == b.length and all(np.array_equal(s.values_Nd[a_T], s.values_Nd[b_T]) for s in signals)
            what = "the same numbers as" if same else f"within {ALIKE:.0%} of the movement of"
            next = f"manipi filter <folder> --without {a.index} --out keep.json  # leaves one of the two out"
            yield warning("movement", f"{what} episode {b.index}", next, (a.index, b.index))


def language(dataset: Dataset) -> Iterator[Finding]:
    """Episodes without an instruction, instructions that differ in case, space or punctuation alone, and the first
    item of LeRobot's language columns that is broken."""
    try:
        for position, e in enumerate(dataset.episodes):
            for frame, items in dataset.said(position)[1].items():
                list(question_pairs(items, dataset.place(e.start + frame)))
    except DataError as broken:
        yield from_error(broken, "language")
    if silent := [e.index for e in dataset.episodes if not e.task.strip()]:
        what = f"{len(silent)} of {len(dataset.episodes)} episodes have no instruction"
        yield warning("language", what, "write what the robot does there; the policy is told nothing otherwise", silent)
    spellings = defaultdict[str, dict[str, list[int]]](lambda: defaultdict(list))
    for e in dataset.episodes:
        plain = e.task.casefold().translate(str.maketrans("", "", string.punctuation))
        spellings["".join(plain.split())][e.task].append(e.index)  # by what does not differ by accident
    for variants in spellings.values():
        if len(variants) > 1:
            common = max(variants.values(), key=len)
            named = ", ".join(f"{text!r} ({len(numbers)})" for text, numbers in variants.items())
            rare = sorted(n for numbers in variants.values() if numbers is not common for n in numbers)
            what = f"one instruction in {len(variants)} spellings: {named}"
            yield warning("language", what, "spell it in one way; to the policy they are different texts", rare)


def speed_curves(dataset: Dataset, signals: Sequence[Signal]) -> list[tuple[float, ...]]:
    """Mean speed over all moving dimensions in `BINS` parts of each episode, from 0 to 1."""
    parts = [np.abs(np.diff(s.values_Nd[:, s.moving_d], axis=0)) / s.range_d[s.moving_d] for s in signals]
    parts = [part for part in parts if part.shape[1]]
    if not parts:
        return [() for _ in dataset.episodes]
    speed_N = np.append(np.concatenate(parts, axis=1).mean(axis=1), 0)
    speed_N[dataset.ends - 1] = 0
    curves = []
    for e in dataset.episodes:
        moves = max(e.length - 1, 1)  # the last frame is followed by another episode's
        bins = np.array_split(speed_N[e.start : e.start + moves], min(BINS, moves))
        curves.append(np.array([part.mean() for part in bins]))
    top = np.quantile(np.concatenate(curves), 0.99) or 1.0
    return [tuple(np.round(np.minimum(curve / top, 1), 3).tolist()) for curve in curves]
