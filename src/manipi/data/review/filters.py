"""Rules that leave frames out of training. They give a mask (`manipi.data.review.mask`); the dataset stays as it is.

rule           leaves out
idle           pauses of the robot, seen in state and actions (`data.idle`)
droid_idle     pauses by openpi's rule for DROID, seen in the joint velocities (`data.idle`)
trim           the first and last seconds of every episode
success        episodes whose success column is never true
without        episodes by number
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from manipi.data.dataset import Dataset
from manipi.data.review.describe import is_rate, state_and_action_keys
from manipi.data.review.idle import droid_keep_ranges, idle_frames
from manipi.data.review.mask import Mask, mask_of
from manipi.errors import ConfigError, quoted


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
    for name, left_out_N in _apply(dataset, rules, state_keys, action_key):
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


def _apply(
    dataset: Dataset, rules: Rules, state_keys: tuple[str, ...], action_key: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Each rule that is on, in words, and the rows that it leaves out."""
    frame_N = np.arange(dataset.num_frames)
    start_N, end_N = (edges[dataset.episode_of(frame_N)] for edges in (dataset.starts, dataset.ends))
    if rules.idle:
        yield (
            f"pauses of {rules.idle:g} s within {rules.idle_share:.1%} of the range",
            _idle(dataset, rules, state_keys, action_key),
        )
    if rules.droid_idle:
        yield f"DROID's pauses in {rules.droid_idle}", ~_droid_keep(dataset, rules.droid_idle)
    if rules.trim_start:
        yield f"the first {rules.trim_start:g} s", frame_N < start_N + round(rules.trim_start * dataset.fps)
    if rules.trim_end:
        yield f"the last {rules.trim_end:g} s", frame_N >= end_N - round(rules.trim_end * dataset.fps)
    if rules.success:
        succeeded = np.logical_or.reduceat(dataset.column(rules.success)[:, 0] > 0, dataset.starts)
        yield f"episodes without {rules.success}", ~succeeded[dataset.episode_of(frame_N)]
    if rules.without:
        numbers = np.array([episode.index for episode in dataset.episodes])
        if unknown := sorted(set(rules.without) - set(numbers.tolist())):
            raise ConfigError(
                expected=f"episodes from {numbers.min()} to {numbers.max()}",
                found=f"{unknown}",
                where="--without",
                next=f"manipi inspect {quoted(dataset.root)}  # lists the episodes",
            )
        yield (
            f"episodes {', '.join(map(str, rules.without))}",
            np.isin(numbers, rules.without)[dataset.episode_of(frame_N)],
        )


def _idle(dataset: Dataset, rules: Rules, state_keys: tuple[str, ...], action_key: str) -> np.ndarray:
    states = [dataset.column(key) for key in state_keys]  # none, where the robot observes none
    action_NA, names = dataset.column(action_key), dataset.features[action_key].names
    return idle_frames(
        np.concatenate([np.zeros((dataset.num_frames, 0), np.float32), *states], axis=1),
        action_NA,
        fps=dataset.fps,
        starts=dataset.starts,
        min_idle=rules.idle,
        share=rules.idle_share,
        rates_A=np.array([is_rate(f"{action_key} {name}") for name in names or ("",) * action_NA.shape[1]]),
    )


def _droid_keep(dataset: Dataset, key: str) -> np.ndarray:
    keep_N, velocity_NJ = np.zeros(dataset.num_frames, dtype=bool), dataset.column(key)
    for episode in dataset.episodes:
        for start, end in droid_keep_ranges(velocity_NJ[episode.start : episode.start + episode.length]):
            keep_N[episode.start + start : episode.start + end] = True
    return keep_N


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
        parts = np.array_split(
            keep_N[episode.start : episode.start + episode.length], max(1, width * episode.length // longest)
        )
        bar = "".join("█" if part.mean() > 0.5 else "░" for part in parts if part.size)
        lines.append(f"{episode.index:>7}  {bar:<{width}}  {1 - lost[k] / episode.length:4.0%} of {episode.length}")
    more = len(dataset.episodes) - len(lines)
    return "\n".join(["episode", *lines, *([f"… and {more} more that lose less"] if more else [])])
