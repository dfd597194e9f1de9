"""Read a dataset in full, and say what is wrong with it.

    check        error                                          warning
    metadata     files that are missing or disagree             an instruction without text
    tables       missing columns, rows, episodes                two episodes with the same numbers
    numbering    frame_index, index, task_index
    timestamps   not ascending                                  not 1/fps apart
    values       NaN, infinity                                  dimensions that never move, jumps
    pictures     frames that cannot be decoded                  a video longer than its episodes
    robot        a feature that the dataset lacks               another rate than the dataset's

Nothing stops at the first finding: a table that cannot be read is reported, and the others are read all the same.
Pictures are decoded by the reader that training uses, so what passes here trains.

Shape letters: N rows, E episodes, d dimensions.
"""

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, TypeAlias

import av
import numpy as np
import pyarrow as pa
from av.error import FFmpegError
from tqdm import tqdm

from manipi.data.dataset import Dataset, Episode, open_dataset
from manipi.data.lerobot_index import LeRobotIndex, read_columns, read_index
from manipi.data.stats import NEAR_CONSTANT
from manipi.errors import DataError, DatasetFormatError
from manipi.robots.robot import Robot

CHECKS = ("metadata", "tables", "numbering", "timestamps", "values", "pictures", "robot")
NUMBERING = ("episode_index", "frame_index", "index", "task_index", "timestamp")
SPACING = 0.1
"""Timestamps may be off by this share of a frame."""
JUMP, USUAL_SHARE = 8.0, 0.9
"""A jump is a step of more than `JUMP` times what the largest steps of `USUAL_SHARE` of the episodes stay below.
Episodes are compared, not steps, because a gripper that snaps shut does so in most episodes and in hardly any frame."""
_BLOCK = 32
"""Pictures decoded at a time."""

