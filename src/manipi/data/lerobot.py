"""LeRobot datasets, versions 2.0, 2.1 and 3.0, read from their files: parquet tables, JSON metadata, MP4 video.

meta/info.json          version, fps, features, path templates
v2:  meta/episodes.jsonl, meta/tasks.jsonl;  one table and one video file per episode
v3:  meta/episodes/**, meta/tasks.parquet;   many episodes per table and per video file
"""

import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from manipi.data.dataset import Dataset, Episode, Feature
from manipi.data.video import VideoFrames
from manipi.errors import DatasetFormatError, DatasetNotFoundError, MissingFeatureError

_FOOTER_BYTES = 1 << 20
_ROW_GROUPS = 8
"""Row groups of encoded pictures kept in RAM; LeRobot writes one per episode."""


@dataclass(frozen=True, kw_only=True)
class _Clip:
    """Where the pictures of one episode and camera lie."""

    path: Path
    start: float
    """Seconds into the file."""


@dataclass(frozen=True, kw_only=True)
class _Index:
    """What both versions say, each in its own files."""

    episodes: list[Episode]
    tasks: dict[int, str]
    tables: list[Path]
    """The data tables in row order."""
    clips: dict[str, list[_Clip]]
    """Per video feature, one clip per episode."""
    metadata: list[Path]


class LeRobotDataset(Dataset):
    """A LeRobot dataset folder.

    Raises:
        DatasetNotFoundError: no episodes or frames.
        DatasetFormatError: an unknown version; metadata or tables that are missing, broken or disagree.
    """

    def __init__(self, root: Path):
        info = _read_json(root / "meta/info.json", root)
        try:
            self._index = _read_index(info, root)
            features = {key: _feature(entry) for key, entry in info["features"].items()}
            fps = float(info["fps"])
        except KeyError as error:
            _broken(root, f"an entry {error} in the metadata", "none", root / "meta")
        super().__init__(root=root, name=root.name, fps=fps, features=features, episodes=self._index.episodes)
        self._check_counts(info)
        self._videos = VideoFrames()
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
            with _arrow_errors(path, self.root), path.open("rb") as file:
                size = path.stat().st_size
                file.seek(max(0, size - _FOOTER_BYTES) if holds_pictures else 0)
                digest.update(f"{path.relative_to(self.root)} {size}\n".encode())
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def prompt(self, row: int) -> str:
        return self._index.tasks[int(self._task_indices[row])]

    @cached_property
    def _task_indices(self) -> np.ndarray:
        indices = self._read_column("task_index")[:, 0]
        unknown = set(np.unique(indices).tolist()) - self._index.tasks.keys()
        if unknown:
            _broken(self.root, f"task_index among {sorted(self._index.tasks)}", f"{sorted(unknown)}", "the data tables")
        return indices

    def _check_counts(self, info: Mapping[str, Any]) -> None:
        if not self.num_frames:
            raise _empty(self.root)
        if info.get("total_frames", self.num_frames) != self.num_frames:
            found = f"{self.num_frames} in the episodes' metadata"
            _broken(self.root, f"{info['total_frames']} frames, as meta/info.json says", found, "meta/info.json")

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
            _broken(self.root, f"{len(expected)} rows in the data tables", f"{len(self._row_order)}", "data/")
        row = int(np.argmax(expected != self._row_order))
        found = f"episode_index {self._row_order[row]}"
        _broken(self.root, f"episode_index {expected[row]} in row {row}", found, self.root / "data")

    def _concatenate(self, key: str, width: int) -> np.ndarray:
        return np.concatenate([self._read_values(path, key, width) for path in self._index.tables])

    def _read_values(self, path: Path, key: str, width: int) -> np.ndarray:
        with _arrow_errors(path, self.root):
            table = pq.ParquetFile(path)
            if key not in table.schema_arrow.names:
                raise MissingFeatureError(
                    expected=f"a column {key!r}, as meta/info.json says",
                    found=f"the columns {', '.join(table.schema_arrow.names)}",
                    where=str(path),
                    next=_download(self.root),
                )
            column = table.read(columns=[key]).column(0)
        values = _numbers(column)
        if len(values) != len(column) * width:
            found = f"{len(values)} numbers in {len(column)} rows"
            _broken(self.root, f"{width} numbers per row in {key!r}, as meta/info.json says", found, path)
        return values.astype(np.float32 if values.dtype.kind == "f" else np.int64).reshape(-1, width)

    # Pictures ---------------------------------------------------------------------------------------------------

    def _read_images(self, camera: str, rows: np.ndarray) -> np.ndarray:
        images = np.empty((len(rows), *self.features[camera].shape), np.uint8)
        read = self._read_video_frame if camera in self._index.clips else self._read_picture
        for i, row in enumerate(rows.tolist()):
            image = read(camera, row)
            if image.shape != images.shape[1:]:
                expected = f"a picture of shape {images.shape[1:]}, as meta/info.json says"
                _broken(self.root, expected, f"{image.shape}", f"{camera}, {self.locate(row)}")
            images[i] = image
        return images

    def _read_video_frame(self, camera: str, row: int) -> np.ndarray:
        position = int(self.episode_of(np.asarray(row)))
        clip = self._index.clips[camera][position]
        seconds = clip.start + (row - self.episodes[position].start) / self.fps
        return self._videos.frame(clip.path, seconds, where=f"{clip.path}, {self.locate(row)}")

    def _read_picture(self, camera: str, row: int) -> np.ndarray:
        group = int(np.searchsorted(self._row_groups.starts, row, side="right")) - 1
        path, number = self._row_groups.places[group]
        encoded = self._pictures(path, number, camera)[row - int(self._row_groups.starts[group])]
        try:
            return np.asarray(Image.open(io.BytesIO(encoded["bytes"])).convert("RGB"))
        except OSError as error:
            _broken(self.root, f"an encoded picture in {camera!r}", str(error), f"{path}, {self.locate(row)}")

    @cached_property
    def _row_groups(self) -> "_RowGroups":
        places, sizes = [], []
        for path in self._index.tables:
            with _arrow_errors(path, self.root):
                metadata = pq.read_metadata(path)
            places += [(path, number) for number in range(metadata.num_row_groups)]
            sizes += [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        return _RowGroups(places=places, starts=np.cumsum([0, *sizes])[:-1])


@dataclass(frozen=True, kw_only=True)
class _RowGroups:
    """The smallest readable parts of the tables, in row order."""

    places: list[tuple[Path, int]]
    starts: np.ndarray


def _read_pictures(path: Path, group: int, camera: str) -> list[dict[str, Any]]:
    return pq.ParquetFile(path).read_row_group(group, columns=[camera]).column(0).to_pylist()


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """All numbers of a column of numbers or of (nested) lists of numbers, flat."""
    values = column.combine_chunks()
    while pa.types.is_nested(values.type):
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False)


