"""The values of LeRobot's metadata and tables, each read as what it has to be or refused.

Whatever JSON or parquet type stands there: a value is converted where that loses nothing (2.0 is the number 2), and
otherwise is a DatasetFormatError that names its file and name. Rows are compared with what the metadata promise: the
reader raises the first fault, `manipi check` lists them all.
"""

import json
import math
import shlex
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from manipi.data.dataset import Episode
from manipi.errors import DataError, DatasetFormatError, one_line, quoted, shown

T = TypeVar("T")

ROW_COLUMNS = {"episode_index": 1, "timestamp": 1, "task_index": 1}
"""What tells whether the rows are those that the metadata promise."""
INDEX_COLUMNS = ("episode_index", "frame_index", "index", "task_index", "subtask_index")
"""Whole numbers, whatever type a table stores them in."""
_MOST = 2**53
"""Larger numbers of episodes, rows and files are none, and a float does not tell them apart."""

# Errors -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """An error, and whom it concerns."""

    error: DataError
    episodes: tuple[int, ...] = ()
    """Numbers of the episodes that it spoils; none: the whole dataset."""
    frame: int | None = None
    advice: str = ""
    """What to do about it, for `manipi check`, to which the error itself sends its reader."""


def format_error(root: Path, expected: str, found: str, where: str | Path, next: str = "") -> DatasetFormatError:
    fetch = f"hf download <dataset> --repo-type dataset --local-dir {quoted(root)}  # fetches what is missing or broken"
    return DatasetFormatError(expected=expected, found=found, where=str(where), next=next or fetch)


def broken(root: Path, expected: str, found: str, where: str | Path, next: str = "") -> NoReturn:
    """Raise the error for a dataset whose files are missing, damaged or disagree."""
    raise format_error(root, expected, found, where, next)


def to_check(root: Path, expected: str, found: str, where: str | Path) -> DatasetFormatError:
    """An error that sends its reader to `manipi check`, which has the advice of its `Fault`."""
    next = f"manipi check {quoted(root)}  # lists every bad episode, to repair or leave out"
    return format_error(root, expected, found, where, next)


def leave_out(root: Path, *keys: str) -> str:
    """The command that makes a dataset without some cameras or vectors."""
    return f"manipi convert {quoted(root)} TARGET --exclude {shlex.join(keys)}"


def listed(names: Sequence[str]) -> str:
    """Names of columns, on one line; of thousands, the first."""
    return one_line(", ".join(names), 1000)


def _unreadable(root: Path, what: str, error: Exception, path: Path) -> NoReturn:
    """Where the right to read is what lacks, it says how to give it."""
    denied = isinstance(error, PermissionError)
    allow = f"chmod +r {quoted(path)}  # as its owner, or ask for the right to read it" if denied else ""
    broken(root, f"a readable {what} file", one_line(str(error), 300), path, allow)


# JSON ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One JSON object of the metadata.

    It and all methods raise DatasetFormatError, which names file and key.
    """

    values: Mapping[str, Any]
    where: str
    root: Path

    def __post_init__(self) -> None:
        if not isinstance(self.values, dict):
            broken(self.root, "a JSON object", shown(self.values), self.where, f"correct it: {self.where}")

    def value(self, key: str, kind: type = object, expected: str = "") -> Any:
        if key not in self.values:
            found = f"only {shown(list(self.values), 300)}"
            broken(self.root, f"an entry {key!r}", found, self.where, f"correct it: {self.where}")
        return self.values[key] if isinstance(self.values[key], kind) else self.refuse(key, expected)

    def text(self, key: str) -> str:
        return self.value(key, str, "a text")

    def whole(self, key: str, least: int = 0) -> int:
        return self._whole(key, self.value(key), least)

    def count(self, key: str, otherwise: int) -> int:
        """A number that may be absent or null."""
        return otherwise if self.values.get(key) is None else self.whole(key)

    def rate(self, key: str) -> float:
        """A finite number above 0."""
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _MOST:
            self.refuse(key, "a finite number above 0")
        return value

    def shape(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers; a scalar, (), has one dimension of one."""
        return tuple(self._whole(key, size) for size in self.value(key, list, "a list of whole numbers")) or (1,)

    def instruction(self, key: str) -> str:
        """A text; "" where it is null, which means that there is none."""
        return "" if self.value(key) is None else self.text(key)

    def instructions(self, key: str) -> list[str]:
        """A list of texts, one text, or null."""
        value = self.value(key)
        values = value if isinstance(value, list) else [value]
        if not all(text is None or isinstance(text, str) for text in values):
            self.refuse(key, "a list of texts")
        return [text or "" for text in values]

    def entries(self, key: str) -> dict[str, "Entry"]:
        """An object of objects."""
        inside = self.value(key, dict, "an object").items()
        return {name: Entry(value, f"{self.where}, {key} {shown(name)}", self.root) for name, value in inside}

    def paths(self, key: str, numbers: Sequence[str], **texts: str) -> Callable[..., Path]:
        """What a path template such as "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet" names.

        Args:
            numbers: the names of numbers that may stand in it; their values are given in this order in the calls.
            texts: the other names that may, and what they stand for.
        """
        template, example = self.text(key), dict.fromkeys(numbers, 0) | texts
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
        # Many episodes share a file.
        return cache(lambda *values: self.root / template.format(**dict(zip(numbers, values)), **texts))

    def refuse(self, key: str, expected: str) -> Any:
        where = self.where
        broken(self.root, f"{expected} as {key!r}", shown(self.values[key]), where, f"correct it: {where}")

    def _whole(self, key: str, value: Any, least: int = 0) -> int:
        whole = not isinstance(value, bool) and isinstance(value, (int, float)) and least <= value < _MOST
        if not whole or value != int(value):
            self.refuse(key, f"whole numbers of at least {least}")
        return int(value)


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


