"""Open loop: what a policy would have commanded at recorded frames, beside what was recorded, and beside baselines.

    frame t ──► policy ──► â_t … â_t+H-1 ┐
            └─► baselines                ├─► |â - a|, where the step lies within the episode
    recorded               a_t … a_t+H-1 ┘

Errors and baselines are those of `manipi.data.action_error`. The nearest neighbour is left out where the frames are
training frames themselves.

A low open-loop error is no success on the robot: errors that add up, and the robot's own mistakes, only show there.

Which episodes the policy has not seen, the split of its run says (`open_split`), or a new one (`new_split`).

Shape letters: n frames, T training frames; H action horizon, A dimensions of the robot's command.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int64
from tqdm import tqdm

from manipi.checkpoints.native import QuantizationReport, identity
from manipi.data.action_error import (
    ChunkError,
    baselines,
    chunk_error,
    commands,
    evenly_spaced,
    nearest_neighbour,
    recorded_chunks,
    travel_of,
)
from manipi.data.dataset import Dataset, command_names
from manipi.data.feed.mixture import frames_of
from manipi.data.feed.sampler import split_episodes
from manipi.data.open import open_dataset
from manipi.errors import ConfigError, MissingFeatureError
from manipi.evaluate.policies import run_folder
from manipi.model.inference.fused import Quantization
from manipi.policy import Policy
from manipi.robots.robot import Robot
from manipi.train.data import check_features, open_demonstrations, provenance_of
from manipi.train.run.folder import read_config
from manipi.train.watch.progress import figure
from manipi.transforms.pipeline import observation_of

BLOCK = 32
"""Frames whose pictures are in RAM at a time."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """A dataset, and on which side of the split each of its rows is."""

    dataset: Dataset
    train_rows: Int64[np.ndarray, "T"]
    held_out_rows: Int64[np.ndarray, "E"]
    origin: str
    """Whose split it is, in words."""


def open_split(checkpoint: Path, policy: Policy, data: str | None) -> Split:
    """The split that the policy was trained with; of a mixture, that of its robot's first dataset.

    Args:
        data: where the dataset is now; None: where it was in training.

    Raises:
        ConfigError: the checkpoint stands apart from its run, the data are not those that it was trained on, or the
            run held no episodes out.
        DataError: the dataset is absent or broken.
    """
    run = run_folder(checkpoint)
    if run is None:
        raise _no_split("a checkpoint in its run's folder, runs/NAME/checkpoints/STEP", "no config.json", checkpoint)
    config = read_config(run)
    if not config.data.holdout:
        raise _no_split("a run with held-out episodes", "data.holdout 0: it trained on all of them", run)
    if data:
        config = replace(config, data=replace(config.data, path=data))
    trained_on = (policy.norm_stats.data, policy.norm_stats.rows)
    try:
        mine = [one for one in open_demonstrations(config) if one.robot.name == config.robot.name]
    except MissingFeatureError as error:
        raise _no_split(
            "the data that the policy was trained on", f"data without {error.expected}", error.where
        ) from error
    if (found := provenance_of(mine)) != trained_on:
        raise _no_split(
            f"the data that the policy was trained on ({trained_on[0][:12]}, frames {trained_on[1][:12]})",
            f"other data ({found[0][:12]}, frames {found[1][:12]})",
            mine[0].dataset.root,
        )
    origin = f"the run's own (holdout {config.data.holdout:g})"
    first = mine[0]
    return Split(dataset=first.dataset, train_rows=first.rows, held_out_rows=first.held_out, origin=origin)


def new_split(policy: Policy, data: str, *, holdout: float, seed: int) -> Split:
    """A split made now, for data that the policy was not trained on, or a checkpoint apart from its run."""
    dataset = open_dataset(data)
    check_features(dataset, policy.robot)
    train, held_out = split_episodes(dataset, holdout=holdout, seed=seed)
    origin = f"made now (holdout {holdout:g}, seed {seed}): the policy may have been trained on any of these episodes"
    return Split(dataset=dataset, train_rows=train, held_out_rows=held_out, origin=origin)


def _no_split(expected: str, found: str, where: Path | str) -> ConfigError:
    return ConfigError(
        expected=expected,
        found=found,
        where=str(where),
        next="--data PATH --holdout 0.2 --seed 0  # splits the data anew; baselines know of the other 80 % only",
    )


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
        policy, moving, sentences = self.errors["policy"], self.travel > 0, []
        mine = policy.share_of_travel
        for name, baseline in self.errors.items():
            its = baseline.share_of_travel
            lower = int((policy.per_dimension < baseline.per_dimension)[moving].sum())
            where = f"lower in {lower} of {int(moving.sum())} dimensions"
            if name == "policy":
                continue
            if mine < its:
                said = f"The policy beats {name}: its error is {1 - mine / its:.0%} lower in the mean, {where}."
            else:
                said = f"The policy does NOT beat {name}: {mine:.2%} of the travel against {its:.2%}; {where}."
            sentences.append(said)
        return "\n".join(sentences)


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
            model = policy.config.model
            for frame in frames_of(policy.robot, model.action_horizon, dataset, block, past=model.past_steps):
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
    moving = np.flatnonzero(result.travel > 0)
    spread = recorded[:, moving].std(axis=0) / result.travel[moving]
    shown = sorted(moving[np.argsort(-spread)[:6]].tolist())  # the liveliest in this episode
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


def measure_quantization(
    checkpoint: Path, quantization: Quantization, data: str, *, frames: int, device: str = "cpu", show: bool = True
) -> QuantizationReport:
    """Both policies on so many frames, evenly spaced over a dataset, from the same noise.

    Raises:
        DataError: the dataset lacks what the policy's robot names, or cannot be read.
        ConfigError: the device has no such quantization.
    """
    policy, dataset = Policy.load(checkpoint, device=device), open_dataset(data)
    check_features(dataset, policy.robot)
    robot, every = policy.robot, np.arange(dataset.num_frames)
    rows = evenly_spaced(every, frames)
    recorded, valid = recorded_chunks(robot, dataset, rows, policy.config.model.action_horizon)
    plain = infer_rows(policy, dataset, rows, show=show)
    policy.fuse(quantization)
    quantized = infer_rows(policy, dataset, rows, show=show)
    travel = travel_of(robot, dataset, every)
    difference = chunk_error(quantized, plain, valid, travel)
    return QuantizationReport(
        quantization=quantization,
        checkpoint=identity(checkpoint),
        dataset=dataset.name,
        frames=len(rows),
        difference=difference.share_of_travel,
        per_dimension=dict(zip(command_names(robot, dataset), difference.per_dimension.tolist(), strict=True)),
        error=chunk_error(quantized, recorded, valid, travel).share_of_travel,
        plain_error=chunk_error(plain, recorded, valid, travel).share_of_travel,
    )
