"""LeRobot datasets: parquet tables, and pictures from MP4 files or from the tables. Metadata: `lerobot_index`."""

import hashlib
import io
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from manipi.data.dataset import Dataset, PromptSource
from manipi.data.lerobot_index import open_index
from manipi.data.lerobot_tables import ROW_COLUMNS, broken, parquet_errors, read_values, row_faults
from manipi.data.video import VideoFrames, decoders_for
from manipi.errors import DataError
from manipi.remote.fetch import fetch, origin

_FOOTER_BYTES = 1 << 20
_ROW_GROUPS = 8
"""Row groups of encoded pictures kept in RAM; LeRobot writes one per episode."""


class LeRobotDataset(Dataset):
    """A LeRobot dataset folder.

    Args:
        numbers: the episodes to use, in ascending order, where not all: files of others are not touched.

    Raises:
        DatasetNotFoundError: no episodes or frames.
        DatasetFormatError: an unknown version; metadata or tables that are missing, broken or disagree.
        ConfigError: no episode of that number.
    """

    def __init__(self, root: Path, numbers: Sequence[int] = ()):
        self._index = index = open_index(root, numbers)
        self._numbers, self._tables = tuple(numbers), list(dict.fromkeys(index.tables))
        super().__init__(root=root, name=root.name, fps=index.fps, features=index.features, episodes=index.episodes)
        pictures = [index.features[camera].shape for camera in index.clips]
        self._videos = VideoFrames(decoders_for(max((h * w for h, w, _ in pictures), default=0)))
        self._origin = origin(root / "meta").removesuffix("/meta/")
        self._pictures = lru_cache(maxsize=_ROW_GROUPS)(_read_pictures)

    def __reduce__(self) -> tuple:
        return LeRobotDataset, (self.root, self._numbers)

    def _fingerprint(self) -> str:
        """SHA-256 over names and contents of metadata and tables.

        Tables that hold pictures are too big to be read for this; their footer tells the size and range of each column.
        """
        digest = hashlib.sha256(f"{self._numbers}".encode() if self._numbers else b"")
        for path in self._index.metadata:
            digest.update(f"{path.relative_to(self.root)}\n".encode() + path.read_bytes())
        holds_pictures = any(self.features[key].dtype == "image" for key in self.cameras)
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
        if not self._index.subtasks or "subtask_index" not in self.features:
            return super().subtask(row)
        number = int(self.column("subtask_index")[row, 0])
        if number not in self._index.subtasks:
            known = f"subtask_index among {sorted(self._index.subtasks)}"
            broken(self.root, known, str(number), f"{self.root}, {self.locate(row)}")
        return self._index.subtasks[number]

    def instructions(self, source: PromptSource) -> tuple[list[str], np.ndarray]:
        key = "task_index" if source == "task" else "subtask_index"
        prompt_at = self.prompt if source == "task" else self.subtask
        if source == "subtask" and key not in self.features:
            prompt_at(0)
        _, first, numbers = np.unique(self.column(key)[:, 0], return_index=True, return_inverse=True)
        return [prompt_at(row) for row in first.tolist()], numbers.reshape(-1, 1)

    def place(self, row: int) -> str:
        return f"{self._index.tables[int(self.episode_of(np.asarray(row)))]}, {self.locate(row)}"

    # Tables -----------------------------------------------------------------------------------------------------

    def _read_column(self, key: str) -> np.ndarray:
        width = int(np.prod(self.features[key].shape)) if key in self.features else 1
        rows, values = self._table_rows, self._concatenate({key: width})[key]
        return values[rows] if self._numbers else values  # a copy costs a tenth of the reading

    @cached_property
    def _table_rows(self) -> np.ndarray:
        """Which row of the tables each row is. Rows are addressed by position, so they must be as promised."""
        found = self._concatenate(ROW_COLUMNS)
        numbers, seconds, tasks = (found[key][:, 0] for key in ROW_COLUMNS)
        rows = np.flatnonzero(np.isin(numbers, self._numbers)) if self._numbers else np.arange(len(numbers))
        expected = np.repeat([e.index for e in self.episodes], [e.length for e in self.episodes])
        if np.array_equal(expected, numbers[rows]) and np.isin(tasks[rows], list(self._index.tasks)).all():
            ascends = np.diff(seconds[rows]) > 0
            if ascends[np.diff(expected) == 0].all():
                return rows
        raise self._row_fault()

    def _row_fault(self) -> DataError:
        for path, promised in self._index.by_table().items():
            values = read_values(path, ROW_COLUMNS, self.root)
            for fault in row_faults(path, self.root, promised, self._index.tasks, values, only=bool(self._numbers)):
                return fault.error
        raise AssertionError("the fast test and row_faults disagree")

    def _concatenate(self, widths: dict[str, int]) -> dict[str, np.ndarray]:
        parts = [read_values(path, widths, self.root) for path in self._tables]
        return {key: np.concatenate([part[key] for part in parts]) if parts[1:] else parts[0][key] for key in widths}

    # Pictures ---------------------------------------------------------------------------------------------------

    def _read_images(self, camera: str, rows: np.ndarray) -> np.ndarray:
        images = np.empty((len(rows), *self.features[camera].shape), np.uint8)
        read = self._read_video_frame if camera in self._index.clips else self._read_picture
        for i, row in enumerate(rows.tolist()):
            image = read(camera, row)
            if image.shape != images.shape[1:]:
                expected = f"a picture of shape {images.shape[1:]}, as meta/info.json says"
                broken(self.root, expected, f"{image.shape}", f"{self._file(camera, row)}, {self.locate(row)}")
            images[i] = image
        return images

    def _file(self, camera: str, row: int) -> Path:
        position = int(self.episode_of(np.asarray(row)))
        return self._index.clips[camera][position].path if camera in self._index.clips else self._index.tables[position]

    def _read_video_frame(self, camera: str, row: int) -> np.ndarray:
        position = int(self.episode_of(np.asarray(row)))
        clip = self._index.clips[camera][position]
        seconds = clip.start + (row - self.episodes[position].start) / self.fps
        return self._videos.frame(self._here(clip.path), seconds, where=f"{clip.path}, {self.locate(row)}")

    def _here(self, path: Path) -> Path:
        """A video of a dataset whose metadata were fetched comes when it is first needed."""
        if not self._origin or path.exists():
            return path
        return fetch(f"{self._origin}/{path.relative_to(self.root)}", show=False)

    def _read_picture(self, camera: str, row: int) -> np.ndarray:
        stored = int(self._table_rows[row])
        start, path, group = self._row_groups[bisect_right(self._row_groups, stored, key=lambda entry: entry[0]) - 1]
        encoded = self._pictures(path, group, camera)[stored - start]
        try:
            return np.asarray(Image.open(io.BytesIO(encoded["bytes"])).convert("RGB"))
        except OSError as error:
            broken(self.root, f"an encoded picture in {camera!r}", str(error), f"{path}, {self.locate(row)}")

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


def _read_pictures(path: Path, group: int, camera: str) -> list[dict[str, Any]]:
    return pq.ParquetFile(path).read_row_group(group, columns=[camera]).column(0).to_pylist()
