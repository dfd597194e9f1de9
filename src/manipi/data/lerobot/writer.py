"""Write LeRobot v3.0 datasets: many episodes per table and video file, all or none.

The folder, schemas and statistics are those of lerobot 0.4, which opens the result as its own.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from manipi.data.dataset import Feature
from manipi.data.lerobot.episode import (
    EpisodeEncoder,
    EpisodeStats,
    Pictures,
    Texts,
    encoded_errors,
    merge,
    read_episode,
    vector_stats,
    video_file,
)
from manipi.data.lerobot.language import EVENTS, PERSISTENT, language_array
from manipi.errors import ConfigError, quoted
from manipi.records import json_bytes, read_json
from manipi.storage import (
    Lock,
    atomic_directory,
    atomic_write,
    name_for_good,
    remove_partial,
    require_absent,
    storage_errors,
)

_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_CHUNK_FILES = 1000
_ROWS_PER_GROUP = 16_384
_EPISODES_PER_GROUP = 1_000
_DEFAULTS = {"timestamp": "float32"} | dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")


class LeRobotWriter:
    """A LeRobot v3.0 dataset in the making; it appears at `root` when the block ends well.

        with LeRobotWriter(root, fps=10, features=features, robot_type="tabletop") as writer:
            writer.add_episode({"image": images, "state": states, "action": actions}, task="push the block")

    Args:
        root: a folder that does not exist yet.
        features, fps, pix_fmt, crf: how episodes are encoded, see `EpisodeEncoder`.
        data_mb, video_mb: a new table or video file begins at this size.

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
        self._encoder = EpisodeEncoder(features=self.features, fps=fps, pix_fmt=pix_fmt, crf=crf)
        self._tasks: dict[str, int] = {}
        self._totals: dict[str, EpisodeStats] = {}
        self._limits = {"data_files_size_in_mb": data_mb, "video_files_size_in_mb": video_mb}
        self._stack = ExitStack()
        self._folder = self._stack.enter_context(atomic_directory(self.root))
        self._tables = _Tables(self._folder, _DATA, data_mb, _ROWS_PER_GROUP)
        self._episodes = _Tables(self._folder, _EPISODES, math.inf, _EPISODES_PER_GROUP)
        videos = {key: _VIDEO.replace("{video_key}", key) for key in self._encoder.cameras}
        self._videos = {key: _Videos(self._folder, video, video_mb, fps) for key, video in videos.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Write what is still in memory and the metadata, and let the folder appear at `root`."""
        if error is not None:
            self._stack.__exit__(kind, error, tb)
            return
        with self._stack:
            if not self.num_episodes:
                next = "call add_episode first"
                raise ConfigError(expected="at least one episode", found="none", where=str(self.root), next=next)
            for files in (self._tables, self._episodes, *self._videos.values()):
                files.close()
            self._write_metadata()

    def add_episode(self, data: Mapping[str, np.ndarray | Pictures | Texts], *, task: str | Sequence[str]) -> None:
        """Append one episode.

        Args:
            data: per feature the values of all T frames, [T, h, w, 3] or [T, d]; pictures may also come in blocks. Of a
                language column pairs of a frame and a `Said`.
            task: the instruction, or one per frame.

        Raises:
            MissingFeatureError: a feature without values, or values without a feature.
            ConfigError: no frames, or a shape or type that differs from the feature's.
            BadValueError: NaN or infinity.
        """
        with TemporaryDirectory(dir=self._folder) as folder:
            self._encoder.encode(Path(folder), data, task, where=f"{self.root}, episode {self.num_episodes}")
            self.add_encoded(Path(folder))

    def add_encoded(self, folder: Path) -> None:
        """Append the episode that an `EpisodeEncoder` with the same settings wrote to `folder`."""
        episode = read_episode(folder)
        tasks = np.array([self._tasks.setdefault(task, len(self._tasks)) for task in episode.tasks])
        frame = np.arange(episode.length)
        numbering = {
            "timestamp": (frame / self.fps).astype(np.float32)[:, None],
            "frame_index": frame[:, None],
            "episode_index": np.full((episode.length, 1), self.num_episodes),
            "index": self.num_frames + frame[:, None],
            "task_index": tasks[episode.task_index_T][:, None],
        }
        # Vectors as fixed-size lists, those of one dimension as plain numbers; described for the `datasets` library.
        arrays, described = {}, {}
        for key, values in (episode.columns | numbering).items():
            flat, width = pa.array(values.ravel()), values.shape[1]
            value = {"dtype": str(values.dtype), "_type": "Value"}
            arrays[key] = flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width)
            described[key] = value if width == 1 else {"feature": value, "length": width, "_type": "List"}
        arrays |= {key: language_array(key, items, episode.length) for key, items in episode.language.items()}
        rows = pa.table(arrays).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": described}})})
        self._tables.add(rows)
        row = {"episode_index": self.num_episodes, "tasks": episode.tasks, "length": episode.length}
        row |= {f"data/{name}": value for name, value in self._tables.place.items()}
        row |= {"dataset_from_index": self.num_frames, "dataset_to_index": self.num_frames + episode.length}
        for key, files in self._videos.items():
            times = files.append(video_file(folder, key))
            row |= {f"videos/{key}/{name}": value for name, value in (files.place | times).items()}
        stats = episode.stats | vector_stats(numbering)
        row |= {f"stats/{key}/{name}": values.tolist() for key, part in stats.items() for name, values in part.items()}
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        self._episodes.add(pa.table({name: [value] for name, value in row.items()}))
        self._totals = {key: merge(self._totals[key], part) if self._totals else part for key, part in stats.items()}
        self.num_episodes += 1
        self.num_frames += episode.length

    def add_file(self, path: str, content: bytes) -> None:
        """Put a file of your own beside the dataset's, such as meta/NAME.json."""
        target = self._folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    def add_texts(self, kind: str, texts: Sequence[str]) -> None:
        """Write meta/KINDs.parquet: numbers and texts, as pandas stores a frame whose index holds the texts."""
        key, index, number = f"{kind}_index", "__index_level_0__", {"pandas_type": "int64", "numpy_type": "int64"}
        columns = [
            {"name": key, "field_name": key, **number, "metadata": None},
            {"name": None, "field_name": index, "pandas_type": "unicode", "numpy_type": "object", "metadata": None},
        ]
        pandas = {"index_columns": [index], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
        table = pa.table({key: pa.array(range(len(texts)), pa.int64()), index: pa.array(list(texts), pa.string())})
        path = self._folder / f"meta/{kind}s.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), path)

    def _write_metadata(self) -> None:
        described = {}
        numbering = {key: Feature(kind="vector", shape=(1,), dtype=dtype) for key, dtype in _DEFAULTS.items()}
        for key, feature in (self.features | numbering).items():
            shape = list(feature.shape)
            described[key] = {"dtype": feature.dtype, "shape": shape, "names": list(feature.names) or None}
            if key in self._videos:
                video = {"height": shape[0], "width": shape[1], "codec": "h264", "pix_fmt": self._encoder.pix_fmt}
                video |= {"is_depth_map": False, "fps": self.fps, "channels": shape[2]}
                about = {f"video.{name}": value for name, value in video.items()} | {"has_audio": False}
                described[key] |= {"dtype": "video", "names": ["height", "width", "channels"], "info": about}
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
            "features": described,
        }
        stats = {key: {name: value.tolist() for name, value in part.items()} for key, part in self._totals.items()}
        meta = self._folder / "meta"
        meta.mkdir(exist_ok=True)
        (meta / "info.json").write_text(json.dumps(info, indent=4))
        (meta / "stats.json").write_text(json.dumps(stats, indent=4))
        self.add_texts("task", list(self._tasks))


# Files --------------------------------------------------------------------------------------------------------------


class _Files:
    """Numbered files of one kind, each begun when the one before has reached its size; an episode lies in one file."""

    def __init__(self, folder: Path, template: str, limit_mb: float):
        self._folder, self._template, self._limit = folder, template, limit_mb * 2**20
        self._number, self._num_bytes = -1, math.inf

    def _next_path(self) -> Path | None:
        """The path of a new file, where the next episode is to begin one."""
        if self._num_bytes < self._limit:
            return None
        self.close()
        self._number, self._num_bytes = self._number + 1, 0
        path = self._folder / self._template.format(**self.place)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def place(self) -> dict[str, Any]:
        """Where the last episode is."""
        return {"chunk_index": self._number // _CHUNK_FILES, "file_index": self._number % _CHUNK_FILES}

    def close(self) -> None:
        raise NotImplementedError


class _Tables(_Files):
    """Parquet files, whose rows wait in RAM until they fill a row group."""

    def __init__(self, folder: Path, template: str, limit_mb: float, rows_per_group: int):
        super().__init__(folder, template, limit_mb)
        self._rows_per_group, self._num_waiting = rows_per_group, 0
        self._waiting: list[pa.Table] = []
        self._file: pq.ParquetWriter | None = None

    def add(self, table: pa.Table) -> None:
        if path := self._next_path():
            # Dictionaries of numbers that hardly repeat are larger than the numbers, and slower to read.
            repeat: Any = [field.name for field in table.schema if pa.types.is_integer(field.type)]
            repeat += [
                f"{key}.list.element.{name}" for key in (PERSISTENT, EVENTS) for name in ("content", "role", "style")
            ]
            self._file = pq.ParquetWriter(path, table.schema, use_dictionary=repeat)
        self._waiting.append(table)
        self._num_waiting += table.num_rows
        self._num_bytes += table.nbytes
        if self._num_waiting >= self._rows_per_group:
            self._flush()

    def close(self) -> None:
        if self._file:
            self._flush()
            self._file.close()

    def _flush(self) -> None:
        if self._file and self._waiting:
            self._file.write_table(pa.concat_tables(self._waiting).combine_chunks())
        self._waiting, self._num_waiting = [], 0


class _Videos(_Files):
    """MP4 files, put together from the packets of episodes that all begin with a keyframe."""

    def __init__(self, folder: Path, template: str, limit_mb: float, fps: int):
        super().__init__(folder, template, limit_mb)
        self._fps, self._num_frames = fps, 0

    def append(self, episode: Path) -> dict[str, float]:
        """Returns the seconds of the file that are the episode's."""
        with ExitStack() as stack:
            with encoded_errors(episode.parent):
                source = stack.enter_context(av.open(str(episode)))
                stream = source.streams.video[0]
            if path := self._next_path():
                self._container, self._num_frames = av.open(str(path), "w"), 0
                self._stream = self._container.add_stream_from_template(stream)
            first = self._num_frames / self._fps
            start = round(first / (stream.time_base or 1))
            for packet in source.demux(stream):
                if packet.pts is None or packet.dts is None:  # the empty packet that ends a stream
                    continue
                packet.pts, packet.dts, packet.stream = packet.pts + start, packet.dts + start, self._stream
                self._num_frames += 1
                self._num_bytes += packet.size
                self._container.mux(packet)
        return {"from_timestamp": first, "to_timestamp": self._num_frames / self._fps}

    def close(self) -> None:
        if self._number >= 0:
            self._container.close()


# Parts --------------------------------------------------------------------------------------------------------------

_BEGUN = {
    "recording": ("recording.json", "manipi record --finish {}"),
    "conversion": ("conversion.json", "repeat the manipi convert command that was begun to {}"),
}
"""By what makes the episodes: the file that says what was begun, and how to finish it."""


def how_to_finish(target: Path) -> str | None:
    """What to run where the episodes of a dataset wait beside it; None where none do."""
    target = target.expanduser().absolute()
    for activity, (_, command) in _BEGUN.items():
        parts = Parts(target, activity)
        if parts.begun.exists() and (parts.finished or parts.episodes()):
            return command.format(quoted(target))
    return None


class Parts:
    """Encoded episodes that wait beside a dataset until all of them are there, and are then put together.

        .TARGET.parts/
        ├─ lock                  one process at a time
        ├─ recording.json        what was begun; of a conversion `conversion.json`
        ├─ episode-000042/       as `EpisodeEncoder` wrote it; it has its name when it is complete and on the disk
        ├─ dataset/              all of them, one behind the other
        └─ finished.json         says that `dataset` is whole; it then takes the name TARGET, and the parts vanish

    A process that is killed loses the episode that it was encoding. At whatever moment that is, the next process finds
    either the episodes or the whole dataset, and goes on.

    Args:
        target: the folder of the dataset, which does not exist yet.
        activity: what makes them: "conversion", "recording".
    """

    def __init__(self, target: Path, activity: str):
        self.target, self._activity = target.expanduser().absolute(), activity
        self.folder = self.target.with_name(f".{self.target.name}.parts")
        self._dataset, self._finished = self.folder / "dataset", self.folder / "finished.json"
        self.begun = self.folder / _BEGUN[activity][0]

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """The parts, for this process alone; what a killed one left half-written is gone.

        Raises:
            ConfigError: another process is at work there.
            StorageError: the folder cannot be written.
        """
        try:
            with storage_errors(self.target):
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = Lock(self.folder / "lock", wait=False)
                remove_partial(self.folder)
                remove_partial(self.target.parent, self.target.name)
        except BlockingIOError:
            raise ConfigError(
                expected=f"one {self._activity} at a time to a folder",
                found="another one that is going on",
                where=str(self.target),
                next="wait for it, or choose another folder",
            ) from None
        with lock:
            yield

    def episode(self, number: int) -> Path:
        """The folder of an episode, there or not."""
        return self.folder / f"episode-{number:06d}"

    def episodes(self) -> list[Path]:
        """The folders of those that are there, in order."""
        return sorted(self.folder.glob("episode-*"))

    def require_own(self) -> None:
        """Raises ConfigError where the episodes that are there were not begun by this activity."""
        if (self.finished or self.episodes()) and not self.begun.exists():
            first = how_to_finish(self.target)
            raise ConfigError(
                expected=f"no episodes there but those of a {self._activity}",
                found=f"others, without {self.begun.name}",
                where=str(self.folder),
                next="choose another folder" + (f", or first: {first}" if first else ""),
            )

    @property
    def finished(self) -> bool:
        """Whether all that is left to do is `settle`."""
        return self._finished.exists()

    def finish(
        self,
        folders: Sequence[Path],
        encoder: EpisodeEncoder,
        robot_type: str,
        report: Mapping[str, Any],
        *,
        files: Mapping[str, bytes] | None = None,
        show: bool,
    ) -> dict[str, Any]:
        """Put the dataset together and give it its name; the parts vanish.

        Args:
            report: what `settle` is to return, beside `num_episodes` and `num_frames`.
            files: content of further files by their path in the dataset.

        Raises:
            StorageError: the disk is full, or something has the target's name; the episodes stay.
            DatasetFormatError: an episode's files are damaged.
        """
        shutil.rmtree(self._dataset, ignore_errors=True)  # one of which it is not known whether it is whole
        with LeRobotWriter(self._dataset, robot_type=robot_type, **vars(encoder)) as writer:
            for folder in tqdm(folders, desc="assemble", unit="episode", disable=not show):
                writer.add_encoded(folder)
            for path, content in (files or {}).items():
                writer.add_file(path, content)
        counts = {"num_episodes": writer.num_episodes, "num_frames": writer.num_frames}
        atomic_write(self._finished, json_bytes({**report, **counts}))
        return self.settle()

    def settle(self) -> dict[str, Any]:
        """Do what is left after `finished`; returns the report of `finish`, whichever process called it."""
        report = read_json(self._finished)
        if self._dataset.exists():
            require_absent(self.target)
            with storage_errors(self.target):
                name_for_good(self._dataset, self.target)
        self.remove()
        return report

    def remove(self) -> None:
        """Delete the parts: last what says whose they are, so that a kill leaves nothing to be taken for others'."""
        for path in self.episodes():
            shutil.rmtree(path)
        self._finished.unlink(missing_ok=True)
        shutil.rmtree(self.folder)