def _feature(entry: Mapping[str, Any]) -> Feature:
    """A feature from its entry in info.json, which states pictures as [h, w, 3] or [3, h, w]; stored is [h, w, 3]."""
    shape, names, dtype = tuple(entry["shape"]), _flat(entry.get("names")), entry["dtype"]
    if dtype in ("image", "video"):
        channels_first = names[0].startswith("channel") if len(names) == 3 else shape[0] == 3
        return Feature(kind="image", shape=(*shape[1:], shape[0]) if channels_first else shape, dtype=dtype)
    return Feature(kind="text" if dtype == "string" else "vector", shape=shape, dtype=dtype, names=names)


def _flat(names: Any) -> tuple[str, ...]:
    """Names are stated as a list, a list of lists, or a dict of lists (v2.0: {"motors": [...]})."""
    if names is None or isinstance(names, str):
        return (names,) if names else ()
    values: Iterable[Any] = names.values() if isinstance(names, Mapping) else names
    return tuple(itertools.chain.from_iterable(_flat(value) for value in values))


# Versions -----------------------------------------------------------------------------------------------------------


def _read_index(info: Mapping[str, Any], root: Path) -> _Index:
    readers = {"v2.0": _read_v2, "v2.1": _read_v2, "v3.0": _read_v3}
    version = info.get("codebase_version")
    if version not in readers:
        raise DatasetFormatError(
            expected=f"codebase_version among {', '.join(readers)}",
            found=repr(version),
            where=str(root / "meta/info.json"),
            next=f"python -m lerobot.datasets.v30.convert_dataset_v21_to_v30 --root={root}  # or another converter",
        )
    if info.get("total_episodes") == 0:
        raise _empty(root)
    return readers[version](info, root)


def _read_v2(info: Mapping[str, Any], root: Path) -> _Index:
    meta = root / "meta"
    rows = sorted(_read_json_lines(meta / "episodes.jsonl", root), key=lambda row: row["episode_index"])
    tasks = {row["task_index"]: row["task"] for row in _read_json_lines(meta / "tasks.jsonl", root)}

    def path(template: str, episode: int, **names: str) -> Path:
        chunk = episode // info["chunks_size"]
        return root / template.format(episode_chunk=chunk, episode_index=episode, **names)

    numbers = [row["episode_index"] for row in rows]
    clips = {
        key: [_Clip(path=path(info["video_path"], number, video_key=key), start=0.0) for number in numbers]
        for key in _video_keys(info)
    }
    return _Index(
        episodes=_episodes(numbers, [row["length"] for row in rows], [row["tasks"] for row in rows]),
        tasks=tasks,
        tables=[path(info["data_path"], number) for number in numbers],
        clips=clips,
        metadata=[meta / "info.json", meta / "episodes.jsonl", meta / "tasks.jsonl"],
    )


