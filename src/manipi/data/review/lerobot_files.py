"""What only a LeRobot dataset can have wrong: files that are absent or disagree.

Metadata, tables, numbering and video lengths that disagree, and what the metadata name and no file has.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from tqdm import tqdm

from manipi.data.dataset import Dataset, Episode
from manipi.data.lerobot.index import (
    SLACK,
    LeRobotIndex,
    how_off,
    metadata_faults,
    off_grid,
    read_index,
    time_fault,
)
from manipi.data.lerobot.reader import LeRobotDataset
from manipi.data.lerobot.tables import (
    ROW_COLUMNS,
    Fault,
    column_names,
    leave_out,
    listed,
    read_values,
    row_faults,
    runs,
)
from manipi.data.review.report import Finding, error, frames, from_error, warning
from manipi.data.review.values import uneven_timestamps
from manipi.errors import DataError, quoted

NUMBERING = ("frame_index", "index")
"""Columns that no picture or value is found by, and that a table need not have."""


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
    findings = [_of_fault(fault, "metadata") for fault in faults]
    listed = {e.index for e in index.episodes} - {number for fault in faults for number in fault.episodes}
    wanted = index.features.keys() if keys is None else index.features.keys() & set(keys)
    absent = list(_absent(index, root, wanted))
    wanted -= {key for finding in absent for key in finding.features}
    if absent and not absent[0].features:
        return [*findings, *absent], None, None
    in_tables, spoilt, seconds = _tables(index, root, wanted)
    of_times, times, timeless = _times(index, root, wanted, {n: seconds[n] for n in listed - spoilt if n in seconds})
    findings += [*absent, *in_tables, *of_times]
    for path in sorted(set((root / "data").rglob("*.parquet")) - set(index.tables)):
        # A recording or conversion that died before the metadata were written left it behind.
        what = f"{path} belongs to no episode of the metadata"
        findings.append(warning("tables", what, "record or convert its episodes again, or delete the file"))
    findings += _video_lengths(index, wanted, times)
    sound = sorted(listed - spoilt)
    # Pictures inside tables are found by their rows, and videos without them, at frame / fps.
    inside = any(f.dtype == "image" for k, f in index.features.items() if k in wanted)
    to_decode = [number for number in (sound if inside else sorted(listed)) if number not in timeless]
    rows, pictures = (
        LeRobotDataset(root, numbers, times, index.clips) if numbers else None for numbers in (sound, to_decode)
    )
    return findings, rows, pictures


def _tables(
    index: LeRobotIndex, root: Path, keys: Collection[str]
) -> tuple[list[Finding], set[int], dict[int, np.ndarray]]:
    """What is wrong in the tables, the numbers of the episodes whose rows cannot be used, and each one's timestamps."""
    vectors = {k: math.prod(f.shape) for k, f in index.features.items() if f.kind == "vector"}
    widths = {k: w for k, w in vectors.items() if k in keys} | dict.fromkeys(NUMBERING, 1)
    findings, spoilt, seconds = list[Finding](), set[int](), dict[int, np.ndarray]()
    for path, promised in tqdm(index.by_table().items(), desc="tables", unit="file", leave=False):
        try:
            absent = set(NUMBERING) - set(column_names(path, root))
            wanted = {key: width for key, width in (widths | ROW_COLUMNS).items() if key not in absent}
            values = read_values(path, wanted, root)
            faults = list(row_faults(path, root, promised, index.tasks, values))
        except DataError as e:
            faults = [Fault(e, tuple(e.index for e in promised))]
        else:
            for number, start, end in runs(values["episode_index"][:, 0]):
                seconds[number] = values["timestamp"][start:end, 0]
                for name in filter(values.__contains__, NUMBERING):
                    found = values[name][start:end, 0]
                    expected = np.arange(end - start) + (0 if name == "frame_index" else found[0])
                    if (wrong := np.flatnonzero(found != expected)).size:
                        at, count = int(wrong[0]), frames(wrong.size)
                        what = f"{name} is {found[at]} where {expected[at]} belongs ({count} in all), in {path}"
                        next = "manipi convert <folder> TARGET  # numbers them anew"
                        findings.append(error("numbering", what, next, (number,), at))
        for fault in faults:
            check = "timestamps" if "timestamps" in fault.error.expected else "numbering"
            findings.append(_of_fault(fault, "tables" if fault.frame is None else check))
            spoilt |= set(fault.episodes)
    return findings, spoilt, seconds


def _times(
    index: LeRobotIndex, root: Path, keys: Collection[str], seconds: Mapping[int, np.ndarray]
) -> tuple[list[Finding], dict[int, np.ndarray], set[int]]:
    """What is odd about the timestamps of episodes off the grid; those timestamps; and the numbers of the episodes
    whose videos have no pictures at them."""
    findings, times, timeless = [], dict[int, np.ndarray](), set[int]()
    for position, episode in enumerate(index.episodes):
        values = seconds.get(episode.index)
        if values is None:
            continue
        cameras = [camera for camera in index.clips if camera in keys]
        if not off_grid(values, np.arange(len(values)), index.fps).any() or not cameras:
            findings += uneven_timestamps(episode.index, values, index.fps)
            continue
        times[episode.index] = values
        faults = [fault for camera in cameras if (fault := time_fault(index, root, camera, position, values))]
        findings += [from_error(fault.error, "timestamps", fault.episodes, fault.frame) for fault in faults]
        if faults:
            timeless.add(episode.index)
        else:
            off = np.abs(values * index.fps - np.arange(len(values)))
            how, next = how_off(values, index.fps, index.clips[cameras[0]][position].start)
            what = f"{how}; pictures are taken at the timestamps, up to {off.max():.3g} frames from frame / fps"
            findings.append(warning("timestamps", what, next, (episode.index,), int(off.argmax())))
    return findings, times, timeless


