"""From a training config to encoded batches: dataset, split, statistics, tokenizers and the one pipeline."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from manipi.checkpoints.initial import require_tokenizer
from manipi.data.dataset import Dataset, action_chunks
from manipi.data.feed.cache import CachedDataset
from manipi.data.feed.loader import Loader
from manipi.data.feed.mixture import Mixture, Part, Share, Source
from manipi.data.feed.sampler import Sampler, permutation, split_episodes
from manipi.data.norm_stats.compute import (
    read_state,
    rows_fingerprint,
    sketch_norm_stats,
    suspicious_dimensions,
)
from manipi.data.norm_stats.sketch import provenance
from manipi.data.open import fetch_tables, open_dataset
from manipi.data.review.check import other_rate, sort_episodes
from manipi.data.review.mask import read_mask
from manipi.errors import ConfigError, NormStatsError
from manipi.model.config import Pi0FastConfig
from manipi.records import fingerprint, from_json, read_json, write_json
from manipi.remote.fetch import fetch
from manipi.robots.robot import Robot
from manipi.storage import atomic_directory
from manipi.tokenizers import (
    ActionTokenizer,
    ByteTokenizer,
    FastTokenizer,
    Tokenizers,
)
from manipi.train.config import DatasetConfig, TrainConfig
from manipi.train.run.folder import checkpoint_steps, claim_videos
from manipi.train.watch.prompt_length import LongestPrompt, longest_prompt
from manipi.transforms import pipeline
from manipi.transforms.actions import ActionSpace
from manipi.transforms.normalize import load_norm_stats, normalize, read_openpi_stats, save_norm_stats
from manipi.transforms.pipeline import observation_of
from manipi.types import NormStats, Sample
from manipi.weights.tokenizers import open_action_tokenizer, open_text_tokenizer

FIT_CHUNKS, FIT_CODES = 4_096, 1_024
"""Action chunks that a FAST tokenizer is fitted to, and the most codes that it learns."""


@dataclass(frozen=True, kw_only=True)
class TrainingSet(Part):
    """One dataset of the run. Its `source` reads it as it is on disk, pictures in full size."""

    to_train_on: Source
    """The same, from the cache where there is one."""


@dataclass(frozen=True)
class TrainingData:
    """Everything that stands between the datasets' files and the model."""

    config: TrainConfig
    sets: tuple[TrainingSet, ...]
    stats: Mapping[str, NormStats]
    """Per robot, by its name."""
    tokenizers: Tokenizers
    longest: LongestPrompt

    @property
    def main(self) -> TrainingSet:
        """The first set of the recipe's own robot."""
        return next(one for one in self.sets if one.source.pipeline.robot == self.config.robot)

    @property
    def other_robots(self) -> dict[str, tuple[Robot, NormStats]]:
        """Those of the mixture beside the recipe's, with their statistics."""
        robots = {robot.name: robot for robot in (one.source.pipeline.robot for one in self.sets)}
        return {name: (robot, self.stats[name]) for name, robot in robots.items() if name != self.config.robot.name}

    def example(self) -> Sample:
        """The main set's first held-out observation (or training one, where none is held out), in the robot's keys."""
        rows = self.main.held_out if len(self.main.held_out) else self.main.rows
        observation = observation_of(self.main.source.frames(rows[:1])[0], self.config.robot)
        return {k: v for k, v in observation.items() if k not in ("actions", "action_valid")}

    @cached_property
    def mixture(self) -> Mixture:
        """What the loader draws from."""
        return Mixture([replace(one, source=one.to_train_on) for one in self.sets])

    def loader(self, start_step: int, rank: int = 0, world_size: int = 1) -> Loader:
        """Endless encoded batches from `start_step` on: the part of them that is this rank's."""
        c, mixture = self.config, self.mixture
        sampler = Sampler(mixture.stream(c.seed), c.batch_size)
        workers = c.data.num_workers
        return Loader(
            mixture.samples, sampler, num_workers=workers, start_step=start_step, rank=rank, world_size=world_size
        )

    def report(self) -> list[Share]:
        """What the run sees of each set."""
        return Mixture(self.sets).report(self.config.steps * self.config.batch_size)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A dataset of the run, before there are statistics and with them a pipeline."""

    settings: DatasetConfig
    robot: Robot
    dataset: Dataset
    rows: np.ndarray
    held_out: np.ndarray

    @property
    def cameras(self) -> list[str]:
        """Those of the robot that the dataset has, by the dataset's names."""
        return [self.robot.dataset_key(key) for key in self.robot.cameras_in(self.dataset.features).values()]


