"""Whatever stands in the metadata and tables of a LeRobot dataset: it is read rightly, or refused by our error."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.data.addressed import CAMERA, addresses, edit_column, write_set

from manipi.data.dataset import frames
from manipi.data.open import open_dataset
from manipi.data.review.check import check_dataset, sort_episodes
from manipi.data.review.describe import describe_dataset
from manipi.errors import ManipiError

VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    1.0,
    1.5,
    10**12,
    2**53,
    10**30,
    10**5000,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "v2.1",
    "video",
    "string",
    "3",
    "\ud800",
    "\0",
    "x" * 300,
    "{",
    "{0}",
    "{video_key.x}",
    "{episode_index:0999999999d}",
    "../{episode_index}",
    "/etc/passwd",
    [],
    [None],
    [0],
    [1.5],
    [-1],
    [10**30],
    [10**6, 10**6, 3],
    [1, 2, 3, 4],
    ["x"],
    [["x"], [1, None]],
    {},
    {"a": None},
    {"a": 1, "b": 0},
    {"a": {"b": []}},
    {"motors": ["x", 1]},
]
DELETED = object()


def read(root: Path, changed: str = "") -> None:
    """What a run and `check` read. What is read is right: the picture and state of frame 3 of episode 1.

    Args:
        changed: a column that has other values.
    """
    try:
        dataset = open_dataset(root)
        row = np.array([dataset.episodes[1].start + 3])
        keys = {"cameras": [CAMERA], "state_keys": ["observation.state"], "action_key": "action"}
        (frame,) = frames(dataset, row, horizon=2, **keys)
        if changed != "observation.state":
            np.testing.assert_array_equal(frame.observation["observation.state"], [3, 1])
        if "timestamp" not in changed:
            np.testing.assert_array_equal(addresses(frame.observation[CAMERA][None]), [[3, 1]])
        assert isinstance(frame.prompt, str)
        describe_dataset(dataset)
        for key, feature in dataset.features.items():
            if feature.kind == "vector":
                dataset.column(key)
    except ManipiError as error:
        said = str(error)
    else:
        said = ""
    assert len(said) < 4000
    check_dataset(root, num_workers=1)
    with contextlib.suppress(ManipiError):
        sort_episodes(root, num_workers=1)


@pytest.fixture(scope="module", params=["v2.1", "v3.0"])
def sound(request, tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("entries") / "set", request.param, lengths=(6, 5))


@pytest.fixture
def root(sound, tmp_path) -> Path:
    return shutil.copytree(sound, tmp_path / "set")


def places(entry: Any, at: tuple = ()) -> Iterator[tuple]:
    """The path to every value in nested objects, the whole first."""
    yield at
    for key in entry if isinstance(entry, dict) else ():
        yield from places(entry[key], (*at, key))


def put(entry: Any, at: tuple, value: Any) -> Any:
    """A copy with another value there."""
    if not at:
        return value
    inner = put(entry[at[0]], at[1:], value)
    return {k: inner if k == at[0] else v for k, v in entry.items() if inner is not DELETED or k != at[0]}


def mutate(path: Path, line: int, chosen: Callable[[list], list]) -> Iterator[str]:
    """Every value of the object in a line of a JSON file, replaced by each value of `chosen(VALUES)` in turn."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    entry = json.loads(lines[line])
    for at in places(entry):
        values = chosen([*VALUES, DELETED])
        for value in values:
            if value is DELETED and not at:
                continue
            try:
                text = json.dumps(put(entry, at, value))
            except ValueError:  # Python writes no such number; a file may have it
                text = json.dumps(put(entry, at, "LARGE")).replace('"LARGE"', "1" + "0" * 5000)
            path.write_text("\n".join([*lines[:line], text, *lines[line + 1 :]]))
            yield f"{path.name} {at} = {str(value)[:50] if not isinstance(value, int) else 'int'}"
    path.write_text("\n".join(lines))


def every(values: list) -> list:
    return values


def some(count: int) -> Callable[[list], list]:
    """Others each time, so that few places together meet all."""
    rng = np.random.default_rng(0)
    return lambda values: [values[i] for i in rng.choice(len(values), count, replace=False)]


def json_files(root: Path) -> list[Path]:
    return [path for name in ("info.json", "episodes.jsonl", "tasks.jsonl") if (path := root / "meta" / name).exists()]


