"""Open loop: what a policy would have commanded at recorded frames, beside what was recorded, and beside baselines.

    frame t ──► policy ──► â_t … â_t+H-1 ┐
            └─► baselines                ├─► |â - a|, where the step lies within the episode
    recorded               a_t … a_t+H-1 ┘

Errors and baselines are those of `manipi.data.action_error`. The nearest neighbour is left out where the frames are
training frames themselves.

A low open-loop error is no success on the robot: errors that add up, and the robot's own mistakes, only show there.

Shape letters: n frames, T training frames; H action horizon, A dimensions of the robot's command.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int64
from tqdm import tqdm

from manipi.data.action_error import (
    ChunkError,
    baselines,
    chunk_error,
    commands,
    nearest_neighbour,
    recorded_chunks,
    travel_of,
)
from manipi.data.dataset import Dataset
from manipi.data.dimensions import command_names
from manipi.data.feed.mixture import frames_of
from manipi.policy import Policy
from manipi.robots.robot import Robot
from manipi.train.watch.progress import figure
from manipi.transforms.pipeline import observation_of

BLOCK = 32
"""Frames whose pictures are in RAM at a time."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Action chunks in the robot's units at some rows of a dataset."""

    rows: Int64[np.ndarray, "n"]
    recorded: Float[np.ndarray, "n H A"]
    valid: Bool[np.ndarray, "n H"]
    chunks: dict[str, Float[np.ndarray, "n H A"]]
    """By predictor: the policy and the baselines."""


@dataclass(frozen=True, kw_only=True)
class OpenLoop:
    """The errors on some frames of some episodes."""

    frames: int
    episodes: int
    dimensions: tuple[str, ...]
    travel: Float[np.ndarray, "A"]
    """q99 - q01 of the training episodes' commands; 0 where a dimension counts as constant."""
    errors: dict[str, ChunkError]

    def verdict(self) -> str:
        """One sentence per baseline."""
        return "\n".join(self._compare(name) for name in self.errors if name != "policy")

    def _compare(self, name: str) -> str:
        policy, baseline = self.errors["policy"], self.errors[name]
        mine, its, moving = policy.share_of_travel, baseline.share_of_travel, self.travel > 0
        lower = int((policy.per_dimension < baseline.per_dimension)[moving].sum())
        where = f"lower in {lower} of {int(moving.sum())} dimensions"
        if mine < its:
            return f"The policy beats {name}: its error is {1 - mine / its:.0%} lower in the mean, {where}."
        return f"The policy does NOT beat {name}: {mine:.2%} of the travel against {its:.2%}; {where}."


def predict(
    policy: Policy,
    dataset: Dataset,
    rows: Int64[np.ndarray, "n"],
    train_rows: Int64[np.ndarray, "T"],
    *,
    show: bool = True,
) -> Predictions:
    """The policy's chunks and the baselines' at `rows`; baselines know of the states and commands of `train_rows` only.

    Raises:
        DataError: the dataset lacks what the policy's robot names, or cannot be read.
    """
    robot, horizon = policy.robot, policy.config.model.action_horizon
    recorded, valid = recorded_chunks(robot, dataset, rows, horizon)
    chunks = {
        "policy": infer_rows(policy, dataset, rows, show=show),
        **baselines(robot, dataset, rows, train_rows, horizon),
    }
    if robot.state_size and not np.isin(rows, train_rows).any():
        chunks["the nearest neighbour"] = nearest_neighbour(robot, dataset, rows, train_rows, horizon)
    return Predictions(rows=rows, recorded=recorded, valid=valid, chunks=chunks)


def score(predictions: Predictions, dataset: Dataset, robot: Robot, train_rows: Int64[np.ndarray, "T"]) -> OpenLoop:
    """Mean absolute errors of every predictor."""
    travel, p = travel_of(robot, dataset, train_rows), predictions
    return OpenLoop(
        frames=len(p.rows),
        episodes=len(np.unique(dataset.episode_of(p.rows))),
        dimensions=command_names(robot, dataset),
        travel=travel,
        errors={name: chunk_error(chunks, p.recorded, p.valid, travel) for name, chunks in p.chunks.items()},
    )


def infer_rows(policy: Policy, dataset: Dataset, rows: np.ndarray, *, show: bool = True) -> Float[np.ndarray, "n H A"]:
    """The policy's chunks at `rows`, with the noise that follows a reset."""
    policy.reset()
    chunks = []
    with tqdm(total=len(rows), desc="infer", unit="frame", disable=not show) as bar:
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            for frame in frames_of(policy.robot, policy.config.model.action_horizon, dataset, block):
                observation = observation_of(frame, policy.robot)
                seen = {key: value for key, value in observation.items() if key not in ("actions", "action_valid")}
                chunks.append(policy.infer(seen)["actions"])
                bar.update()
    return np.stack(chunks)


def plot_chunks(predictions: Predictions, dataset: Dataset, robot: Robot, result: OpenLoop, path: Path) -> None:
    """The commands of one episode and the policy's chunks over them, for the dimensions that travel most often."""
    episodes = dataset.episode_of(predictions.rows)
    position = int(np.bincount(episodes).argmax())
    start, end = dataset.starts[position], dataset.ends[position]
    recorded = commands(robot, dataset)[start:end]
    shown = _liveliest(recorded, result.travel, 6)
    with figure(path, figsize=(9, 1.6 * len(shown) + 0.8)) as drawing:
        axes = drawing.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for axis, d in zip(axes, shown, strict=True):
            axis.plot(recorded[:, d], color="#444444", linewidth=1.8, label="recorded")
            for i in np.flatnonzero(episodes == position):
                steps = predictions.rows[i] - start + np.arange(predictions.valid[i].sum())
                chunk = predictions.chunks["policy"][i, : len(steps), d]
                axis.plot(steps, chunk, color="#d9622b", linewidth=1, alpha=0.7)
            axis.set_ylabel(result.dimensions[d], fontsize=8)
            axis.grid(alpha=0.25)
        axes[0].plot([], [], color="#d9622b", label="predicted chunks")
        axes[0].legend(loc="upper right", fontsize=8, ncols=2)
        axes[-1].set_xlabel(f"frame of episode {dataset.episodes[position].index}")


def _liveliest(commands: np.ndarray, travel: np.ndarray, count: int) -> list[int]:
    """The dimensions with the largest spread in one episode, as a share of their travel; in their own order."""
    moving = np.flatnonzero(travel > 0)
    spread = commands[:, moving].std(axis=0) / travel[moving]
    return sorted(moving[np.argsort(-spread)[:count]].tolist())
