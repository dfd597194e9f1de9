"""What an RLDS dataset says of itself, and an index of its records that is made once and then memory-mapped.

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

Record files of a store are on loan (`remote.loan`) while they are read: `_AHEAD` come while one is indexed. What was
read of each is kept in .index.partial/progress.jsonl, so that the next opening goes on behind the last whole file.
"""

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from manipi.data.dataset import Episode, Feature
from manipi.data.rlds.fields import FIELDS_FILE, RldsFields
from manipi.data.rlds.loan import Loan, make_room
from manipi.data.rlds.tfrecord import Example, Record, broken, read_json, read_records
from manipi.errors import (
    ConfigError,
    DatasetFormatError,
    DatasetNotFoundError,
    FetchError,
    MissingFeatureError,
    quoted,
    unknown_name,
)
from manipi.records import fingerprint, write_json
from manipi.remote.fetch import fetch, is_here, origin
from manipi.remote.stores import fetch_error
from manipi.storage import atomic_directory, home, remove_partial, storage_errors

_FORMAT = 2
"""Of the index; another number makes all indexes anew."""
_AHEAD = 2
"""Record files that are fetched while one is indexed."""
_INFO = "dataset_info.json"
_INSTRUCTIONS = ("language_instruction", "natural_language_instruction")
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One split of a dataset in a version's folder, and what of it is read."""

    root: Path
    origin: str
    """The address that record files are fetched from; empty where they are in `root`."""
    name: str
    files: tuple[Path, ...]
    num_records: tuple[int, ...]
    """Per file, as dataset_info.json says."""
    metadata: str
    """Digest of the two JSON files."""
    steps: Mapping[str, Feature]
    """All features of a step that can be read."""
    fields: RldsFields
    """The map, with the features themselves where it says to take all."""

    def record_file(self, number: int) -> Loan:
        path = self.files[number]
        return Loan(f"{self.origin}/{path.relative_to(self.root)}" if self.origin else str(path))

    @property
    def pictures(self) -> list[str]:
        """The picture features that some camera shows, in an order that does not depend on the cameras."""
        return sorted({feature for features in self.fields.images.values() for feature in features})

    def vector(self, key: str) -> Feature:
        parts = [self.steps[feature] for feature in self.fields.vectors[key]]
        dtype = "int64" if all("float" not in part.dtype for part in parts) else "float32"
        shape = parts[0].shape if len(parts) == 1 else (sum(math.prod(part.shape) for part in parts),)
        return Feature(kind="vector", shape=shape, dtype=dtype)


def find_version(folder: Path) -> Path | None:
    """The folder of a version, given that or its parent; None where neither holds record files or their metadata.

    Raises:
        ConfigError: the parent of several versions; names them.
    """
    if _is_version(folder):
        return folder
    versions = [path for path in sorted(folder.iterdir()) if path.is_dir() and _is_version(path)]
    if len(versions) > 1:
        raise ConfigError(
            expected="the folder of one version",
            found=f"{len(versions)}: {', '.join(path.name for path in versions)}",
            where=str(folder),
            next=f"name one of them, such as {versions[-1]}",
        )
    return versions[0] if versions else None


def _is_version(folder: Path) -> bool:
    return any(name in ("features.json", "dataset_info.json") or ".tfrecord" in name for name in os.listdir(folder))


def fetch_metadata(url: str) -> Path:
    """The folder that a version's metadata are in, and its record files later. FetchError where there is no version."""
    optional = [] if is_here(f"{url}/{_INFO}") else [FIELDS_FILE]
    # What comes last tells that all that there is came.
    for name in (*optional, "features.json", _INFO):
        try:
            path = fetch(f"{url}/{name}", show=False)
        except FetchError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            if name not in optional:
                next = f"give the address of the dataset itself; of RLDS that of a version, such as {url}/1.0.0"
                found = f"no {name}"
                raise fetch_error("LeRobot's meta/info.json, or an RLDS version", found, url, next) from error
    return path.parent  # pyright: ignore[reportPossiblyUnboundVariable]


def read_info(root: Path) -> dict[str, Any]:
    """dataset_info.json, which has a name and splits; else DatasetFormatError."""
    info = read_json(root / "dataset_info.json")
    with _malformed(root / "dataset_info.json"):
        return info | {"name": str(info["name"]), "splits": list(info["splits"])}


