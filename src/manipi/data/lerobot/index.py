"""The metadata of a LeRobot dataset, versions 2.0, 2.1 and 3.0, as one `LeRobotIndex`.

meta/info.json      version, fps, features, path templates
v2   meta/episodes.jsonl, meta/tasks.jsonl      one table and one video file per episode
v3   meta/episodes/**, meta/tasks.parquet       many episodes per table and per video file
"""

import itertools
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from manipi.data.dataset import Episode, Feature, require_episodes
from manipi.data.lerobot.entries import Entry, EpisodeTable, flat_names, read_entries, read_entry, read_texts
from manipi.data.lerobot.tables import Fault, broken, column_names, format_error, read_columns, see_check
from manipi.data.lerobot.video import is_deep
from manipi.errors import DatasetFormatError, DatasetNotFoundError, shown

_NUMBERS = ("float", "double", "half", "bfloat", "int", "uint", "long", "short", "bool")
"""How the dtypes of numbers begin in info.json."""


@dataclass(frozen=True)
class Clip:
    """Where the pictures of one episode and camera lie."""

    path: Path
    start: float
    """Seconds into the file."""
    end: float = math.inf
    """Where those of another episode may begin."""


@dataclass(frozen=True, kw_only=True)
class LeRobotIndex:
    """What all versions say, each in its own files."""

    fps: float
    features: dict[str, Feature]
    episodes: list[Episode]
    tasks: dict[int, str]
    subtasks: dict[int, str]
    """Empty where the dataset has none."""
    tables: list[Path]
    """Per episode, the data table that its rows are in."""
    clips: dict[str, list[Clip]]
    """Per feature that is stored as video, one clip per episode; not those of which no episode has a place."""
    metadata: list[Path]
    promised: tuple[int, int]
    """Episodes and frames that meta/info.json counts."""
    unreadable: list[DatasetFormatError]
    """What is wrong with entries of episodes that cannot be read, and are left out of all the above."""

    def by_table(self) -> dict[Path, list[Episode]]:
        """The episodes that each data table holds, in row order."""
        tables: dict[Path, list[Episode]] = {}
        for path, episode in zip(self.tables, self.episodes, strict=True):
            tables.setdefault(path, []).append(episode)
        return tables

    def only(self, numbers: Sequence[int], root: Path) -> "LeRobotIndex":
        """The index of some episodes, in ascending order; ConfigError where there is no episode of a number."""
        require_episodes([e.index for e in self.episodes], numbers, root)
        kept = [i for i, episode in enumerate(self.episodes) if episode.index in set(numbers)]
        starts = itertools.accumulate((self.episodes[i].length for i in kept), initial=0)
        return replace(
            self,
            episodes=[replace(self.episodes[i], start=start) for i, start in zip(kept, starts)],
            tables=[self.tables[i] for i in kept],
            clips={key: [clips[i] for i in kept] for key, clips in self.clips.items()},
        )


def open_index(root: Path, numbers: Sequence[int]) -> LeRobotIndex:
    """The metadata of a dataset, or of the episodes of it with these numbers, where those are sound.

    Raises:
        DatasetNotFoundError: no episodes or frames.
        DatasetFormatError: an unknown version; metadata that are missing, broken or disagree.
        ConfigError: no episode of that number.
    """
    index = read_index(root)
    for fault in metadata_faults(index, root):
        if not numbers or set(numbers) & set(fault.episodes):
            raise fault.error
    return index.only(numbers, root) if numbers else index


def metadata_faults(index: LeRobotIndex, root: Path) -> Iterator[Fault]:
    """What the metadata say that cannot be."""
    meta, next, listed = root / "meta", see_check(root), Counter(episode.index for episode in index.episodes)
    # Of metadata that count too many, some are enough.
    lost = tuple(sorted(set(range(min(index.promised[0], 2 * len(listed) + 1000))) - listed.keys()))
    yield from (Fault(error, lost) for error in index.unreadable)
    for number, count in listed.items():
        if count > 1:
            error = format_error(root, f"episode {number} once", f"{count} entries of it", meta, next)
            yield Fault(error, (number,), advice=f"take out all of its entries in {meta} but one")
    for e in index.episodes:
        if e.length < 1:
            where = f"{meta}, episode {e.index}"
            advice = f"take its entry out of {meta}, or correct the length that it states"
            error = format_error(root, "at least one frame", f"{e.length} frames", where, next)
            yield Fault(error, (e.index,), advice=advice)
    for what, counted, promised in zip(
        ("episodes", "frames"), (len(index.episodes), sum(e.length for e in index.episodes)), index.promised
    ):
        if counted != promised and not index.unreadable:
            expected = f"{promised} {what} in all, as meta/info.json says"
            advice = f"correct total_{what} in {meta / 'info.json'}, or put back the entries that are lost"
            error = format_error(root, expected, str(counted), meta, next)
            yield Fault(error, lost if what == "episodes" else (), advice=advice)


