"""Rules that leave frames out of training, and the mask that they give: the dataset stays as it is.

rule           leaves out
idle           pauses of the robot, seen in state and actions (`idle_frames`)
droid_idle     pauses by openpi's rule for DROID, seen in the joint velocities (`droid_keep_ranges`)
trim           the first and last seconds of every episode
success        episodes whose success column is never true
without        episodes by number

A mask is a file beside the dataset with the kept frames of each episode as half-open ranges:

    {"type": "Mask", "dataset": "9f2c…", "rules": ["idle 1.0 s", "without episodes 7"],
     "keep": {"0": [[12, 180], [233, 410]], "1": [[0, 398]], "7": []}}

An episode that is not listed is left out whole. openpi's files of DROID ("sample ranges") have such ranges with the
episode's recording as key, and are read as well.

Shape letters: T frames of one episode, N frames of a dataset, J joints, S state and A action dimensions, M both.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from manipi.data.dataset import Dataset
from manipi.data.review.describe import is_rate, state_and_action_keys
from manipi.errors import ConfigError, DatasetFormatError, quoted
from manipi.records import from_json, read_json, to_json
from manipi.storage import atomic_write

DROID_STILL = 1e-3
"""rad/s: a joint velocity that changes by less from one step to the next is not a movement."""
DROID_MIN_IDLE, DROID_MIN_MOVING, DROID_CUT = 7, 16, 10
"""Steps: shorter pauses are kept; shorter movements are not; what is taken from the end of each range."""


@dataclass(frozen=True, kw_only=True)
class Mask:
    """The frames of one dataset to keep, and by which rules they were chosen."""

    dataset: str
    """Fingerprint of the dataset."""
    rules: tuple[str, ...]
    keep: Mapping[str, Any]
    """Per episode number its kept ranges [[start, end], …]."""

    def save(self, path: Path) -> None:
        # On one line: the ranges of a large dataset are not for reading.
        atomic_write(path, json.dumps(to_json(self)).encode())


def mask_of(dataset: Dataset, keep_N: Bool[np.ndarray, " N"], rules: tuple[str, ...]) -> Mask:
    """The mask that keeps the frames where `keep_N` holds."""
    parts = ((str(e.index), true_ranges(keep_N[e.start : e.start + e.length])) for e in dataset.episodes)
    return Mask(dataset=dataset.fingerprint, rules=rules, keep=dict(parts))


def read_mask(path: str | Path, dataset: Dataset) -> Bool[np.ndarray, " N"]:
    """Which rows of `dataset` the file keeps.

    Raises:
        ConfigError: the file belongs to another dataset, or keeps frames that an episode does not have.
        DatasetFormatError: it is absent, or no JSON object.
    """
    path = Path(path)
    data = read_json(path, DatasetFormatError)
    if not isinstance(data, dict):
        raise DatasetFormatError(
            expected="an object of ranges by episode",
            found=f"a JSON {type(data).__name__}",
            where=str(path),
            next="name a file of `manipi filter`, or openpi's of DROID",
        )
    if "type" in data:
        keys = [str(episode.index) for episode in dataset.episodes]
        mask: Mask = from_json(data, (Mask,), str(path))
        if mask.dataset != dataset.fingerprint:
            rules = ", ".join(mask.rules)
            raise ConfigError(
                expected=f"a mask of this dataset ({dataset.fingerprint[:12]}), {dataset.root}",
                found=f"one of another dataset, or of an older state of it ({mask.dataset[:12]})",
                where=str(path),
                next=f"manipi filter {quoted(dataset.root)} --out {quoted(path)}  # with the rules {rules}",
            )
        keep = mask.keep
    else:  # openpi's, whose users look steps up in it one by one: what lies beyond an episode is never asked for
        keys = [episode.key or str(episode.index) for episode in dataset.episodes]
        lengths = {key: episode.length for key, episode in zip(keys, dataset.episodes, strict=True)}
        keep = {
            key: [(max(start, 0), max(min(end, lengths[key]), 0)) for start, end in ranges]
            for key, ranges in data.items()
            if key in lengths
        }
    if not keep.keys() & set(keys):
        raise ConfigError(
            expected=f"ranges of episodes such as {keys[0]!r}",
            found=f"ranges of {len(keep)} episodes such as {next(iter(keep), 'none')!r}, and of none of the dataset's",
            where=str(path),
            next="name the mask that was made for this dataset",
        )
    rows_N = np.zeros(dataset.num_frames, dtype=bool)
    for episode, key in zip(dataset.episodes, keys, strict=True):
        for start, end in keep.get(key, ()):
            if not 0 <= start <= end <= episode.length:
                raise ConfigError(
                    expected=f"ranges within the {episode.length} frames of the episode",
                    found=f"{start} to {end}",
                    where=f"{path}, episode {key}",
                    next="make the mask again for the dataset as it is now: manipi filter DATASET --out FILE",
                )
            rows_N[episode.start + start : episode.start + end] = True
    return rows_N


# Rules ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What to leave out; nothing by default."""

    idle: float = 0.0
    """Pauses of at least so many seconds; 0: pauses stay."""
    idle_share: float = 0.02
    """A dimension rests while it stays within this share of its range."""
    droid_idle: str = ""
    """The feature with the commanded joint velocities, to apply openpi's rule for DROID."""
    trim_start: float = 0.0
    """Seconds at the start of every episode."""
    trim_end: float = 0.0
    """Seconds at the end of every episode."""
    success: str = ""
    """The feature that tells success, such as next.success: keep only episodes in which it is ever true."""
    without: tuple[int, ...] = ()
    """Numbers of episodes to leave out."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one rule does on its own."""

    rule: str
    frames: int
    episodes: int
    """Left out whole."""


