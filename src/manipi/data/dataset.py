"""What every dataset reader offers: columns in RAM, pictures on demand, rows numbered through all episodes.

    row      0   1   2   3   4   5   6   7   8  …        one row per frame, over the whole dataset
    episode  0 ──────────┐   1 ──────────────┐
    frame    0   1   2   3   0   1   2   3   4           number within the episode

Shape letters: N rows of the dataset, n rows asked for, d dimensions; h, w picture height and width.
"""

import abc
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Literal, SupportsIndex, TypeAlias

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8

from manipi.errors import BadValueError, ConfigError, MissingFeatureError, quoted
from manipi.processes import SharedArray
from manipi.records import fingerprint
from manipi.robots.robot import EndEffector, Gripper, LinkageGripper, Robot
from manipi.types import Frame, Said

PromptSource: TypeAlias = Literal["task", "subtask"]
"""What the policy is told: the instruction of the episode, or of the step."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One quantity that a dataset records at every frame."""

    kind: Literal["image", "depth", "vector", "text"]
    shape: tuple[int, ...]
    """(h, w, 3) of a picture, also of a depth map of 8 bits; (h, w, 1) of a deeper one; (d,) of a vector."""
    dtype: str
    """As the dataset states it: "video", "image", "float32", "int64", "string" …"""
    names: tuple[str, ...] = ()
    """One name per dimension of a vector, where the dataset has them."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """A run of consecutive rows."""

    index: int
    """Its number in the dataset's own files."""
    start: int
    """Its first row."""
    length: int
    task: str
    """The instruction; the first one where an episode has several."""
    key: str = ""
    """What the dataset's makers call it in files of theirs, where they do."""


def in_a_row(episodes: Sequence[Episode]) -> list[Episode]:
    """The same episodes, each begun where the one before it ends."""
    starts = itertools.accumulate((episode.length for episode in episodes), initial=0)
    return [replace(episode, start=start) for episode, start in zip(episodes, starts, strict=False)]


