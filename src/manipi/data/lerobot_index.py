"""The metadata of a LeRobot dataset, versions 2.0, 2.1 and 3.0, as one `LeRobotIndex`.

meta/info.json      version, fps, features, path templates
v2   meta/episodes.jsonl, meta/tasks.jsonl      one table and one video file per episode
v3   meta/episodes/**, meta/tasks.parquet       many episodes per table and per video file
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from manipi.data.dataset import Episode, Feature
from manipi.errors import DatasetFormatError, DatasetNotFoundError


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Where the pictures of one episode and camera lie."""

    path: Path
    start: float
    """Seconds into the file."""


@dataclass(frozen=True, kw_only=True)
class LeRobotIndex:
    """What all versions say, each in its own files."""

    fps: float
    features: dict[str, Feature]
    episodes: list[Episode]
    tasks: dict[int, str]
    subtasks: dict[int, str]
    """None where the dataset has none."""
    tables: list[Path]
    """The data tables, in row order."""
    clips: dict[str, list[Clip]]
    """Per feature that is stored as video, one clip per episode."""
    metadata: list[Path]


def read_index(root: Path) -> LeRobotIndex:
    """Read the metadata of any known version.

    Raises:
        DatasetNotFoundError: no episodes or frames.
        DatasetFormatError: an unknown version; metadata that are missing, broken or disagree.
    """
    info = _read_json(root / "meta/info.json", root)
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
    try:
        index = readers[version](info, root)
    except KeyError as error:
        broken(root, f"an entry {error} in the metadata", "none", root / "meta")
    num_frames = sum(episode.length for episode in index.episodes)
    if not num_frames:
        raise _empty(root)
    if num_frames != info.get("total_frames", num_frames):
        expected = f"{info['total_frames']} frames in all episodes, as meta/info.json says"
        broken(root, expected, str(num_frames), root / "meta")
    return index


def _read_v2(info: Mapping[str, Any], root: Path) -> LeRobotIndex:
    meta = root / "meta"
    rows = sorted(_read_json(meta / "episodes.jsonl", root, lines=True), key=lambda row: row["episode_index"])
    tasks = {row["task_index"]: row["task"] for row in _read_json(meta / "tasks.jsonl", root, lines=True)}

    def path(template: str, episode: int, **names: str) -> Path:
        chunk = episode // info["chunks_size"]
        return root / template.format(episode_chunk=chunk, episode_index=episode, **names)

    numbers = [row["episode_index"] for row in rows]
    clips = {
        key: [Clip(path=path(info["video_path"], number, video_key=key), start=0.0) for number in numbers]
        for key in _video_keys(info)
    }
    return LeRobotIndex(
        fps=info["fps"],
        features=_features(info),
        episodes=_episodes(numbers, [row["length"] for row in rows], [row["tasks"] for row in rows]),
        tasks=tasks,
        subtasks=_subtasks(root),
        tables=[path(info["data_path"], number) for number in numbers],
        clips=clips,
        metadata=[meta / "info.json", meta / "episodes.jsonl", meta / "tasks.jsonl"],
    )


def _read_v3(info: Mapping[str, Any], root: Path) -> LeRobotIndex:
    episode_files = sorted((root / "meta/episodes").glob("*/*.parquet"))
    if not episode_files:
        broken(root, "tables of episodes", "none", root / "meta/episodes")
    place = ("chunk_index", "file_index")
    clip_columns = {key: [f"videos/{key}/{name}" for name in (*place, "from_timestamp")] for key in _video_keys(info)}
    data_columns = [f"data/{name}" for name in place]
    wanted = ["episode_index", "length", "tasks", *data_columns, *itertools.chain.from_iterable(clip_columns.values())]
    table = pa.concat_tables([read_columns(path, wanted, root) for path in episode_files]).sort_by("episode_index")
    columns = {name: table.column(name).to_pylist() for name in wanted}
    places = dict.fromkeys(zip(*(columns[name] for name in data_columns), strict=True))
    clips = {
        key: [
            Clip(path=root / info["video_path"].format(video_key=key, chunk_index=chunk, file_index=file), start=start)
            for chunk, file, start in zip(*(columns[name] for name in names), strict=True)
        ]
        for key, names in clip_columns.items()
    }
    return LeRobotIndex(
        fps=info["fps"],
        features=_features(info),
        episodes=_episodes(columns["episode_index"], columns["length"], columns["tasks"]),
        tasks=_texts(root, "task"),
        subtasks=_subtasks(root),
        tables=[root / info["data_path"].format(chunk_index=chunk, file_index=file) for chunk, file in places],
        clips=clips,
        metadata=[root / "meta/info.json", root / "meta/tasks.parquet", *episode_files],
    )


