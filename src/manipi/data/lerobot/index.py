"""The metadata of a LeRobot dataset of any version, and where its pictures lie in time.

meta/info.json      version, fps, features, path templates
v2   meta/episodes.jsonl, meta/tasks.jsonl      one table and one video file per episode
v3   meta/episodes/**, meta/tasks.parquet       many episodes per table and per video file
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from jaxtyping import Bool, Float64, Int64

from manipi.data.dataset import Episode, Feature, in_a_row, require_episodes
from manipi.data.lerobot.tables import (
    Entry,
    Fault,
    Table,
    broken,
    column_names,
    flat_names,
    format_error,
    read_entries,
    read_entry,
    read_texts,
    to_check,
)
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
        wanted = set(numbers)
        kept = [i for i, episode in enumerate(self.episodes) if episode.index in wanted]
        return replace(
            self,
            episodes=in_a_row([self.episodes[i] for i in kept]),
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
    meta, listed = root / "meta", Counter(episode.index for episode in index.episodes)
    # Of metadata that count too many, some are enough.
    lost = tuple(sorted(set(range(min(index.promised[0], 2 * len(listed) + 1000))) - listed.keys()))
    yield from (Fault(error, lost) for error in index.unreadable)
    for number, count in listed.items():
        if count > 1:
            advice = f"take out all of its entries in {meta} but one"
            error = to_check(root, f"episode {number} once", f"{count} entries of it", meta)
            yield Fault(error, (number,), advice=advice)
    for e in index.episodes:
        if e.length < 1:
            advice = f"take its entry out of {meta}, or correct the length that it states"
            error = to_check(root, "at least one frame", f"{e.length} frames", f"{meta}, episode {e.index}")
            yield Fault(error, (e.index,), advice=advice)
    counted = len(index.episodes), sum(e.length for e in index.episodes)
    for what, found, promised, numbers in zip(("episodes", "frames"), counted, index.promised, (lost, ())):
        if found != promised and not index.unreadable:
            advice = f"correct total_{what} in {meta / 'info.json'}, or put back the entries that are lost"
            error = to_check(root, f"{promised} {what} in all, as meta/info.json says", str(found), meta)
            yield Fault(error, numbers, advice=advice)


def read_index(root: Path) -> LeRobotIndex:
    """Read the metadata of any known version, sound or not; `metadata_faults` tells. Raises as `open_index` does."""
    info = read_entry(root / "meta/info.json", root)
    readers = {"v2.0": _read_v2, "v2.1": _read_v2, "v3.0": _read_v3}
    version = info.values.get("codebase_version")
    if not isinstance(version, str) or version not in readers:
        next = f"python -m lerobot.datasets.v30.convert_dataset_v21_to_v30 --root={root}  # or another converter"
        broken(root, f"codebase_version among {', '.join(readers)}", shown(version), info.where, next)
    empty = DatasetNotFoundError(
        expected="at least one episode with at least one frame",
        found="none",
        where=str(root / "meta"),
        next="record or convert episodes into this dataset, or give another path",
    )
    if info.count("total_episodes", 1) == 0:
        raise empty
    videos = [key for key, entry in info.entries("features").items() if entry.values.get("dtype") == "video"]
    index = readers[version](info, root, videos)
    if not any(episode.length for episode in index.episodes):
        raise index.unreadable[0] if index.unreadable else empty
    return index


def _read_v2(info: Entry, root: Path, videos: list[str]) -> LeRobotIndex:
    meta, unreadable, chunks_size = root / "meta", list[DatasetFormatError](), info.whole("chunks_size", 1)

    def episode(entry: Entry) -> dict[str, Any]:
        number, length, texts = entry.whole("episode_index"), entry.whole("length"), entry.instructions("tasks")
        return {"episode_index": number, "episode_chunk": number // chunks_size, "length": length, "tasks": texts}

    def task(entry: Entry) -> tuple[int, str]:
        return entry.whole("task_index"), entry.instruction("task")

    rows = read_entries(meta / "episodes.jsonl", root, episode, unreadable)
    names = ("episode_index", "episode_chunk", "length", "tasks")
    columns = {name: [row[name] for row in rows] for name in names}
    tasks, files = dict(read_entries(meta / "tasks.jsonl", root, task)), ("info.json", "episodes.jsonl", "tasks.jsonl")
    common = {"tasks": tasks, "metadata": [meta / name for name in files], "unreadable": unreadable}
    return _index(info, root, columns, ("episode_chunk", "episode_index"), "", dict.fromkeys(videos, ""), **common)


def _read_v3(info: Entry, root: Path, videos: list[str]) -> LeRobotIndex:
    episode_files = sorted((root / "meta/episodes").glob("*/*.parquet"))
    if not episode_files:
        broken(root, "tables of episodes", "none", root / "meta/episodes")
    stated = list[set[str]]()
    for path in episode_files:
        with suppress(DatasetFormatError):  # reading it tells
            stated.append(set(column_names(path, root)))
    # The cameras that any episode has a place for. One that was never recorded is missed where it is asked for.
    place, clips = ("chunk_index", "file_index"), {key: f"videos/{key}/" for key in videos}
    if stated:
        clips = {key: of for key, of in clips.items() if any(c.issuperset(of + name for name in place) for c in stated)}
    whole = ["episode_index", "length", *(prefix + name for prefix in ("data/", *clips.values()) for name in place)]
    starts, ends = ([f"{prefix}{edge}_timestamp" for prefix in clips.values()] for edge in ("from", "to"))
    columns, tables, unreadable = dict[str, list](), list[Path](), list[DatasetFormatError]()
    for path in episode_files:
        try:
            table = Table(path, root, [*whole, "tasks", *starts], optional=ends)  # of other types than another one
            read = {name: table.whole(name) for name in whole} | {name: table.seconds(name) for name in starts}
            read |= {name: table.ends(name) for name in ends} | {"tasks": table.instructions("tasks")}
        except DatasetFormatError as error:
            unreadable.append(error)
            continue
        tables.append(path)
        for name, values in read.items():
            columns.setdefault(name, []).extend(values)
    if not tables:
        raise unreadable[0]
    metadata = [root / "meta/info.json", root / "meta/tasks.parquet", *tables]
    common = {"tasks": read_texts(root, "task"), "metadata": metadata, "unreadable": unreadable}
    return _index(info, root, columns, place, "data/", clips, **common)


def _index(
    info: Entry,
    root: Path,
    columns: Mapping[str, list],
    place: tuple[str, ...],
    data: str,
    clips: Mapping[str, str],
    **common: Any,
) -> LeRobotIndex:
    """The index of some episodes, whose numbers, lengths, instructions and places are the `columns`.

    Args:
        place: the numbers that stand in path templates.
        data, clips: the prefixes of their names in `columns`, for the tables and for the videos of each camera.
    """
    features = {key: _feature(key, entry) for key, entry in info.entries("features").items()}
    order = sorted(range(len(columns["length"])), key=columns["episode_index"].__getitem__)
    columns = {name: [values[i] for i in order] for name, values in columns.items()}
    lengths, fps = columns["length"], info.rate("fps")
    starts = accumulate(lengths, initial=0)

    def paths(template: str, prefix: str, **texts: str) -> list[Path]:
        return list(map(info.paths(template, place, **texts), *(columns[prefix + name] for name in place)))

    return LeRobotIndex(
        fps=fps,
        # Without those of no dimension, such as shape (0,), which hold nothing.
        features={key: feature for key, feature in features.items() if 0 not in feature.shape},
        episodes=[
            Episode(index=number, start=start, length=length, task=texts[0] if texts else "")
            for number, start, length, texts in zip(columns["episode_index"], starts, lengths, columns["tasks"])
        ],
        subtasks=read_texts(root, "subtask") if (root / "meta/subtasks.parquet").exists() else {},
        tables=paths("data_path", data),
        clips={
            key: _clips(paths("video_path", prefix, video_key=key), columns, prefix, fps)
            for key, prefix in clips.items()
        },
        promised=(info.count("total_episodes", len(lengths)), info.count("total_frames", sum(lengths))),
        **common,
    )


def _clips(paths: list[Path], columns: Mapping[str, list], prefix: str, fps: float) -> list[Clip]:
    """The episodes' parts of video files, each up to where the metadata say, or the next one in the file begins.

    A `to_timestamp` is the end of an episode's last picture, or (of writers other than LeRobot) its beginning. A frame
    is added for the latter; the next episode bounds both.
    """
    starts = columns.get(f"{prefix}from_timestamp", [0.0] * len(paths))
    ends = columns.get(f"{prefix}to_timestamp", [math.inf] * len(paths))
    places = list(zip(map(str, paths), starts, strict=True))
    following = {one: next[1] for one, next in pairwise(sorted(set(places))) if one[0] == next[0]}
    stated = (end + 1 / fps if end > start else math.inf for start, end in zip(starts, ends, strict=True))
    bounds = (min(end, following.get(place, math.inf)) for end, place in zip(stated, places, strict=True))
    return [Clip(*clip) for clip in zip(paths, starts, bounds, strict=True)]


def _feature(key: str, entry: Entry) -> Feature:
    """A feature from its entry in info.json, which states pictures as [h, w, 3] or [3, h, w]; stored is [h, w, 3].

    Depth is what is marked as such, has more than 8 bits of grey, or one channel and either no axis for it or a name
    that says so. Other pictures of one channel are grey, and read as three equal ones.
    """
    dtype, names = entry.text("dtype"), flat_names(entry.values.get("names"))
    if dtype not in ("image", "video"):
        if not dtype.startswith(_NUMBERS):  # "string", "language" and what else there may be: not read here
            return Feature(kind="text", shape=(1,), dtype=dtype, names=names)
        return Feature(kind="vector", shape=entry.shape("shape"), dtype=dtype, names=names)
    shape = entry.shape("shape")
    if len(shape) not in (2, 3):
        entry.refuse("shape", "height, width and channels of a picture")
    channels_first = names[0].startswith("channel") if len(names) == 3 else shape[0] in (1, 3) and shape[-1] != 1
    shape = (*shape[1:], shape[0]) if channels_first and len(shape) == 3 else shape
    about = entry.values.get("info") or entry.values.get("video_info")
    about = about if isinstance(about, Mapping) else {}
    encoded = str(about.get("video.pix_fmt") or about.get("pix_fmt") or "")
    marked, deep = any(about.get(name) for name in ("is_depth_map", "video.is_depth_map")), is_deep(encoded)
    single = len(shape) == 2 or shape[-1:] == (1,)
    if marked or deep or (single and (len(shape) == 2 or "depth" in key.lower())):
        shown = not deep and (bool(encoded) or not single)
        return Feature(kind="depth", shape=(*shape[:2], 3 if shown else 1), dtype=dtype)
    return Feature(kind="image", shape=(*shape[:2], 3) if single else shape, dtype=dtype)


# Times --------------------------------------------------------------------------------------------------------------
#
# LeRobot's rule is that the picture of a row is shown at `from_timestamp` of the episode + `timestamp` of the row. In
# most datasets `timestamp` is frame / fps rounded to float32, and frame / fps the more exact. Where rows were cut out,
# an episode begins later or the rows have another rate, it is not; such an episode is called off the grid here, and
# its timestamps count.

SLACK = 0.25
"""Times that differ by less than this share of a frame name the same picture."""


def off_grid(
    seconds_T: Float64[np.ndarray, " T"], frame_T: Int64[np.ndarray, " T"], fps: float
) -> Bool[np.ndarray, " T"]:
    """Which timestamps differ from frame / fps by more than rounding."""
    rounding_T = 0.5 * np.spacing(np.abs(seconds_T).astype(np.float32)).astype(np.float64)
    return np.abs(seconds_T - frame_T / fps) > SLACK / fps + rounding_T


def time_fault(
    index: LeRobotIndex, root: Path, camera: str, position: int, seconds_T: Float64[np.ndarray, " T"]
) -> Fault | None:
    """What is wrong where a video has no picture at the times of an episode that is off the grid.

    None also where the file cannot be read, which its decoder reports.

    Args:
        position: of the episode in `index.episodes`.
    """
    clip, episode = index.clips[camera][position], index.episodes[position]
    try:
        shown_F, period = _shown_at(clip.path, clip.path.stat().st_mtime_ns)
    except (FFmpegError, OSError, IndexError, ValueError):
        return None
    wanted_T = clip.start + seconds_T
    after_T = np.searchsorted(shown_F, wanted_T)
    before_T, after_T = shown_F[np.maximum(after_T - 1, 0)], shown_F[np.minimum(after_T, len(shown_F) - 1)]
    distance_T = np.minimum(np.abs(before_T - wanted_T), np.abs(after_T - wanted_T))
    bad_T = (distance_T > SLACK * period) | (wanted_T > clip.end - SLACK * period)
    if not bad_T.any():
        return None
    at = int(bad_T.argmax())
    lacking = f"none for {int(bad_T.sum())} of {episode.length} rows, the first at {wanted_T[at]:.3f} s"
    of_others = f", where another episode's may begin ({clip.end:.3f} s)" if wanted_T[at] > clip.end - period else ""
    what, _ = how_off(seconds_T, index.fps, clip.start)
    error = format_error(
        root,
        f"a picture in {camera!r} at from_timestamp + timestamp of every row",
        f"{lacking}{of_others}; {what}",
        f"{clip.path}, episode {episode.index}, frame {at}",
        f"where row i belongs to picture i of the episode, write timestamp = frame / fps into {index.tables[position]};"
        " else leave the episode out",
    )
    return Fault(error, (episode.index,), at)


def how_off(seconds_T: Float64[np.ndarray, " T"], fps: float, start: float) -> tuple[str, str]:
    """What is odd about timestamps off the grid, and what to do about it.

    Args:
        start: where the episode's pictures begin in their file, in seconds.
    """
    look = "look with `manipi view` whether its pictures belong to its rows"
    steps_T = np.diff(seconds_T) * fps
    first, step = float(seconds_T[0]), float(np.median(steps_T)) if len(steps_T) else 1.0
    if np.abs(steps_T - 1).max(initial=0) < SLACK:
        if abs(first * fps - 1) < SLACK:
            return f"its timestamps begin one frame late, at {first:.4g} s", look
        if start > 0 and abs(first - start) * fps < SLACK:
            return f"its timestamps run on through the file, from {first:.4g} s, and do not begin anew", look
        return f"its timestamps begin at {first:.4g} s", look
    if abs(step - 1) >= SLACK:
        what = f"its timestamps are {step / fps:.4g} s apart, and fps is {fps:g} in meta/info.json"
        return what, "correct fps, or the timestamps"
    at = int(np.argmax(np.abs(steps_T - 1)))
    what = f"its timestamps go from {seconds_T[at]:.4g} s to {seconds_T[at + 1]:.4g} s at frame {at + 1}"
    return what, f"action chunks go on over it: cut the episode there, or leave it out; {look}"


@lru_cache(maxsize=8)
def _shown_at(path: Path, changed: int) -> tuple[Float64[np.ndarray, " F"], float]:
    """The times of a video's pictures, ascending, and its period; nothing is decoded, and little read where the file's
    index has them: without B-frames, pictures are shown in the order in which they are decoded.

    Args:
        changed: when the file was, so that another one of that name is read anew.
    """
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        tick, period = float(stream.time_base or 1), float(1 / (stream.average_rate or 30))
        listed = () if stream.codec_context.has_b_frames else getattr(stream, "index_entries", ())
        shown = [entry.timestamp for entry in listed]
        shown = shown or [packet.pts for packet in container.demux(stream) if packet.pts is not None]
    if not shown:
        raise ValueError("no pictures")
    return np.sort(np.array(shown) * tick), period