def prepare(config: TrainConfig, folder: Path) -> TrainingData:
    """Open, check and encode the data of a run; statistics and tokenizers are kept in `folder` and reused.

    Raises:
        DataError: a dataset is absent, broken, or lacks what its robot names.
        ConfigError: a robot or the longest prompt does not fit the model, or the recipe has no dataset.
        TokenizerError: another project's weights to start from, and not the tokenizer that they were trained with.
    """
    opened = open_demonstrations(config)
    stats = {name: _stats(config, group, folder) for name, group in _by_robot(opened).items()}
    claim_videos(folder, {one.dataset.fingerprint: one.dataset.picture_files(one.cameras) for one in opened})
    mine = [one for one in opened if one.robot == config.robot]
    tokenizers = _tokenizers(config, mine[0], stats[config.robot.name], folder / "tokenizer")
    sets = tuple(_training_set(config, one, stats[one.robot.name], tokenizers, folder / "cache") for one in opened)
    longest = _longest(config, sets, stats, tokenizers, folder / "longest_prompt.json")
    longest.require_fit()
    return TrainingData(config, sets, stats, tokenizers, longest)


def at_hand(config: TrainConfig) -> bool:
    """Whether the recipe has datasets, and all of them lie on this disk."""
    paths = [one.path for one in config.data.datasets]
    return bool(paths) and all("://" not in path and Path(path).expanduser().is_dir() for path in paths)


def prepare_to_look(config: TrainConfig) -> TrainingData:
    """As `prepare`, without leaving anything on disk, and without a cache: of pictures, few are looked at."""
    with tempfile.TemporaryDirectory() as folder:
        return prepare(replace(config, data=replace(config.data, cache="none")), Path(folder))


def _longest(
    config: TrainConfig, sets: Sequence[TrainingSet], stats: Mapping[str, NormStats], tokenizers: Tokenizers, path: Path
) -> LongestPrompt:
    """The run's longest prompt: of millions of frames it is looked for once, whoever asks again."""
    read = [(one.source.dataset.fingerprint, one.source.prompt, one.source.pipeline.robot) for one in sets]
    rows = [rows_fingerprint(np.concatenate([one.rows, one.held_out])) for one in sets]
    action = tokenizers.action and tokenizers.action.sha256
    of = fingerprint([config.model, config.norm_mode, read, rows, stats, tokenizers.text.reference, action])
    if path.exists() and (kept := read_json(path)).get("of") == of:
        return from_json(kept["longest"], (LongestPrompt,), str(path))
    longest = longest_prompt(sets)
    write_json(path, {"of": of, "longest": longest})
    return longest


def open_demonstrations(config: TrainConfig) -> list[Opened]:
    """The datasets of a recipe, which have what their robots name, split and masked. Raises as `prepare` does."""
    if not config.data.datasets:
        raise _no_demonstrations("a recipe without a dataset of its own")
    opened = [_open(config, settings) for settings in config.data.datasets]
    if config.robot not in [one.robot for one in opened]:
        raise _no_demonstrations(f"only demonstrations of {', '.join(sorted({one.robot.name for one in opened}))}")
    return opened


