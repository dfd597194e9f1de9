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
"""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from manipi.data.dataset import Episode, Feature
from manipi.data.rlds_fields import RldsFields
from manipi.data.tfrecord import Example, Record, broken, read_json, read_records
from manipi.errors import ConfigError, DatasetNotFoundError, MissingFeatureError, unknown_name
from manipi.records import fingerprint, write_json
from manipi.storage import atomic_directory, home, remove_partial, storage_errors

_FORMAT = 1
"""Of the index; another number makes all indexes anew."""
_INSTRUCTIONS = ("language_instruction", "natural_language_instruction")
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One split of a dataset in a version's folder, and what of it is read."""

    root: Path
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
        name=info["name"],
        files=files,
        num_records=num_records,
        metadata=fingerprint([info, features]),
        steps=steps,
        fields=_resolve(fields, steps),
    )


def _resolve(fields: RldsFields, steps: Mapping[str, Feature]) -> RldsFields:
    every = {kind: {n: (n,) for n in sorted(steps) if steps[n].kind == kind} for kind in ("image", "vector", "text")}
    return replace(
        fields,
        images=fields.images or every["image"],
        vectors=fields.vectors or every["vector"],
        prompts=fields.prompts or tuple(name for name in every["text"] if name.split("/")[-1] in _INSTRUCTIONS),
    )


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
        self._folder = _make(source, show)
        index = read_json(self._folder / "index.json")
        self.digest: str = index["digest"]
        """SHA-256 over length and checksum of every record."""
        self.texts: list[str] = index["texts"]
        self.num_frames: int = sum(length for _, _, length, _ in index["episodes"])
        self.files = [source.files[file] for _, file, _, _ in index["episodes"]]
        """The record file of each episode."""
        self.prompts = self.array("prompts", np.int32, len(source.fields.prompts))
        self.episodes = list(self._episodes(index["episodes"]))

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
    for path in source.files:
        if not path.is_file():
            broken(f"{len(source.files)} record files, as dataset_info.json says", "nothing of this name", path)
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in source.files]
    fields = source.fields
    read = [fields.vectors, source.pictures, fields.prompts, fields.episode_key, fields.only]
    key = fingerprint([_FORMAT, source.root, source.metadata, stats, read])
    folder = home() / "rlds" / f"{source.name}-{key[:16]}"
    target = folder / "index"
    next = "free some space or choose another folder for indexes with MANIPI_HOME"
    if not target.is_dir():
        with storage_errors(folder, next=next):
            folder.mkdir(parents=True, exist_ok=True)
            # Of the processes of a run one makes the index, and the others wait for it.
            with FileLock(folder / ".lock"):
                if not target.is_dir():
                    remove_partial(folder)
                    with atomic_directory(target, next) as partial:
                        _Builder(source, partial).run(show)
    return target


class _Builder:
    """Reads all records of a source, and writes what is not pictures into a folder."""

    def __init__(self, source: Source, folder: Path):
        self._source, self._fields, self._folder = source, source.fields, folder
        self._texts: dict[str, int] = {}
        self._episodes: list[tuple[int, int, int, str]] = []
        self._digest = hashlib.sha256()
        self._num_records = 0

    def run(self, show: bool) -> None:
        sizes = [path.stat().st_size for path in self._source.files]
        bar = tqdm(total=sum(sizes), desc=f"index {self._source.name}", unit="B", unit_scale=True, disable=not show)
        with ExitStack() as stack:
            progress = stack.enter_context(bar)
            names = [f"vector:{key}" for key in self._fields.vectors]
            names += [f"picture:{feature}" for feature in self._source.pictures] + ["prompts"]
            self._open = {name: stack.enter_context(_path(self._folder, name).open("wb")) for name in names}
            for number, path in enumerate(self._source.files):
                self._read_file(number, path, progress)
        if not self._episodes:
            raise DatasetNotFoundError(
                expected="at least one episode" + "".join(f" with {v!r} in {k}" for k, v in self._fields.only.items()),
                found=f"none in {self._num_records} records",
                where=str(self._source.root),
                next="choose another split, or another map of fields",
            )
        index = {"episodes": self._episodes, "texts": list(self._texts), "digest": self._digest.hexdigest()}
        write_json(self._folder / "index.json", index)

    def _read_file(self, number: int, path: Path, progress: tqdm) -> None:
        first, expected = self._num_records, self._source.num_records[number]
        for record in read_records(path):
            self._digest.update(f"{len(record.data)} {record.checksum}\n".encode())
            try:
                self._read_record(number, record)
            except (ValueError, KeyError) as error:
                found, start = str(error), record.offset
                where = f"{path}, record {self._num_records - first} at byte {start}, episode {self._num_records}"
                broken("an episode with the features of features.json", found, where)
            self._num_records += 1
            progress.update(len(record.data))
        if (found := self._num_records - first) != expected:
            broken(f"{expected} records, as dataset_info.json says", f"{found}", path)

    def _read_record(self, file: int, record: Record) -> None:
        fields, example = self._fields, Example(record.data)
        if not all(part in _text(example, name) for name, part in fields.only.items()):
            return
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
        key = "--".join(_text(example, name) for name in fields.episode_key)
        self._episodes.append((self._num_records, file, next(iter(lengths.values())), key))

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


def _text(example: Example, name: str) -> str:
    """A text feature of the episode; empty where it is."""
    return next(iter(example.texts(name)), "")