@pytest.mark.parametrize("chosen", [some(2), pytest.param(every, marks=pytest.mark.long)], ids=["some", "every"])
def test_any_json(root, chosen):
    for path in json_files(root):
        for said in mutate(path, 0, chosen):
            try:
                read(root)
            except BaseException as error:
                error.add_note(said)
                raise


def test_json_that_is_none(root):
    for path in json_files(root):
        text = path.read_bytes()
        for content in (b"", b"{", b"\xff", b"[" * 100_000, b"null", b"[]", b'"x"', b"3", b"\0"):
            path.write_bytes(content)
            read(root)
        path.write_bytes(text)


ARRAYS: list[pa.Array] = [
    pa.array([None, None]),
    pa.array([1.0, None]),
    pa.array([0, None]),
    pa.array([0.0, 1.0]),
    pa.array([0.5, 1.5]),
    pa.array([np.nan, np.inf]),
    pa.array([-1, -2]),
    pa.array([2**62, 2**63 - 1]),
    pa.array([2**64 - 1, 0], pa.uint64()),
    pa.array([0, 1], pa.int8()),
    pa.array([True, False]),
    pa.array(["a", "b"]),
    pa.array(["a", None], pa.large_string()),
    pa.array(["a", "a"]).dictionary_encode(),
    pa.array([b"a", b"b"]),
    pa.array([[], []]),
    pa.array([[], None], pa.list_(pa.string())),
    pa.array([["a"], ["b", None]], pa.large_list(pa.large_string())),
    pa.array([[1], [1, 2]]),
    pa.array([[[1.0], [2.0]], [[1.0], [2.0]]]),
    pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float64(), 2)),
    pa.array([[1.0, None], [3.0, 4.0]]),
    pa.array([{"a": 1}, {"a": None}]),
    pa.array([0, 1], pa.timestamp("s")),
]


@pytest.mark.parametrize("chosen", [some(2), pytest.param(every, marks=pytest.mark.long)], ids=["some", "every"])
def test_any_column(root, chosen):
    """Metadata and data tables, one column after the other, of any type; and a column that is not there."""
    for path in sorted(root.rglob("*.parquet")):
        whole = pq.read_table(path)
        for name in whole.column_names:
            for values in [*chosen(ARRAYS), None]:
                if values is None:
                    pq.write_table(whole.drop_columns([name]), path)
                else:
                    edit_column(path, name, values.take(pa.array(np.arange(len(whole)) % 2)))
                try:
                    read(root, name)
                except BaseException as error:
                    error.add_note(f"{path.name} {name} = {values if values is None else values.type}")
                    raise
        pq.write_table(whole, path)


@pytest.mark.parametrize("text", ["half a pair \ud800", "\udfff"])
def test_text_that_is_no_unicode(root, text):
    """It can be shown, tokenised and written nowhere."""
    info = root / "meta/info.json"
    before = info.read_text()
    info.write_text(before.replace("{", '{"x": "\\ud83d\\ude00", ', 1))
    open_dataset(root)  # a whole pair is a character
    info.write_text(before.replace("{", f'{{"x": {json.dumps(text)}, ', 1))
    with pytest.raises(ManipiError, match=r"expected JSON\n.*surrogates[\s\S]*info.json"):
        open_dataset(root)
    info.write_text(before)
    if (tasks := root / "meta/tasks.jsonl").exists():
        tasks.write_text(tasks.read_text().replace('"pick the red cube"', json.dumps(text)))
        with pytest.raises(ManipiError, match=r"expected JSON\n.*surrogates[\s\S]*tasks.jsonl, line 1"):
            open_dataset(root)


def test_whole_numbers_of_a_feature_that_is_called_float(root):
    for table in (root / "data").rglob("*.parquet"):
        edit_column(table, "observation.state", pa.array([[i % 5, 1] for i in range(pq.read_metadata(table).num_rows)]))
    report = check_dataset(root, quick=True, num_workers=1)
    assert not report.count("error")
    assert {f.check for f in report.findings} == {"values"}


def test_strings_that_are_no_utf8(root):
    for table in root.rglob("*.parquet"):
        for name, column in zip((t := pq.read_table(table)).column_names, t.columns):
            if pa.types.is_string(column.type):
                size = len(column)
                offsets = pa.py_buffer(np.arange(size + 1, dtype=np.int32).tobytes())
                broken = pa.StringArray.from_buffers(size, offsets, pa.py_buffer(b"\xff" * size))
                pq.write_table(t.set_column(t.column_names.index(name), name, broken), table)
    read(root, "tasks")