Columns: TypeAlias = Mapping[str, np.ndarray]
"""Values [N, d] of every vector feature, and [N] of what numbers the rows."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong."""

    severity: Literal["error", "warning"]
    check: str
    where: str
    """File, episode and frame."""
    what: str
    next: str


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What was read, and what was found in it."""

    root: str
    num_episodes: int = 0
    num_frames: int = 0
    cameras: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()

    def count(self, severity: str, check: str | None = None) -> int:
        return sum(f.severity == severity and check in (None, f.check) for f in self.findings)


def check_dataset(
    root: Path, *, robot: Robot | None = None, quick: bool = False, num_workers: int | None = None
) -> CheckReport:
    """Check everything about the dataset at `root`; what is wrong is in the report, never raised.

    Args:
        robot: also check that the dataset has what this robot names.
        quick: decode the first and the last picture of each episode only.
        num_workers: threads that decode pictures; by default one per processor core.
    """
    try:
        dataset, index = open_dataset(root), read_index(root)
    except DataError as error:
        return CheckReport(root=str(root), findings=(_from_error(error, "metadata", root),))
    columns, unreadable = _read_tables(index, root)
    findings = [*_metadata(index), *unreadable]
    if columns:
        findings += [*_rows(index, columns, complete=not unreadable), *_values(index, columns)]
    findings += [*_video_lengths(index, root), *_pictures(dataset, quick, num_workers or os.cpu_count() or 1)]
    if robot is not None:
        findings += _robot(dataset, robot)
    return CheckReport(
        root=str(root),
        num_episodes=len(index.episodes),
        num_frames=dataset.num_frames,
        cameras=tuple(dataset.cameras),
        findings=tuple(replace(f, where=f.where.replace(f"{dataset.root}/", "")) for f in findings),
    )


def _error(check: str, where: str, what: str, next: str) -> Finding:
    return Finding(severity="error", check=check, where=where, what=what, next=next)


def _warning(check: str, where: str, what: str, next: str) -> Finding:
    return Finding(severity="warning", check=check, where=where, what=what, next=next)


def _from_error(error: DataError, check: str, root: Path) -> Finding:
    next = error.next.replace("<folder>", str(root))
    return _error(check, error.where, f"expected {error.expected}; found {error.found}", next)


def _metadata(index: LeRobotIndex) -> Iterator[Finding]:
    where = "meta/"
    for number, count in Counter(e.index for e in index.episodes).items():
        if count > 1:
            yield _error("metadata", where, f"episode {number} is listed {count} times", "keep one of the entries")
    for episode in index.episodes:
        if episode.length < 1:
            next = "delete the episode from the dataset"
            yield _error("metadata", where, f"episode {episode.index} has {episode.length} frames", next)
        if not episode.task.strip():
            next = "write what the robot does there; the policy is told nothing otherwise"
            yield _warning("metadata", where, f"episode {episode.index} has no instruction", next)


# Tables -------------------------------------------------------------------------------------------------------------


def _read_tables(index: LeRobotIndex, root: Path) -> tuple[Columns, list[Finding]]:
    """All vectors of all tables that can be read, one below the other, and what is wrong with the other tables."""
    vectors = [key for key, feature in index.features.items() if feature.kind == "vector"]
    names, tables, findings = list(dict.fromkeys((*NUMBERING, *vectors))), [], []
    for path in tqdm(index.tables, desc="tables", unit="file"):
        try:
            table = read_columns(path, names, root)
        except DatasetFormatError as error:
            findings.append(_from_error(error, "tables", root))
            continue
        if not len(table):
            continue
        arrays = {name: _array(table.column(name)) for name in names}
        ragged = [name for name, values in arrays.items() if len(values) != len(table)]
        for name in ragged:
            what = f"{name!r} has rows of different lengths, or without numbers"
            findings.append(_error("tables", str(path), what, "convert the dataset again"))
        if not ragged:
            tables.append(arrays)
    return {name: np.concatenate([table[name] for table in tables]) for name in names} if tables else {}, findings


def _array(column: pa.ChunkedArray) -> np.ndarray:
    """[N] or, for lists, [N, d]; another length where rows have different numbers of values."""
    values = column.combine_chunks()
    nested, rows = pa.types.is_nested(values.type), max(len(values), 1)
    while pa.types.is_nested(values.type):
        values = values.flatten()
    flat = values.to_numpy(zero_copy_only=False)
    if not nested or len(flat) % rows:
        return flat
    return flat.reshape(rows, -1)


def _runs(columns: Columns) -> list[tuple[int, slice]]:
    """Episode number and rows of each run of equal `episode_index`."""
    numbers = columns["episode_index"]
    bounds = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    return [(int(numbers[start]), slice(start, end)) for start, end in pairwise(bounds)]


def _rows(index: LeRobotIndex, columns: Columns, *, complete: bool) -> Iterator[Finding]:
    """Every run of rows against the episode that the metadata promise."""
    episodes, seen, digests = {e.index: e for e in index.episodes}, set[int](), dict[bytes, int]()
    for number, rows in _runs(columns):
        where, episode, count = f"episode {number}", episodes.get(number), rows.stop - rows.start
        if episode is None or number in seen:
            what = "occurs twice in the data tables" if number in seen else "is in the data tables, not in the metadata"
            yield _error("tables", where, f"episode_index {number} {what}", "convert or record the dataset again")
            continue
        seen.add(number)
        if count != episode.length:
            what = f"{count} rows in the data tables, {episode.length} in the metadata"
            yield _error("tables", where, what, "convert the dataset again; every later frame is misplaced")
            continue
        yield from _numbering(index, episode, {name: columns[name][rows] for name in NUMBERING})
        twin = digests.setdefault(_digest(columns, rows), number)
        if twin != number:
            yield _warning("tables", where, f"the same numbers as episode {twin}", "delete one of the two")
    if complete:
        for number in sorted(e.index for e in index.episodes if e.length and e.index not in seen):
            yield _error("tables", f"episode {number}", "no rows in the data tables", "convert the dataset again")


def _digest(columns: Columns, rows: slice) -> bytes:
    floats = [v[rows] for k, v in columns.items() if k not in NUMBERING and v.dtype.kind == "f"]
    return hashlib.sha256(b"".join(v.tobytes() for v in floats) or str(rows).encode()).digest()


def _numbering(index: LeRobotIndex, episode: Episode, columns: Columns) -> Iterator[Finding]:
    frame, seconds = np.arange(episode.length), columns["timestamp"].astype(np.float64)
    for name, expected in (("frame_index", frame), ("index", frame + episode.start)):
        if (wrong := np.flatnonzero(columns[name] != expected)).size:
            at = int(wrong[0])
            what = f"{name} is {columns[name][at]} where {expected[at]} belongs ({_frames(wrong.size)} in all)"
            yield _error("numbering", f"episode {episode.index}, frame {at}", what, "number the rows again")
    unknown = [int(i) for i in np.unique(columns["task_index"]) if not index.tasks.get(int(i), "").strip()]
    if unknown:
        what, next = f"task_index {unknown} has no text in meta/tasks", "add the instruction's text"
        yield _error("numbering", f"episode {episode.index}", what, next)
    step = np.diff(seconds)
    if (back := np.flatnonzero(step <= 0)).size:
        at = int(back[0])
        what = f"the time goes from {seconds[at]:.4f} s to {seconds[at + 1]:.4f} s ({_frames(back.size)} in all)"
        yield _error("timestamps", f"episode {episode.index}, frame {at + 1}", what, "sort the rows by time")
    elif (off := np.flatnonzero(np.abs(step * index.fps - 1) > SPACING)).size:
        at = int(off[0])
        what = f"{step[at]:.4f} s after the frame before, not 1/{index.fps:g} s ({_frames(off.size)} in all)"
        next = "resample the episode, or correct fps in meta/info.json"
        yield _warning("timestamps", f"episode {episode.index}, frame {at + 1}", what, next)


def _frames(count: int) -> str:
    return f"{count} frame{'s' if count > 1 else ''}"


# Values -------------------------------------------------------------------------------------------------------------


def _values(index: LeRobotIndex, columns: Columns) -> Iterator[Finding]:
    runs = _runs(columns)
    for key, values in columns.items():
        if key in NUMBERING or values.dtype.kind != "f":
            continue
        values_Nd, feature = values.reshape(len(values), -1).astype(np.float64), index.features[key]
        named = len(feature.names) == values_Nd.shape[1]
        names = [f"{key}[{d}]" + (f" {feature.names[d]!r}" if named else "") for d in range(values_Nd.shape[1])]
        for number, rows in runs:
            yield from _not_finite(names, number, values_Nd[rows])
        values_Nd[~np.isfinite(values_Nd)] = np.nan
        yield from _still(names, values_Nd)
        yield from _jumps(names, values_Nd, runs)


def _not_finite(names: list[str], episode: int, values_Nd: np.ndarray) -> Iterator[Finding]:
    bad = np.argwhere(~np.isfinite(values_Nd))
    if len(bad):
        frame, d = bad[0].tolist()
        what = f"{values_Nd[frame, d]} in {names[d]} ({len(bad)} value{'s' if len(bad) > 1 else ''} in the episode)"
        next = "repair the values, or leave the episode out; training stops at them"
        yield _error("values", f"episode {episode}, frame {frame}", what, next)


def _still(names: list[str], values_Nd: np.ndarray) -> Iterator[Finding]:
    finite = values_Nd[np.isfinite(values_Nd).all(axis=1)]
    if not len(finite):
        return
    low, high = np.quantile(finite, (0.01, 0.99), axis=0)
    if (still := np.flatnonzero(high - low < NEAR_CONSTANT)).size:
        what = f"98 % of the values lie within {NEAR_CONSTANT:g} in {', '.join(names[d] for d in still)}"
        next = "leave out what the robot does not use; normalisation would turn its noise into large numbers"
        yield _warning("values", "all episodes", what, next)


def _jumps(names: list[str], values_Nd: np.ndarray, runs: list[tuple[int, slice]]) -> Iterator[Finding]:
    steps_Nd = np.abs(np.diff(values_Nd, axis=0, prepend=values_Nd[:1]))
    starts = [rows.start for _, rows in runs]
    steps_Nd[starts] = 0  # there is no step from one episode to the next
    largest_Ed = np.nan_to_num(np.fmax.reduceat(steps_Nd, starts, axis=0))
    usual_d = np.quantile(largest_Ed, USUAL_SHARE, axis=0, method="lower")
    # A dimension that rests in most episodes has no usual step to compare with.
    excess_Ed = np.divide(largest_Ed, usual_d, out=np.zeros_like(largest_Ed), where=usual_d > 0)
    for e in np.flatnonzero((excess_Ed > JUMP).any(axis=1)).tolist():
        number, rows = runs[e]
        d = int(excess_Ed[e].argmax())
        frame = int(np.nanargmax(steps_Nd[rows, d]))
        what = f"{names[d]} steps by {largest_Ed[e, d]:.3g}, in most episodes by at most {usual_d[d]:.3g}"
        next = "look at the frame: a lost packet, an angle that wraps, a sensor that was reset?"
        yield _warning("values", f"episode {number}, frame {frame}", what, next)


# Pictures -----------------------------------------------------------------------------------------------------------


def _video_lengths(index: LeRobotIndex, root: Path) -> Iterator[Finding]:
    """Pictures that a video has beyond those of its episodes. Those that it lacks show when they are decoded."""
    for clips in index.clips.values():
        promised = Counter[Path]()
        for clip, episode in zip(clips, index.episodes, strict=True):
            promised[clip.path] += episode.length
        for path, count in promised.items():
            found = _video_length(path)
            if found is not None and found > count:
                what = f"{_frames(found)}, and only {count} in the episodes that it belongs to"
                yield _warning("pictures", str(path), what, "look whether pictures and rows are shifted")


def _video_length(path: Path) -> int | None:
    try:
        with av.open(str(path)) as container:
            return container.streams.video[0].frames
    except (FFmpegError, IndexError):
        return None  # decoding reports it, with the episodes concerned


def _pictures(dataset: Dataset, quick: bool, num_workers: int) -> list[Finding]:
    """Decode every camera of every episode; the first damaged picture of each is reported."""
    jobs = [(camera, position) for camera in dataset.cameras for position in range(len(dataset.episodes))]
    local = threading.local()

    def begin() -> None:
        local.dataset = open_dataset(dataset.root)

    def decode(job: tuple[str, int]) -> Finding | None:
        return _decode(local.dataset, *job, quick=quick)

    with ThreadPoolExecutor(num_workers, initializer=begin) as pool:
        try:
            bar = tqdm(pool.map(decode, jobs), total=len(jobs), desc="pictures", unit="clip")
            return [finding for finding in bar if finding is not None]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _decode(dataset: Dataset, camera: str, position: int, *, quick: bool) -> Finding | None:
    episode = dataset.episodes[position]
    rows = episode.start + np.arange(episode.length)
    if quick:
        rows = rows[[0, -1]] if episode.length else rows
    try:
        for start in range(0, len(rows), _BLOCK):
            dataset.images(camera, rows[start : start + _BLOCK])
    except DataError as error:
        return _from_error(error, "pictures", dataset.root)
    return None


# Robot --------------------------------------------------------------------------------------------------------------


def _robot(dataset: Dataset, robot: Robot) -> Iterator[Finding]:
    pictures = [(key, None) for key in robot.cameras.values()]
    vectors = [(s.key, s.size) for s in robot.state] + [(robot.action_key, robot.action_size)]
    for key, size in (*pictures, *vectors):
        try:
            dataset.require(robot.dataset_key(key), "image" if size is None else "vector", size)
        except DataError as error:
            yield _from_error(error, "robot", dataset.root)
    if robot.control_hz != dataset.fps:
        what = f"{robot.name!r} runs at {robot.control_hz:g} Hz, the dataset at {dataset.fps:g} Hz"
        yield _warning("robot", "control_hz", what, "set control_hz; chunks would be executed at another speed")