class Dataset(abc.ABC):
    """Base of all readers. A reader opens its metadata, and says how to read a column and some pictures.

    Readers pickle by re-opening `root`, so that worker processes share neither file handles nor decoders; the columns
    that were read before a process is spawned it finds in shared memory.
    """

    def __init__(
        self, *, root: Path, fps: float, features: Mapping[str, Feature], episodes: Sequence[Episode], name: str
    ):
        self.root, self.fps, self.features, self.episodes, self.name = root, fps, features, episodes, name
        self._columns: dict[str, SharedArray | np.ndarray] = {}

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple:
        made_by, arguments = self.__reduce__()[:2]
        shared = {key: kept for key, kept in self._columns.items() if isinstance(kept, SharedArray)}
        return made_by, arguments, {"_columns": shared if get_spawning_popen() else {}}

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the metadata and tables: equal on every machine, different when the data differ."""
        return self._fingerprint()

    @abc.abstractmethod
    def _fingerprint(self) -> str: ...

    def picture_files(self, cameras: Sequence[str]) -> dict[str, str]:
        """What `fingerprint` leaves out: the states of the files that hold nothing but pictures of some cameras, by
        their paths in the dataset. Files that are not there, or whose store does not tell, are left out.

            SIZE ends DIGEST        on a disk: a digest of its head and tail
            SIZE ADDRESS VERSION    in the store of a dataset with that address
        """
        return {}

    @abc.abstractmethod
    def prompt(self, row: int) -> str:
        """The instruction at a row."""

    def subtask(self, row: int) -> str:
        """What the robot does at a row, finer than the instruction. Raises MissingFeatureError where none are kept."""
        raise MissingFeatureError(
            expected="subtasks: in language_persistent, or in meta/subtasks.parquet with a column subtask_index",
            found="none",
            where=str(self.root),
            next="--data.prompt task, or a plan without subtasks; or annotate it, as LeRobot's lerobot-annotate does",
        )

    def said(self, position: int) -> tuple[Sequence[Said], Mapping[int, Sequence[Said]]]:
        """Of an episode, by its position in `episodes`: the texts that hold for a while, and by frame those that belong
        to one."""
        return (), {}

    def texts(self, style: str) -> tuple[list[str], Int64[np.ndarray, "N"]]:
        """The texts of a style that holds for a while, and which of them holds at each row; -1: none does.

        Raises:
            MissingFeatureError: the dataset has none of that style.
        """
        if style == "subtask":
            texts, numbers = self.instructions("subtask")
            return texts, numbers[:, 0]
        raise MissingFeatureError(
            expected=f"texts of style {style!r} in language_persistent",
            found="none",
            where=str(self.root),
            next="annotate the dataset, as LeRobot's lerobot-annotate does",
        )

    def instructions(self, source: PromptSource) -> tuple[list[str], Int64[np.ndarray, "N k"]]:
        """Every text that a policy may be told, and which of them each row may have; readers know it without a loop."""
        prompt_at, numbers = self.prompt if source == "task" else self.subtask, dict[str, int]()
        rows = [numbers.setdefault(prompt_at(row), len(numbers)) for row in range(self.num_frames)]
        return list(numbers), np.array(rows, np.int64)[:, None]

    @abc.abstractmethod
    def _read_column(self, key: str) -> np.ndarray:
        """All values of a vector feature, [N, d], floats as float32 and the rest as int64."""

    @abc.abstractmethod
    def _read_images(self, camera: str, rows: np.ndarray) -> np.ndarray:
        """Pictures uint8 [n, h, w, 3] of rows that ascend."""

    @cached_property
    def num_frames(self) -> int:
        return sum(episode.length for episode in self.episodes)

    @cached_property
    def starts(self) -> Int64[np.ndarray, " episodes"]:
        """First row of each episode."""
        return np.array([episode.start for episode in self.episodes], dtype=np.int64)

    @cached_property
    def ends(self) -> Int64[np.ndarray, " episodes"]:
        """The row after the last of each episode."""
        return self.starts + [episode.length for episode in self.episodes]

    @property
    def cameras(self) -> list[str]:
        """What shows colours. Depth maps are pictures only where they are asked for by name, and have 8 bits."""
        return [key for key, feature in self.features.items() if feature.kind == "image"]

    def episode_of(self, rows: Int64[np.ndarray, "*n"]) -> Int64[np.ndarray, "*n"]:
        """Position in `episodes` of each row's episode."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def locate(self, row: int) -> str:
        """`episode 3, frame 17`, for messages."""
        episode = self.episodes[int(self.episode_of(np.asarray(row)))]
        return f"episode {episode.index}, frame {row - episode.start}"

    def place(self, row: int) -> str:
        """The file, where a reader knows it, and `locate(row)`."""
        return f"{self.root}, {self.locate(row)}"

    def column(self, key: str) -> np.ndarray:
        """All values of a vector feature, [N, d] float32 or int64; read once and read-only; processes share it.

        Raises:
            MissingFeatureError: the dataset has no vector of that name.
            BadValueError: NaN or infinity, named by episode and frame.
            DatasetFormatError: a table is missing or broken.
        """
        if key not in self._columns:
            self.require(key, "vector")
            values = self._read_column(key)
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                bad = np.argwhere(~np.isfinite(values))
                row, dimension = bad[0].tolist()
                raise BadValueError(
                    expected=f"finite numbers in {key!r}",
                    found=f"{values[row, dimension]} in dimension {dimension}, and {len(bad)} such values in all",
                    where=self.place(row),
                    next=f"manipi check {quoted(self.root)}  # lists every bad episode, to repair or leave out",
                )
            # What a file holds already, processes share through it.
            self._columns[key] = values if isinstance(values.base, np.memmap) else SharedArray(values)
        kept = self._columns[key]
        return kept.array if isinstance(kept, SharedArray) else kept

    def images(self, camera: str, rows: Int64[np.ndarray, " n"]) -> UInt8[np.ndarray, "n h w 3"]:
        """The pictures of some rows, in the order asked for; read in file order, where neighbours are cheap.

        Raises:
            MissingFeatureError: the dataset has no camera of that name, or a depth map that eight bits cannot show.
            DatasetFormatError: a file is missing, truncated, or of another size; names file, episode and frame.
        """
        self.require(camera, "image")
        rows = np.asarray(rows, dtype=np.int64)
        self._check_rows(rows)
        order = np.argsort(rows, kind="stable")
        images = self._read_images(camera, rows[order])
        return images if np.array_equal(order, np.arange(len(rows))) else images[np.argsort(order)]

    def require(self, key: str, kind: Literal["image", "vector", "text"], size: int | None = None) -> None:
        """Check that there is a feature of a kind and, for vectors, of a size; else MissingFeatureError."""
        known = {name: feature for name, feature in self.features.items() if feature.kind == kind}
        other = self.features.get(key)
        if key in known and size in (None, math.prod(known[key].shape)):
            return
        if other and other.kind == "depth" and kind == "image" and other.shape[-1] == 3:
            return
        next = f"manipi inspect {quoted(self.root)}  # lists the features; name one of them in the robot"
        if other and other.kind == "depth" and kind == "image":
            next = f"name a camera of colours in the robot: {', '.join(self.cameras) or 'there is none'}"
        raise MissingFeatureError(
            expected=f"{kind} {key!r}" + (f" of size {size}" if size else ""),
            found=f"{other.kind} {key!r} of shape {other.shape}" if other else f"only {', '.join(known) or 'none'}",
            where=str(self.root),
            next=next,
        )

    def _check_rows(self, rows: np.ndarray) -> None:
        if rows.size and not 0 <= rows.min() <= rows.max() < self.num_frames:
            raise ConfigError(
                expected=f"rows between 0 and {self.num_frames - 1}",
                found=f"rows {rows.min()} to {rows.max()}",
                where=str(self.root),
                next=f"manipi inspect {quoted(self.root)}  # shows the number of frames",
            )


