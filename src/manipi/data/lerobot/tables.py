"""The data tables of a LeRobot dataset: columns read, and rows compared with what the metadata promise.

The reader raises the first fault, `manipi check` lists them all.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NoReturn, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from manipi.data.dataset import Episode
from manipi.errors import DataError, DatasetFormatError, one_line, quoted, shown

ROW_COLUMNS = {"episode_index": 1, "timestamp": 1, "task_index": 1}
"""What tells whether the rows are those that the metadata promise."""
INDEX_COLUMNS = ("episode_index", "frame_index", "index", "task_index", "subtask_index")
"""Whole numbers, whatever type a table stores them in."""


@dataclass(frozen=True)
class Fault:
    """An error, and whom it concerns."""

    error: DataError
    episodes: tuple[int, ...] = ()
    """Numbers of the episodes that it spoils; none: the whole dataset."""
    frame: int | None = None
    advice: str = ""
    """What to do about it, for `manipi check`, to which the error itself sends its reader."""


def read_values(path: Path, widths: Mapping[str, int], root: Path) -> dict[str, np.ndarray]:
    """Columns of a table, each [rows, width]: "timestamp" as float64, other floats as float32, the rest as int64.

    Raises:
        DatasetFormatError: file or columns are missing, rows have another number of values, or values are no numbers.
    """
    table = read_columns(path, list(widths), root)
    return {key: _rectangle(table.column(key), key, width, path, root) for key, width in widths.items()}


def _rectangle(column: pa.ChunkedArray, key: str, width: int, path: Path, root: Path) -> np.ndarray:
    """All numbers of a column of numbers or of (nested) lists of numbers."""
    expected = f"{width} numbers per row in {key!r}, as meta/info.json says"
    flat, found = plain(column), 1
    while isinstance(flat, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)):
        lengths = pc.call_function("list_value_length", [flat]).to_numpy(
            zero_copy_only=False
        )  # NaN where a list is null
        if (other := np.flatnonzero(lengths != lengths[:1])).size:
            at, row = int(other[0]), int(other[0]) // found
            unequal = f"{lengths[0]:g} in row 0 and {lengths[at]:g} in row {row}".replace("nan", "none")
            broken(root, expected, f"rows of unequal length: {unequal} of the table", path, not_as_meant(path))
        found *= int(lengths[0]) if len(lengths) else width
        inner = flat.flatten()
        flat = inner.dictionary_decode() if isinstance(inner, pa.DictionaryArray) else inner
    if pa.types.is_boolean(flat.type):
        flat = flat.cast(pa.int64())
    if not is_number(flat.type):
        broken(root, f"numbers in {key!r}", f"values of type {shown(str(flat.type))}", path, not_as_meant(path))
    if len(flat) != len(column) * width:
        broken(root, expected, f"{len(flat)} numbers in {len(column)} rows", path, not_as_meant(path))
    if key in INDEX_COLUMNS or pa.types.is_integer(flat.type):
        return whole_numbers(flat, key, path, root).reshape(-1, width)
    values = flat.cast(pa.float64()) if pa.types.is_decimal(flat.type) else flat
    dtype = np.float64 if key == "timestamp" else np.float32
    return values.to_numpy(zero_copy_only=False).astype(dtype, copy=False).reshape(-1, width)  # null becomes NaN


def plain(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece, its values themselves where it has numbers of a dictionary."""
    values = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return values.dictionary_decode() if isinstance(values, pa.DictionaryArray) else values


def objects(column: pa.ChunkedArray, key: str, path: Path, root: Path) -> list:
    """A column's values as Python objects; DatasetFormatError where a text is none."""
    try:
        return plain(column).to_pylist()
    except UnicodeDecodeError as error:  # no writer of parquet looks
        broken(root, f"texts in UTF-8 in {key!r}", str(error), path, not_as_meant(path))


def is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def whole_numbers(values: pa.Array, key: str, path: Path, root: Path) -> np.ndarray:
    """Numbers of any type as int64; DatasetFormatError where one is missing or not whole."""
    expected = f"whole numbers in {key!r}"
    if not is_number(values.type):
        broken(root, expected, f"values of type {shown(str(values.type))}", path, not_as_meant(path))
    if values.null_count:
        broken(
            root,
            expected,
            f"null in row {int(np.flatnonzero(values.is_null())[0])} of the table",
            path,
            not_as_meant(path),
        )
    try:
        return values.cast(pa.int64()).to_numpy(zero_copy_only=False)
    except pa.ArrowException as error:
        broken(root, expected, shown(str(error), 200), path, not_as_meant(path))


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
    for number, start, end in runs(numbers):
        if only and number not in lengths:
            continue
        here = {key: values[start:end, 0] for key, values in rows.items()}
        if fault := _misplaced(lengths, number, end - start, seen) or _misread(tasks, here):
            expected, found, frame, advice = fault
            where = f"{path}, episode {number}" + (f", frame {frame}" if frame is not None else "")
            error = format_error(root, expected, found, where, see_check(root))
            yield Fault(error, (number,), frame, f"{advice}, in {path}; or leave the episode out")
        seen.add(number)
    for number in sorted(lengths.keys() - set(numbers.tolist())):
        where, advice = f"{path}, episode {number}", f"take its entry out of {root / 'meta'}, or leave the episode out"
        error = format_error(root, f"{lengths[number]} rows", "none", where, see_check(root))
        yield Fault(error, (number,), advice=advice)