def filter_dataset(
    dataset: Dataset, rules: Rules, *, state_keys: tuple[str, ...], action_key: str
) -> tuple[Mask, Bool[np.ndarray, " N"], list[Effect]]:
    """The mask, the rows that it keeps, and what every rule leaves out on its own.

    Raises:
        MissingFeatureError: the dataset lacks a feature that a rule reads.
        ConfigError: no rule, an unknown episode, or nothing would be left.
    """
    keep_N, effects = np.ones(dataset.num_frames, dtype=bool), []
    for name, left_out_N in _left_out(dataset, rules, state_keys, action_key):
        keep_N &= ~left_out_N
        whole = np.logical_and.reduceat(left_out_N, dataset.starts).sum()
        effects.append(Effect(rule=name, frames=int(left_out_N.sum()), episodes=int(whole)))
    if not effects or not keep_N.any():
        raise ConfigError(
            expected="rules that keep some frames",
            found="none that keep any: " + ", ".join(e.rule for e in effects) if effects else "no rule",
            where=str(dataset.root),
            next="manipi filter --help  # lists the rules, such as --idle 1.0",
        )
    return mask_of(dataset, keep_N, tuple(e.rule for e in effects)), keep_N, effects


def _left_out(
    dataset: Dataset, rules: Rules, state_keys: tuple[str, ...], action_key: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Each rule that is on, in words, and the rows that it leaves out."""
    frame_N = np.arange(dataset.num_frames)
    position_N = dataset.episode_of(frame_N)
    if rules.idle:
        states = [dataset.column(key) for key in state_keys]  # none, where the robot observes none
        action_NA, names = dataset.column(action_key), dataset.features[action_key].names
        idle_N = idle_frames(
            np.concatenate([np.zeros((dataset.num_frames, 0), np.float32), *states], axis=1),
            action_NA,
            fps=dataset.fps,
            starts=dataset.starts,
            min_idle=rules.idle,
            share=rules.idle_share,
            rates_A=np.array([is_rate(f"{action_key} {name}") for name in names or ("",) * action_NA.shape[1]]),
        )
        yield f"pauses of {rules.idle:g} s within {rules.idle_share:.1%} of the range", idle_N
    if rules.droid_idle:
        pause_N, velocity_NJ = np.ones(dataset.num_frames, dtype=bool), dataset.column(rules.droid_idle)
        for episode in dataset.episodes:
            for start, end in droid_keep_ranges(velocity_NJ[episode.start : episode.start + episode.length]):
                pause_N[episode.start + start : episode.start + end] = False
        yield f"DROID's pauses in {rules.droid_idle}", pause_N
    if rules.trim_start:
        first_N = dataset.starts[position_N] + round(rules.trim_start * dataset.fps)
        yield f"the first {rules.trim_start:g} s", frame_N < first_N
    if rules.trim_end:
        end_N = dataset.ends[position_N] - round(rules.trim_end * dataset.fps)
        yield f"the last {rules.trim_end:g} s", frame_N >= end_N
    if rules.success:
        succeeded = np.logical_or.reduceat(dataset.column(rules.success)[:, 0] > 0, dataset.starts)
        yield f"episodes without {rules.success}", ~succeeded[position_N]
    if rules.without:
        numbers = np.array([episode.index for episode in dataset.episodes])
        if unknown := sorted(set(rules.without) - set(numbers.tolist())):
            raise ConfigError(
                expected=f"episodes from {numbers.min()} to {numbers.max()}",
                found=f"{unknown}",
                where="--without",
                next=f"manipi inspect {quoted(dataset.root)}  # lists the episodes",
            )
        yield f"episodes {', '.join(map(str, rules.without))}", np.isin(numbers, rules.without)[position_N]


def guess_keys(dataset: Dataset) -> tuple[tuple[str, ...], str]:
    """The state features and the action feature, where no robot names them. Raises ConfigError where names do not."""
    states, actions = state_and_action_keys(dataset)
    if not states or not actions:
        raise ConfigError(
            expected="features for state and actions that their names give away",
            found=f"vectors {', '.join(k for k, f in dataset.features.items() if f.kind == 'vector') or 'none'}",
            where=str(dataset.root),
            next="--robot RECIPE|FILE.py:NAME  # names them",
        )
    return states, actions[0]


def preview(dataset: Dataset, keep_N: Bool[np.ndarray, " N"], *, width: int = 60, most: int = 20) -> str:
    """Bars of the episodes that lose most: `█` kept, `░` left out, the longest episode over the whole width."""
    lost = np.add.reduceat(~keep_N, dataset.starts)
    longest = max(episode.length for episode in dataset.episodes)
    lines = []
    for k in sorted(np.argsort(-lost, kind="stable")[:most].tolist()):
        episode = dataset.episodes[k]
        kept_T = keep_N[episode.start : episode.start + episode.length]
        parts = np.array_split(kept_T, max(1, width * episode.length // longest))
        bar = "".join("█" if part.mean() > 0.5 else "░" for part in parts if part.size)
        lines.append(f"{episode.index:>7}  {bar:<{width}}  {1 - lost[k] / episode.length:4.0%} of {episode.length}")
    more = len(dataset.episodes) - len(lines)
    return "\n".join(["episode", *lines, *([f"… and {more} more that lose less"] if more else [])])


# Pauses ----------------------------------------------------------------------------------------------------------


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

    A policy that learns from frames without movement learns to stand still, and once it stands it stays so.

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
    # An encoder's step: the smallest difference between neighbours; none where that is most of the range, as of a
    # gripper that snaps.
    steps_NM = np.abs(np.diff(values_NM, axis=0))
    step_M = np.where(steps_NM > 0, steps_NM, np.inf).min(axis=0, initial=np.inf)
    limit_M = np.maximum(share * range_M, np.where(step_M < 0.25 * range_M, 1.01 * step_M, 0))
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


def true_ranges(mask: Bool[np.ndarray, " n"]) -> list[tuple[int, int]]:
    """[start, end) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