def replaced(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The picture files that were known and are others now.

    Two states of a file that one copy in a store and another one elsewhere gave have the size in common, and are
    compared by that alone.
    """
    names = []
    for name, state in now.items():
        (size, source, *_), (size_before, source_before, *_) = state.split(" "), before.get(name, state).split(" ")
        if size != size_before or (source == source_before and state != before.get(name, state)):
            names.append(name)
    return names


def frames(
    dataset: Dataset,
    rows: Int64[np.ndarray, " n"],
    *,
    cameras: Sequence[str],
    state_keys: Sequence[str],
    action_key: str,
    horizon: int,
    past: Sequence[int] = (),
) -> list[Frame]:
    """The frames at some rows, each with the action chunk of `horizon` steps that begins there.

    Args:
        past: how many steps ago the older observations are that each frame brings along.
    """
    rows = np.asarray(rows, dtype=np.int64)
    earlier = rows[:, None] - np.array(past, np.int64)
    there = earlier >= dataset.starts[dataset.episode_of(rows)][:, None]
    shown, at = rows, np.arange(len(rows))
    if past:
        shown, at = np.unique(np.concatenate([rows, earlier[there]]), return_inverse=True)
    observed = {camera: dataset.images(camera, shown) for camera in cameras}
    observed |= {key: dataset.column(key)[shown] for key in state_keys}
    places = np.full(earlier.shape, -1)
    places[there] = at[len(rows) :]

    def observation(place: int) -> dict[str, np.ndarray]:
        return {key: values[place] for key, values in observed.items()}

    actions, valid = action_chunks(dataset, rows, action_key=action_key, horizon=horizon)
    episodes = [dataset.episodes[position] for position in dataset.episode_of(rows).tolist()]
    return [
        Frame(
            observation=observation(at[i]),
            past=tuple(None if place < 0 else observation(place) for place in places[i].tolist()),
            actions=actions[i],
            action_valid=valid[i],
            prompt=dataset.prompt(row),
            episode=episode.index,
            index=row - episode.start,
        )
        for i, (row, episode) in enumerate(zip(rows.tolist(), episodes, strict=True))
    ]


def action_chunks(
    dataset: Dataset, rows: Int64[np.ndarray, " n"], *, action_key: str, horizon: int
) -> tuple[Float32[np.ndarray, "n H A"], Bool[np.ndarray, "n H"]]:
    """The action chunks that begin at some rows, and which of their steps lie within the episode.

    Beyond the end of the episode the last action is repeated, and not valid.

        episode of 5, chunk of 4 at frame 3:   actions a₃ a₄ a₄ a₄   valid 1 1 0 0
    """
    ends = dataset.ends[dataset.episode_of(rows)][:, None]
    steps = rows[:, None] + np.arange(horizon)
    return dataset.column(action_key)[np.minimum(steps, ends - 1)], steps < ends


class EpisodeSubset(Dataset):
    """The chosen episodes, in the order given, with rows numbered anew; nothing is read of the others' pictures.

        dataset   episode 0 1 1 1 2 2        EpisodeSubset(dataset, [2, 0])   episode 2 2 0
                  row     0 1 2 3 4 5                                         row     0 1 2

    Raises:
        ConfigError: the dataset has no episode of that number, or one is named twice.
    """

    def __init__(self, dataset: Dataset, numbers: Sequence[int]):
        self._dataset, self._numbers = dataset, tuple(numbers)
        by_number = {episode.index: episode for episode in dataset.episodes}
        require_episodes(by_number, numbers, dataset.root)
        chosen = [by_number[number] for number in numbers]
        self._rows = np.concatenate([np.arange(e.start, e.start + e.length) for e in chosen])
        common = {"root": dataset.root, "name": dataset.name, "fps": dataset.fps, "features": dataset.features}
        super().__init__(**common, episodes=in_a_row(chosen))

    def __reduce__(self) -> tuple:
        return EpisodeSubset, (self._dataset, self._numbers)

    def prompt(self, row: int) -> str:
        return self._dataset.prompt(int(self._rows[row]))

    def subtask(self, row: int) -> str:
        return self._dataset.subtask(int(self._rows[row]))

    def instructions(self, source: PromptSource) -> tuple[list[str], np.ndarray]:
        texts, numbers = self._dataset.instructions(source)
        return texts, numbers[self._rows]

    def said(self, position: int) -> tuple[Sequence[Said], Mapping[int, Sequence[Said]]]:
        return self._dataset.said(int(self._dataset.episode_of(self._rows[self.starts[position]])))

    def texts(self, style: str) -> tuple[list[str], np.ndarray]:
        texts, numbers = self._dataset.texts(style)
        return texts, numbers[self._rows]

    def place(self, row: int) -> str:
        return self._dataset.place(int(self._rows[row]))

    def _fingerprint(self) -> str:
        return fingerprint([self._dataset.fingerprint, self._numbers])

    def picture_files(self, cameras: Sequence[str]) -> dict[str, str]:
        return self._dataset.picture_files(cameras)

    def _read_column(self, key: str) -> np.ndarray:
        return self._dataset.column(key)[self._rows]

    def _read_images(self, camera: str, rows: np.ndarray) -> np.ndarray:
        return self._dataset.images(camera, self._rows[rows])


def require_episodes(known: Collection[int], numbers: Sequence[int], root: Path) -> None:
    """Raises ConfigError where a dataset has no episode of a number, or one is named twice."""
    unknown = [number for number in numbers if number not in known]
    if unknown or len(set(numbers)) < len(numbers):
        raise ConfigError(
            expected=f"each episode once, from {min(known)} to {max(known)}",
            found=f"unknown {unknown}" if unknown else f"{list(numbers)}",
            where=f"--data.episodes of {root}",
            next=f"manipi inspect {quoted(root)}  # lists the episodes",
        )


# Names of dimensions --------------------------------------------------------------------------------------------------
#
# What the dimensions of states and commands are called, wherever people read of them. The dataset's own names count,
# where it has one for each dimension; else the robot's, which are all that a server and a checkpoint know. Units are
# the robot's. Two columns that show the same number show it under the same name.


def feature_names(dataset: Dataset, key: str, otherwise: Sequence[str] = ()) -> tuple[str, ...]:
    """Of a vector, one per dimension; without names in the dataset `otherwise`, or else its numbers."""
    feature = dataset.features[key]
    size = math.prod(feature.shape)
    complete = (names for names in (feature.names, otherwise) if len(names) == size)
    return tuple(next(complete, map(str, range(size))))


def command_names(robot: Robot, dataset: Dataset | None = None) -> tuple[str, ...]:
    """Of the robot's commands."""
    own = tuple(dimension.name for dimension in robot.action_space)
    return own if dataset is None else feature_names(dataset, robot.dataset_key(robot.action_key), own)


def command_units(robot: Robot) -> tuple[str, ...]:
    """The unit of each dimension of a command; empty where there is none."""
    return tuple(dimension.unit for dimension in robot.action_space)


def state_labels(robot: Robot, dataset: Dataset | None = None) -> list[str]:
    """Of the states, with their units."""
    labels: list[str] = []
    for state in robot.state:
        own = state.names or tuple(f"{state.key}[{d}]" for d in range(state.size))
        names = own if dataset is None else feature_names(dataset, robot.dataset_key(state.key), own)
        labels += [label(name, state.unit) for name in names]
    return labels


def action_labels(robot: Robot, dataset: Dataset | None = None) -> list[str]:
    """Of the commands as the model sees them, with their units: relative ones, 6D rotations, grippers from 0 to 1."""
    names, units, labels = command_names(robot, dataset), list(command_units(robot)), list[str]()
    start = 0
    for group in robot.actions:
        span = slice(start, start := start + group.size)
        mine, of_mine = names[span], units[span]
        if isinstance(group, EndEffector) and group.rotation != "none":
            rotation = robot.action_space[span.start + 3].name.removesuffix(" 1")
            mine, of_mine = (*mine[:3], *(f"{rotation} 6D {i + 1}" for i in range(6))), [*of_mine[:3], *[""] * 6]
        if isinstance(group, Gripper | LinkageGripper):
            of_mine = [""]
        relative = "relative " if group.relative else ""
        labels += [label(f"{relative}{name}", unit) for name, unit in zip(mine, of_mine, strict=True)]
    return labels


def label(name: str, unit: str) -> str:
    """`left_waist [rad]`."""
    return f"{name} [{unit}]" if unit else name
