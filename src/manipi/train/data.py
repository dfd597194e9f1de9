"""From a training config to encoded batches: dataset, split, statistics, tokenizers and the one pipeline.

The longest prompt of a run's data is found from the tables before the first step: no picture is read. A prompt's length
is that of its instruction, plus that of each number of the state, plus (π0-FAST) that of the actions:

    tokens of a row  =  length of its text with a state of zeros  +  Σ over dimensions, how much longer than "0" its bin

For tokenizers that split at spaces, which PaliGemma's and ours do, the sum is exact. It is compared with prompts that
are written out, the longest by the sum and others; where one differs, the prompt of every row is written out instead.

Shape letters: N rows, S state dimensions, H action horizon, A action dimensions.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int64
from tqdm import tqdm

from manipi.checkpoints.initial import require_tokenizer
from manipi.data.dataset import Dataset, action_chunks, replaced
from manipi.data.feed.cache import CachedDataset
from manipi.data.feed.loader import Loader
from manipi.data.feed.mixture import EncodedDataset, Mixture, Part, Share
from manipi.data.feed.sampler import Sampler, permutation, split_episodes
from manipi.data.norm_stats import (
    provenance,
    read_state,
    rows_fingerprint,
    sketch_norm_stats,
    suspicious_dimensions,
)
from manipi.data.questions import Questions, questions_of, read_questions
from manipi.data.review.filters import read_mask
from manipi.errors import ConfigError, ManipiError, MissingFeatureError, NormStatsError, TrainingError, shown
from manipi.model.config import ModelConfig
from manipi.records import fingerprint, from_json, json_bytes, read_object
from manipi.remote.fetch import fetch
from manipi.robots.robot import Robot
from manipi.storage import atomic_directory, atomic_write
from manipi.tokenizers import (
    ActionTokenizer,
    ByteTokenizer,
    DctTokenizer,
    FastTokenizer,
    Tokenizers,
)
from manipi.tokenizers.actions import NUM_BINS, bin_indices
from manipi.train.config import DatasetConfig, TrainConfig
from manipi.train.run.folder import checkpoint_steps
from manipi.transforms import pipeline
from manipi.transforms.actions import ActionSpace
from manipi.transforms.model_input import TokenizeActions, TokenizePrompt, TokenizeStep
from manipi.transforms.normalize import Normalize, load_norm_stats, normalize, read_openpi_stats, save_norm_stats
from manipi.transforms.pipeline import Pipeline, observation_of
from manipi.types import NormStats, Sample
from manipi.weights.layouts import open_action_tokenizer, open_text_tokenizer
from manipi_client.keys import PAST

# The longest prompt ---------------------------------------------------------------------------------------------------


BLOCK = 1 << 14
"""Rows worked on at a time."""
PROBES = 64
"""Of each block, so many rows that seem the longest are written out, and as many others."""


@dataclass(frozen=True, kw_only=True)
class LongestPrompt:
    """The prompt of some data that takes most of the model's prompt tokens."""

    tokens: int
    of_actions: int
    """How many of them spell actions: π0-FAST alone has any."""
    limit: int
    """The model's `max_token_len`."""
    truncated: bool
    """Whether the model cuts what is too long (`Compat.truncated_prompts`)."""
    dataset: str
    place: str
    """Episode and frame."""
    instruction: str

    def __str__(self) -> str:
        actions = f", {self.of_actions} of them actions" if self.of_actions else ""
        cut = "; the rest is cut off" if self.tokens > self.limit else ""
        where = f"{self.dataset}, {self.place}, {shown(self.instruction)}"
        return f"longest prompt  {self.tokens} of {self.limit} tokens (max_token_len){actions}{cut}: {where}"

    def require_fit(self) -> None:
        """Raises ConfigError where the model has too few prompt tokens and does not cut."""
        if self.tokens > self.limit and not self.truncated:
            actions = f", {self.of_actions} of them actions" if self.of_actions else ""
            raise ConfigError(
                expected=f"prompts of at most {self.limit} tokens (max_token_len)",
                found=f"{self.tokens} tokens{actions}, with the instruction {shown(self.instruction)}",
                where=f"{self.dataset}, {self.place}, the longest of the data",
                next=f"--model.max-token-len {self.tokens}, in the recipe or as a flag; or shorten the instruction",
            )


