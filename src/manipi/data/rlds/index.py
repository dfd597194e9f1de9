"""An index of an RLDS dataset's records, made once and then memory-mapped.

    features.json, dataset_info.json      names, shapes and dtypes; splits and their record files
    <name>-<split>.tfrecord-00000-of-…    one record per episode, each feature over all its steps

    MANIPI_HOME/rlds/<name>-<digest>/index/
    ├─ index.json                         episodes, texts, digest of all records
    ├─ vector:<key>                       float32 or int64 [N, d]
    ├─ picture:<feature>                  int64 [N, 2]: where in the record file the encoded picture begins; its size
    └─ prompts                            int32 [N, P]: numbers in the list of texts

Making it reads every record file once, from front to back, and checks every checksum; after that, a picture costs one
read of its own bytes, where TensorFlow has to read its whole episode. It is 16 bytes per picture and 4 per number (an
eight-dimensional state, eight-dimensional actions, three cameras: 124 bytes per step), and is made anew when the files
change in name, size or time, or the map in what it reads.

Record files of a store are too many to keep (`CachedFile`): each comes when it is first read, and goes when there is no
more room. `_AHEAD` of them come while one is indexed. What was read of each is kept in .index.partial/progress.jsonl,
so that the next opening goes on behind the last whole file.

    MANIPI_HOME/gs+bucket+droid+1.0.1/
    ├─ droid-train.tfrecord-00007-of-02048         fetched and verified as any other
    └─ .droid-train.tfrecord-00007-of-02048.use    locked by all who read that file; its time is that of the last use
"""

import hashlib
import json
import math
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from tqdm import tqdm

from manipi.data.dataset import Episode
from manipi.data.rlds.fields import RldsSplit
from manipi.data.rlds.tfrecord import Example, Record, broken, read_json, read_records
from manipi.errors import ConfigError, DatasetFormatError, DatasetNotFoundError, quoted
from manipi.records import fingerprint, write_json
from manipi.remote.fetch import fetch, sha256_of, target_of
from manipi.storage import Lock, atomic_directory, home, remove_partial, storage_errors

_FORMAT = 2
"""Of the index, as 0.1.0 wrote it too; another number makes all indexes anew."""
_AHEAD = 2
"""Record files that are fetched while one is indexed."""

# Record files -------------------------------------------------------------------------------------------------------

LIMIT_GB = 50.0
"""Where MANIPI_RECORDS_GB does not say otherwise."""
_over_limit = False
"""Whether files in use alone took more than the limit when this process looked last."""


class CachedFile:
    """A file that stays at `path` as long as this object is referenced: of a store, or a local one as it is.

    Of files of stores, whenever one came, those whose last use is longest ago are deleted until all together take no
    more than MANIPI_RECORDS_GB. One that any process of this machine uses stays; if it was in the way, the next use of
    any file looks again.

    Raises:
        FetchError, StorageError: as `fetch`.
        ConfigError: MANIPI_RECORDS_GB is no size.
    """

    def __init__(self, source: str):
        self.path, self.sha256 = Path(source), ""
        """`sha256` is that of a file of a store, as it was fetched."""
        if "://" not in source:
            return
        limit()  # is a size, or nothing is fetched
        target = target_of(source)
        use = target.with_name(f".{target.name}.use")
        with storage_errors(use):
            use.parent.mkdir(parents=True, exist_ok=True)
            self._use = Lock(use, shared=True)
            os.utime(self._use.descriptor)
        here = target.exists()
        self.path = fetch(source, show=False)
        self.sha256 = sha256_of(self.path)
        if _over_limit or (self.path == target and not here):
            delete_unused()


def limit() -> float:
    """Bytes for all files of stores that were used once and are still here. Raises ConfigError where it is no size."""
    text = os.environ.get("MANIPI_RECORDS_GB") or str(LIMIT_GB)
    try:
        if (size := float(text)) > 0:
            return size * 1e9
    except ValueError:
        pass
    raise ConfigError(
        expected="a size in GB", found=repr(text), where="MANIPI_RECORDS_GB", next="export MANIPI_RECORDS_GB=50"
    )


def delete_unused() -> None:
    """Delete record files beyond the limit that are not in use, those first whose last use is longest ago."""
    global _over_limit
    home().mkdir(parents=True, exist_ok=True)
    with Lock(home() / ".room.lock"):
        uses = sorted(home().glob("*/.*.use"), key=lambda use: use.stat().st_mtime_ns)
        files = {use: use.with_name(use.name.removeprefix(".").removesuffix(".use")) for use in uses}
        sizes = {use: file.stat().st_size for use, file in files.items() if file.exists()}
        excess = sum(sizes.values()) - limit()
        for use, size in sizes.items():
            if excess > 0:
                with suppress(BlockingIOError), Lock(use, wait=False):
                    files[use].unlink()
                    excess -= size
        _over_limit = excess > 0


# The index ----------------------------------------------------------------------------------------------------------