def _open(config: TrainConfig, settings: DatasetConfig) -> Opened:
    robot = settings.robot or config.robot
    pipeline.check_fit(robot, config.model)
    episodes = _sound(settings, robot) if config.data.skip_bad_episodes else settings.episodes
    dataset = open_dataset(settings.path, episodes, fields=settings.fields, seed=config.seed)
    check_features(dataset, robot)
    for slot in robot.cameras.keys() - robot.cameras_in(dataset.features):
        tqdm.write(f"absent  {dataset.name}: the optional camera {slot!r} ({robot.dataset_key(robot.cameras[slot])})")
    if what := other_rate(dataset, robot):
        tqdm.write(f"rate    {dataset.name}: {what}; chunks would be executed at another speed: set control_hz")
    rows, held_out = split_episodes(dataset, holdout=config.data.holdout, seed=config.seed)
    if settings.keep:
        keep = read_mask(fetch(settings.keep), dataset)
        rows, held_out = rows[keep[rows]], held_out[keep[held_out]]
    return Opened(settings=settings, robot=robot, dataset=dataset, rows=rows, held_out=held_out)


def _sound(settings: DatasetConfig, robot: Robot) -> tuple[int, ...]:
    """The episodes that `manipi check` finds sound; says which are left out. None named: all."""
    root = fetch_tables(settings.path) if "://" in settings.path else Path(settings.path).expanduser()
    sound, bad = sort_episodes(root, robot=robot, fields=settings.fields)
    wanted = settings.episodes or (*sound, *bad)
    for number in sorted(set(wanted) & set(bad)):
        tqdm.write(f"left out  {root.name}, episode {number}: {bad[number]}")
    if not set(wanted) & set(sound):
        raise _no_demonstrations(f"no sound episode in {root}")
    return tuple(number for number in wanted if number not in bad) if bad else settings.episodes


def _by_robot(opened: Sequence[Opened]) -> dict[str, list[Opened]]:
    """The sets of each robot, which share their statistics."""
    groups: dict[str, list[Opened]] = {}
    for one in opened:
        groups.setdefault(one.robot.name, []).append(one)
    for name, group in groups.items():
        if len({one.robot.contract() for one in group}) > 1:
            raise ConfigError(
                expected=f"one layout of states and actions per robot, in all datasets of {name!r}",
                found="several",
                where="TrainConfig.data.mixture",
                next="give the robots names of their own; each then has its own statistics",
            )
    return groups


def _training_set(
    config: TrainConfig, one: Opened, stats: NormStats, tokenizers: Tokenizers, cache: Path
) -> TrainingSet:
    steps = pipeline.build(one.robot, config.model, stats, tokenizers, config.norm_mode)
    horizon, prompt = config.model.action_horizon, one.settings.prompt
    source = Source(dataset=one.dataset, pipeline=steps, action_horizon=horizon, prompt=prompt)
    cached = replace(source, dataset=_cached(config, one, cache))
    weight = one.settings.weight
    return TrainingSet(source=source, to_train_on=cached, rows=one.rows, held_out=one.held_out, weight=weight)


def _cached(config: TrainConfig, one: Opened, folder: Path) -> Dataset:
    """The same samples after encoding (`raw`: bit for bit): the cache resizes as the pipeline does."""
    if config.data.cache == "none":
        return one.dataset
    size = config.model.vision.image_size
    cached = CachedDataset(
        one.dataset, one.cameras, folder, size, format=config.data.cache, max_gb=config.data.cache_gb
    )
    if config.data.cache_fill == "ahead":
        cached.fill()
    return cached


def _no_demonstrations(found: str) -> ConfigError:
    return ConfigError(
        expected="demonstrations of the recipe's robot to train on",
        found=found,
        where="TrainConfig.data",
        next="--data.path FOLDER|URL, a dataset with what the recipe's robot names",
    )


def check_features(dataset: Dataset, robot: Robot) -> None:
    """The dataset has what the robot names, in the sizes that it names; optional cameras may be absent."""
    for key in robot.cameras_in(dataset.features).values():
        dataset.require(robot.dataset_key(key), "image")
    for key, size in [*((s.key, s.size) for s in robot.state), (robot.action_key, robot.action_size)]:
        dataset.require(robot.dataset_key(key), "vector", size)