def longest_prompt(parts: Sequence[Part]) -> LongestPrompt:
    """Of all rows of all parts, those held out too, and of all that a language plan may choose for them."""
    one_by_one = [replace(part, source=replace(part.source, plan=(say,))) for part in parts for say in part.source.plan]
    return max(map(_longest_of, one_by_one), key=lambda one: one.tokens - one.limit)


def _longest_of(part: Part) -> LongestPrompt:
    source, rows = part.source, np.sort(np.concatenate([part.rows, part.held_out]))
    dataset, step = source.dataset, _step(source.pipeline, TokenizePrompt, TokenizeActions)
    texts, numbers = source.instructions()
    states, behind = _States(step, source.pipeline.robot.state_size), getattr(step, "codes", None)
    of_text = np.array([states.with_zeros(text) for text in texts])
    learned, which = source.learned() if isinstance(step, TokenizePrompt) and step.writes_text else ([""], None)
    style = "answer" if isinstance(dataset, Questions) else "subtask"
    of_learned = np.array([states.with_zeros("", {style: text}) - states.with_zeros("") for text in learned])
    which = np.zeros((dataset.num_frames, 1), np.int64) if which is None else which
    tokens, of_actions, row, text = 0, 0, 0, ""
    for block, state_NS, actions_N in _blocks(part, step, rows):
        if behind is not None:  # they have room of their own
            behind.require_fit(int(actions_N.max()), dataset.name, dataset.locate(int(block[actions_N.argmax()])))
            actions_N = np.zeros_like(actions_N)
        candidates_Nk = of_text[numbers[block]]
        choice_N = candidates_Nk.argmax(axis=1)
        prompt_N = candidates_Nk.max(axis=1) + states.beyond_zeros(state_NS) + of_learned[which[block, 0]]

        def written(i: int) -> int:
            behind_it = {style: learned[which[block[i], 0]]}  # noqa: B023
            return step.prompt_length(texts[numbers[block[i], choice_N[i]]], state_NS[i], behind_it)  # noqa: B023

        order = np.argsort(-(prompt_N + actions_N), kind="stable")
        probes = {*order[:PROBES].tolist(), *order[:: max(1, len(order) // PROBES)].tolist()}
        if any(written(i) != prompt_N[i] for i in probes):
            prompt_N = np.array([written(i) for i in range(len(block))])
        at = int((prompt_N + actions_N).argmax())
        if prompt_N[at] + actions_N[at] > tokens:
            tokens, of_actions = int(prompt_N[at] + actions_N[at]), int(actions_N[at])
            row, text = int(block[at]), texts[numbers[block[at], choice_N[at]]]
    return LongestPrompt(
        tokens=tokens,
        of_actions=of_actions,
        limit=step.max_len,
        truncated=step.compat.truncated_prompts,
        dataset=dataset.name,
        place=dataset.locate(row),
        instruction=text,
    )


def _blocks(
    part: Part, step: TokenizeStep, rows: Int64[np.ndarray, "N"]
) -> Iterator[tuple[np.ndarray, Float32[np.ndarray, "N S"], Int64[np.ndarray, "N"]]]:
    """Rows, their normalised states, and the tokens of their actions, as the pipeline makes them of frames."""
    source, robot = part.source, part.source.pipeline.robot
    if isinstance(source.dataset, Questions):
        yield rows, np.zeros((len(rows), robot.state_size), np.float32), np.zeros(len(rows), np.int64)
        return
    normalize = _step(source.pipeline, Normalize)
    space, state_NS = ActionSpace(robot), read_state(source.dataset, robot)
    key, horizon = robot.dataset_key(robot.action_key), source.action_horizon
    blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
    for block in tqdm(blocks, desc="prompts", unit="block", leave=False, delay=2, disable=None):
        sample = {"state": state_NS[block].astype(np.float32)}
        if writes := isinstance(step, TokenizeActions) or step.codes is not None:
            sample["actions"] = action_chunks(source.dataset, block, action_key=key, horizon=horizon)[0]
        sample = normalize.encode(space.encode(sample))
        yield block, sample["state"], step.action_lengths(sample["actions"]) if writes else np.zeros(len(block), int)


class _States:
    """How many tokens the numbers of a state take, by their bins."""

    def __init__(self, step: TokenizeStep, size: int):
        self._step, self._size = step, size if step.with_state else 0
        # A number's tokens depend on what stands beside it at the ends of the list alone.
        places = {0, min(1, self._size - 1), self._size - 1} if self._size else set()
        self._tables = {place: self._table(place) for place in places}

    def with_zeros(self, text: str, learned: Mapping[str, str] | None = None) -> int:
        return self._step.prompt_length(text, _centres(np.zeros(self._size)), learned or {})

    def beyond_zeros(self, state_NS: Float32[np.ndarray, "N S"]) -> Int64[np.ndarray, "N"]:
        """How many tokens more than one of zeros each state takes."""
        more_N = np.zeros(len(state_NS), np.int64)
        for d in range(self._size):
            table = self._tables[d if d in self._tables else 1]
            more_N += table[1 + bin_indices(state_NS[:, d], minus_one_below=True)]
        return more_N

    def _table(self, place: int) -> Int64[np.ndarray, "257"]:
        """For the bins from -1 on."""
        bins = np.zeros((NUM_BINS + 1, self._size))
        bins[:, place] = np.arange(-1, NUM_BINS)
        return np.array([self._step.prompt_length("", _centres(state), {}) for state in bins]) - self.with_zeros("")


def _centres(bins: np.ndarray) -> np.ndarray:
    return (bins + 0.5) / (NUM_BINS / 2) - 1


def _step(pipeline: Pipeline, *kinds: type) -> Any:
    return next(step for step in pipeline.steps if isinstance(step, kinds))


# The data of a run ----------------------------------------------------------------------------------------------------


FIT_CHUNKS, FIT_CODES = 4_096, 1_024
"""Action chunks that an action tokenizer is fitted to, and the most codes that FAST learns."""


@dataclass(frozen=True, kw_only=True)
class TrainingSet(Part):
    """One dataset of the run. Its `source` reads it as it is on disk, pictures in full size."""

    to_train_on: EncodedDataset
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
    def robot_sets(self) -> list[TrainingSet]:
        """Those of robots, without questions about pictures."""
        return [one for one in self.sets if not isinstance(one.source.dataset, Questions)]

    @property
    def main(self) -> TrainingSet:
        """The first set of the recipe's own robot."""
        return next(one for one in self.sets if one.source.pipeline.robot == self.config.robot)

    @property
    def other_robots(self) -> dict[str, tuple[Robot, NormStats]]:
        """Those of the mixture beside the recipe's, with their statistics."""
        robots = {robot.name: robot for robot in (one.source.pipeline.robot for one in self.robot_sets)}
        return {name: (robot, self.stats[name]) for name, robot in robots.items() if name != self.config.robot.name}

    def example(self) -> Sample:
        """The main set's first held-out observation (or training one, where none is held out), in the robot's keys."""
        rows = self.main.held_out if len(self.main.held_out) else self.main.rows
        observation = observation_of(self.main.source.frames(rows[:1])[0], self.config.robot)
        return {k: v for k, v in observation.items() if k not in ("actions", "action_valid", "subtask", PAST)}

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
    _require_text(config, opened)
    of_robots = [one for one in opened if not isinstance(one.dataset, Questions)]
    stats = {name: _stats(config, group, folder) for name, group in _by_robot(of_robots).items()}
    claim_videos(folder, {one.dataset.fingerprint: one.dataset.picture_files(one.cameras) for one in opened})
    tokenizers = _tokenizers(config, of_robots, stats, folder / "tokenizer")
    sets = tuple(_training_set(config, one, stats, tokenizers, folder / "cache") for one in opened)
    longest = _longest(config, sets, stats, tokenizers, folder / "longest_prompt.json")
    longest.require_fit()
    return TrainingData(config, sets, stats, tokenizers, longest)


def at_hand(config: TrainConfig) -> bool:
    """Whether the recipe has datasets, and all of them lie on this disk."""
    paths = [one.path for one in config.data.datasets]
    return bool(paths) and all("://" not in path and Path(path).expanduser().exists() for path in paths)


def prepare_to_look(config: TrainConfig) -> TrainingData:
    """As `prepare`, without leaving anything on disk, and without a cache: of pictures, few are looked at."""
    with tempfile.TemporaryDirectory() as folder:
        return prepare(replace(config, data=replace(config.data, cache="none")), Path(folder))


def claim_videos(folder: Path, now: Mapping[str, Mapping[str, str]]) -> None:
    """Tie a run to the files that hold its pictures: `Dataset.picture_files` by the dataset's fingerprint.

    Raises:
        TrainingError: the run has a checkpoint, and files are others than those that it was trained on.
    """
    path, trained = folder / "videos.json", bool(checkpoint_steps(folder))
    before = read_object(path) if path.exists() else {}
    others = [name for data, files in now.items() for name in replaced(before.get(data, {}), files)]
    if others and trained:
        raise TrainingError(
            expected="the videos that this run was trained on",
            found=f"{len(others)} others of the same names: {', '.join(others[:4])}" + (" …" if others[4:] else ""),
            where=str(path),
            next="put the videos back as they were, or train on these in a run folder of their own (--run-dir)",
        )
    if trained and any(now.values()) and not before:
        tqdm.write(f"{folder} did not say yet which videos it is trained on; from now on, those that are there")
    known = {data: {**before.get(data, {}), **files} for data, files in now.items()}
    if known != before:
        atomic_write(path, json_bytes(known))


def _require_text(config: TrainConfig, opened: Sequence["Opened"]) -> None:
    """Raises ConfigError where text is to be learned by a model that writes none."""
    for one in opened:
        learns = isinstance(one.dataset, Questions) or any(say.learn_subtask for say in one.settings.plan)
        if learns and not config.model.writes_text:
            raise ConfigError(
                expected="a model that writes text, to learn subtasks or answers",
                found=f"a {type(config.model).__name__} without"
                + (" one" if config.model.writes_codes else " JointConfig"),
                where=f"TrainConfig.model, and the language of {one.dataset.name}",
                next="model=Pi05Config(joint=JointConfig(…)), or leave questions and learn_subtask out",
            )


def _longest(
    config: TrainConfig, sets: Sequence[TrainingSet], stats: Mapping[str, NormStats], tokenizers: Tokenizers, path: Path
) -> LongestPrompt:
    """The run's longest prompt: of millions of frames it is looked for once, whoever asks again."""
    read = [(one.source.dataset.fingerprint, one.source.plan, one.source.pipeline.robot) for one in sets]
    rows = [rows_fingerprint(np.concatenate([one.rows, one.held_out])) for one in sets]
    action = tokenizers.action and tokenizers.action.sha256
    of = fingerprint([config.model, config.norm_mode, read, rows, stats, tokenizers.text.reference, action])
    try:
        kept = read_object(path)
        if kept.get("of") == of:
            return from_json(kept.get("longest"), (LongestPrompt,), str(path))
    except ManipiError:
        pass  # none yet, half of one that 0.1.0 was killed at, or another version's: it is found again
    longest = longest_prompt(sets)
    atomic_write(path, json_bytes({"of": of, "longest": longest}))
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
    from manipi.data.open import open_dataset  # PyArrow and PyAV take as long to import as all the rest
    from manipi.data.review.check import other_rate

    robot = settings.robot or config.robot
    pipeline.check_fit(robot, config.model)
    if settings.kind == "vqa" and settings.path.endswith(".jsonl"):
        return _questions(config, settings, read_questions(fetch(settings.path), config.model.cameras))
    episodes = _sound(settings, robot) if config.data.skip_bad_episodes else settings.episodes
    dataset = open_dataset(settings.path, episodes, fields=settings.fields, seed=config.seed)
    if settings.kind == "vqa":
        slots = {robot.dataset_key(key): slot for slot, key in robot.cameras_in(dataset.features).items()}
        return _questions(config, settings, questions_of(dataset, slots))
    check_features(dataset, robot)
    for slot in robot.cameras.keys() - robot.cameras_in(dataset.features):
        tqdm.write(f"absent  {dataset.name}: the optional camera {slot!r} ({robot.dataset_key(robot.cameras[slot])})")
    if what := other_rate(dataset, robot):
        tqdm.write(f"rate    {dataset.name}: {what}; chunks would be executed at another speed: set control_hz")
    rows, held_out = split_episodes(dataset, holdout=config.data.holdout, seed=config.seed)
    if settings.keep:
        keep = read_mask(fetch(settings.keep), dataset)
        rows, held_out = rows[keep[rows]], held_out[keep[held_out]]
    _require_subtasks(settings, dataset, np.concatenate([rows, held_out]))
    return Opened(settings=settings, robot=robot, dataset=dataset, rows=rows, held_out=held_out)


def _questions(config: TrainConfig, settings: DatasetConfig, questions: Questions) -> Opened:
    rows, held_out = split_episodes(questions, holdout=config.data.holdout, seed=config.seed)
    robot = pipeline.robot_of_questions(config.robot, config.model)
    return Opened(settings=settings, robot=robot, dataset=questions, rows=rows, held_out=held_out)


def _require_subtasks(settings: DatasetConfig, dataset: Dataset, rows: np.ndarray) -> None:
    """Where subtasks are told or learned, the dataset has some; where they are told, every frame has one."""
    if not any(say.instruct == "subtask" or say.learn_subtask for say in settings.plan):
        return
    lacking = rows[dataset.texts("subtask")[1][rows] < 0]
    if lacking.size and any(say.instruct == "subtask" for say in settings.plan):
        raise MissingFeatureError(
            expected="a subtask at every frame, since the policy is told it",
            found=f"{lacking.size:,} of {rows.size:,} frames without, the first: {dataset.locate(int(lacking.min()))}",
            where=str(dataset.root),
            next="tell it the task, Say(learn_subtask=True); or leave those frames out (keep), or annotate them",
        )


def _sound(settings: DatasetConfig, robot: Robot) -> tuple[int, ...]:
    """The episodes that `manipi check` finds sound; says which are left out. None named: all."""
    from manipi.data.open import fetch_tables
    from manipi.data.review.check import sort_episodes

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
    config: TrainConfig, one: Opened, stats: Mapping[str, NormStats], tokenizers: Tokenizers, cache: Path
) -> TrainingSet:
    """With a cache, which resizes as the pipeline does: the samples are the same (`raw`: bit for bit). Pictures of
    questions are not kept in it."""
    asks = isinstance(one.dataset, Questions)
    steps = (
        pipeline.build_questions(config.robot, config.model, tokenizers)
        if asks
        else pipeline.build(one.robot, config.model, stats[one.robot.name], tokenizers, config.norm_mode)
    )
    horizon, plan, how = config.model.action_horizon, one.settings.plan, config.data
    source = to_train_on = EncodedDataset(dataset=one.dataset, pipeline=steps, action_horizon=horizon, plan=plan)
    if how.cache != "none" and not asks:
        size = config.model.vision.image_size
        cached = CachedDataset(one.dataset, one.cameras, cache, size, format=how.cache, max_gb=how.cache_gb)
        if how.cache_fill == "ahead":
            cached.fill()
        to_train_on = replace(source, dataset=cached)
    weight = one.settings.weight
    return TrainingSet(source=source, to_train_on=to_train_on, rows=one.rows, held_out=one.held_out, weight=weight)


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
            released = fetch(config.data.norm_stats) / "norm_stats.json"
            stats = read_openpi_stats(released, config.robot, config.model.action_horizon)
            stats = replace(stats, data=data, rows=rows)
        else:
            sets = [(one.dataset, one.robot, one.rows) for one in group]
            stats = sketch_norm_stats(sets, config.model.action_horizon, bins=False).stats()
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


def provenance_of(group: Sequence[Opened]) -> tuple[str, str]:
    """Fingerprints of the data and of the rows that a robot's statistics are of."""
    return provenance([(one.dataset.fingerprint, rows_fingerprint(one.rows)) for one in group])


def _tokenizers(
    config: TrainConfig, opened: Sequence[Opened], stats: Mapping[str, NormStats], folder: Path
) -> Tokenizers:
    if folder.is_dir():
        return Tokenizers.load(folder)
    action: ActionTokenizer | None = None
    if config.model.writes_codes and config.action_tokenizer not in ("fit", "dct"):
        action = open_action_tokenizer(config.action_tokenizer)
    elif config.model.writes_codes:
        chunks = chunks_to_fit(config, opened, stats)
        if config.action_tokenizer == "dct":
            action = fit_dct(config.model, *chunks)
            saturated = max(float(action.saturated(one).max()) for one in chunks)
            error = max(action.rms_error(one) for one in chunks)
            tqdm.write(f"codes   {action}; RMS error {error:.3f} of a range of 2, {saturated:.2%} saturated at most")
        else:
            # The codes live behind the text's ids in the model's vocabulary.
            room = config.model.vocab_size - ByteTokenizer.NUM_TEXT_IDS if config.tokenizer == "byte" else FIT_CODES
            action = FastTokenizer.fit(*chunks, vocab_size=min(room, FIT_CODES))
    tokenizers = Tokenizers(open_text_tokenizer(config.tokenizer, action), action)
    if config.init:
        require_tokenizer(config.init, config.model.vocab_size, tokenizers.text)
    with atomic_directory(folder) as partial:
        tokenizers.save(partial)
    return tokenizers


def fit_dct(model: ModelConfig, *chunks: Float[np.ndarray, "_N H _A"]) -> DctTokenizer:
    """Fixed codes, as many per place as the model has. Raises as `DctTokenizer.fit` does."""
    return DctTokenizer.fit(*chunks, **({"codes_per_place": fixed.per_place} if (fixed := model.fixed_codes) else {}))


def chunks_to_fit(
    config: TrainConfig, opened: Sequence[Opened], stats: Mapping[str, NormStats]
) -> list[Float[np.ndarray, "_N H _A"]]:
    """At most `FIT_CHUNKS` action chunks in all, as the model sees them: relative and normalised. One array per
    dataset, with its share of the run's samples."""
    total, found = sum(one.settings.weight for one in opened), []
    for one in opened:
        robot, dataset, rows = one.robot, one.dataset, one.rows
        count = max(1, round(FIT_CHUNKS * (one.settings.weight / total)))
        chosen = np.sort(rows[permutation(len(rows), f"fast/{config.seed}")[:count]])
        action_key = robot.dataset_key(robot.action_key)
        chunks, _ = action_chunks(dataset, chosen, action_key=action_key, horizon=config.model.action_horizon)
        relative = ActionSpace(robot).to_model(chunks, read_state(dataset, robot)[chosen])
        found.append(normalize(relative, stats[robot.name].actions, config.norm_mode))
    return found