class RldsIndex:
    """The index of a split: opened where it was made before, else made.

    Raises:
        DatasetFormatError: a record file is missing, truncated or damaged, or disagrees with the metadata.
        DatasetNotFoundError: no episode, or none that the map leaves in.
        StorageError: no room for the index.
    """

    def __init__(self, split: RldsSplit, *, show: bool):
        self._folder, self._split = _make(split, show), split
        index = read_json(self._folder / "index.json")
        self.digest: str = index["digest"]
        """SHA-256 over length and checksum of every record."""
        self.texts: list[str] = index["texts"]
        self.num_frames: int = sum(length for _, _, length, _ in index["episodes"])
        self.files: list[int] = [file for _, file, _, _ in index["episodes"]]
        """The number of each episode's record file."""
        self._sha256: list[str] = index["sha256"]
        self.prompts = self.array("prompts", np.int32, len(split.fields.prompts))
        self.episodes = list[Episode]()
        start = 0
        for record, _, length, key in index["episodes"]:
            texts = [self.texts[number] for number in self.prompts[start].tolist()]
            task = next((text for text in texts if text), "")
            self.episodes.append(Episode(index=record, start=start, length=length, task=task, key=key))
            start += length

    def record_file(self, number: int) -> CachedFile:
        """The file that was indexed. Raises DatasetFormatError where the store now has another one."""
        file = _record_file(self._split, number)
        if file.sha256 != self._sha256[number]:
            raise DatasetFormatError(
                expected=f"the record file that was indexed, SHA-256 {self._sha256[number]}",
                found=f"another one, {file.sha256}",
                where=str(file.path),
                next=f"rm -r {quoted(self._split.root)} {quoted(self._folder)}  # then it is indexed anew",
            )
        return file

    def array(self, name: str, dtype: Any, width: int) -> np.ndarray:
        """[N, width], mapped from the index's file of that name; read-only."""
        if not width:
            return np.empty((self.num_frames, 0), dtype)
        return np.memmap(_path(self._folder, name), dtype, "r", shape=(self.num_frames, width)).view(np.ndarray)


def _path(folder: Path, name: str) -> Path:
    return folder / quote(name, safe=": ")


def _record_file(split: RldsSplit, number: int) -> CachedFile:
    path = split.files[number]
    return CachedFile(f"{split.origin}/{path.relative_to(split.root)}" if split.origin else str(path))


def _make(split: RldsSplit, show: bool) -> Path:
    """The folder of the index, which is made where it is absent."""
    fields, stats = split.fields, list[tuple[str, int, int]]()
    for path in () if split.origin else split.files:
        if not path.is_file():
            broken(f"{len(split.files)} record files, as dataset_info.json says", "nothing of this name", path)
        stats.append((path.name, path.stat().st_size, path.stat().st_mtime_ns))
    read = [fields.vectors, split.pictures, fields.prompts, fields.episode_key, fields.only]
    key = fingerprint([_FORMAT, split.origin or split.root, split.metadata, stats, read])
    folder = home() / "rlds" / f"{split.name}-{key[:16]}"
    target = folder / "index"
    next = "free some space or choose another folder for indexes with MANIPI_HOME"
    if not target.is_dir():
        with storage_errors(folder, next=next):
            folder.mkdir(parents=True, exist_ok=True)
            # Of the processes of a run one makes the index, and the others wait for it.
            with Lock(folder / ".lock"):
                if not target.is_dir():
                    if not split.origin:
                        remove_partial(folder)
                    with atomic_directory(target, next, resume=bool(split.origin)) as partial:
                        _Builder(split, partial).run(show)
                    if split.origin:
                        delete_unused()
    return target