def read_source(root: Path, fields: RldsFields, split: str) -> Source:
    """Read the metadata of a version's folder.

    Raises:
        DatasetFormatError: metadata that are missing or broken, or record files of another format than TFRecord.
        MissingFeatureError: the map names a feature that is not there, or of another kind.
        UnknownNameError: no such split; names those that are there.
    """
    info, features = read_info(root), read_json(root / "features.json")
    with _malformed(root / "dataset_info.json"):
        splits = {entry["name"]: _files(root, info, entry) for entry in info["splits"]}
    with _malformed(root / "features.json"):
        leaves = dict(_leaves(features, ""))
    if split not in splits:
        raise unknown_name("split", split, splits, next=f"name one of those in {root / 'dataset_info.json'}")
    files, num_records = splits[split]
    steps = {name.removeprefix("steps/"): leaf for name, leaf in leaves.items() if name.startswith("steps/")}
    for needed, found in ((fields.only.keys() | set(fields.episode_key), leaves), (fields.prompts, steps)):
        for name in needed:
            _require(found, name, "text", root)
    for kind, groups in (("image", fields.images), ("vector", fields.vectors)):
        for name in {name for names in groups.values() for name in names}:
            _require(steps, name, kind, root)
    return Source(
        root=root,
        origin=origin(root / _INFO).removesuffix(f"/{_INFO}"),
        name=info["name"],
        files=files,
        num_records=num_records,
        metadata=fingerprint([info, features]),
        steps=steps,
        fields=_resolve(fields, steps),
    )


def _resolve(fields: RldsFields, steps: Mapping[str, Feature]) -> RldsFields:
    every = {
        kind: {n: (n,) for n in sorted(steps) if steps[n].kind == kind and not is_depth(n, steps[n])}
        for kind in ("image", "vector", "text")
    }
    return replace(
        fields,
        images=fields.images or every["image"],
        vectors=fields.vectors or every["vector"],
        prompts=fields.prompts or tuple(name for name in every["text"] if name.split("/")[-1] in _INSTRUCTIONS),
    )


def is_depth(name: str, feature: Feature) -> bool:
    """Whether a matrix of numbers is a depth map, which is no vector unless a map of fields says so."""
    return feature.kind == "vector" and len(feature.shape) == 2 and "depth" in name.lower() and min(feature.shape) >= 16