def _of_fault(fault: Fault, check: str) -> Finding:
    finding = from_error(fault.error, check, fault.episodes, fault.frame)
    return replace(finding, next=fault.advice or finding.next)


def _absent(index: LeRobotIndex, root: Path, keys: Collection[str]) -> Iterator[Finding]:
    """What meta/info.json names and no file has: once, beside the files that no episode has.

    A finding about no feature in particular is about all tables, without which nothing can be looked into.
    """
    numbers, where = tuple(e.index for e in index.episodes), str(root / "meta/info.json")
    fetch = f"hf download <dataset> --repo-type dataset --local-dir {quoted(root)}  # fetches what is missing"
    tables = list(dict.fromkeys(index.tables))
    if not any(path.is_file() for path in tables):
        strays = sorted((root / "data").rglob("*.parquet"))
        what = f"{_nothing_at(tables)}, to which data_path leads{_of_no_episode(strays)}"
        yield error("tables", what, f"correct data_path in {where}" if strays else fetch, numbers, where=where)
        return
    of_videos = {key for key in keys if index.features[key].dtype == "video"}
    videos = {key: {clip.path for clip in index.clips.get(key, ())} for key in of_videos}
    empty = sorted(key for key, paths in videos.items() if not any(path.is_file() for path in paths))
    if empty:
        in_metadata = {clip.path for clips in index.clips.values() for clip in clips}
        strays = sorted(set((root / "videos").rglob("*.mp4")) - in_metadata)
        places = [path for key in empty for path in sorted(videos[key])]
        found = _nothing_at(places) if places else "no episode names one"
        advice = f"{leave_out(root, *empty)}  # if it was never recorded; else {fetch}"
        if strays and places:
            advice = f"correct video_path in {where}"
            if len(empty) < len(videos):
                advice = f"name the feature in {where} as its folder is named, or the folder as the feature"
        what = f"no file has pictures of {', '.join(empty)}: {found}{_of_no_episode(strays)}"
        yield error("pictures", what, advice, numbers, where=where, features=empty)
    # Columns that no table has, of those that can be read.
    named, absent = list[str](), set(keys) - of_videos - {*NUMBERING, *ROW_COLUMNS}
    for path in tables:
        if not absent:
            return
        with suppress(DataError):  # reading it tells
            named = column_names(path, root)
            absent = absent.difference(named)
    for key in sorted(absent) if named else ():
        what = f"expected the columns {listed([key])}; found only {listed(named)}"
        advice = f"{leave_out(root, key)}  # or take it out of {where}"
        place = f"{tables[0]}" + (f", and {len(tables) - 1} more" if len(tables) > 1 else "")
        yield error("tables", what, advice, numbers, where=place, features=(key,))


def _nothing_at(paths: list[Path]) -> str:
    return f"found nothing at {paths[0]}" + (f", and so at {len(paths) - 1} more places" if len(paths) > 1 else "")


def _of_no_episode(strays: list[Path]) -> str:
    if not strays:
        return ""
    some = "1 file there belongs" if len(strays) == 1 else f"{len(strays)} files there belong"
    return f"; {some} to no episode of the metadata, such as {strays[0]}"


def _video_lengths(index: LeRobotIndex, keys: Collection[str], elsewhere: Collection[int]) -> Iterator[Finding]:
    """Pictures that a video has beyond those of its episodes, or that two of its episodes share. Those that it lacks
    show when they are decoded; of episodes `elsewhere`, `_times` says what is wrong."""
    for clips in [clips for camera, clips in index.clips.items() if camera in keys]:
        belonging: dict[Path, list[Episode]] = {}
        for clip, episode in zip(clips, index.episodes, strict=True):
            belonging.setdefault(clip.path, []).append(episode)
            last = clip.start + (episode.length - 1) / index.fps
            if last > clip.end - SLACK / index.fps and episode.index not in elsewhere:
                there = f"its pictures in {clip.path} run to {last:.3f} s"
                next = "look with `manipi view` whether its last pictures are another episode's"
                what = f"{there}, its part of that file only to {clip.end:.3f} s"
                yield warning("pictures", what, next, (episode.index,))
        for path, episodes in belonging.items():
            count, concerned = sum(episode.length for episode in episodes), [episode.index for episode in episodes]
            try:
                with av.open(str(path)) as container:
                    found = container.streams.video[0].frames
            except (FFmpegError, IndexError):
                continue  # decoding reports it, with the episodes concerned
            if found > count and not set(concerned) & set(elsewhere):
                what = f"{frames(found)} in {path}, and only {count} in the episodes that it belongs to"
                yield warning("pictures", what, "look whether pictures and rows are shifted", concerned)