def _texts(root: Path, kind: str) -> dict[int, str]:
    """Texts of tasks or subtasks by number. They are the table's pandas index, which lerobot 0.4 stores unnamed."""
    path, number = root / f"meta/{kind}s.parquet", f"{kind}_index"
    with parquet_errors(path, root):
        names = pq.read_schema(path).names
    text = kind if kind in names else "__index_level_0__"
    columns = read_columns(path, [number, text], root).to_pydict()
    return dict(zip(columns[number], columns[text], strict=True))


def _subtasks(root: Path) -> dict[int, str]:
    return _texts(root, "subtask") if (root / "meta/subtasks.parquet").exists() else {}


def _features(info: Mapping[str, Any]) -> dict[str, Feature]:
    return {key: _feature(entry) for key, entry in info["features"].items()}


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


def _video_keys(info: Mapping[str, Any]) -> list[str]:
    return [key for key, entry in info["features"].items() if entry["dtype"] == "video"]


def _episodes(numbers: list[int], lengths: list[int], tasks: list[list[str]]) -> list[Episode]:
    starts = itertools.accumulate(lengths, initial=0)
    return [
        Episode(index=number, start=start, length=length, task=texts[0] if texts else "")
        for number, start, length, texts in zip(numbers, starts, lengths, tasks)
    ]


# Files --------------------------------------------------------------------------------------------------------------


def _read_json(path: Path, root: Path, *, lines: bool = False) -> Any:
    if not path.is_file():
        broken(root, "a metadata file", "nothing", path)
    text = path.read_text(encoding="utf-8")
    try:
        return [json.loads(line) for line in text.split("\n") if line.strip()] if lines else json.loads(text)
    except json.JSONDecodeError as error:
        broken(root, "JSON", str(error), path)


def read_columns(path: Path, names: list[str], root: Path) -> pa.Table:
    """Some columns of a parquet file of the dataset at `root`; DatasetFormatError when file or columns are missing."""
    with parquet_errors(path, root):
        table = pq.ParquetFile(path)
        if missing := [name for name in names if name not in table.schema_arrow.names]:
            expected = f"the columns {', '.join(missing)}"
            broken(root, expected, f"only {', '.join(table.schema_arrow.names)}", path)
        return table.read(columns=names)


@contextmanager
def parquet_errors(path: Path, root: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        broken(root, "a parquet file", "nothing", path)
    except (pa.ArrowInvalid, OSError) as error:  # Arrow reports a damaged page as an OSError
        broken(root, "a readable parquet file", str(error), path)


def broken(root: Path, expected: str, found: str, where: str | Path) -> NoReturn:
    """Raise the error for a dataset whose files are missing, damaged or disagree."""
    raise DatasetFormatError(
        expected=expected,
        found=found,
        where=str(where),
        next=f"hf download <dataset> --repo-type dataset --local-dir {root}  # fetches what is missing or broken",
    )


def _empty(root: Path) -> DatasetNotFoundError:
    return DatasetNotFoundError(
        expected="at least one episode with at least one frame",
        found="none",
        where=str(root / "meta"),
        next="record or convert episodes into this dataset, or give another path",
    )