class _Builder:
    """Reads all records of a split, and writes what is not pictures into a folder.

    Of each record file there is an entry, and entries are all that the index and a resumed builder need:

        records   length and checksum of each         episodes   number, file, steps, key
        texts     those not seen before                sha256     of the file, where it came from a store
        ends      of the columns behind this file
    """

    def __init__(self, split: RldsSplit, folder: Path):
        self._split, self._fields, self._folder = split, split.fields, folder
        self._log = folder / "progress.jsonl"
        self._entries: list[dict[str, Any]] = []
        self._texts: dict[str, int] = {}

    def run(self, show: bool) -> None:
        counts, names = self._split.num_records, [f"vector:{key}" for key in self._fields.vectors]
        names += [f"picture:{feature}" for feature in self._split.pictures] + ["prompts"]
        with ExitStack() as stack:
            self._open = {name: stack.enter_context(_path(self._folder, name).open("ab")) for name in names}
            self._resume()
            first = len(self._entries)
            what = {"desc": f"index {self._split.name}", "unit": "episode", "disable": not show}
            bar = stack.enter_context(tqdm(total=sum(counts), initial=sum(counts[:first]), **what))
            pool = stack.enter_context(ThreadPoolExecutor(_AHEAD))
            numbers = iter(range(first, len(counts)))
            waiting = deque(pool.submit(_record_file, self._split, number) for number in islice(numbers, _AHEAD))
            for number in range(first, len(counts)):
                file = waiting.popleft().result()
                waiting.extend(pool.submit(_record_file, self._split, ahead) for ahead in islice(numbers, 1))
                self._read_file(number, file, bar)
                del file  # which may go now
        self._write_index()
        self._log.unlink(missing_ok=True)

    def _resume(self) -> None:
        """Go on behind the last whole line of the log."""
        lines = self._log.read_bytes().splitlines(keepends=True) if self._log.is_file() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        self._entries = [json.loads(line) for line in whole]
        self._texts = {text: i for i, text in enumerate(chain.from_iterable(e["texts"] for e in self._entries))}
        if lines:
            os.truncate(self._log, sum(map(len, whole)))
        ends = self._entries[-1]["ends"] if whole else [0] * len(self._open)
        for file, end in zip(self._open.values(), ends, strict=True):
            file.truncate(end)
            file.seek(end)

    def _write_index(self) -> None:
        episodes, records, texts = (
            list(chain.from_iterable(entry[part] for entry in self._entries))
            for part in ("episodes", "records", "texts")
        )
        if not episodes:
            raise DatasetNotFoundError(
                expected="at least one episode" + "".join(f" with {v!r} in {k}" for k, v in self._fields.only.items()),
                found=f"none in {len(records)} records",
                where=str(self._split.root),
                next="choose another split, or another map of fields",
            )
        digest = hashlib.sha256("".join(f"{length} {checksum}\n" for length, checksum in records).encode())
        sha256 = [entry["sha256"] for entry in self._entries]
        index = {"episodes": episodes, "texts": texts, "digest": digest.hexdigest(), "sha256": sha256}
        write_json(self._folder / "index.json", index)

    def _read_file(self, number: int, file: CachedFile, bar: tqdm) -> None:
        known, episodes, records = len(self._texts), list[Any](), list[tuple[int, int]]()
        first = sum(self._split.num_records[:number])
        for record in read_records(file.path):
            episode = first + len(records)
            try:
                if (read := self._read_record(record)) is not None:
                    episodes.append((episode, number, *read))
            except (ValueError, KeyError) as error:
                where = f"{file.path}, record {len(records)} at byte {record.offset}, episode {episode}"
                broken("an episode with the features of features.json", str(error), where)
            records.append((len(record.data), record.checksum))
            bar.update()
        if (expected := self._split.num_records[number]) != len(records):
            broken(f"{expected} records, as dataset_info.json says", f"{len(records)}", file.path)
        texts = list(islice(self._texts, known, None))
        entry = {"records": records, "episodes": episodes, "texts": texts, "sha256": file.sha256}
        self._entries.append(entry)
        if self._split.origin:  # the entry follows its numbers to the disk
            for column in self._open.values():
                column.flush()
                os.fsync(column.fileno())
            entry["ends"] = [column.tell() for column in self._open.values()]
            with self._log.open("a") as log:
                log.write(json.dumps(entry) + "\n")
                log.flush()
                os.fsync(log.fileno())

    def _read_record(self, record: Record) -> tuple[int, str] | None:
        """Steps and key of the episode; None where the map leaves it out."""
        fields, example = self._fields, Example(record.data)
        if not all(part in _text(example, name) for name, part in fields.only.items()):
            return None
        content: dict[str, np.ndarray] = {f"vector:{key}": self._vector(example, key) for key in fields.vectors}
        for name in self._split.pictures:
            content[f"picture:{name}"] = example.spans(f"steps/{name}") + np.array([record.offset, 0])
        prompts = [
            [self._texts.setdefault(text, len(self._texts)) for text in example.texts(f"steps/{name}")]
            for name in fields.prompts
        ]
        lengths = {name: len(values) for name, values in content.items()}
        lengths |= dict(zip(fields.prompts, map(len, prompts), strict=True))
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(f"not the same number of steps, at least one, in every feature: {lengths}")
        content["prompts"] = np.array(prompts, np.int32).T
        for name, values in content.items():
            self._open[name].write(values.tobytes())
        return next(iter(lengths.values())), "--".join(_text(example, name) for name in fields.episode_key)

    def _vector(self, example: Example, key: str) -> np.ndarray:
        """[T, d]"""
        dtype, parts = np.dtype(self._split.vector(key).dtype), []
        for name in self._fields.vectors[key]:
            width, values = math.prod(self._split.steps[name].shape), example.numbers(f"steps/{name}")
            if values.size % width:
                raise ValueError(f"{values.size} numbers in {name!r}, which is of size {width}")
            if not np.can_cast(values.dtype, dtype, "same_kind"):
                raise ValueError(f"{values.dtype} in {name!r}, not integers")
            parts.append(values.reshape(-1, width))
        return np.concatenate(parts, axis=1, dtype=dtype, casting="same_kind")


def _text(example: Example, name: str) -> str:
    """A text feature of the episode; empty where it is."""
    return next(iter(example.texts(name)), "")
