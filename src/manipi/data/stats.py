"""Norm stats from the state and action columns alone: no picture is read.

State and actions pass through the same `ActionSpace` as in training, the actions over the whole chunk, so the
statistics are of what the model sees. Steps beyond the end of an episode do not count.
"""

import numpy as np
from tqdm import tqdm

from manipi.data.dataset import Dataset, action_chunks
from manipi.robots.robot import Robot
from manipi.transforms.actions import ActionSpace
from manipi.transforms.pipeline import contract
from manipi.types import FieldStats, NormStats

BLOCK = 65_536
NEAR_CONSTANT = 1e-4
"""A dimension whose q01 and q99 are closer than this makes tiny differences huge once normalised."""


def compute_norm_stats(dataset: Dataset, robot: Robot, action_horizon: int, rows: np.ndarray) -> NormStats:
    """Exact mean, std, min, max and quantiles over `rows` (global frame numbers)."""
    state = read_state(dataset, robot)
    key, space, blocks = robot.dataset_key(robot.action_key), ActionSpace(robot), []
    for start in tqdm(range(0, len(rows), BLOCK), desc="norm stats", unit="block", disable=len(rows) <= BLOCK):
        block = rows[start : start + BLOCK]
        chunks, valid = action_chunks(dataset, block, action_key=key, horizon=action_horizon)
        blocks.append(space.to_model(chunks, state[block])[valid].astype(np.float32))
    return NormStats(
        state=field_stats(space.state_to_model(state[rows])),
        actions=field_stats(np.concatenate(blocks)),
        num_frames=len(rows),
        contract=contract(robot, action_horizon),
        data=dataset.fingerprint,
    )


def read_state(dataset: Dataset, robot: Robot) -> np.ndarray:
    """The robot's state of every frame, float32 [N, S]."""
    parts = [dataset.column(robot.dataset_key(s.key)) for s in robot.state]
    return np.concatenate(parts, axis=-1) if parts else np.zeros((dataset.num_frames, 0), np.float32)


def field_stats(values: np.ndarray) -> FieldStats:
    """[N, dim] -> statistics per dimension, float64."""
    columns = [values[:, d].astype(np.float64) for d in range(values.shape[1])]
    per_dim = [(c.mean(), c.std(), *np.quantile(c, (0.01, 0.99)), c.min(), c.max()) for c in columns]
    return FieldStats(*np.array(per_dim, dtype=np.float64).reshape(-1, 6).T)


def suspicious_dimensions(stats: NormStats) -> list[str]:
    """Plain sentences about dimensions that normalisation would blow up or that never move."""
    notes = []
    for name, field in (("state", stats.state), ("actions", stats.actions)):
        for d in np.flatnonzero(field.q99 - field.q01 < NEAR_CONSTANT):
            kind = "never moves" if field.min[d] == field.max[d] else "hardly moves"
            notes.append(f"{name}[{d}] {kind}: q01 {field.q01[d]:.6g}, q99 {field.q99[d]:.6g}")
    return notes
