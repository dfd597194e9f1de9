"""Open loop: what a policy would have commanded at recorded frames, beside what was recorded, and beside baselines.

    frame t ──► policy ──► â_t … â_t+H-1 ┐
            └─► baselines                ├─► |â - a|, where the step lies within the episode
    recorded               a_t … a_t+H-1 ┘

The error is in the robot's own units per dimension; over dimensions it is a share of their travel, q99 - q01 of the
commands in the training episodes, so that degrees and metres add up. Dimensions that never travel do not count there.

    holding position       the state where a group is relative to it; elsewhere the command of the frame before
    the mean action        of the training episodes
    the nearest neighbour  the chunk recorded at the training frame with the nearest state, relative groups moved to
                           this state; left out where the frames are training frames themselves

A low open-loop error is no success on the robot: errors that add up, and the robot's own mistakes, only show there.

Shape letters: n frames, T training frames, N rows of the dataset; H action horizon, A dimensions of the robot's
command, S state dimensions.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int64
from tqdm import tqdm

from manipi.data.dataset import Dataset, action_chunks
from manipi.data.source import frames_of
from manipi.data.stats import NEAR_CONSTANT, read_state
from manipi.policy import Policy
from manipi.robots.robot import Robot
from manipi.storage import atomic_write
from manipi.transforms.actions import ActionSpace
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
class ChunkError:
    """Mean absolute error of one predictor."""

    share_of_travel: float
    """Mean over steps and over the dimensions that travel."""
    per_step: Float[np.ndarray, "H"]
    """The same for each step of the chunk; 0 where no frame has that step."""
    per_dimension: Float[np.ndarray, "A"]
    """In the robot's own units."""


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


def evenly_spaced(rows: Int64[np.ndarray, "n"], count: int) -> Int64[np.ndarray, "m"]:
    """At most `count` of the rows, from the first to the last."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(np.int64))]


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
    space, state_NS = ActionSpace(robot), read_state(dataset, robot)
    recorded, valid = action_chunks(dataset, rows, action_key=robot.dataset_key(robot.action_key), horizon=horizon)
    mean_A = _commands(robot, dataset)[train_rows].mean(axis=0)
    baselines = {
        "holding position": _hold(robot, dataset, rows, mean_A, state_NS),
        "the mean action": np.broadcast_to(mean_A, (len(rows), robot.action_size)),
    }
    chunks = {"policy": _infer(policy, dataset, rows, show)}
    chunks |= {name: np.repeat(command_nA[:, None], horizon, axis=1) for name, command_nA in baselines.items()}
    if robot.state_size and not np.isin(rows, train_rows).any():
        chunks["the nearest neighbour"] = _nearest(robot, dataset, rows, train_rows, state_NS, horizon)
    # There and back, so that a rotation reads the same however it was written down (q and -q, for one).
    recorded = space.to_robot(space.to_model(recorded, state_NS[rows]), state_NS[rows])
    return Predictions(rows=rows, recorded=recorded, valid=valid, chunks=chunks)


def score(predictions: Predictions, dataset: Dataset, robot: Robot, train_rows: Int64[np.ndarray, "T"]) -> OpenLoop:
    """Mean absolute errors of every predictor."""
    low, high = np.quantile(_commands(robot, dataset)[train_rows].astype(np.float64), (0.01, 0.99), axis=0)
    travel = np.where(high - low < NEAR_CONSTANT, 0.0, high - low)
    names = dataset.features[robot.dataset_key(robot.action_key)].names
    return OpenLoop(
        frames=len(predictions.rows),
        episodes=len(np.unique(dataset.episode_of(predictions.rows))),
        dimensions=names if len(names) == robot.action_size else tuple(map(str, range(robot.action_size))),
        travel=travel,
        errors={name: _error(chunks, predictions, travel) for name, chunks in predictions.chunks.items()},
    )


def _error(chunks_nHA: np.ndarray, predictions: Predictions, travel_A: np.ndarray) -> ChunkError:
    valid = predictions.valid
    error = np.abs(chunks_nHA.astype(np.float64) - predictions.recorded) * valid[..., None]
    moving = travel_A > 0
    share_nH = (error[..., moving] / travel_A[moving]).mean(axis=-1)
    return ChunkError(
        share_of_travel=float(share_nH.sum() / valid.sum()),
        per_step=share_nH.sum(axis=0) / np.maximum(valid.sum(axis=0), 1),
        per_dimension=error.sum(axis=(0, 1)) / valid.sum(),
    )


def _infer(policy: Policy, dataset: Dataset, rows: np.ndarray, show: bool) -> np.ndarray:
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


def _commands(robot: Robot, dataset: Dataset) -> np.ndarray:
    return dataset.column(robot.dataset_key(robot.action_key))


def _hold(robot: Robot, dataset: Dataset, rows: np.ndarray, mean_A: np.ndarray, state_NS: np.ndarray) -> np.ndarray:
    """Commands [n, A] that keep the robot where it is; before an episode's first command, the mean of all."""
    first = np.isin(rows, dataset.starts)[:, None]
    hold = np.where(first, mean_A, _commands(robot, dataset)[rows - 1])
    start = 0
    for group in robot.actions:
        if group.relative:
            base = start if group.state_start is None else group.state_start
            hold[:, start : start + group.size] = state_NS[rows, base : base + group.size]
        start += group.size
    return hold


