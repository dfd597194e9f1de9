"""What only a LeRobot dataset can have wrong: metadata, tables, numbering and video lengths that disagree."""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from tqdm import tqdm

from manipi.data.checks.report import Finding, error, frames, from_error, warning
from manipi.data.checks.values import uneven_timestamps
from manipi.data.dataset import Dataset
from manipi.data.lerobot import LeRobotDataset
from manipi.data.lerobot_index import LeRobotIndex, metadata_faults, read_index
from manipi.data.lerobot_tables import Fault, read_values, row_faults, runs
from manipi.errors import DataError

NUMBERING = ("episode_index", "frame_index", "index", "task_index", "timestamp")


def open_lerobot(
    root: Path, keys: Collection[str] | None = None
) -> tuple[list[Finding], Dataset | None, Dataset | None]:
    """What is wrong with the files, and the episodes that are sound enough to look into.

    Args:
        keys: the features that matter; None: all.

    Returns:
        findings; the episodes whose rows can be read; those whose pictures can be tried (None: there are none).

    Raises:
        DataError: nothing can be read.
    """
    index = read_index(root)
    faults = list(metadata_faults(index, root))
    findings = [from_error(fault.error, "metadata", fault.episodes) for fault in faults]
    listed = {e.index for e in index.episodes} - {number for fault in faults for number in fault.episodes}
    in_tables, spoilt = _tables(index, root, keys)
    findings += [*in_tables, *_unlisted(index, root), *_video_lengths(index, keys)]
    sound = sorted(listed - spoilt)
    # Pictures inside tables are found by their rows, and videos without them.
    inside = any(f.dtype == "image" for k, f in index.features.items() if keys is None or k in keys)
    to_decode = sound if inside else sorted(listed)
    rows, pictures = (LeRobotDataset(root, numbers) if numbers else None for numbers in (sound, to_decode))
    return findings, rows, pictures


def _tables(index: LeRobotIndex, root: Path, keys: Collection[str] | None) -> tuple[list[Finding], set[int]]:
    """What is wrong in the tables, and the numbers of the episodes whose rows cannot be used."""
    vectors = {k: math.prod(f.shape) for k, f in index.features.items() if f.kind == "vector"}
    widths = {k: w for k, w in vectors.items() if keys is None or k in keys} | dict.fromkeys(NUMBERING, 1)
    findings, spoilt = [], set[int]()
    for path, promised in tqdm(index.by_table().items(), desc="tables", unit="file", leave=False):
        numbers = [e.index for e in promised]
        try:
            values = read_values(path, widths, root)
            faults = list(row_faults(path, root, promised, index.tasks, values))
        except DataError as e:
            faults = [Fault(e, tuple(numbers))]
        else:
            findings += _numbering(index.fps, path, values)
        findings += [from_error(f.error, _kind(f), f.episodes, f.frame) for f in faults]
        spoilt |= {number for fault in faults for number in fault.episodes}
    return findings, spoilt


def _kind(fault: Fault) -> str:
    if fault.frame is None:
        return "tables"
    return "timestamps" if "timestamps" in fault.error.expected else "numbering"


def _numbering(fps: float, path: Path, values: Mapping[str, np.ndarray]) -> Iterator[Finding]:
    for number, start, end in runs(values["episode_index"][:, 0]):
        rows = {key: values[key][start:end, 0] for key in NUMBERING}
        for name, first in (("frame_index", 0), ("index", int(rows["index"][0]))):
            expected = first + np.arange(end - start)
            if (wrong := np.flatnonzero(rows[name] != expected)).size:
                at = int(wrong[0])
                what = (
                    f"{name} is {rows[name][at]} where {expected[at]} belongs ({frames(wrong.size)} in all), in {path}"
                )
                yield error("numbering", what, "number the rows again", (number,), at)
        yield from uneven_timestamps(number, rows["timestamp"], fps)


def _unlisted(index: LeRobotIndex, root: Path) -> Iterator[Finding]:
    """Tables that a recording or conversion left behind when it died before the metadata were written."""
    for path in sorted(set((root / "data").rglob("*.parquet")) - set(index.tables)):
        what = f"{path} belongs to no episode of the metadata"
        yield warning("tables", what, "record or convert its episodes again, or delete the file")


def _video_lengths(index: LeRobotIndex, keys: Collection[str] | None) -> Iterator[Finding]:
    """Pictures that a video has beyond those of its episodes. Those that it lacks show when they are decoded."""
    for camera, clips in index.clips.items():
        promised = Counter[Path]()
        for clip, episode in zip(clips, index.episodes, strict=True):
            promised[clip.path] += episode.length
        for path, count in promised.items() if keys is None or camera in keys else ():
            found = _video_length(path)
            if found is not None and found > count:
                what = f"{frames(found)} in {path}, and only {count} in the episodes that it belongs to"
                concerned = [e.index for c, e in zip(clips, index.episodes, strict=True) if c.path == path]
                yield warning("pictures", what, "look whether pictures and rows are shifted", concerned)


def _video_length(path: Path) -> int | None:
    try:
        with av.open(str(path)) as container:
            return container.streams.video[0].frames
    except (FFmpegError, IndexError):
        return None  # decoding reports it, with the episodes concerned
