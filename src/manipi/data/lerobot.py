"""LeRobot datasets: parquet tables, and pictures from MP4 files or from the tables. Metadata: `lerobot_index`."""

import hashlib
import io
from bisect import bisect_right
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from manipi.data.dataset import Dataset
from manipi.data.lerobot_index import broken, parquet_errors, read_columns, read_index
from manipi.data.shared import SharedArray
from manipi.data.video import VideoFrames, decoders_for

_FOOTER_BYTES = 1 << 20
_ROW_GROUPS = 8
"""Row groups of encoded pictures kept in RAM; LeRobot writes one per episode."""


class LeRobotDataset(Dataset):
    """A LeRobot dataset folder.

    Raises:
        DatasetNotFoundError: no episodes or frames.
        DatasetFormatError: an unknown version; metadata or tables that are missing, broken or disagree.
    """

    def __init__(self, root: Path):
        self._index = index = read_index(root)
        super().__init__(root=root, name=root.name, fps=index.fps, features=index.features, episodes=index.episodes)
        pictures = [index.features[camera].shape for camera in index.clips]
        self._videos = VideoFrames(decoders_for(max((h * w for h, w, _ in pictures), default=0)))
        self._pictures = lru_cache(maxsize=_ROW_GROUPS)(_read_pictures)

    def __reduce__(self) -> tuple:
        return LeRobotDataset, (self.root,)

    def _fingerprint(self) -> str:
        """SHA-256 over names and contents of metadata and tables.

        Tables that hold pictures are too big to be read for this; their footer tells the size and range of each column.
        """
        digest = hashlib.sha256()
        for path in self._index.metadata:
            digest.update(f"{path.relative_to(self.root)}\n".encode() + path.read_bytes())
        holds_pictures = any(self.features[key].dtype == "image" for key in self.cameras)
        for path in self._index.tables:
            with parquet_errors(path, self.root), path.open("rb") as file:
                size = path.stat().st_size
                file.seek(max(0, size - _FOOTER_BYTES) if holds_pictures else 0)
                digest.update(f"{path.relative_to(self.root)} {size}\n".encode())
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def prompt(self, row: int) -> str:
        if "task_index" not in self._columns:
            self._columns["task_index"] = SharedArray(self._read_task_indices())
        return self._index.tasks[int(self._columns["task_index"].array[row, 0])]

    def _read_task_indices(self) -> np.ndarray:
        indices = self._read_column("task_index")
        unknown = set(np.unique(indices).tolist()) - self._index.tasks.keys()
        if unknown:
            broken(self.root, f"task_index among {sorted(self._index.tasks)}", f"{sorted(unknown)}", "the data tables")
        return indices

    # Tables -----------------------------------------------------------------------------------------------------

    def _read_column(self, key: str) -> np.ndarray:
        self._check_row_order()
        width = int(np.prod(self.features[key].shape)) if key in self.features else 1
        return self._concatenate(key, width)

    @cached_property
    def _row_order(self) -> np.ndarray:
        return self._concatenate("episode_index", 1)[:, 0]

    def _check_row_order(self) -> None:
        """Rows are addressed by position, so every row must lie in the episode that the metadata put there."""
        expected = np.repeat([e.index for e in self.episodes], [e.length for e in self.episodes])
        if np.array_equal(expected, self._row_order):
            return
        if len(expected) != len(self._row_order):
            broken(self.root, f"{len(expected)} rows in the data tables", f"{len(self._row_order)}", "data/")
        row = int(np.argmax(expected != self._row_order))
        found = f"episode_index {self._row_order[row]}"
        broken(self.root, f"episode_index {expected[row]} in row {row}", found, self.root / "data")

    def _concatenate(self, key: str, width: int) -> np.ndarray:
        return np.concatenate([self._read_values(path, key, width) for path in self._index.tables])

    def _read_values(self, path: Path, key: str, width: int) -> np.ndarray:
        column = read_columns(path, [key], self.root).column(0)
        values = _numbers(column)
        if len(values) != len(column) * width:
            found = f"{len(values)} numbers in {len(column)} rows"
            broken(self.root, f"{width} numbers per row in {key!r}, as meta/info.json says", found, path)
        return values.astype(np.float32 if values.dtype.kind == "f" else np.int64).reshape(-1, width)

    # Pictures ---------------------------------------------------------------------------------------------------

    def _read_images(self, camera: str, rows: np.ndarray) -> np.ndarray:
        images = np.empty((len(rows), *self.features[camera].shape), np.uint8)
        read = self._read_video_frame if camera in self._index.clips else self._read_picture
        for i, row in enumerate(rows.tolist()):
            image = read(camera, row)
            if image.shape != images.shape[1:]:
                expected = f"a picture of shape {images.shape[1:]}, as meta/info.json says"
                broken(self.root, expected, f"{image.shape}", f"{camera}, {self.locate(row)}")
            images[i] = image
        return images

    def _read_video_frame(self, camera: str, row: int) -> np.ndarray:
        position = int(self.episode_of(np.asarray(row)))
        clip = self._index.clips[camera][position]
        seconds = clip.start + (row - self.episodes[position].start) / self.fps
        return self._videos.frame(clip.path, seconds, where=f"{clip.path}, {self.locate(row)}")

    def _read_picture(self, camera: str, row: int) -> np.ndarray:
        start, path, group = self._row_groups[bisect_right(self._row_groups, row, key=lambda entry: entry[0]) - 1]
        encoded = self._pictures(path, group, camera)[row - start]
        try:
            return np.asarray(Image.open(io.BytesIO(encoded["bytes"])).convert("RGB"))
        except OSError as error:
            broken(self.root, f"an encoded picture in {camera!r}", str(error), f"{path}, {self.locate(row)}")

    @cached_property
    def _row_groups(self) -> list[tuple[int, Path, int]]:
        """The smallest readable parts of the tables: first row, table, number within the table."""
        groups, start = [], 0
        for path in self._index.tables:
            with parquet_errors(path, self.root):
                metadata = pq.read_metadata(path)
            for number in range(metadata.num_row_groups):
                groups.append((start, path, number))
                start += metadata.row_group(number).num_rows
        return groups


def _read_pictures(path: Path, group: int, camera: str) -> list[dict[str, Any]]:
    return pq.ParquetFile(path).read_row_group(group, columns=[camera]).column(0).to_pylist()


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """All numbers of a column of numbers or of (nested) lists of numbers, flat."""
    values = column.combine_chunks()
    while pa.types.is_nested(values.type):
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False)
