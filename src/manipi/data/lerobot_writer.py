"""Write LeRobot v3.0 datasets: many episodes per table and per video file, whole or not at all.

The folder, schemas and statistics are those of lerobot 0.4, which opens the result as its own.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from manipi.data.dataset import Feature
from manipi.data.lerobot_stats import EpisodeStats, image_stats, merge, vector_stats
from manipi.data.video import VideoWriter
from manipi.errors import BadValueError, ConfigError, MissingFeatureError
from manipi.storage import atomic_directory

_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_EPISODES = "meta/episodes/chunk-000/file-000.parquet"
_CHUNK_FILES = 1000
_ROWS_PER_GROUP = 16_384
_EPISODES_PER_GROUP = 1_000
_DEFAULTS = {"timestamp": "float32"} | dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")

_File = TypeVar("_File", "_TableFile", VideoWriter)


class LeRobotWriter:
    """A LeRobot v3.0 dataset in the making; it appears at `root` when the block ends well.

        with LeRobotWriter(root, fps=10, features=features, robot_type="tabletop") as writer:
            writer.add_episode({"image": images, "state": states, "action": actions}, task="push the block")

    Args:
        root: a folder that does not exist yet.
        features: pictures (uint8 [h, w, 3], stored as video) and vectors (float32 or int64 [d]) by key.
        data_mb, video_mb: a new table or video file begins at this size.
        pix_fmt, crf: how pictures are encoded, see `VideoWriter`.

    Raises:
        StorageError: `root` exists, the disk is full, or the folder cannot be written. Nothing half-written stays.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        fps: int,
        features: Mapping[str, Feature],
        robot_type: str,
        data_mb: int = 100,
        video_mb: int = 200,
        pix_fmt: str = "yuv420p",
        crf: int = 23,
    ):
        self.root, self.fps, self.features, self.robot_type = Path(root), fps, dict(features), robot_type
        self.num_episodes = self.num_frames = 0
        for key, feature in self.features.items():
            _check_feature(key, feature)
        self._pix_fmt, self._closed = pix_fmt, False
        self._tasks: dict[str, int] = {}
        self._totals: dict[str, EpisodeStats] = {}
        self._limits = {"data_files_size_in_mb": data_mb, "video_files_size_in_mb": video_mb}
        self._stack = ExitStack()
        self._folder = self._stack.enter_context(atomic_directory(self.root))
        self._tables = _Files(
            self._folder, _DATA, partial(_TableFile, rows_per_group=_ROWS_PER_GROUP), limit_mb=data_mb
        )
        self._videos: dict[str, _Files[VideoWriter]] = {}
        for key, feature in self.features.items():
            if feature.kind == "image":
                height, width, _ = feature.shape
                begin = partial(VideoWriter, fps=fps, height=height, width=width, pix_fmt=pix_fmt, crf=crf)
                template = _VIDEO.replace("{video_key}", key)
                self._videos[key] = _Files(self._folder, template, begin, limit_mb=video_mb)
        self._episodes = _TableFile(self._folder / _EPISODES, rows_per_group=_EPISODES_PER_GROUP)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self._stack.__exit__(kind, error, tb)

    def close(self) -> None:
        """Write what is still in memory and the metadata, and let the folder appear at `root`."""
        if self._closed:
            return
        self._closed = True
        with self._stack:
            if not self.num_episodes:
                raise ConfigError(
                    expected="at least one episode", found="none", where=str(self.root), next="call add_episode first"
                )
            for files in (self._tables, self._episodes, *self._videos.values()):
                files.close()
            self._write_metadata()

    def add_episode(self, data: Mapping[str, np.ndarray], *, task: str) -> None:
        """Append one episode.

        Args:
            data: per feature the values of all T frames, [T, h, w, 3] or [T, d].
            task: the instruction.

        Raises:
            MissingFeatureError: a feature without values, or values without a feature.
            ConfigError: no frames, or a shape or type that differs from the feature's.
            BadValueError: NaN or infinity.
        """
        length = self._check(data)
        vectors = {
            key: np.asarray(data[key]).astype(feature.dtype)
            for key, feature in self.features.items()
            if feature.kind == "vector"
        }
        vectors |= self._default_columns(length, self._tasks.setdefault(task, len(self._tasks)))
        stats = {key: image_stats(data[key]) for key in self._videos} | vector_stats(vectors)
        row = {"episode_index": self.num_episodes, "tasks": [task], "length": length}
        row |= self._write_rows(vectors)
        row |= {"dataset_from_index": self.num_frames, "dataset_to_index": self.num_frames + length}
        for key in self._videos:
            row |= self._write_video(key, data[key])
        row |= {f"stats/{key}/{name}": values.tolist() for key, part in stats.items() for name, values in part.items()}
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        self._episodes.add(pa.table({name: [value] for name, value in row.items()}))
        self._totals = {key: merge(self._totals[key], part) if self._totals else part for key, part in stats.items()}
        self.num_episodes += 1
        self.num_frames += length

    def _write_rows(self, vectors: Mapping[str, np.ndarray]) -> dict[str, int]:
        self._tables.current().add(_rows_table(vectors))
        return {f"data/{name}": value for name, value in self._tables.place.items()}

    def _write_video(self, key: str, images: np.ndarray) -> dict[str, float]:
        video = self._videos[key].current()
        start = video.num_frames / self.fps
        video.add(images)
        times = {"from_timestamp": start, "to_timestamp": video.num_frames / self.fps}
        return {f"videos/{key}/{name}": value for name, value in (self._videos[key].place | times).items()}

    def _default_columns(self, length: int, task: int) -> dict[str, np.ndarray]:
        frame = np.arange(length)
        return {
            "timestamp": (frame / self.fps).astype(np.float32)[:, None],
            "frame_index": frame[:, None],
            "episode_index": np.full((length, 1), self.num_episodes),
            "index": self.num_frames + frame[:, None],
            "task_index": np.full((length, 1), task),
        }

    def _check(self, data: Mapping[str, np.ndarray]) -> int:
        where = f"{self.root}, episode {self.num_episodes}"
        if data.keys() != self.features.keys():
            raise MissingFeatureError(
                expected=f"values for {', '.join(sorted(self.features))}",
                found=", ".join(sorted(data)),
                where=where,
                next="pass add_episode one array per feature that LeRobotWriter was given",
            )
        length = max(len(values) for values in data.values())
        for key, feature in self.features.items():
            values = np.asarray(data[key])
            wanted = np.dtype(np.uint8 if feature.kind == "image" else feature.dtype)
            castable = np.can_cast(values.dtype, wanted, "same_kind")
            if values.shape != (length, *feature.shape) or not length or not castable:
                raise ConfigError(
                    expected=f"{key!r} as {feature.dtype} of shape {(length or 'T', *feature.shape)}",
                    found=f"{values.dtype} of shape {values.shape}",
                    where=where,
                    next="give every feature the same number of frames, at least one, in its own shape and type",
                )
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                frame = int(np.argwhere(~np.isfinite(values))[0, 0])
                raise BadValueError(
                    expected=f"finite numbers in {key!r}",
                    found="NaN or infinity",
                    where=f"{where}, frame {frame}",
                    next="repair the recording, or leave this episode out",
                )
        return length

    def _write_metadata(self) -> None:
        info = {
            "codebase_version": "v3.0",
            "robot_type": self.robot_type,
            "total_episodes": self.num_episodes,
            "total_frames": self.num_frames,
            "total_tasks": len(self._tasks),
            "chunks_size": _CHUNK_FILES,
            **self._limits,
            "fps": self.fps,
            "splits": {"train": f"0:{self.num_episodes}"},
            "data_path": _DATA,
            "video_path": _VIDEO if self._videos else None,
            "features": {key: self._feature_info(key, feature) for key, feature in self.features.items()}
            | {key: {"dtype": dtype, "shape": [1], "names": None} for key, dtype in _DEFAULTS.items()},
        }
        stats = {key: {name: value.tolist() for name, value in part.items()} for key, part in self._totals.items()}
        meta = self._folder / "meta"
        meta.mkdir(exist_ok=True)
        (meta / "info.json").write_text(json.dumps(info, indent=4))
        (meta / "stats.json").write_text(json.dumps(stats, indent=4))
        pq.write_table(_tasks_table(list(self._tasks)), meta / "tasks.parquet")

    def _feature_info(self, key: str, feature: Feature) -> dict[str, Any]:
        if key not in self._videos:
            return {"dtype": feature.dtype, "shape": list(feature.shape), "names": list(feature.names) or None}
        height, width, channels = feature.shape
        video = {"height": height, "width": width, "codec": "h264", "pix_fmt": self._pix_fmt}
        video |= {"is_depth_map": False, "fps": self.fps, "channels": channels}
        return {
            "dtype": "video",
            "shape": list(feature.shape),
            "names": ["height", "width", "channels"],
            "info": {f"video.{name}": value for name, value in video.items()} | {"has_audio": False},
        }


