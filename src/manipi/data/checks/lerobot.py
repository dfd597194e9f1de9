"""What only a LeRobot dataset can have wrong: metadata, tables, numbering and video lengths that disagree, and what the
metadata name and no file has."""

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
from manipi.data.lerobot_index import LeRobotIndex, column_names, metadata_faults, read_index
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
    wanted = index.features.keys() if keys is None else index.features.keys() & set(keys)
    absent = list(_absent(index, root, wanted))
    wanted -= {key for finding in absent for key in finding.features}
    if absent and not absent[0].features:
        return [*findings, *absent], None, None
    in_tables, spoilt = _tables(index, root, wanted)
    findings += [*absent, *in_tables, *_unlisted(index, root), *_video_lengths(index, wanted)]
    sound = sorted(listed - spoilt)
    # Pictures inside tables are found by their rows, and videos without them.
    inside = any(f.dtype == "image" for k, f in index.features.items() if k in wanted)
    to_decode = sound if inside else sorted(listed)
    rows, pictures = (LeRobotDataset(root, numbers) if numbers else None for numbers in (sound, to_decode))
    return findings, rows, pictures


def _tables(index: LeRobotIndex, root: Path, keys: Collection[str]) -> tuple[list[Finding], set[int]]:
    """What is wrong in the tables, and the numbers of the episodes whose rows cannot be used."""
    vectors = {k: math.prod(f.shape) for k, f in index.features.items() if f.kind == "vector"}
    widths = {k: w for k, w in vectors.items() if k in keys} | dict.fromkeys(NUMBERING, 1)
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


def _absent(index: LeRobotIndex, root: Path, keys: Collection[str]) -> Iterator[Finding]:
    """What meta/info.json names and no file has: once, beside the files that no episode has.

    A finding about no feature in particular is about all tables, without which nothing can be looked into.
    """
    everyone, where = tuple(e.index for e in index.episodes), str(root / "meta/info.json")
    fetch = f"hf download <dataset> --repo-type dataset --local-dir {root}  # fetches what is missing"
    tables = list(dict.fromkeys(index.tables))
    if not any(path.is_file() for path in tables):
        strays = sorted((root / "data").rglob("*.parquet"))
        what = f"{_nothing_at(tables)}, to which data_path leads"
        advice = f"correct data_path in {where}" if strays else fetch
        yield error("tables", what + _of_no_episode(strays), advice, everyone, where=where)
        return
    videos = {key: {clip.path for clip in index.clips.get(key, ())} for key in keys if _is_video(index, key)}
    empty = [key for key, paths in videos.items() if not any(path.is_file() for path in paths)]
    if empty:
        listed = {clip.path for clips in index.clips.values() for clip in clips}
        strays = sorted(set((root / "videos").rglob("*.mp4")) - listed)
        places = [path for key in empty for path in sorted(videos[key])]
        what = (
            f"no file has pictures of {', '.join(empty)}: {_nothing_at(places) if places else 'no episode names one'}"
        )
        advice = f"manipi convert {root} TARGET --exclude {' '.join(empty)}  # if it was never recorded; else {fetch}"
        if strays and places:
            advice = f"correct video_path in {where}"
            if len(empty) < len(videos):
                advice = f"name the feature in {where} as its folder is named, or the folder as the feature"
        yield error("pictures", what + _of_no_episode(strays), advice, everyone, where=where, features=empty)
    columns = {key for key in keys if not _is_video(index, key)} - set(NUMBERING)
    named = list[str]()
    for path in tables if columns else ():
        named = column_names(path) or named
        if not (columns := columns.difference(column_names(path) or columns)):
            return
    for key in sorted(columns):
        what = f"expected the columns {key}; found only {', '.join(named)}"
        advice = f"manipi convert {root} TARGET --exclude {key}  # or take it out of {where}"
        place = f"{tables[0]}" + (f", and {len(tables) - 1} more" if len(tables) > 1 else "")
        yield error("tables", what, advice, everyone, where=place, features=(key,))


def _nothing_at(paths: list[Path]) -> str:
    return f"found nothing at {paths[0]}" + (f", and so at {len(paths) - 1} more places" if len(paths) > 1 else "")


def _of_no_episode(strays: list[Path]) -> str:
    if not strays:
        return ""
    some = "1 file there belongs" if len(strays) == 1 else f"{len(strays)} files there belong"
    return f"; {some} to no episode of the metadata, such as {strays[0]}"


def _is_video(index: LeRobotIndex, key: str) -> bool:
    return index.features[key].dtype == "video"


def _video_lengths(index: LeRobotIndex, keys: Collection[str]) -> Iterator[Finding]:
    """Pictures that a video has beyond those of its episodes. Those that it lacks show when they are decoded."""
    for camera, clips in index.clips.items():
        promised = Counter[Path]()
        for clip, episode in zip(clips, index.episodes, strict=True):
            promised[clip.path] += episode.length
        for path, count in promised.items() if camera in keys else ():
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