@contextmanager
def _malformed(where: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        broken("the entries that tensorflow_datasets writes", f"{type(error).__name__}: {error}", where)


def _require(leaves: Mapping[str, Feature], name: str, kind: str, root: Path) -> None:
    if name in leaves and leaves[name].kind == kind:
        return
    known = sorted(n for n, leaf in leaves.items() if leaf.kind == kind)
    raise MissingFeatureError(
        expected=f"{kind} {name!r}",
        found=f"{leaves[name].kind} {name!r}" if name in leaves else f"only {', '.join(known) or 'none'}",
        where=str(root / "features.json"),
        next="name one of those in the RldsFields",
    )


def _files(root: Path, info: Mapping[str, Any], split: Mapping[str, Any]) -> tuple[tuple[Path, ...], tuple[int, ...]]:
    if info.get("fileFormat", "tfrecord") != "tfrecord":
        broken("record files in the format tfrecord", repr(info["fileFormat"]), root / "dataset_info.json")
    numbers = tuple(int(number) for number in split["shardLengths"])
    template, total = split.get("filepathTemplate") or _TEMPLATE, f"{len(numbers):05d}"
    names = {"DATASET": info["name"], "SPLIT": split["name"], "FILEFORMAT": "tfrecord", "NUM_SHARDS": total}
    indices = [f"{i:05d}" for i in range(len(numbers))]
    files = [template.format(**names, SHARD_INDEX=i, SHARD_X_OF_Y=f"{i}-of-{total}") for i in indices]
    return tuple(root / file for file in files), numbers


def _leaves(node: Mapping[str, Any], name: str) -> Iterator[tuple[str, Feature]]:
    """Features by their path, `steps/observation/state`; those that no key can show are left out.

    These are inner sequences, tensors of three and more or unknown dimensions or in an encoding of their own, and
    pictures in anything but 8-bit RGB.
    """
    if "featuresDict" in node:
        for part, child in node["featuresDict"]["features"].items():
            yield from _leaves(child, f"{name}/{part}" if name else part)
    elif name == "steps" and "sequence" in node:
        yield from _leaves(node["sequence"]["feature"], name)
    elif "text" in node:
        yield name, Feature(kind="text", shape=(1,), dtype="string")
    elif "classLabel" in node:
        yield name, Feature(kind="vector", shape=(1,), dtype="int64")
    elif "image" in node or "tensor" in node:
        entry = node.get("image") or node["tensor"]
        shape = tuple(int(size) for size in entry["shape"].get("dimensions", ()))
        dtype = entry.get("dtype", "uint8")
        if "image" in node:
            if dtype == "uint8" and shape[2:] == (3,):
                yield name, Feature(kind="image", shape=shape, dtype="image")
        elif dtype in ("string", "object", "bytes") and not shape:
            yield name, Feature(kind="text", shape=(1,), dtype="string")
        elif len(shape) < 3 and min(shape, default=1) > 0 and entry.get("encoding", "none") == "none":
            yield name, Feature(kind="vector", shape=shape or (1,), dtype=dtype)


# The index ----------------------------------------------------------------------------------------------------------


class RldsIndex:
    """The index of a source: opened where it was made before, else made.

    Raises:
        DatasetFormatError: a record file is missing, truncated or damaged, or disagrees with the metadata.
        DatasetNotFoundError: no episode, or none that the map leaves in.
        StorageError: no room for the index.
    """

    def __init__(self, source: Source, *, show: bool):
        self._folder, self._source = _make(source, show), source
        index = read_json(self._folder / "index.json")
        self.digest: str = index["digest"]
        """SHA-256 over length and checksum of every record."""
        self.texts: list[str] = index["texts"]
        self.num_frames: int = sum(length for _, _, length, _ in index["episodes"])
        self.files: list[int] = [file for _, file, _, _ in index["episodes"]]
        """The number of each episode's record file."""
        self._sha256: list[str] = index["sha256"]
        self.prompts = self.array("prompts", np.int32, len(source.fields.prompts))
        self.episodes = list(self._episodes(index["episodes"]))

    def record_file(self, number: int) -> Loan:
        """The file that was indexed. Raises DatasetFormatError where the store now has another one."""
        loan = self._source.record_file(number)
        if loan.sha256 != self._sha256[number]:
            raise DatasetFormatError(
                expected=f"the record file that was indexed, SHA-256 {self._sha256[number]}",
                found=f"another one, {loan.sha256}",
                where=str(loan.path),
                next=f"rm -r {quoted(self._source.root)} {quoted(self._folder)}  # then it is indexed anew",
            )
        return loan

    def array(self, name: str, dtype: Any, width: int) -> np.ndarray:
        """[N, width], mapped from the index's file of that name; read-only."""
        if not width:
            return np.empty((self.num_frames, 0), dtype)
        return np.memmap(_path(self._folder, name), dtype, "r", shape=(self.num_frames, width)).view(np.ndarray)

    def _episodes(self, rows: list[list[Any]]) -> Iterator[Episode]:
        start = 0
        for record, _, length, key in rows:
            texts = [self.texts[number] for number in self.prompts[start].tolist()]
            task = next((text for text in texts if text), "")
            yield Episode(index=record, start=start, length=length, task=task, key=key)
            start += length


def _path(folder: Path, name: str) -> Path:
    return folder / quote(name, safe=": ")


def _make(source: Source, show: bool) -> Path:
    fields, stats = source.fields, [] if source.origin else _stats(source.files)
    read = [fields.vectors, source.pictures, fields.prompts, fields.episode_key, fields.only]
    key = fingerprint([_FORMAT, source.origin or source.root, source.metadata, stats, read])
    folder = home() / "rlds" / f"{source.name}-{key[:16]}"
    target = folder / "index"
    next = "free some space or choose another folder for indexes with MANIPI_HOME"
    if not target.is_dir():
        with storage_errors(folder, next=next):
            folder.mkdir(parents=True, exist_ok=True)
            # Of the processes of a run one makes the index, and the others wait for it.
            with FileLock(folder / ".lock"):
                if not target.is_dir():
                    if not source.origin:
                        remove_partial(folder)
                    with atomic_directory(target, next, resume=bool(source.origin)) as partial:
                        _Builder(source, partial).run(show)
                    if source.origin:
                        make_room()
    return target


def _stats(files: tuple[Path, ...]) -> list[tuple[str, int, int]]:
    for path in files:
        if not path.is_file():
            broken(f"{len(files)} record files, as dataset_info.json says", "nothing of this name", path)
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


class _Builder:
    """Reads all records of a source, and writes what is not pictures into a folder.

    Of each record file there is an entry, and entries are all that the index and a resumed builder need:

        records   length and checksum of each         episodes   number, file, steps, key
        texts     those not seen before                sha256     of the file, where it came from a store
        ends      of the columns behind this file
    """

    def __init__(self, source: Source, folder: Path):
        self._source, self._fields, self._folder = source, source.fields, folder
        self._log = folder / "progress.jsonl"
        self._entries: list[dict[str, Any]] = []
        self._texts: dict[str, int] = {}

    def run(self, show: bool) -> None:
        with ExitStack() as stack:
            names = [f"vector:{key}" for key in self._fields.vectors]
            names += [f"picture:{feature}" for feature in self._source.pictures] + ["prompts"]
            self._open = {name: stack.enter_context(_path(self._folder, name).open("ab")) for name in names}
            self._resume()
            first, counts = len(self._entries), self._source.num_records
            what = {"desc": f"index {self._source.name}", "unit": "episode", "disable": not show}
            bar = stack.enter_context(tqdm(total=sum(counts), initial=sum(counts[:first]), **what))
            loans = stack.enter_context(_ahead(self._source, first))
            for number, loan in enumerate(loans, start=first):
                self._read_file(number, loan, bar)
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

    def _keep(self) -> None:
        """The entry follows its numbers to the disk."""
        for file in self._open.values():
            file.flush()
            os.fsync(file.fileno())
        self._entries[-1]["ends"] = [file.tell() for file in self._open.values()]
        with self._log.open("a") as log:
            log.write(json.dumps(self._entries[-1]) + "\n")
            log.flush()
            os.fsync(log.fileno())

    def _write_index(self) -> None:
        episodes, records, texts = (
            list(chain.from_iterable(entry[part] for entry in self._entries))
            for part in ("episodes", "records", "texts")
        )
        if not episodes:
            raise DatasetNotFoundError(
                expected="at least one episode" + "".join(f" with {v!r} in {k}" for k, v in self._fields.only.items()),
                found=f"none in {len(records)} records",
                where=str(self._source.root),
                next="choose another split, or another map of fields",
            )
        digest = hashlib.sha256("".join(f"{length} {checksum}\n" for length, checksum in records).encode())
        sha256 = [entry["sha256"] for entry in self._entries]
        index = {"episodes": episodes, "texts": texts, "digest": digest.hexdigest(), "sha256": sha256}
        write_json(self._folder / "index.json", index)

    def _read_file(self, number: int, loan: Loan, bar: tqdm) -> None:
        known, episodes, records = len(self._texts), list[Any](), list[tuple[int, int]]()
        first = sum(self._source.num_records[:number])
        for record in read_records(loan.path):
            episode = first + len(records)
            try:
                if (read := self._read_record(record)) is not None:
                    episodes.append((episode, number, *read))
            except (ValueError, KeyError) as error:
                where = f"{loan.path}, record {len(records)} at byte {record.offset}, episode {episode}"
                broken("an episode with the features of features.json", str(error), where)
            records.append((len(record.data), record.checksum))
            bar.update()
        if (expected := self._source.num_records[number]) != len(records):
            broken(f"{expected} records, as dataset_info.json says", f"{len(records)}", loan.path)
        texts = list(islice(self._texts, known, None))
        self._entries.append({"records": records, "episodes": episodes, "texts": texts, "sha256": loan.sha256})
        if self._source.origin:
            self._keep()

    def _read_record(self, record: Record) -> tuple[int, str] | None:
        """Steps and key of the episode; None where the map leaves it out."""
        fields, example = self._fields, Example(record.data)
        if not all(part in _text(example, name) for name, part in fields.only.items()):
            return None
        content: dict[str, np.ndarray] = {f"vector:{key}": self._vector(example, key) for key in fields.vectors}
        for name in self._source.pictures:
            content[f"picture:{name}"] = example.spans(f"steps/{name}") + np.array([record.offset, 0])
        prompts = [self._numbers(example.texts(f"steps/{name}")) for name in fields.prompts]
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
        dtype, parts = np.dtype(self._source.vector(key).dtype), []
        for name in self._fields.vectors[key]:
            width, values = math.prod(self._source.steps[name].shape), example.numbers(f"steps/{name}")
            if values.size % width:
                raise ValueError(f"{values.size} numbers in {name!r}, which is of size {width}")
            if not np.can_cast(values.dtype, dtype, "same_kind"):
                raise ValueError(f"{values.dtype} in {name!r}, not integers")
            parts.append(values.reshape(-1, width))
        return np.concatenate(parts, axis=1, dtype=dtype, casting="same_kind")

    def _numbers(self, texts: list[str]) -> list[int]:
        return [self._texts.setdefault(text, len(self._texts)) for text in texts]


@contextmanager
def _ahead(source: Source, first: int) -> Iterator[Iterator[Loan]]:
    """The record files from one on, of which the next `_AHEAD` are fetched while one is in use."""

    def loans() -> Iterator[Loan]:
        numbers = iter(range(first, len(source.files)))
        waiting = deque(pool.submit(source.record_file, number) for number in islice(numbers, _AHEAD))
        while waiting:
            loan = waiting.popleft().result()
            waiting.extend(pool.submit(source.record_file, number) for number in islice(numbers, 1))
            yield loan

    with ThreadPoolExecutor(_AHEAD) as pool:
        yield loans()


def _text(example: Example, name: str) -> str:
    """A text feature of the episode; empty where it is."""
    return next(iter(example.texts(name)), "")