def _nearest(
    robot: Robot, dataset: Dataset, rows: np.ndarray, train_rows: np.ndarray, state_NS: np.ndarray, horizon: int
) -> np.ndarray:
    """The chunks [n, H, A] of the training frames with the nearest states, as seen from the states at `rows`.

    Distances are Euclidean after scaling each state dimension by its travel.
    """
    low, high = np.quantile(state_NS[train_rows], (0.01, 0.99), axis=0)
    moving = high - low >= NEAR_CONSTANT
    scaled = state_NS[:, moving] / (high - low)[moving]
    known = scaled[train_rows]
    nearest = train_rows[[int(((known - query) ** 2).sum(axis=-1).argmin()) for query in scaled[rows]]]
    action_key, space = robot.dataset_key(robot.action_key), ActionSpace(robot)
    chunks, _ = action_chunks(dataset, nearest, action_key=action_key, horizon=horizon)
    return space.to_robot(space.to_model(chunks, state_NS[nearest]), state_NS[rows])


def plot_chunks(predictions: Predictions, dataset: Dataset, robot: Robot, result: OpenLoop, path: Path) -> None:
    """The commands of one episode and the policy's chunks over them, for the dimensions that travel most often."""
    import io

    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    episodes = dataset.episode_of(predictions.rows)
    position = int(np.bincount(episodes).argmax())
    start, end = dataset.starts[position], dataset.ends[position]
    commands = _commands(robot, dataset)[start:end]
    shown = _liveliest(commands, result.travel, 6)
    figure, axes = plt.subplots(
        len(shown), 1, figsize=(9, 1.6 * len(shown) + 0.8), dpi=110, sharex=True, squeeze=False, layout="constrained"
    )
    for axis, d in zip(axes[:, 0], shown, strict=True):
        axis.plot(commands[:, d], color="#444444", linewidth=1.8, label="recorded")
        for i in np.flatnonzero(episodes == position):
            steps = predictions.rows[i] - start + np.arange(predictions.valid[i].sum())
            axis.plot(steps, predictions.chunks["policy"][i, : len(steps), d], color="#d9622b", linewidth=1, alpha=0.7)
        axis.set_ylabel(result.dimensions[d], fontsize=8)
        axis.grid(alpha=0.25)
    axes[0, 0].plot([], [], color="#d9622b", label="predicted chunks")
    axes[0, 0].legend(loc="upper right", fontsize=8, ncols=2)
    axes[-1, 0].set_xlabel(f"frame of episode {dataset.episodes[position].index}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    atomic_write(path, buffer.getvalue())


def _liveliest(commands: np.ndarray, travel: np.ndarray, count: int) -> list[int]:
    """The dimensions with the largest spread in one episode, as a share of their travel; in their own order."""
    moving = np.flatnonzero(travel > 0)
    spread = commands[:, moving].std(axis=0) / travel[moving]
    return sorted(moving[np.argsort(-spread)[:count]].tolist())
