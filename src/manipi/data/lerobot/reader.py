"""LeRobot datasets: parquet tables, and pictures from MP4 files or from the tables. Metadata: `index`."""

import hashlib
import logging
import math
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Float64

from manipi.data.dataset import Dataset, PromptSource
from manipi.data.lerobot.index import off_grid, open_index, time_fault
from manipi.data.lerobot.language import EVENTS, PERSISTENT, Language, read_language
from manipi.data.lerobot.tables import (
    ROW_COLUMNS,
    Table,
    broken,
    format_error,
    leave_out,
    parquet_errors,
    read_values,
    row_faults,
    runs,
)
from manipi.data.lerobot.video import DeepPicture, VideoFrames, decode_picture, decoders_for, without_camera
from manipi.errors import FetchError, MissingFeatureError, shown
from manipi.processes import SharedArray
from manipi.remote.fetch import StoreFile, fetch, listing, origin
from manipi.types import Said

logger = logging.getLogger(__name__)

_FOOTER_BYTES = 1 << 20
_ENDS = 4096
"""Bytes that are read at each end of a video."""
_ROW_GROUPS = 8
"""Row groups of encoded pictures kept in RAM; LeRobot writes one per episode."""


class LeRobotDataset(Dataset):
    """A LeRobot dataset folder.

    Args:
        numbers: the episodes to use, in ascending order, where not all: files of others are not touched.
        times: the timestamps of each episode off the grid (`index.off_grid`), by its number; None: the tables say.
        compared: cameras whose videos are known to have pictures at these times.
        texts: those of the styles that were read already; which holds at a row is among the columns.

    Raises:
        DatasetNotFoundError: no episodes or frames.
        DatasetFormatError: an unknown version; metadata or tables that are missing, broken or disagree.
        ConfigError: no episode of that number.
    """

    def __init__(
        self,
        root: Path,
        numbers: Sequence[int] = (),
        times: Mapping[int, Float64[np.ndarray, " T"]] | None = None,
        compared: Collection[str] = (),
        texts: Mapping[str, list[str]] = MappingProxyType({}),
    ):
        self._index = index = open_index(root, numbers)
        self._numbers, self._tables = tuple(numbers), list(dict.fromkeys(index.tables))
        super().__init__(root=root, name=root.name, fps=index.fps, features=index.features, episodes=index.episodes)
        pictures = [index.features[camera].shape for camera in index.clips if camera in index.features]
        self._videos = VideoFrames(decoders_for(max((math.prod(shape[:2]) for shape in pictures), default=0)))
        self._origin = origin(root / "meta").removesuffix("/meta/")
        self._pictures = lru_cache(maxsize=_ROW_GROUPS)(_read_pictures)
        self._compared = set(compared)
        self._texts = dict(texts)
        if times is not None:
            self._times = times

    def __reduce__(self) -> tuple:
        return LeRobotDataset, (self.root, self._numbers, self.__dict__.get("_times"), self._compared, self._texts)

    def _fingerprint(self) -> str:
        """SHA-256 over names and contents of metadata and tables.

        Tables that hold pictures are too big to be read for this; their footer tells the size and range of each column.
        Of episodes off the grid, earlier releases took pictures by frame number: theirs may not be mixed with these.
        """
        digest = hashlib.sha256(f"{self._numbers}".encode() if self._numbers else b"")
        for path in self._index.metadata:
            digest.update(f"{path.relative_to(self.root)}\n".encode() + path.read_bytes())
        if self._index.clips and self._times:
            digest.update(b"pictures at timestamps")
        holds_pictures = any(feature.dtype == "image" for feature in self.features.values())
        for path in self._tables:
            with parquet_errors(path, self.root), path.open("rb") as file:
                size = path.stat().st_size
                file.seek(max(0, size - _FOOTER_BYTES) if holds_pictures else 0)
                digest.update(f"{path.relative_to(self.root)} {size}\n".encode())
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def prompt(self, row: int) -> str:
        return self._index.tasks[int(self.column("task_index")[row, 0])]

    def subtask(self, row: int) -> str:
        texts, numbers = self.texts("subtask")
        if numbers[row] < 0:
            raise MissingFeatureError(
                expected="a subtask",
                found="none that holds there yet",
                where=self.place(row),
                next="annotate the episode from its first frame on, or leave such frames out (--data.keep)",
            )
        return texts[numbers[row]]

    def instructions(self, source: PromptSource) -> tuple[list[str], np.ndarray]:
        """A frame without a subtask has the text "", which training refuses as an instruction."""
        if source == "subtask":
            texts, numbers = self.texts("subtask")
            return ([*texts, ""], np.where(numbers < 0, len(texts), numbers)[:, None])
        _, first, numbers = np.unique(self.column("task_index")[:, 0], return_index=True, return_inverse=True)
        return [self.prompt(row) for row in first.tolist()], numbers.reshape(-1, 1)

    def texts(self, style: str) -> tuple[list[str], np.ndarray]:
        """Of subtasks those of language_persistent, and at frames where none of them holds those of subtask_index."""
        key = f"which text of style {style}"
        if key not in self._columns:
            texts, numbers = self._language.holding(style, self.episodes, self._read_column("timestamp")[:, 0])
            if style == "subtask" and self._index.subtasks and "subtask_index" in self.features:
                rows = np.flatnonzero(numbers < 0)
                old, first, numbers[rows] = np.unique(
                    self.column("subtask_index")[rows, 0], return_index=True, return_inverse=True
                )
                numbers[rows] += len(texts)
                for number, row in zip(old.tolist(), rows[first].tolist(), strict=True):
                    if number not in self._index.subtasks:
                        known = f"subtask_index among {sorted(self._index.subtasks)}"
                        next = f"give it a text in {self.root / 'meta/subtasks.parquet'}, or use --data.prompt task"
                        broken(self.root, known, str(number), f"{self.root}, {self.locate(row)}", next)
                    texts.append(self._index.subtasks[number])
            self._texts[style], self._columns[key] = texts, SharedArray(numbers)
        if not self._texts[style]:
            return super().texts(style) if style != "subtask" else ([super().subtask(0)], self._rows[0])  # both raise
        kept = self._columns[key]
        return self._texts[style], kept.array if isinstance(kept, SharedArray) else kept

    def said(self, position: int) -> tuple[Sequence[Said], Mapping[int, Sequence[Said]]]:
        episode, events = self.episodes[position], self._language.events
        stored = self._rows[0][episode.start : episode.start + episode.length].tolist()
        by_frame = {frame: events[row] for frame, row in enumerate(stored) if events.get(row)}
        return self._language.persistent.get(episode.index, ()), by_frame

    @cached_property
    def _language(self) -> Language:
        columns = [key for key in (PERSISTENT, EVENTS) if key in self.features]
        if not columns:
            return Language(persistent={}, events={})
        numbers = self._concatenate({"episode_index": 1})["episode_index"][:, 0]
        chosen = np.isin(numbers, [episode.index for episode in self.episodes])
        return read_language(self._tables, self.root, columns, np.where(chosen, numbers, -1), self.features)

    def place(self, row: int) -> str:
        return f"{self._index.tables[int(self.episode_of(np.asarray(row)))]}, {self.locate(row)}"

    # Tables -----------------------------------------------------------------------------------------------------

    def _read_column(self, key: str) -> np.ndarray:
        width = int(np.prod(self.features[key].shape)) if key in self.features else 1
        rows, values = self._rows[0], self._concatenate({key: width})[key]
        values = values.astype(np.float32, copy=False) if values.dtype.kind == "f" else values
        in_order = len(rows) == len(values) and np.array_equal(rows, np.arange(len(rows)))
        return values if in_order else values[rows]  # a copy costs a tenth of the reading

    @cached_property
    def _times(self) -> Mapping[int, Float64[np.ndarray, " T"]]:
        """The timestamps of the episodes off the grid, by episode number."""
        return self._rows[1]

    @cached_property
    def _rows(self) -> tuple[np.ndarray, Mapping[int, Float64[np.ndarray, " T"]]]:
        """Which row of the tables each row is, and `_times`. The tables must hold what the metadata promise."""
        found = self._concatenate(ROW_COLUMNS)
        numbers, seconds, tasks = (found[key][:, 0] for key in ROW_COLUMNS)
        lengths = {e.index: e.length for e in self.episodes}
        pieces = [piece for piece in runs(numbers) if not self._numbers or piece[0] in lengths]
        whole = {number: np.arange(start, end) for number, start, end in pieces if lengths.get(number) == end - start}
        if len(pieces) == len(whole) == len(lengths):
            rows = np.concatenate([whole[e.index] for e in self.episodes])
            seconds, known = seconds[rows], np.isin(tasks[rows], list(self._index.tasks)).all()
            ascends = np.diff(seconds) > 0
            ascends[self.starts[1:] - 1] = True  # from one episode to the next
            if known and ascends.all() and np.isfinite(seconds).all():
                frames = np.arange(len(rows)) - np.repeat(self.starts, self.ends - self.starts)
                off = self.episode_of(np.flatnonzero(off_grid(seconds, frames, self.fps)))
                chosen = [self.episodes[position] for position in np.unique(off).tolist()]
                return rows, {e.index: seconds[e.start : e.start + e.length].copy() for e in chosen}
        for path, promised in self._index.by_table().items():
            values = read_values(path, ROW_COLUMNS, self.root)
            for fault in row_faults(path, self.root, promised, self._index.tasks, values, only=bool(self._numbers)):
                raise fault.error
        raise AssertionError("the fast test and row_faults disagree")

    def _concatenate(self, widths: dict[str, int]) -> dict[str, np.ndarray]:
        """Floats where any table has floats: tables may have other types than each other."""
        parts = [read_values(path, widths, self.root) for path in self._tables]
        return {key: np.concatenate([part[key] for part in parts]) if parts[1:] else parts[0][key] for key in widths}

    # Pictures ---------------------------------------------------------------------------------------------------

    def _read_images(self, camera: str, rows: np.ndarray) -> np.ndarray:
        shape, read = self.features[camera].shape, self._read_picture
        if camera in self._index.clips:
            self._compare_times(camera)
            read = self._read_video_frame
        elif self.features[camera].dtype == "video":
            where, next = f"{self.root / 'meta/episodes'}, {camera!r}", without_camera(self.root)
            broken(self.root, "the place of a video in the entry of each episode", "none", where, next)
        images = np.empty((0, *shape), np.uint8)
        for i, row in enumerate(rows.tolist()):
            image = read(camera, row)
            if image.shape != shape:
                expected = f"a picture of shape {shape}, as meta/info.json says"
                position = int(self.episode_of(np.asarray(row)))
                clips = self._index.clips.get(camera)
                file = clips[position].path if clips else self._index.tables[position]
                correct = f"correct its shape in {self.root / 'meta/info.json'}, if all pictures have this one"
                next = f"{correct}; else record the episode again"
                broken(self.root, expected, f"{image.shape}", f"{file}, {self.locate(row)}", next)
            if not i:  # memory is taken for a shape that a picture has
                images = np.empty((len(rows), *shape), np.uint8)
            images[i] = image
        return images

    def _read_video_frame(self, camera: str, row: int) -> np.ndarray:
        position = int(self.episode_of(np.asarray(row)))
        clip, episode = self._index.clips[camera][position], self.episodes[position]
        frame, times, path = row - episode.start, self._times.get(episode.index), clip.path
        seconds = clip.start + (frame / self.fps if times is None else float(times[frame]))
        if self._origin and not path.exists():  # a video of a dataset in a store comes when it is first needed
            path = fetch(f"{self._origin}/{path.relative_to(self.root)}", show=False)
        return self._videos.frame(path, seconds, where=f"{clip.path}, {self.locate(row)}")

    def _compare_times(self, camera: str) -> None:
        """Once per camera: a video that is here must have a picture at every timestamp of episodes off the grid.

        One that is not here yet is not fetched for this; its decoder says where it has none.
        """
        if camera in self._compared:
            return
        for position, episode in enumerate(self.episodes):
            times = self._times.get(episode.index)
            if times is not None and (fault := time_fault(self._index, self.root, camera, position, times)):
                raise fault.error
        self._compared.add(camera)

    def picture_files(self, cameras: Sequence[str]) -> dict[str, str]:
        clips = [clip.path for camera in cameras for clip in self._index.clips.get(camera, ())]
        paths = sorted(set(clips), key=str)
        names = [str(path.relative_to(self.root)) for path in paths]
        if not self._origin:
            with ThreadPoolExecutor(8) as pool:  # on a disk over the network, opening is what takes time
                return {name: state for name, state in zip(names, pool.map(_state, paths)) if state}
        # Of a web server, each file would have to be asked for.
        files = _videos(self._origin) if names and not self._origin.startswith("http") else {}
        known = {name: files.get(name.removeprefix("videos/")) for name in names}
        return {name: f"{file.size} {self._origin} {file.version}" for name, file in known.items() if file}

    def _read_picture(self, camera: str, row: int) -> np.ndarray:
        stored = int(self._rows[0][row])
        start, path, group = self._row_groups[bisect_right(self._row_groups, stored, key=lambda entry: entry[0]) - 1]
        entry = self._pictures(self.root, path, group, camera)[stored - start]
        encoded = entry.get("bytes") if isinstance(entry, dict) else entry
        try:
            if isinstance(encoded, bytes):
                return decode_picture(encoded)
            found = shown(entry) if encoded is None else f"a {type(encoded).__name__}"
            next = f"{leave_out(self.root, camera)}  # leaves this camera out"
        except DeepPicture as error:
            found, next = str(error), f"store it with 8 bits, or: {leave_out(self.root, camera)}"
        except ValueError as error:
            found, next = shown(str(error), 200), ""
        expected = f"an encoded picture of 8 bits per channel in {camera!r}"
        raise format_error(self.root, expected, found, f"{path}, {self.locate(row)}", next)

    @cached_property
    def _row_groups(self) -> list[tuple[int, Path, int]]:
        """The smallest readable parts of the tables: first row, table, number within the table."""
        groups, start = [], 0
        for path in self._tables:
            with parquet_errors(path, self.root):
                metadata = pq.read_metadata(path)
            for number in range(metadata.num_row_groups):
                groups.append((start, path, number))
                start += metadata.row_group(number).num_rows
        return groups


def _read_pictures(root: Path, path: Path, group: int, camera: str) -> list[dict[str, Any] | bytes]:
    with parquet_errors(path, root):
        return Table(path, root, [camera], row_group=group).objects(camera)


def _state(video: Path) -> str:
    """What a file is known by without being read: its size, its head and its tail, at one of which an MP4 file has the
    sizes of all its frames. Empty where there is none."""
    try:
        with video.open("rb") as file:
            head, size = file.read(_ENDS), file.seek(0, 2)
            file.seek(max(0, size - _ENDS))
            return f"{size} ends {hashlib.sha256(head + file.read(_ENDS)).hexdigest()[:32]}"
    except FileNotFoundError:  # what needs it says so
        return ""


@cache
def _videos(url: str) -> dict[str, StoreFile]:
    """What a store has there now. One that cannot be reached is said in the log, and leaves the files unknown."""
    try:
        return listing(f"{url}/videos")
    except FetchError as error:
        logger.warning("whether the videos of %s were replaced is not known: %s", url, error.found)
        return {}
