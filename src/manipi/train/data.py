"""From a training config to encoded batches: dataset, split, statistics, tokenizers and the one pipeline."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from manipi.checkpoints.fetch import fetch
from manipi.checkpoints.importing import require_tokenizer
from manipi.checkpoints.tokenizers import open_action_tokenizer, open_text_tokenizer
from manipi.data.cache import CachedDataset
from manipi.data.dataset import Dataset, action_chunks, frames, open_dataset
from manipi.data.loader import Loader
from manipi.data.sampler import Sampler, permutation
from manipi.data.split import split_episodes
from manipi.data.stats import compute_norm_stats, read_state
from manipi.errors import ConfigError, NormStatsError
from manipi.model.config import Pi0FastConfig
from manipi.robots.robot import Robot
from manipi.storage import atomic_directory
from manipi.tokenizers import (
    ActionTokenizer,
    ByteTokenizer,
    FastTokenizer,
    Tokenizers,
)
from manipi.train.config import DataConfig, TrainConfig
from manipi.transforms import pipeline
from manipi.transforms.actions import ActionSpace
from manipi.transforms.normalize import load_norm_stats, normalize, read_openpi_stats, save_norm_stats
from manipi.transforms.pipeline import Pipeline, observation_of
from manipi.types import Frame, NormStats, Sample

FIT_CHUNKS, FIT_CODES = 4_096, 1_024
"""Action chunks that a FAST tokenizer is fitted to, and the most codes that it learns."""


@dataclass(frozen=True)
class TrainingData:
    """Everything that stands between the dataset's files and the model."""

    config: TrainConfig
    dataset: Dataset
    """As it is on disk, pictures in full size."""
    to_train_on: Dataset
    """The same, from the cache where there is one."""
    train_rows: np.ndarray
    held_out_rows: np.ndarray
    stats: NormStats
    tokenizers: Tokenizers
    pipeline: Pipeline

    def frames(self, rows: np.ndarray) -> list[Frame]:
        """Raw frames in the dataset's keys, with action chunks of the model's horizon."""
        return frames_of(self.config.robot, self.config.model.action_horizon, self.dataset, rows)

    def example(self) -> Sample:
        """The first held-out observation (or training one, where none is held out), in the robot's keys."""
        rows = self.held_out_rows if len(self.held_out_rows) else self.train_rows
        observation = observation_of(self.frames(rows[:1])[0], self.config.robot)
        return {k: v for k, v in observation.items() if k not in ("actions", "action_valid")}

    def loader(self, start_step: int) -> Loader:
        """Endless encoded batches from `start_step` on."""
        c = self.config
        sampler = Sampler(self.train_rows, c.batch_size, seed=c.seed, fingerprint=self.dataset.fingerprint)
        read = partial(frames_of, c.robot, c.model.action_horizon)
        encode = self.pipeline.encode_frame
        return Loader(
            self.to_train_on, sampler, encode, read=read, num_workers=c.data.num_workers, start_step=start_step
        )


def frames_of(robot: Robot, action_horizon: int, dataset: Dataset, rows: np.ndarray) -> list[Frame]:
    """The rows as frames with just the features that the robot names."""
    return frames(
        dataset,
        rows,
        cameras=[robot.dataset_key(key) for key in robot.cameras.values()],
        state_keys=[robot.dataset_key(s.key) for s in robot.state],
        action_key=robot.dataset_key(robot.action_key),
        horizon=action_horizon,
    )


def prepare(config: TrainConfig, folder: Path) -> TrainingData:
    """Open, check and encode the data of a run; statistics and tokenizers are kept in `folder` and reused.

    Raises:
        DataError: the dataset is absent, broken, or lacks what the robot names.
        ConfigError: the robot does not fit the model, or the recipe has no dataset.
        TokenizerError: another project's weights to start from, and not the tokenizer that they were trained with.
    """
    pipeline.check_fit(config.robot, config.model)
    dataset = open_demonstrations(config)
    train_rows, held_out_rows = split_episodes(dataset, holdout=config.data.holdout, seed=config.seed)
    stats = _stats(config, dataset, train_rows, folder / "norm_stats.json")
    tokenizers = _tokenizers(config, dataset, train_rows, stats, folder / "tokenizer")
    steps = pipeline.build(config.robot, config.model, stats, tokenizers, config.norm_mode)
    to_train_on = _cached(config, dataset, folder / "cache") if config.data.cache == "frames" else dataset
    return TrainingData(config, dataset, to_train_on, train_rows, held_out_rows, stats, tokenizers, steps)