def read_entry(path: Path, root: Path) -> Entry:
    """The object in a JSON file."""
    return _parse(_read_text(path, root), str(path), root)


def read_entries(
    path: Path, root: Path, make: Callable[[Entry], T], unreadable: list[DatasetFormatError] | None = None
) -> list[T]:
    """What `make` makes of the object in each line; where it cannot, that raises, or is added to `unreadable`."""
    made = []
    for number, line in enumerate(_read_text(path, root).split("\n"), start=1):
        try:
            made += [make(_parse(line, f"{path}, line {number}", root))] if line.strip() else []
        except DatasetFormatError as error:
            if unreadable is None:
                raise
            unreadable.append(error)
    return made


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
        _unreadable(root, "metadata", error, path)


def _parse(text: str, where: str, root: Path) -> Entry:
    try:
        value = json.loads(text)
        if "\\u" in text:  # half of a pair of such escapes is no character, and can be written nowhere
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # also of numbers of thousands of digits
        broken(root, "JSON", shown(str(error), 200), where)
    return Entry(value, where, root)


# Parquet ------------------------------------------------------------------------------------------------------------


class Table:
    """Some columns of a parquet file of the dataset at `root`; every method reads one, as long as the table.

    Args:
        names: columns that must be there.
        optional: columns that are read where they are there.
        row_group: the number of the part to read; None: all of the file.

    Raises:
        DatasetFormatError: file or columns are missing, a column is there twice, or has other values than it should;
            names file and column.
    """

    def __init__(
        self, path: Path, root: Path, names: Sequence[str], optional: Sequence[str] = (), row_group: int | None = None
    ):
        self.path, self.root = path, root
        with parquet_errors(path, root):
            file = pq.ParquetFile(path)
            known = file.schema_arrow.names
            if missing := [name for name in names if name not in known]:
                self.refuse(f"the columns {listed(missing)}", f"only {listed(known)}")
            self.names = [*names, *(name for name in optional if name in known)]
            if twice := [name for name in self.names if known.count(name) > 1]:
                self.refuse(f"one column {twice[0]!r}", f"{known.count(twice[0])}")
            self._table = (
                file.read(columns=self.names)
                if row_group is None
                else file.read_row_group(row_group, columns=self.names)
            )

    def refuse(self, expected: str, found: str) -> NoReturn:
        """Of a file that is whole, and has other values than it should."""
        next = f"correct {self.path}, or record or convert its episodes again"
        broken(self.root, expected, found, self.path, next)

    def _plain(self, key: str) -> pa.Array:
        """A column in one piece."""
        column = self._table.column(key)
        return _decoded(column.chunk(0) if column.num_chunks == 1 else column.combine_chunks())

    def numbers(self, key: str, width: int) -> np.ndarray:
        """All numbers of a column of numbers or of (nested) lists of `width` numbers: [rows, width].

        "timestamp" as float64, other floats as float32, the rest as int64.
        """
        expected = f"{width} numbers per row in {key!r}, as meta/info.json says"
        flat, found = self._plain(key), 1
        while isinstance(flat, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)):
            # NaN where a list is null
            lengths = pc.call_function("list_value_length", [flat]).to_numpy(zero_copy_only=False)
            if (other := np.flatnonzero(lengths != lengths[:1])).size:
                at, row = int(other[0]), int(other[0]) // found
                unequal = f"{lengths[0]:g} in row 0 and {lengths[at]:g} in row {row}".replace("nan", "none")
                self.refuse(expected, f"rows of unequal length: {unequal} of the table")
            found *= int(lengths[0]) if len(lengths) else width
            flat = _decoded(flat.flatten())
        if pa.types.is_boolean(flat.type):
            flat = flat.cast(pa.int64())
        self._require_numbers(f"numbers in {key!r}", flat)
        if len(flat) != len(self._table) * width:
            self.refuse(expected, f"{len(flat)} numbers in {len(self._table)} rows")
        if key in INDEX_COLUMNS or pa.types.is_integer(flat.type):
            return self._whole(flat, key).reshape(-1, width)
        values = flat.cast(pa.float64()) if pa.types.is_decimal(flat.type) else flat
        dtype = np.float64 if key == "timestamp" else np.float32
        return values.to_numpy(zero_copy_only=False).astype(dtype, copy=False).reshape(-1, width)  # null becomes NaN

    def _require_numbers(self, expected: str, values: pa.Array) -> None:
        kind = values.type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
            self.refuse(expected, f"values of type {shown(str(kind))}")

    def _whole(self, values: pa.Array, key: str) -> np.ndarray:
        """Numbers of any type as int64; refused where one is missing or not whole."""
        expected = f"whole numbers in {key!r}"
        self._require_numbers(expected, values)
        if values.null_count:
            self.refuse(expected, f"null in row {int(np.flatnonzero(values.is_null())[0])} of the table")
        try:
            return values.cast(pa.int64()).to_numpy(zero_copy_only=False)
        except pa.ArrowException as error:
            self.refuse(expected, shown(str(error), 200))

    def whole(self, key: str, least: int | None = 0) -> list[int]:
        """Whole numbers, one per row."""
        numbers = self._whole(self._plain(key), key).tolist()
        if least is not None and (bad := [number for number in numbers if not least <= number < _MOST]):
            self.refuse(f"whole numbers of at least {least} in {key!r}", f"{bad[0]}")
        return numbers

    def seconds(self, key: str) -> list[float]:
        """Finite, of at least 0."""
        values = self._floats(key)
        if (bad := np.flatnonzero(~((values >= 0) & (values < _MOST)))).size:
            self.refuse(f"finite seconds of at least 0 in {key!r}", f"{values[bad[0]]}")
        return values.tolist()

    def ends(self, key: str) -> list[float]:
        """Seconds, infinite where there are none."""
        if key not in self.names or pa.types.is_null(self._table.schema.field(key).type):
            return [math.inf] * len(self._table)
        values = self._floats(key)
        return np.where(np.isnan(values), np.inf, values).tolist()

    def _floats(self, key: str) -> np.ndarray:
        """NaN for null."""
        values = self._plain(key)
        self._require_numbers(f"numbers in {key!r}", values)
        return values.cast(pa.float64()).to_numpy(zero_copy_only=False)

    def objects(self, key: str) -> list:
        """A column's values as Python objects; refused where a text is none."""
        try:
            return self._plain(key).to_pylist()
        except UnicodeDecodeError as error:  # no writer of parquet looks
            self.refuse(f"texts in UTF-8 in {key!r}", str(error))

    def texts(self, key: str) -> list[str]:
        """Empty for null."""
        texts = self.objects(key)
        if bad := [value for value in texts if value is not None and not isinstance(value, str)]:
            self.refuse(f"texts in {key!r}", shown(bad[0]))
        return [value or "" for value in texts]

    def instructions(self, key: str) -> list[list[str]]:
        """Lists of texts."""
        return [Entry({key: row}, str(self.path), self.root).instructions(key) for row in self.objects(key)]