_Wrong: TypeAlias = tuple[str, str, int | None, str]
"""Expected, found, frame, and what to do about it."""


def _misplaced(lengths: Mapping[int, int], number: int, length: int, seen: set[int]) -> _Wrong | None:
    """What is wrong with an episode's place or length."""
    if number not in lengths:
        advice = "give its rows an entry in the metadata, or take them out"
        return "an episode of the metadata", "one that is in the table alone", None, advice
    if number in seen:
        advice = "write the rows of every episode in one piece, under a number of its own"
        return "the rows of each episode in one piece", "more of them further on", None, advice
    if length != lengths[number]:
        advice = "correct its length in the metadata, or add or take out rows"
        return f"{lengths[number]} rows, as the metadata say", f"{length}", None, advice
    return None


def _misread(tasks: Mapping[int, str], rows: Mapping[str, np.ndarray]) -> _Wrong | None:
    """What is wrong with the first bad row of an episode."""
    seconds, indices = rows["timestamp"], rows["task_index"]
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


def runs(numbers: np.ndarray) -> list[tuple[int, int, int]]:
    """Value, start and end of each run of equal numbers."""
    bounds = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    return [(int(numbers[start]), start, end) for start, end in pairwise(bounds) if end > start]


def read_columns(path: Path, names: list[str], root: Path, optional: Sequence[str] = ()) -> pa.Table:
    """Some columns of a parquet file of the dataset at `root`, and of the `optional` ones those that it has.

    Raises:
        DatasetFormatError: file or columns are missing, or a column is there twice.
    """
    with parquet_errors(path, root):
        table = pq.ParquetFile(path)
        known = table.schema_arrow.names
        if missing := [name for name in names if name not in known]:
            expected, found = f"the columns {listed(missing)}", f"only {listed(known)}"
            broken(root, expected, found, path, not_as_meant(path))
        wanted = [*names, *(name for name in optional if name in known)]
        if twice := [name for name in wanted if known.count(name) > 1]:
            broken(root, f"one column {twice[0]!r}", f"{known.count(twice[0])}", path, not_as_meant(path))
        return table.read(columns=wanted)


def column_names(path: Path, root: Path) -> list[str]:
    """What the columns of a parquet file are called; DatasetFormatError where it cannot be read."""
    with parquet_errors(path, root):
        return pq.read_schema(path).names


@contextmanager
def parquet_errors(path: Path, root: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        broken(root, "a parquet file", "nothing", path)
    except (pa.ArrowException, OSError) as error:  # Arrow reports a damaged page as an OSError
        broken(root, "a readable parquet file", one_line(str(error), 300), path, allow(error, path))


def broken(root: Path, expected: str, found: str, where: str | Path, next: str = "") -> NoReturn:
    """Raise the error for a dataset whose files are missing, damaged or disagree."""
    raise format_error(root, expected, found, where, next)


def allow(error: Exception, path: Path) -> str:
    """What to do about a file that may not be read; empty for anything else that is wrong with it."""
    return (
        f"chmod +r {quoted(path)}  # as its owner, or ask for the right to read it"
        if isinstance(error, PermissionError)
        else ""
    )


def listed(names: Sequence[str]) -> str:
    """Names of columns, on one line; of thousands, the first."""
    return one_line(", ".join(names), 1000)


def leave_out(root: Path, *keys: str) -> str:
    """The command that makes a dataset without some cameras or vectors."""
    return f"manipi convert {quoted(root)} TARGET --exclude {shlex.join(keys)}"


def not_as_meant(path: Path) -> str:
    """What to do about a file that is whole, and has other values than it should."""
    return f"correct {path}, or record or convert its episodes again"


def format_error(root: Path, expected: str, found: str, where: str | Path, next: str = "") -> DatasetFormatError:
    fetch = f"hf download <dataset> --repo-type dataset --local-dir {quoted(root)}  # fetches what is missing or broken"
    return DatasetFormatError(expected=expected, found=found, where=str(where), next=next or fetch)


def see_check(root: Path) -> str:
    return f"manipi check {quoted(root)}  # lists every bad episode, to repair or leave out"