def _cached(config: TrainConfig, dataset: Dataset, folder: Path) -> Dataset:
    """The same samples after encoding, bit for bit: the cache resizes as the pipeline does."""
    cameras = [config.robot.dataset_key(key) for key in config.robot.cameras.values()]
    return CachedDataset(dataset, cameras, folder, config.model.vision.image_size)


def open_demonstrations(config: TrainConfig) -> Dataset:
    """The dataset of a recipe, which has what its robot names. Raises as `prepare` does."""
    if not config.data.is_local:
        raise _no_demonstrations(config.data)
    dataset = open_dataset(config.data.path, config.data.episodes)
    check_features(dataset, config.robot)
    return dataset


def _no_demonstrations(data: DataConfig) -> ConfigError:
    folder = "--data.path FOLDER, a LeRobot dataset with what the recipe's robot names"
    if data.path:
        found, next = f"the URL {data.path}, which is not read yet", f"download it; then {folder}"
    elif data.rlds:
        sets = " and ".join(f"{s.name} {s.version}" for s in data.rlds)
        found, next = f"RLDS sets, which are not read yet: {sets}", f"convert them to LeRobot; then {folder}"
    else:
        found, next = "a recipe without a dataset of its own", folder
    return ConfigError(
        expected="the folder of a LeRobot dataset to train on", found=found, where="TrainConfig.data", next=next
    )


def check_features(dataset: Dataset, robot: Robot) -> None:
    """The dataset has the cameras, states and actions that the robot names, in the sizes that it names."""
    for key in robot.cameras.values():
        dataset.require(robot.dataset_key(key), "image")
    for key, size in [*((s.key, s.size) for s in robot.state), (robot.action_key, robot.action_size)]:
        dataset.require(robot.dataset_key(key), "vector", size)


def _stats(config: TrainConfig, dataset: Dataset, rows: np.ndarray, path: Path) -> NormStats:
    if not path.exists():
        if config.data.norm_stats:
            # From now on the run is tied to its data, although the numbers are those of other demonstrations.
            stats = replace(_released_stats(config), data=dataset.fingerprint)
        else:
            stats = compute_norm_stats(dataset, config.robot, config.model.action_horizon, rows)
        save_norm_stats(stats, path)
    stats = load_norm_stats(path)
    if stats.data != dataset.fingerprint:
        raise NormStatsError(
            expected=f"statistics of this dataset ({dataset.fingerprint[:12]})",
            found=f"statistics of another, or of an older state of it ({stats.data[:12]})",
            where=str(path),
            next=f"delete {path} to compute them again, or start a new run folder",
        )
    return stats


def _released_stats(config: TrainConfig) -> NormStats:
    path = fetch(config.data.norm_stats) / "norm_stats.json"
    return read_openpi_stats(path, config.robot, config.model.action_horizon)


def _tokenizers(config: TrainConfig, dataset: Dataset, rows: np.ndarray, stats: NormStats, folder: Path) -> Tokenizers:
    if folder.is_dir():
        return Tokenizers.load(folder)
    action = _action_tokenizer(config, dataset, rows, stats) if isinstance(config.model, Pi0FastConfig) else None
    tokenizers = Tokenizers(open_text_tokenizer(config.tokenizer, action), action)
    if config.init:
        require_tokenizer(config.init, config.model.vocab_size, tokenizers.text)
    with atomic_directory(folder) as partial:
        tokenizers.save(partial)
    return tokenizers


def _action_tokenizer(config: TrainConfig, dataset: Dataset, rows: np.ndarray, stats: NormStats) -> ActionTokenizer:
    if config.action_tokenizer != "fit":
        return open_action_tokenizer(config.action_tokenizer)
    # The codes live behind the text's ids in the model's vocabulary.
    room = config.model.vocab_size - ByteTokenizer.NUM_TEXT_IDS if config.tokenizer == "byte" else FIT_CODES
    return FastTokenizer.fit(chunks_to_fit(config, dataset, rows, stats), vocab_size=min(room, FIT_CODES))


def chunks_to_fit(config: TrainConfig, dataset: Dataset, rows: np.ndarray, stats: NormStats) -> np.ndarray:
    """At most `FIT_CHUNKS` action chunks [N, H, A] of `rows`, as the model sees them: relative and normalised."""
    robot = config.robot
    chosen = np.sort(rows[permutation(len(rows), f"fast/{config.seed}")[:FIT_CHUNKS]])
    action_key = robot.dataset_key(robot.action_key)
    chunks, _ = action_chunks(dataset, chosen, action_key=action_key, horizon=config.model.action_horizon)
    relative = ActionSpace(robot).to_model(chunks, read_state(dataset, robot)[chosen])
    return normalize(relative, stats.actions, config.norm_mode)