def read_index(root: Path) -> LeRobotIndex:
    """Read the metadata of any known version, sound or not; `metadata_faults` tells. Raises as `open_index` does."""
    info = read_entry(root / "meta/info.json", root)
    readers = {"v2.0": _read_v2, "v2.1": _read_v2, "v3.0": _read_v3}
    version = info.values.get("codebase_version")
    if not isinstance(version, str) or version not in readers:
        raise DatasetFormatError(
            expected=f"codebase_version among {', '.join(readers)}",
            found=shown(version),
            where=info.where,
            next=f"python -m lerobot.datasets.v30.convert_dataset_v21_to_v30 --root={root}  # or another converter",
        )
    if info.count("total_episodes") == 0:
        raise _empty(root)
    index = readers[version](info, root)
    if not any(episode.length for episode in index.episodes):
        raise index.unreadable[0] if index.unreadable else _empty(root)
    return index


def _read_v2(info: Entry, root: Path) -> LeRobotIndex:
    meta, unreadable = root / "meta", list[DatasetFormatError]()

    def episode(entry: Entry) -> tuple[int, int, list[str]]:
        return entry.whole("episode_index"), entry.whole("length"), entry.instructions("tasks")

    def task(entry: Entry) -> tuple[int, str]:
        return entry.whole("task_index"), entry.instruction("task")

    rows = sorted(read_entries(meta / "episodes.jsonl", root, episode, unreadable), key=lambda row: row[0])
    numbers, lengths = [number for number, _, _ in rows], [length for _, length, _ in rows]
    chunks = [number // info.whole("chunks_size", 1) for number in numbers]

    def paths(template: str, **names: str) -> list[Path]:
        path = info.paths(template, episode_chunk=0, episode_index=0, **names)
        return [path(episode_chunk=c, episode_index=n, **names) for c, n in zip(chunks, numbers, strict=True)]

    return LeRobotIndex(
        fps=info.rate("fps"),
        features=_features(info),
        episodes=_episodes(numbers, lengths, [texts for _, _, texts in rows]),
        tasks=dict(read_entries(meta / "tasks.jsonl", root, task)),
        subtasks=_subtasks(root),
        tables=paths("data_path"),
        clips={key: [Clip(path, 0.0) for path in paths("video_path", video_key=key)] for key in _video_keys(info)},
        metadata=[meta / "info.json", meta / "episodes.jsonl", meta / "tasks.jsonl"],
        promised=_promised(info, lengths),
        unreadable=unreadable,
    )


def _read_v3(info: Entry, root: Path) -> LeRobotIndex:
    episode_files = sorted((root / "meta/episodes").glob("*/*.parquet"))
    if not episode_files:
        broken(root, "tables of episodes", "none", root / "meta/episodes")
    videos, columns, tables, unreadable = _recorded(info, episode_files, root), dict[str, list](), list[Path](), []
    for path in episode_files:
        try:
            read = _read_episode_table(path, root, videos)
        except DatasetFormatError as error:
            unreadable.append(error)
            continue
        tables.append(path)
        for name, values in read.items():
            columns.setdefault(name, []).extend(values)
    if not tables:
        raise unreadable[0]
    order = np.argsort(np.array(columns["episode_index"], np.int64), kind="stable").tolist()
    columns = {name: [values[i] for i in order] for name, values in columns.items()}

    def paths(template: str, place: str, **names: str) -> list[Path]:
        path = info.paths(template, chunk_index=0, file_index=0, **names)
        places = zip(columns[f"{place}/chunk_index"], columns[f"{place}/file_index"], strict=True)
        return [path(chunk_index=chunk, file_index=file, **names) for chunk, file in places]

    clips = {
        key: _clips(
            paths("video_path", f"videos/{key}", video_key=key),
            columns[f"videos/{key}/from_timestamp"],
            columns[f"videos/{key}/to_timestamp"],
            info.rate("fps"),
        )
        for key in videos
    }
    return LeRobotIndex(
        fps=info.rate("fps"),
        features=_features(info),
        episodes=_episodes(columns["episode_index"], columns["length"], columns["tasks"]),
        tasks=_texts(root, "task"),
        subtasks=_subtasks(root),
        tables=paths("data_path", "data"),
        clips=clips,
        metadata=[root / "meta/info.json", root / "meta/tasks.parquet", *tables],
        promised=_promised(info, columns["length"]),
        unreadable=unreadable,
    )


def _recorded(info: Entry, episode_files: list[Path], root: Path) -> list[str]:
    """The cameras that any episode has a place for. One that was never recorded is missed where it is asked for."""
    stated = list[set[str]]()
    for path in episode_files:
        with suppress(DatasetFormatError):  # reading it tells
            stated.append(set(column_names(path, root)))
    places = {key: {f"videos/{key}/{name}" for name in ("chunk_index", "file_index")} for key in _video_keys(info)}
    return [key for key, names in places.items() if any(names <= columns for columns in stated) or not stated]


def _read_episode_table(path: Path, root: Path, videos: list[str]) -> dict[str, list]:
    """The columns of one table of meta/episodes. The tables may have other types than each other."""
    starts, ends = [f"videos/{key}/from_timestamp" for key in videos], [f"videos/{key}/to_timestamp" for key in videos]
    places = [
        f"{of}/{name}" for of in ("data", *(f"videos/{k}" for k in videos)) for name in ("chunk_index", "file_index")
    ]
    whole = ["episode_index", "length", *places]
    table = EpisodeTable(read_columns(path, [*whole, "tasks", *starts], root, optional=ends), path, root)
    columns: dict[str, list] = {name: table.whole(name) for name in whole}
    columns |= {name: table.seconds(name) for name in starts}
    columns |= {end: table.ends(end) for end in ends}
    return {**columns, "tasks": table.instructions("tasks")}


def _clips(paths: list[Path], starts: list[float], ends: list[float], fps: float) -> list[Clip]:
    """The episodes' parts of video files, each up to where the metadata say, or the next one in the file begins.

    A `to_timestamp` is the end of an episode's last picture, or (of writers other than LeRobot) its beginning. A frame
    is added for the latter; the next episode bounds both.
    """
    following: dict[Path, list[float]] = {}
    for path, start in zip(paths, starts, strict=True):
        following.setdefault(path, []).append(start)
    for values in following.values():
        values.sort()
    clips = []
    for path, start, end in zip(paths, starts, ends, strict=True):
        later = following[path]
        after = bisect_right(later, start)
        clips.append(
            Clip(path, start, min(end + 1 / fps if end > start else math.inf, *later[after : after + 1], math.inf))
        )
    return clips


def _texts(root: Path, kind: str) -> dict[int, str]:
    """Texts of tasks or subtasks by number."""
    return read_texts(root / f"meta/{kind}s.parquet", root, f"{kind}_index", kind)


def _subtasks(root: Path) -> dict[int, str]:
    return _texts(root, "subtask") if (root / "meta/subtasks.parquet").exists() else {}


def _features(info: Entry) -> dict[str, Feature]:
    """Without those of no dimension, such as shape (0,), which hold nothing."""
    features = {key: _feature(key, entry) for key, entry in info.entries("features").items()}
    return {key: feature for key, feature in features.items() if 0 not in feature.shape}


def _feature(key: str, entry: Entry) -> Feature:
    """A feature from its entry in info.json, which states pictures as [h, w, 3] or [3, h, w]; stored is [h, w, 3]."""
    dtype, names = entry.text("dtype"), flat_names(entry.values.get("names"))
    if dtype in ("image", "video"):
        shape = entry.shape("shape")
        if len(shape) not in (2, 3):
            entry.refuse("shape", "height, width and channels of a picture")
        channels_first = names[0].startswith("channel") if len(names) == 3 else shape[0] in (1, 3) and shape[-1] != 1
        shape = (*shape[1:], shape[0]) if channels_first and len(shape) == 3 else shape
        return _picture(key, shape, dtype, entry.values.get("info") or entry.values.get("video_info"))
    if not dtype.startswith(_NUMBERS):  # "string", "language" and what else there may be: not read here
        return Feature(kind="text", shape=(1,), dtype=dtype, names=names)
    return Feature(kind="vector", shape=entry.shape("shape"), dtype=dtype, names=names)


def _picture(key: str, shape: tuple[int, ...], dtype: str, about: Any) -> Feature:
    """A camera of colours or of depth. What has one channel and is no depth map is grey, and read as three equal ones.

    Depth is what is marked as such, has more than 8 bits of grey, or one channel and either no axis for it or a name
    that says so.
    """
    about = about if isinstance(about, Mapping) else {}
    encoded = str(about.get("video.pix_fmt") or about.get("pix_fmt") or "")
    marked, deep = any(about.get(name) for name in ("is_depth_map", "video.is_depth_map")), is_deep(encoded)
    single = len(shape) == 2 or shape[-1:] == (1,)
    if marked or deep or (single and (len(shape) == 2 or "depth" in key.lower())):
        shown = not deep and (bool(encoded) or not single)
        return Feature(kind="depth", shape=(*shape[:2], 3 if shown else 1), dtype=dtype)
    return Feature(kind="image", shape=(*shape[:2], 3) if single else shape, dtype=dtype)


def _video_keys(info: Entry) -> list[str]:
    """Whose pictures are in video files."""
    return [key for key, entry in info.entries("features").items() if entry.values.get("dtype") == "video"]


def _episodes(numbers: list[int], lengths: list[int], tasks: list[list[str]]) -> list[Episode]:
    starts = itertools.accumulate(lengths, initial=0)
    return [
        Episode(index=number, start=start, length=length, task=texts[0] if texts else "")
        for number, start, length, texts in zip(numbers, starts, lengths, tasks)
    ]


def _promised(info: Entry, lengths: list[int]) -> tuple[int, int]:
    episodes, frames = info.count("total_episodes"), info.count("total_frames")
    return len(lengths) if episodes is None else episodes, sum(lengths) if frames is None else frames


def _empty(root: Path) -> DatasetNotFoundError:
    return DatasetNotFoundError(
        expected="at least one episode with at least one frame",
        found="none",
        where=str(root / "meta"),
        next="record or convert episodes into this dataset, or give another path",
    )