def _stats(config: TrainConfig, group: Sequence[Opened], folder: Path) -> NormStats:
    """Statistics of one robot over all of its sets. The recipe's own robot has the run's norm_stats.json."""
    robot, (data, rows) = group[0].robot, provenance_of(group)
    own = robot.name == config.robot.name
    path = folder / ("norm_stats.json" if own else f"robots/{robot.name}/norm_stats.json")
    steps = checkpoint_steps(folder)
    if not path.exists() and steps:
        kept = folder / "checkpoints" / str(steps[-1]) / path.relative_to(folder)
        raise NormStatsError(
            expected="the statistics that this run was trained with",
            found=f"no such file, and a checkpoint of step {steps[-1]}",
            where=str(path),
            next=f"cp {kept} {path}",
        )
    if not path.exists():
        if config.data.norm_stats and own:
            # From now on the run is tied to its data, although the numbers are those of other demonstrations.
            stats = replace(_released_stats(config), data=data, rows=rows)
        else:
            stats = _compute_stats(group, config.model.action_horizon)
            for note in suspicious_dimensions(stats):
                tqdm.write(f"norm stats of {robot.name}: {note}")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_norm_stats(stats, path)
    stats = load_norm_stats(path)
    if (stats.data, stats.rows or rows) != (data, rows):
        raise NormStatsError(
            expected=f"statistics of these demonstrations ({data[:12]}, frames {rows[:12]})",
            found=f"statistics of others, or of an older state of them ({stats.data[:12]}, frames {stats.rows[:12]})",
            where=str(path),
            next="put the demonstrations back as they were (files, episodes, mask), or start a new run folder"
            if steps
            else f"delete {path} to compute them again, or start a new run folder",
        )
    return stats


def _compute_stats(group: Sequence[Opened], horizon: int) -> NormStats:
    return sketch_norm_stats([(one.dataset, one.robot, one.rows) for one in group], horizon, bins=False).stats()


def provenance_of(group: Sequence[Opened]) -> tuple[str, str]:
    """Fingerprints of the data and of the rows that a robot's statistics are of."""
    return provenance([(one.dataset.fingerprint, rows_fingerprint(one.rows)) for one in group])


def _released_stats(config: TrainConfig) -> NormStats:
    path = fetch(config.data.norm_stats) / "norm_stats.json"
    return read_openpi_stats(path, config.robot, config.model.action_horizon)


def _tokenizers(config: TrainConfig, one: Opened, stats: NormStats, folder: Path) -> Tokenizers:
    if folder.is_dir():
        return Tokenizers.load(folder)
    action = _action_tokenizer(config, one, stats) if isinstance(config.model, Pi0FastConfig) else None
    tokenizers = Tokenizers(open_text_tokenizer(config.tokenizer, action), action)
    if config.init:
        require_tokenizer(config.init, config.model.vocab_size, tokenizers.text)
    with atomic_directory(folder) as partial:
        tokenizers.save(partial)
    return tokenizers


def _action_tokenizer(config: TrainConfig, one: Opened, stats: NormStats) -> ActionTokenizer:
    if config.action_tokenizer != "fit":
        return open_action_tokenizer(config.action_tokenizer)
    # The codes live behind the text's ids in the model's vocabulary.
    room = config.model.vocab_size - ByteTokenizer.NUM_TEXT_IDS if config.tokenizer == "byte" else FIT_CODES
    return FastTokenizer.fit(chunks_to_fit(config, one.dataset, one.rows, stats), vocab_size=min(room, FIT_CODES))


def chunks_to_fit(config: TrainConfig, dataset: Dataset, rows: np.ndarray, stats: NormStats) -> np.ndarray:
    """At most `FIT_CHUNKS` action chunks [N, H, A] of `rows`, as the model sees them: relative and normalised."""
    robot = config.robot
    chosen = np.sort(rows[permutation(len(rows), f"fast/{config.seed}")[:FIT_CHUNKS]])
    action_key = robot.dataset_key(robot.action_key)
    chunks, _ = action_chunks(dataset, chosen, action_key=action_key, horizon=config.model.action_horizon)
    relative = ActionSpace(robot).to_model(chunks, read_state(dataset, robot)[chosen])
    return normalize(relative, stats.actions, config.norm_mode)
