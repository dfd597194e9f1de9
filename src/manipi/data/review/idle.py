"""Frames in which a robot does nothing: openpi's rule for DROID, and one for any robot.

A policy that learns from frames without movement learns to stand still, and once it stands it stays so.

Shape letters: T frames of one episode, N frames of a dataset, J joints, S state and A action dimensions, d any.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Int

DROID_STILL = 1e-3
"""rad/s: a joint velocity that changes by less from one step to the next is not a movement."""
DROID_MIN_IDLE, DROID_MIN_MOVING, DROID_CUT = 7, 16, 10
"""Steps: shorter pauses are kept; shorter movements are not; what is taken from the end of each range."""


def droid_keep_ranges(joint_velocity_TJ: Float[np.ndarray, "T J"]) -> list[tuple[int, int]]:
    """Steps [start, end) of a DROID episode to train on, as openpi filters them.

        velocity changes   ■■■■■■■■■■■■■■■■■■■■····■■■■■■■■■········■■■■■········
                                               └ under 7 steps: a pause        └ under 16 steps: dropped
        kept               ├──────────────────────────────┤╌╌╌╌╌
                                                          └ 10 steps: their action chunks would run into the pause

    A step is still where every joint's commanded velocity is within 1e-3 of the step before; the first step never is.

    Source: `examples/droid/compute_droid_nonidle_ranges.py` of openpi.
    """
    still_T = np.zeros(len(joint_velocity_TJ), bool)
    still_T[1:] = (np.abs(np.diff(joint_velocity_TJ, axis=0)) < DROID_STILL).all(axis=1)
    keep_T = np.ones_like(still_T)
    for start, end in true_ranges(still_T):
        keep_T[start:end] = end - start < DROID_MIN_IDLE
    return [(start, end - DROID_CUT) for start, end in true_ranges(keep_T) if end - start >= DROID_MIN_MOVING]


def idle_frames(
    state_NS: Float[np.ndarray, "N S"],
    action_NA: Float[np.ndarray, "N A"],
    *,
    fps: float,
    starts: Sequence[int] | Int[np.ndarray, " episodes"] = (0,),
    min_idle: float = 0.5,
    share: float = 0.02,
    rates_A: Bool[np.ndarray, " A"] | None = None,
) -> Bool[np.ndarray, " N"]:
    """Which frames belong to a pause: some `min_idle` seconds around them in which neither state nor action moves.

    The range of a dimension is its q99 - q01 over all N frames. A window of consecutive frames of one episode is still
    when every dimension's highest and lowest value in it differ by at most `share` of its range, or by one step of its
    encoder (the smallest difference that it ever shows, where that is under a quarter of the range). A slow drift is a
    movement, therefore, and a held position is none. An action dimension that is a rate must also stay within `share`
    of its range from zero, since a constant velocity moves the robot. The pause is all frames of all still windows, but
    for those on both sides of a sudden step: a gripper that snaps shut while the arm waits is what there is to learn.

    Dimensions whose range is under 1e-4 are not asked. One that trembles all the time, as an arm that is not used may,
    hides every pause: leave it out. What is not sure to be a pause is none.

    Args:
        starts: first frame of each episode; no window reaches from one into the next.
        min_idle: seconds from the first to the last frame of a window.
        share: a joint that turned 1 rad in the data moves by less than 0.02 rad in half a second.
        rates_A: which action dimensions are velocities or offsets per step, not positions; None: none.
    """
    values_NM, window = np.concatenate([state_NS, action_NA], axis=1), math.ceil(min_idle * fps) + 1
    idle_N = np.zeros(len(values_NM), bool)
    if not values_NM.size:
        return idle_N
    low_M, high_M = np.quantile(values_NM, (0.01, 0.99), axis=0)
    range_M = high_M - low_M
    asked_M = range_M >= 1e-4
    limit_M = np.maximum(share * range_M, _encoder_steps(values_NM, range_M))
    rates_M = np.zeros_like(asked_M)
    if rates_A is not None:
        rates_M[state_NS.shape[1] :] = rates_A & asked_M[state_NS.shape[1] :]
    for start, end in pairwise([*starts, len(values_NM)]):
        if end - start < window:
            continue
        views_wMk = np.lib.stride_tricks.sliding_window_view(values_NM[start:end], window, axis=0)
        span_wM = views_wMk.max(axis=-1) - views_wMk.min(axis=-1)
        fast_T = (np.abs(values_NM[start:end, rates_M]) > share * range_M[rates_M]).any(axis=1)
        fast_w = np.lib.stride_tricks.sliding_window_view(fast_T, window).any(axis=-1)
        still_w = (span_wM <= limit_M)[:, asked_M].all(axis=1) & ~fast_w
        # How many still windows begin at a frame, less those that ended before it.
        changes_T = np.pad(still_w.astype(int), (0, window)) - np.pad(still_w.astype(int), (window, 0))
        idle_N[start:end] = np.cumsum(changes_T[:-1]) > 0
        stepped_T = (np.abs(np.diff(values_NM[start:end], axis=0)) > limit_M)[:, asked_M].any(axis=1)
        idle_N[start:end] &= ~(np.append(stepped_T, False) | np.append(False, stepped_T))
    return idle_N


def _encoder_steps(values_NM: np.ndarray, range_M: np.ndarray) -> np.ndarray:
    """The smallest difference between neighbours; 0 where that is most of the range, as of a gripper that snaps."""
    steps_NM = np.abs(np.diff(values_NM, axis=0))
    step_M = np.where(steps_NM > 0, steps_NM, np.inf).min(axis=0, initial=np.inf)
    return np.where(step_M < 0.25 * range_M, 1.01 * step_M, 0)


def true_ranges(mask: Bool[np.ndarray, " n"]) -> list[tuple[int, int]]:
    """[start, end) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