def _decoded(values: pa.Array) -> pa.Array:
    """The values themselves where an array has numbers of a dictionary."""
    return values.dictionary_decode() if isinstance(values, pa.DictionaryArray) else values


def read_texts(root: Path, kind: str) -> dict[int, str]:
    """The texts of a kind ("task", "subtask") by number; "" for null.

    They are their table's pandas index, which lerobot 0.4 stores unnamed.
    """
    unnamed = "__index_level_0__"
    table = Table(root / f"meta/{kind}s.parquet", root, [f"{kind}_index"], optional=[kind, unnamed])
    column = kind if kind in table.names else unnamed
    if column not in table.names:
        table.refuse(f"a column {kind!r}", f"only {', '.join(table.names)}")
    return dict(zip(table.whole(f"{kind}_index", least=None), table.texts(column), strict=True))


def read_values(path: Path, widths: Mapping[str, int], root: Path) -> dict[str, np.ndarray]:
    """Columns of a table as `Table.numbers` gives them, each [rows, width]. Raises DatasetFormatError as that does."""
    table = Table(path, root, list(widths))
    return {key: table.numbers(key, width) for key, width in widths.items()}


def column_names(path: Path, root: Path) -> list[str]:
    """What the columns of a parquet file are called; DatasetFormatError where it cannot be read."""
    with parquet_errors(path, root):
        return pq.read_schema(path).names


