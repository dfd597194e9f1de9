"""How far action chunks are from those that were recorded, and what simple predictors would have said there.

The error is in the robot's own units per dimension; over dimensions it is a share of their travel, q99 - q01 of the
commands in the training episodes, so that degrees and metres add up. Dimensions that never travel do not count there.

    holding position       the state where a group is relative to it; elsewhere the command of the frame before
    the mean action        of the training episodes
    the nearest neighbour  the chunk recorded at the training frame with the nearest state, relative groups moved to
                           this state

Shape letters: n frames, T training frames, N rows of the dataset; H action horizon, A dimensions of the robot's
command, S state dimensions.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int64

from manipi.data.dataset import Dataset, action_chunks
from manipi.data.norm_stats import NEAR_CONSTANT, read_state
from manipi.robots.robot import Robot
from manipi.transforms.actions import ActionSpace


@dataclass(frozen=True, kw_only=True)
class ChunkError:
    """Mean absolute error of one predictor."""

    share_of_travel: float
    """Mean over steps and over the dimensions that travel."""
    per_step: Float[np.ndarray, "H"]
    """The same for each step of the chunk; 0 where no frame has that step."""
    per_dimension: Float[np.ndarray, "A"]
    """In the robot's own units."""
    per_step_dimension: Float[np.ndarray, "H A"]
    """In the robot's own units; 0 where no frame has that step."""


def chunk_error(
    chunks: Float[np.ndarray, "n H A"],
    recorded: Float[np.ndarray, "n H A"],
    valid: Bool[np.ndarray, "n H"],
    travel: Float[np.ndarray, "A"],
) -> ChunkError:
    """The mean over the steps that lie within their episode; each of them counts the same."""
    error = np.abs(chunks.astype(np.float64) - recorded) * valid[..., None]
    moving = travel > 0
    share_nH = (error[..., moving] / travel[moving]).mean(axis=-1)
    steps_H = np.maximum(valid.sum(axis=0), 1)
    return ChunkError(
        share_of_travel=float(share_nH.sum() / valid.sum()),
        per_step=share_nH.sum(axis=0) / steps_H,
        per_dimension=error.sum(axis=(0, 1)) / valid.sum(),
        per_step_dimension=error.sum(axis=0) / steps_H[:, None],
    )


def evenly_spaced(rows: Int64[np.ndarray, "n"], count: int) -> Int64[np.ndarray, "m"]:
    """At most `count` of the rows, from the first to the last."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(np.int64))]


def commands(robot: Robot, dataset: Dataset) -> Float[np.ndarray, "N A"]:
    """The recorded command of every row."""
    return dataset.column(robot.dataset_key(robot.action_key))


def travel_of(robot: Robot, dataset: Dataset, train_rows: Int64[np.ndarray, "T"]) -> Float[np.ndarray, "A"]:
    """q99 - q01 of the commands; 0 where a dimension counts as constant."""
    low, high = np.quantile(commands(robot, dataset)[train_rows].astype(np.float64), (0.01, 0.99), axis=0)
    return np.where(high - low < NEAR_CONSTANT, 0.0, high - low)


def recorded_chunks(
    robot: Robot,
    dataset: Dataset,
    rows: Int64[np.ndarray, "n"],
    horizon: int,
    seen_from: Int64[np.ndarray, "n"] | None = None,
) -> tuple[Float[np.ndarray, "n H A"], Bool[np.ndarray, "n H"]]:
    """The chunks that were recorded at `rows`, and which of their steps lie within the episode.

    Args:
        seen_from: rows to whose states relative groups are moved; None: they stay where they are.
    """
    space, state_NS = ActionSpace(robot), read_state(dataset, robot)
    chunks, valid = action_chunks(dataset, rows, action_key=robot.dataset_key(robot.action_key), horizon=horizon)
    # There and back, so that a rotation reads the same however it was written down (q and -q, for one).
    state_nS = state_NS[rows if seen_from is None else seen_from]
    return space.to_robot(space.to_model(chunks, state_NS[rows]), state_nS), valid


def baselines(
    robot: Robot, dataset: Dataset, rows: Int64[np.ndarray, "n"], train_rows: Int64[np.ndarray, "T"], horizon: int
) -> dict[str, Float[np.ndarray, "n H A"]]:
    """The chunks of those who know of the states and commands of `train_rows` only, and of no picture."""
    command_NA, state_NS = commands(robot, dataset), read_state(dataset, robot)
    mean_A = command_NA[train_rows].mean(axis=0)
    # Before an episode's first command, the mean of all.
    hold_nA = np.where(np.isin(rows, dataset.starts)[:, None], mean_A, command_NA[rows - 1])
    start = 0
    for group in robot.actions:
        if group.relative:
            base = robot.state_start(group, start)
            hold_nA[:, start : start + group.size] = state_NS[rows, base : base + group.size]
        start += group.size
    constant = {"holding position": hold_nA, "the mean action": np.broadcast_to(mean_A, hold_nA.shape)}
    return {name: np.repeat(command_nA[:, None], horizon, axis=1) for name, command_nA in constant.items()}


def nearest_neighbour(
    robot: Robot, dataset: Dataset, rows: Int64[np.ndarray, "n"], train_rows: Int64[np.ndarray, "T"], horizon: int
) -> Float[np.ndarray, "n H A"]:
    """The chunks of the training frames with the nearest states, as seen from the states at `rows`.

    Distances are Euclidean after scaling each state dimension by its travel.
    """
    state_NS = read_state(dataset, robot)
    low, high = np.quantile(state_NS[train_rows], (0.01, 0.99), axis=0)
    moving = high - low >= NEAR_CONSTANT
    scaled = state_NS[:, moving] / (high - low)[moving]
    known = scaled[train_rows]
    nearest = train_rows[[int(((known - query) ** 2).sum(axis=-1).argmin()) for query in scaled[rows]]]
    return recorded_chunks(robot, dataset, nearest, horizon, seen_from=rows)[0]
