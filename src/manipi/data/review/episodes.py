"""Whole episodes: those that pause, those that are alike, and what they are told.

Shape letters: N rows, E episodes, d dimensions.
"""

import string
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from manipi.data.dataset import Dataset
from manipi.data.review.describe import is_rate, state_and_action_keys
from manipi.data.review.filters import idle_frames
from manipi.data.review.report import Finding, warning
from manipi.data.review.values import Signal
from manipi.robots.robot import Robot

IDLE_SHARE = 0.5
"""An episode that pauses in more of its frames is worth a look."""
ALIKE, POINTS, BLOCK = 0.01, 16, 512
"""Episodes are alike whose dimensions all differ by less than this share of their range, at this many moments."""
BINS = 40
"""Points of the speed curve in `EpisodeFacts`."""


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
    """Episodes without an instruction, and instructions that differ in case, space or punctuation alone."""
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