@contextmanager
def parquet_errors(path: Path, root: Path) -> Iterator[None]:
    """A parquet file that is missing or damaged as a DatasetFormatError that names it."""
    try:
        yield
    except FileNotFoundError:
        broken(root, "a parquet file", "nothing", path)
    except (pa.ArrowException, OSError) as error:  # Arrow reports a damaged page as an OSError
        _unreadable(root, "parquet", error, path)


# Rows ---------------------------------------------------------------------------------------------------------------


def row_faults(
    path: Path,
    root: Path,
    promised: Sequence[Episode],
    tasks: Mapping[int, str],
    rows: Mapping[str, np.ndarray],
    *,
    only: bool = False,
) -> Iterator[Fault]:
    """What is wrong with the rows of a table that should hold the `promised` episodes, in any order, each in one piece.

    Args:
        rows: the values of `ROW_COLUMNS`.
        only: the table may hold other episodes too, which are not looked at.
    """
    lengths, numbers = {e.index: e.length for e in promised if e.length > 0}, rows["episode_index"][:, 0]
    seen = set[int]()

    def wrong(number: int, start: int, end: int) -> tuple[str, str, int | None, str] | None:
        """What is expected and found, in which frame, and what to do about it."""
        if number not in lengths:
            advice = "give its rows an entry in the metadata, or take them out"
            return "an episode of the metadata", "one that is in the table alone", None, advice
        if number in seen:
            advice = "write the rows of every episode in one piece, under a number of its own"
            return "the rows of each episode in one piece", "more of them further on", None, advice
        if end - start != lengths[number]:
            advice = "correct its length in the metadata, or add or take out rows"
            return f"{lengths[number]} rows, as the metadata say", f"{end - start}", None, advice
        seconds, indices = rows["timestamp"][start:end, 0], rows["task_index"][start:end, 0]
        timed = "sort its rows, or write timestamp = frame / fps"
        if (endless := np.flatnonzero(~np.isfinite(seconds))).size:
            return "finite timestamps", f"{seconds[endless[0]]} s", int(endless[0]), timed
        if (back := np.flatnonzero(~(np.diff(seconds) > 0))).size:
            at = int(back[0])
            return "ascending timestamps", f"{seconds[at]:.4f} s, then {seconds[at + 1]:.4f} s", at + 1, timed
        if (unknown := np.flatnonzero(~np.isin(indices, list(tasks)))).size:
            at = int(unknown[0])
            advice = "give the task a text in the metadata, or correct its number"
            return f"a task_index with a text, among {shown(sorted(tasks))}", f"{indices[at]}", at, advice
        return None

    for number, start, end in runs(numbers):
        if only and number not in lengths:
            continue
        if fault := wrong(number, start, end):
            expected, found, frame, advice = fault
            where = f"{path}, episode {number}" + (f", frame {frame}" if frame is not None else "")
            advice = f"{advice}, in {path}; or leave the episode out"
            yield Fault(to_check(root, expected, found, where), (number,), frame, advice)
        seen.add(number)
    for number in sorted(lengths.keys() - set(numbers.tolist())):
        where, advice = f"{path}, episode {number}", f"take its entry out of {root / 'meta'}, or leave the episode out"
        yield Fault(to_check(root, f"{lengths[number]} rows", "none", where), (number,), advice=advice)


def runs(numbers: np.ndarray) -> list[tuple[int, int, int]]:
    """Value, start and end of each run of equal numbers."""
    bounds = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    return [(int(numbers[start]), start, end) for start, end in pairwise(bounds) if end > start]
