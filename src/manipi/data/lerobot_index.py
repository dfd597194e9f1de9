"""The metadata of a LeRobot dataset, versions 2.0, 2.1 and 3.0, as one `LeRobotIndex`.

meta/info.json      version, fps, features, path templates
v2   meta/episodes.jsonl, meta/tasks.jsonl      one table and one video file per episode
v3   meta/episodes/**, meta/tasks.parquet       many episodes per table and per video file
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from manipi.data.dataset import Episode, Feature
from manipi.data.lerobot_tables import Fault, broken, format_error, parquet_errors, read_columns, see_check
from manipi.data.subset import require_episodes
from manipi.data.video import is_deep
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
    """Empty where the dataset has none."""
    tables: list[Path]
    """Per episode, the data table that its rows are in."""
    clips: dict[str, list[Clip]]
    """Per feature that is stored as video, one clip per episode; not those of which no episode has a place."""
    metadata: list[Path]
    promised: tuple[int, int]
    """Episodes and frames that meta/info.json counts."""
    unreadable: list[DatasetFormatError]
    """What is wrong with entries of episodes that cannot be read, and are left out of all the above."""

    def by_table(self) -> dict[Path, list[Episode]]:
        """The episodes that each data table holds, in row order."""
        tables: dict[Path, list[Episode]] = {}
        for path, episode in zip(self.tables, self.episodes, strict=True):
            tables.setdefault(path, []).append(episode)
        return tables

    def only(self, numbers: Sequence[int], root: Path) -> "LeRobotIndex":
        """The index of some episodes, in ascending order; ConfigError where there is no episode of a number."""
        require_episodes([e.index for e in self.episodes], numbers, root)
        kept = [i for i, episode in enumerate(self.episodes) if episode.index in set(numbers)]
        starts = itertools.accumulate((self.episodes[i].length for i in kept), initial=0)
        return replace(
            self,
            episodes=[replace(self.episodes[i], start=start) for i, start in zip(kept, starts)],
            tables=[self.tables[i] for i in kept],
            clips={key: [clips[i] for i in kept] for key, clips in self.clips.items()},
        )


def open_index(root: Path, numbers: Sequence[int]) -> LeRobotIndex:
    """The metadata of a dataset, or of the episodes of it with these numbers, where those are sound.

    Raises:
        DatasetNotFoundError: no episodes or frames.
        DatasetFormatError: an unknown version; metadata that are missing, broken or disagree.
        ConfigError: no episode of that number.
    """
    index = read_index(root)
    for fault in metadata_faults(index, root):
        if not numbers or set(numbers) & set(fault.episodes):
            raise fault.error
    return index.only(numbers, root) if numbers else index


def metadata_faults(index: LeRobotIndex, root: Path) -> Iterator[Fault]:
    """What the metadata say that cannot be."""
    meta, next, listed = root / "meta", see_check(root), Counter(episode.index for episode in index.episodes)
    lost = tuple(sorted(set(range(index.promised[0])) - listed.keys()))
    yield from (Fault(error, lost) for error in index.unreadable)
    for number, count in listed.items():
        if count > 1:
            yield Fault(format_error(root, f"episode {number} once", f"{count} entries of it", meta, next), (number,))
    for e in index.episodes:
        if e.length < 1:
            where = f"{meta}, episode {e.index}"
            yield Fault(format_error(root, "at least one frame", f"{e.length} frames", where, next), (e.index,))
    for what, counted, promised in zip(
        ("episodes", "frames"), (len(index.episodes), sum(e.length for e in index.episodes)), index.promised
    ):
        if counted != promised and not index.unreadable:
            expected = f"{promised} {what} in all, as meta/info.json says"
            yield Fault(format_error(root, expected, str(counted), meta, next), lost if what == "episodes" else ())


def read_index(root: Path) -> LeRobotIndex:
    """Read the metadata of any known version, sound or not; `metadata_faults` tells. Raises as `open_index` does."""
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
    if not any(episode.length for episode in index.episodes):
        raise index.unreadable[0] if index.unreadable else _empty(root)
    return index


def _read_v2(info: Mapping[str, Any], root: Path) -> LeRobotIndex:
    meta, unreadable = root / "meta", []
    rows = sorted(_read_lines(meta / "episodes.jsonl", root, unreadable), key=lambda row: row["episode_index"])
    tasks = {row["task_index"]: row["task"] for row in _read_lines(meta / "tasks.jsonl", root)}

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
        promised=_promised(info, numbers, [row["length"] for row in rows]),
        unreadable=unreadable,
    )


def _read_v3(info: Mapping[str, Any], root: Path) -> LeRobotIndex:
    episode_files = sorted((root / "meta/episodes").glob("*/*.parquet"))
    if not episode_files:
        broken(root, "tables of episodes", "none", root / "meta/episodes")
    place = ("chunk_index", "file_index")
    clip_columns = {key: [f"videos/{key}/{name}" for name in (*place, "from_timestamp")] for key in _video_keys(info)}
    # A camera of which no episode has a place was never recorded: it is missed where it is asked for.
    stated = [set(column_names(path)) for path in episode_files]
    clip_columns = {k: names for k, names in clip_columns.items() if any(named.issuperset(names) for named in stated)}
    data_columns = [f"data/{name}" for name in place]
    wanted = ["episode_index", "length", "tasks", *data_columns, *itertools.chain.from_iterable(clip_columns.values())]
    tables, unreadable = {}, []
    for path in episode_files:
        try:
            tables[path] = read_columns(path, wanted, root)
        except DatasetFormatError as error:
            unreadable.append(error)
    if not tables:
        raise unreadable[0]
    table = pa.concat_tables(tables.values()).sort_by("episode_index")
    columns = {name: table.column(name).to_pylist() for name in wanted}
    places = zip(*(columns[name] for name in data_columns), strict=True)
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
        metadata=[root / "meta/info.json", root / "meta/tasks.parquet", *tables],
        promised=_promised(info, columns["episode_index"], columns["length"]),
        unreadable=unreadable,
    )


def column_names(path: Path) -> list[str]:
    """None where the file cannot be read, which reading it tells."""
    try:
        return pq.read_schema(path).names
    except (pa.ArrowInvalid, OSError):
        return []


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
    return {key: _feature(key, entry) for key, entry in info["features"].items()}


def _feature(key: str, entry: Mapping[str, Any]) -> Feature:
    """A feature from its entry in info.json, which states pictures as [h, w, 3] or [3, h, w]; stored is [h, w, 3]."""
    shape, names, dtype = tuple(entry["shape"]), _flat(entry.get("names")), entry["dtype"]
    if dtype in ("image", "video"):
        channels_first = names[0].startswith("channel") if len(names) == 3 else shape[0] in (1, 3) and shape[-1] != 1
        shape = (*shape[1:], shape[0]) if channels_first and len(shape) == 3 else shape
        return _picture(key, shape, dtype, entry.get("info") or entry.get("video_info"))
    return Feature(kind="text" if dtype == "string" else "vector", shape=shape, dtype=dtype, names=names)


def _picture(key: str, shape: tuple[int, ...], dtype: str, about: Any) -> Feature:
    """A camera of colours or of depth. What has one channel and is no depth map is grey, and read as three equal ones.

    Depth is what is marked as such, has more than 8 bits of grey, or one channel and either no axis for it or a name
    that says so.
    """
    about = about if isinstance(about, Mapping) else {}
    encoded = str(about.get("video.pix_fmt") or about.get("pix_fmt") or "")
    marked, deep = any(about.get(name) for name in ("is_depth_map", "video.is_depth_map")), is_deep(encoded)
    single = len(shape) == 2 or shape[-1:] == (1,)
    if marked or deep or (single and (len(shape) == 2 or "depth" in key.lower())):
        shown = not deep and (bool(encoded) or not single)
        return Feature(kind="depth", shape=(*shape[:2], 3 if shown else 1), dtype=dtype)
    return Feature(kind="image", shape=(*shape[:2], 3) if single else shape, dtype=dtype)


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


def _promised(info: Mapping[str, Any], numbers: list[int], lengths: list[int]) -> tuple[int, int]:
    return info.get("total_episodes", len(numbers)), info.get("total_frames", sum(lengths))


# Files --------------------------------------------------------------------------------------------------------------


def _read_json(path: Path, root: Path) -> Any:
    try:
        return json.loads(_read_text(path, root))
    except json.JSONDecodeError as error:
        broken(root, "JSON", str(error), path)


def _read_lines(path: Path, root: Path, unreadable: list[DatasetFormatError] | None = None) -> list[Any]:
    """One JSON value per line; a line that is none raises, or is added to `unreadable` and left out."""
    values = []
    for number, line in enumerate(_read_text(path, root).split("\n"), start=1):
        try:
            values += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            fault = format_error(root, "JSON", str(error), f"{path}, line {number}")
            if unreadable is None:
                raise fault from error
            unreadable.append(fault)
    return values


def _read_text(path: Path, root: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        broken(root, "a metadata file", "nothing", path)
    except (OSError, UnicodeDecodeError) as error:
        broken(root, "a readable metadata file", str(error), path)


def _empty(root: Path) -> DatasetNotFoundError:
    return DatasetNotFoundError(
        expected="at least one episode with at least one frame",
        found="none",
        where=str(root / "meta"),
        next="record or convert episodes into this dataset, or give another path",
    )