def _read_v3(info: Mapping[str, Any], root: Path) -> _Index:
    episode_files = sorted((root / "meta/episodes").glob("*/*.parquet"))
    if not episode_files:
        _broken(root, "tables of episodes", "none", root / "meta/episodes")
    place = ("chunk_index", "file_index")
    clip_columns = {key: [f"videos/{key}/{name}" for name in (*place, "from_timestamp")] for key in _video_keys(info)}
    data_columns = [f"data/{name}" for name in place]
    wanted = ["episode_index", "length", "tasks", *data_columns, *itertools.chain.from_iterable(clip_columns.values())]
    table = pa.concat_tables([_read_columns(path, wanted, root) for path in episode_files]).sort_by("episode_index")
    columns = {name: table.column(name).to_pylist() for name in wanted}
    places = dict.fromkeys(zip(*(columns[name] for name in data_columns), strict=True))
    clips = {
        key: [
            _Clip(path=root / info["video_path"].format(video_key=key, chunk_index=chunk, file_index=file), start=start)
            for chunk, file, start in zip(*(columns[name] for name in names), strict=True)
        ]
        for key, names in clip_columns.items()
    }
    return _Index(
        episodes=_episodes(columns["episode_index"], columns["length"], columns["tasks"]),
        tasks=_read_v3_tasks(root),
        tables=[root / info["data_path"].format(chunk_index=chunk, file_index=file) for chunk, file in places],
        clips=clips,
        metadata=[root / "meta/info.json", root / "meta/tasks.parquet", *episode_files],
    )


def _read_v3_tasks(root: Path) -> dict[int, str]:
    """Task texts are the table's pandas index, which is stored without a name by lerobot 0.4."""
    path = root / "meta/tasks.parquet"
    with _arrow_errors(path, root):
        table = pq.read_table(path)
    text = "task" if "task" in table.column_names else "__index_level_0__"
    columns = _read_columns(path, ["task_index", text], root).to_pydict()
    return dict(zip(columns["task_index"], columns[text], strict=True))


def _video_keys(info: Mapping[str, Any]) -> list[str]:
    return [key for key, entry in info["features"].items() if entry["dtype"] == "video"]


def _episodes(numbers: list[int], lengths: list[int], tasks: list[list[str]]) -> list[Episode]:
    starts = itertools.accumulate(lengths, initial=0)
    return [
        Episode(index=number, start=start, length=length, task=texts[0] if texts else "")
        for number, start, length, texts in zip(numbers, starts, lengths, tasks)
    ]


# Files --------------------------------------------------------------------------------------------------------------


def _read_json(path: Path, root: Path) -> Any:
    return _parse(path, _read_text(path, root), root)


def _read_json_lines(path: Path, root: Path) -> list[Any]:
    return [_parse(path, line, root) for line in _read_text(path, root).splitlines() if line.strip()]


def _read_text(path: Path, root: Path) -> str:
    if not path.is_file():
        _broken(root, "a metadata file", "nothing", path)
    return path.read_text(encoding="utf-8")


def _parse(path: Path, text: str, root: Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        _broken(root, "JSON", str(error), path)


def _read_columns(path: Path, names: list[str], root: Path) -> pa.Table:
    """Some columns of a metadata table."""
    with _arrow_errors(path, root):
        table = pq.ParquetFile(path)
        if missing := sorted(set(names) - set(table.schema_arrow.names)):
            _broken(root, f"the columns {', '.join(missing)}", "none of that name", path)
        return table.read(columns=names)


@contextmanager
def _arrow_errors(path: Path, root: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        _broken(root, "a parquet file", "nothing", path)
    except pa.ArrowInvalid as error:
        _broken(root, "a readable parquet file", str(error), path)


def _broken(root: Path, expected: str, found: str, where: str | Path) -> NoReturn:
    raise DatasetFormatError(expected=expected, found=found, where=f"{where}", next=_download(root))


def _empty(root: Path) -> DatasetNotFoundError:
    return DatasetNotFoundError(
        expected="at least one episode with at least one frame",
        found="none",
        where=str(root / "meta"),
        next="record or convert episodes into this dataset, or give another path",
    )


def _download(root: Path) -> str:
    return f"hf download <dataset> --repo-type dataset --local-dir {root}  # fetches what is missing or broken"