def _check_feature(key: str, feature: Feature) -> None:
    is_picture = feature.kind == "image" and len(feature.shape) == 3 and feature.shape[2] == 3
    if not is_picture and (feature.kind != "vector" or len(feature.shape) != 1):
        raise ConfigError(
            expected="pictures of shape (h, w, 3) and vectors of shape (d,)",
            found=f"{feature.kind} of shape {feature.shape}",
            where=f"feature {key!r}",
            next="reshape the feature, or leave it out",
        )


# Files --------------------------------------------------------------------------------------------------------------


class _TableFile:
    """One parquet file, whose rows wait in RAM until they fill a row group."""

    def __init__(self, path: Path, *, rows_per_group: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._rows_per_group = path, rows_per_group
        self._waiting: list[pa.Table] = []
        self._num_waiting = self.num_bytes = 0
        self._file: pq.ParquetWriter | None = None

    def add(self, table: pa.Table) -> None:
        self._waiting.append(table)
        self._num_waiting += table.num_rows
        self.num_bytes += table.nbytes
        if self._num_waiting >= self._rows_per_group:
            self._flush()

    def close(self) -> None:
        if self._waiting:
            self._flush()
        if self._file:
            self._file.close()

    def _flush(self) -> None:
        table = pa.concat_tables(self._waiting).combine_chunks()
        self._file = self._file or pq.ParquetWriter(self._path, table.schema)
        self._file.write_table(table)
        self._waiting, self._num_waiting = [], 0


class _Files(Generic[_File]):
    """A row of files, each begun when the one before has reached its size; an episode lies in one file."""

    def __init__(self, folder: Path, template: str, begin: Callable[[Path], _File], *, limit_mb: int):
        self._folder, self._template, self._begin, self._limit = folder, template, begin, limit_mb * 2**20
        self._number = -1
        self._current: _File | None = None

    def current(self) -> _File:
        """The file that takes the next episode."""
        if self._current is None or self._current.num_bytes >= self._limit:
            self.close()
            self._number += 1
            path = self._folder / self._template.format(**self.place)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._current = self._begin(path)
        return self._current

    @property
    def place(self) -> dict[str, int]:
        return {"chunk_index": self._number // _CHUNK_FILES, "file_index": self._number % _CHUNK_FILES}

    def close(self) -> None:
        if self._current is not None:
            self._current.close()


# Tables -------------------------------------------------------------------------------------------------------------


def _rows_table(columns: Mapping[str, np.ndarray]) -> pa.Table:
    """Vectors as fixed-size lists, those of one dimension as plain numbers; described for the `datasets` library."""
    arrays, described = {}, {}
    for key, values in columns.items():
        flat, width = pa.array(values.ravel()), values.shape[1]
        value = {"dtype": str(values.dtype), "_type": "Value"}
        arrays[key] = flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width)
        described[key] = value if width == 1 else {"feature": value, "length": width, "_type": "List"}
    return pa.table(arrays).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": described}})})


def _tasks_table(tasks: list[str]) -> pa.Table:
    """Numbers and texts of the tasks, as pandas stores a frame whose index holds the texts."""
    index = "__index_level_0__"
    columns = [
        {
            "name": "task_index",
            "field_name": "task_index",
            "pandas_type": "int64",
            "numpy_type": "int64",
            "metadata": None,
        },
        {"name": None, "field_name": index, "pandas_type": "unicode", "numpy_type": "object", "metadata": None},
    ]
    pandas = {"index_columns": [index], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), index: pa.array(tasks, pa.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})
