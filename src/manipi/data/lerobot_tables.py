"""The data tables of a LeRobot dataset: columns read, and rows compared with what the metadata promise.

The reader raises the first fault, `manipi check` lists them all.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from manipi.data.dataset import Episode
from manipi.errors import DataError, DatasetFormatError

ROW_COLUMNS = {"episode_index": 1, "timestamp": 1, "task_index": 1}
"""What tells whether the rows are those that the metadata promise."""


@dataclass(frozen=True)
class Fault:
    """An error, and whom it concerns."""

    error: DataError
    episodes: tuple[int, ...] = ()
    """Numbers of the episodes that it spoils; none: the whole dataset."""
    frame: int | None = None


def read_values(path: Path, widths: Mapping[str, int], root: Path) -> dict[str, np.ndarray]:
    """Columns of a table, each [rows, width], floats as float32 and the rest as int64.

    Raises:
        DatasetFormatError: file or columns are missing, or rows have another number of values.
    """
    table = read_columns(path, list(widths), root)
    return {key: _rectangle(table.column(key), key, width, path, root) for key, width in widths.items()}


def _rectangle(column: pa.ChunkedArray, key: str, width: int, path: Path, root: Path) -> np.ndarray:
    """All numbers of a column of numbers or of (nested) lists of numbers."""
    flat = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    while pa.types.is_nested(flat.type):
        flat = flat.flatten()
    values = flat.to_numpy(zero_copy_only=False)
    if len(values) != len(column) * width:
        found = f"{len(values)} numbers in {len(column)} rows"
        broken(root, f"{width} numbers per row in {key!r}, as meta/info.json says", found, path)
    return values.astype(np.float32 if values.dtype.kind == "f" else np.int64, copy=False).reshape(-1, width)


def row_faults(
    path: Path,
    root: Path,
    promised: Sequence[Episode],
    tasks: Mapping[int, str],
    rows: Mapping[str, np.ndarray],
    *,
    only: bool = False,
) -> Iterator[Fault]:
    """What is wrong with the rows of a table that should hold the `promised` episodes, in ascending order.

    Args:
        rows: the values of `ROW_COLUMNS`.
        only: the table may hold other episodes too, which are not looked at.
    """
    lengths, numbers, last = {e.index: e.length for e in promised if e.length > 0}, rows["episode_index"][:, 0], -1
    for number, start, end in runs(numbers):
        if only and number not in lengths:
            continue
        if fault := _misplaced(lengths, number, end - start, last):
            expected, found, frame = *fault, None
        else:
            expected, found, frame = _misread(tasks, {key: values[start:end, 0] for key, values in rows.items()})
        if expected:
            where = f"{path}, episode {number}" + (f", frame {frame}" if frame is not None else "")
            yield Fault(format_error(root, expected, found, where, see_check(root)), (number,), frame)
        last = max(last, number)
    for number in sorted(lengths.keys() - set(numbers.tolist())):
        where = f"{path}, episode {number}"
        yield Fault(format_error(root, f"{lengths[number]} rows", "none", where, see_check(root)), (number,))


def _misplaced(lengths: Mapping[int, int], number: int, length: int, last: int) -> tuple[str, str] | None:
    if number not in lengths:
        return "an episode of the metadata", "one that is in the table alone"
    if number <= last:
        return "each episode once, in ascending order", f"episode {number} behind {last}"
    if length != lengths[number]:
        return f"{lengths[number]} rows, as the metadata say", f"{length}"
    return None


def _misread(tasks: Mapping[int, str], rows: Mapping[str, np.ndarray]) -> tuple[str, str, int]:
    """Expected, found and frame of the first bad row of an episode; expected is empty where there is none."""
    seconds, indices = rows["timestamp"], rows["task_index"]
    if (back := np.flatnonzero(~(np.diff(seconds) > 0))).size:
        at = int(back[0])
        return "ascending timestamps", f"{seconds[at]:.4f} s, then {seconds[at + 1]:.4f} s", at + 1
    if (unknown := np.flatnonzero(~np.isin(indices, list(tasks)))).size:
        at = int(unknown[0])
        return f"a task_index with a text, among {sorted(tasks)}", f"{indices[at]}", at
    return "", "", 0


def runs(numbers: np.ndarray) -> list[tuple[int, int, int]]:
    """Value, start and end of each run of equal numbers."""
    bounds = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    return [(int(numbers[start]), start, end) for start, end in pairwise(bounds) if end > start]


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
    raise format_error(root, expected, found, where)


def format_error(root: Path, expected: str, found: str, where: str | Path, next: str = "") -> DatasetFormatError:
    fetch = f"hf download <dataset> --repo-type dataset --local-dir {root}  # fetches what is missing or broken"
    return DatasetFormatError(expected=expected, found=found, where=str(where), next=next or fetch)


def see_check(root: Path) -> str:
    return f"manipi check {root}  # lists every bad episode, to repair or leave out"
