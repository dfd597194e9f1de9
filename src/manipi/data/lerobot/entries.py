"""The values of LeRobot metadata, each read as what it has to be, or refused with its file and name.

Whatever JSON or parquet type stands there: a value is converted where that loses nothing (2.0 is the number 2), and
otherwise is a DatasetFormatError.
"""

import json
import math
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from manipi.data.lerobot.tables import (
    allow,
    broken,
    is_number,
    not_as_meant,
    objects,
    plain,
    read_columns,
    whole_numbers,
)
from manipi.errors import DatasetFormatError, shown

T = TypeVar("T")

_MOST = 2**53
"""Larger numbers of episodes, rows and files are none, and a float does not tell them apart."""


@dataclass(frozen=True)
class Entry:
    """One JSON object of the metadata.

    All methods raise DatasetFormatError, which names file and key.
    """

    values: Mapping[str, Any]
    where: str
    root: Path

    def value(self, key: str) -> Any:
        if key not in self.values:
            broken(
                self.root,
                f"an entry {key!r}",
                f"only {shown(list(self.values), 300)}",
                self.where,
                _correct(self.where),
            )
        return self.values[key]

    def text(self, key: str) -> str:
        value = self.value(key)
        return value if isinstance(value, str) else self.refuse(key, "a text")

    def whole(self, key: str, least: int = 0) -> int:
        return self._whole(key, self.value(key), least)

    def count(self, key: str) -> int | None:
        """A number that may be absent or null."""
        return None if self.values.get(key) is None else self.whole(key)

    def rate(self, key: str) -> float:
        """A finite number above 0."""
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _MOST:
            self.refuse(key, "a finite number above 0")
        return value

    def shape(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers; a scalar, (), has one dimension of one."""
        value = self.value(key)
        if not isinstance(value, list):
            self.refuse(key, "a list of whole numbers")
        return tuple(self._whole(key, size, 0) for size in value) or (1,)

    def instruction(self, key: str) -> str:
        """A text; "" where it is null, which means that there is none."""
        value = self.value(key)
        return "" if value is None else self.text(key)

    def instructions(self, key: str) -> list[str]:
        """A list of texts, one text, or null."""
        value = self.value(key)
        values = [value] if value is None or isinstance(value, str) else value
        if not isinstance(values, list) or not all(text is None or isinstance(text, str) for text in values):
            self.refuse(key, "a list of texts")
        return [text or "" for text in values]

    def entries(self, key: str) -> dict[str, "Entry"]:
        """An object of objects."""
        value = self.value(key)
        if not isinstance(value, dict):
            self.refuse(key, "an object")
        return {name: entry_of(inner, f"{self.where}, {key} {shown(name)}", self.root) for name, inner in value.items()}

    def paths(self, key: str, **example: str | int) -> Callable[..., Path]:
        """What a path template such as "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet" names.

        Args:
            example: every name that may stand in it, with a value. Numbers may be others in the calls; texts not.
        """
        template = self.text(key)
        try:
            fields = list(string.Formatter().parse(template))
            # A width of a thousand digits would be a path of a gigabyte.
            plain = all(not turn and len(spec or "") <= 3 and "{" not in (spec or "") for _, _, spec, turn in fields)
            path = PurePosixPath(template.format(**example)) if plain else PurePosixPath("/")
            inside = not path.is_absolute() and ".." not in path.parts and "\0" not in str(path)
            inside &= bool(path.parts) and max(len(part.encode()) for part in path.parts) < 256
        except (ValueError, LookupError, AttributeError, TypeError):  # of the format, and of texts that are no UTF-8
            inside = False
        if not inside:
            self.refuse(key, f"the path of a file in the dataset's folder, made of {{{'}, {'.join(example)}}}")
        return cache(lambda **names: self.root / template.format(**names))  # many episodes share a file

    def refuse(self, key: str, expected: str) -> Any:
        broken(self.root, f"{expected} as {key!r}", shown(self.values[key]), self.where, _correct(self.where))

    def _whole(self, key: str, value: Any, least: int) -> int:
        whole = not isinstance(value, bool) and isinstance(value, (int, float)) and least <= value < _MOST
        if not whole or value != int(value):
            self.refuse(key, f"whole numbers of at least {least}")
        return int(value)


def _correct(where: str) -> str:
    return f"correct it: {where}"


def entry_of(value: Any, where: str, root: Path) -> Entry:
    if not isinstance(value, dict):
        broken(root, "a JSON object", shown(value), where, _correct(where))
    return Entry(value, where, root)


def flat_names(names: Any) -> tuple[str, ...]:
    """Names are stated as a list, a list of lists, a dict of lists (v2.0: {"motors": [...]}), or {name: position}."""
    if names is None or names == "":
        return ()
    if isinstance(names, list):
        return tuple(name for inner in names for name in flat_names(inner))
    if not isinstance(names, dict):
        return (str(names),)
    if all(isinstance(value, (int, float)) for value in names.values()):
        return tuple(sorted(names, key=lambda name: names[name]))
    return flat_names(list(names.values()))


# Files --------------------------------------------------------------------------------------------------------------


def read_entry(path: Path, root: Path) -> Entry:
    """The object in a JSON file."""
    return entry_of(_parse(_read_text(path, root), str(path), root), str(path), root)


def read_entries(
    path: Path, root: Path, make: Callable[[Entry], T], unreadable: list[DatasetFormatError] | None = None
) -> list[T]:
    """What `make` makes of the object in each line; where it cannot, that raises, or is added to `unreadable`."""
    made = []
    for number, line in enumerate(_read_text(path, root).split("\n"), start=1):
        where = f"{path}, line {number}"
        try:
            made += [make(entry_of(_parse(line, where, root), where, root))] if line.strip() else []
        except DatasetFormatError as error:
            if unreadable is None:
                raise
            unreadable.append(error)
    return made


def read_texts(path: Path, root: Path, number: str, text: str) -> dict[int, str]:
    """Texts by number, of a parquet table; "" for null. They are its pandas index, which lerobot 0.4 stores unnamed."""
    unnamed = "__index_level_0__"
    table = read_columns(path, [number], root, optional=[text, unnamed])
    column = text if text in table.column_names else unnamed
    if column not in table.column_names:
        broken(root, f"a column {text!r}", f"only {', '.join(table.column_names)}", path, not_as_meant(path))
    texts = objects(table.column(column), column, path, root)
    if bad := [value for value in texts if value is not None and not isinstance(value, str)]:
        broken(root, f"texts in {column!r}", shown(bad[0]), path, not_as_meant(path))
    numbers = whole_numbers(plain(table.column(number)), number, path, root)
    return {n: value or "" for n, value in zip(numbers.tolist(), texts, strict=True)}


@dataclass(frozen=True)
class EpisodeTable:
    """A parquet table with one row per episode; every method reads a column, as long as the table.

    All raise DatasetFormatError, which names file and column.
    """

    table: pa.Table
    path: Path
    root: Path

    def whole(self, name: str) -> list[int]:
        numbers = whole_numbers(plain(self.table.column(name)), name, self.path, self.root).tolist()
        if bad := [number for number in numbers if not 0 <= number < _MOST]:
            broken(
                self.root, f"whole numbers of at least 0 in {name!r}", f"{bad[0]}", self.path, not_as_meant(self.path)
            )
        return numbers

    def seconds(self, name: str) -> list[float]:
        values = self._floats(name)
        if (bad := np.flatnonzero(~((values >= 0) & (values < _MOST)))).size:
            broken(
                self.root,
                f"finite seconds of at least 0 in {name!r}",
                f"{values[bad[0]]}",
                self.path,
                not_as_meant(self.path),
            )
        return values.tolist()

    def ends(self, name: str) -> list[float]:
        """Seconds, infinite where there are none."""
        if name not in self.table.column_names or pa.types.is_null(self.table.schema.field(name).type):
            return [math.inf] * len(self.table)
        values = self._floats(name)
        return np.where(np.isnan(values), np.inf, values).tolist()

    def _floats(self, name: str) -> np.ndarray:
        """NaN for null."""
        values = plain(self.table.column(name))
        if not is_number(values.type):
            broken(
                self.root,
                f"numbers in {name!r}",
                f"values of type {shown(str(values.type))}",
                self.path,
                not_as_meant(self.path),
            )
        return values.cast(pa.float64()).to_numpy(zero_copy_only=False)

    def instructions(self, name: str) -> list[list[str]]:
        rows = objects(self.table.column(name), name, self.path, self.root)
        return [Entry({name: row}, str(self.path), self.root).instructions(name) for row in rows]


def holds_recordings(folder: Path) -> bool:
    """Whether what lies there is HDF5 or Zarr and no dataset yet."""
    patterns = ("*.hdf5", "*.h5", "*/trajectory.h5", ".zgroup", "zarr.json", "*.zarr", "*.zarr.zip")
    return not (folder / "meta/info.json").exists() and any(any(folder.glob(pattern)) for pattern in patterns)


def _read_text(path: Path, root: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        convert = f"manipi convert {root} TARGET  # makes a dataset of recordings in HDF5 or Zarr"
        broken(root, "a metadata file", "nothing", path, convert if holds_recordings(root) else "")
    except (OSError, UnicodeDecodeError) as error:
        broken(root, "a readable metadata file", str(error), path, allow(error, path))


def _parse(text: str, where: str, root: Path) -> Any:
    try:
        value = json.loads(text)
        if "\\u" in text:  # half of a pair of such escapes is no character, and can be written nowhere
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:  # also of numbers of thousands of digits
        broken(root, "JSON", shown(str(error), 200), where)
