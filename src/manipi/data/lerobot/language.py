"""What LeRobot's language columns say (lerobot 0.6 and later): read, checked, and written.

    data/chunk-000/file-000.parquet
    ├─ language_persistent   per frame the same list of an episode's texts, each of which holds from its `timestamp` on
    │                        until the next of its style: subtask, plan, memory …
    └─ language_events       per frame a list of what is said there and nowhere else: vqa, interjection, trace …

    an item of either   role   content   style   camera   tool_calls       and of language_persistent   timestamp
                        user   a text    vqa     a feature  JSON texts                                  seconds

Two subtasks, `reach` from 0 s and `grasp` from 0.3 s, in an episode of 10 frames per second:

    frame     0      1      2      3      4
    holds   reach  reach  reach  grasp  grasp
"""

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int64

from manipi.data.dataset import Episode, Feature
from manipi.data.lerobot.tables import broken, parquet_errors, runs
from manipi.errors import DatasetFormatError, shown
from manipi.types import Said

PERSISTENT, EVENTS = "language_persistent", "language_events"
LANGUAGE = Feature(kind="text", shape=(1,), dtype="language")
"""How meta/info.json describes either column."""
HOLDING = ("subtask", "plan", "memory")
"""Styles of which one text holds at a time."""
_ROWS = 16_384
"""Read at a time: lists of texts that repeat at every frame take much room."""
_EMPTY = {"content": None, "style": None, "camera": None, "tool_calls": None, "timestamp": None}


@dataclass(frozen=True, kw_only=True)
class Language:
    """The items of both columns."""

    persistent: Mapping[int, Sequence[Said]]
    """By episode number."""
    events: Mapping[int, Sequence[Said]]
    """By row of the tables, as they lie one behind the other."""

    def holding(self, style: str, episodes: Sequence[Episode], seconds_N: np.ndarray) -> tuple[list[str], np.ndarray]:
        """The texts of a style, and which of them holds at each row of the episodes; -1 where none does yet."""
        texts, numbers_N = dict[str, int](), np.full(len(seconds_N), -1, np.int64)
        # lerobot keeps both times as float32, other writers one of them.
        seconds_N = seconds_N.astype(np.float32)
        for e in episodes:
            items = [one for one in self.persistent.get(e.index, ()) if one.style == style]
            items.sort(key=lambda one: one.timestamp or 0.0)
            begins = np.array([one.timestamp for one in items], np.float32)
            own = [texts.setdefault(one.content or "", len(texts)) for one in items]
            here = slice(e.start, e.start + e.length)
            numbers_N[here] = np.array([-1, *own])[np.searchsorted(begins, seconds_N[here], side="right")]
        return list(texts), numbers_N


def read_language(
    tables: Sequence[Path],
    root: Path,
    columns: Sequence[str],
    episodes_N: Int64[np.ndarray, "N"],
    known: Collection[str],
) -> Language:
    """What the tables say of some episodes.

    Args:
        columns: which of the two there are.
        episodes_N: the episode number of every row of the tables; -1: a row that is not asked for.
        known: the dataset's features, of which an item's camera must be one.

    Raises:
        DatasetFormatError: items without what their style needs, of the wrong column, or of unknown cameras; several
            texts that begin to hold at once; other persistent items at one frame than at the one before it.
    """
    persistent, events, start = dict[int, tuple[Said, ...]](), dict[int, tuple[Said, ...]](), 0
    first = {number: at for number, at, _ in reversed(runs(episodes_N))}

    def place(path: Path, row: int) -> str:
        return f"{path}, episode {episodes_N[row]}, frame {row - first[int(episodes_N[row])]}"

    for path in tables:
        with parquet_errors(path, root):
            leaves = pq.read_metadata(path).schema
            paths = [leaves.column(i).path for i in range(len(leaves.names))]
            # Texts that repeat at every frame are told apart by their numbers in the file, five times as fast.
            repeated = [leaf for leaf in paths if leaf.endswith((".role", ".content", ".style", ".camera"))]
            file = pq.ParquetFile(path, read_dictionary=repeated)
            for batch in file.iter_batches(_ROWS, columns=list(columns)):
                of_N = episodes_N[start : start + len(batch)]
                if missing := sorted(set(columns) - set(batch.schema.names)):
                    broken(root, f"the columns {', '.join(columns)}", f"none {', '.join(missing)}", path)
                for key in columns:
                    for at, items in _lists(batch.column(key), of_N, key == PERSISTENT, path, root):
                        row, number = start + at, int(of_N[at])
                        read = tuple(checked(one, key, known, place(path, row), root) for one in items)
                        if key == EVENTS:
                            events[row] = read
                        elif persistent.setdefault(number, read) != read:
                            expected = f"the same {PERSISTENT} at every frame of an episode"
                            _refuse(root, expected, "others than at the frame before", place(path, row))
                        begins = [(one.style, one.timestamp) for one in read if one.style in HOLDING]
                        if twice := [begin for begin in begins if key == PERSISTENT and begins.count(begin) > 1]:
                            expected = f"one text of style {twice[0][0]!r} that begins to hold at a time"
                            _refuse(root, expected, f"several at {twice[0][1]:g} s", place(path, row))
                start += len(batch)
    return Language(persistent=persistent, events=events)


def _lists(lists: pa.Array, of_N: np.ndarray, same: bool, path: Path, root: Path) -> Iterator[tuple[int, list]]:
    """The rows whose lists are worth a look, and the lists: those that hold anything; where they are to be the `same`
    over an episode, those that differ from the row before them."""
    if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)):
        _refuse(root, f"lists in {PERSISTENT} and {EVENTS}", f"values of type {shown(str(lists.type))}", path)
    lengths_N = pc.call_function("list_value_length", [lists]).fill_null(0).to_numpy(zero_copy_only=False)
    ends_N, flat = np.cumsum(lengths_N), lists.flatten()
    for number, start, end in runs(of_N):
        if number < 0:
            continue
        here = np.flatnonzero(lengths_N[start:end]) + start
        if same:
            size, last = int(lengths_N[start]), int(ends_N[end - 1])
            begin = int(ends_N[start]) - size
            # Every list is the one before it where the whole is what follows its first list.
            alike = (lengths_N[start:end] == size).all() and flat.slice(begin, last - begin - size).equals(
                flat.slice(begin + size, last - begin - size)
            )
            here = np.array([start]) if alike else np.arange(start, end)
        for at in here.tolist():
            yield at, lists[at].as_py() or []


def checked(item: Any, column: str, known: Collection[str], where: str, root: Path) -> Said:
    """One item of a list. Raises DatasetFormatError where it lacks what its style and column need."""
    one = {**_EMPTY, **item} if isinstance(item, dict) else {}
    texts = all(one.get(key) is None or isinstance(one[key], str) for key in ("content", "style", "camera"))
    seconds, style = one.get("timestamp"), one.get("style")
    wanted = ""
    calls = one.get("tool_calls")
    if not isinstance(one.get("role"), str) or not texts or not (calls is None or isinstance(calls, list | tuple)):
        wanted = "a role, content, style and camera that are texts or null, and tool_calls in a list"
    elif column == PERSISTENT and not (isinstance(seconds, float | int) and math.isfinite(seconds)):
        wanted = "a finite timestamp in seconds, from which on it holds"
    elif (style in HOLDING and column == EVENTS) or (style == "vqa" and column == PERSISTENT):
        wanted = f"no style {style!r} in {column}"
    elif style in (*HOLDING, "vqa") and not (one["content"] or "").strip():
        wanted = f"a text as content of style {style!r}"
    elif (style == "vqa" or one["camera"] is not None) and one["camera"] not in known:
        wanted = f"the feature of a camera as camera of style {style!r}"
    if wanted:
        _refuse(root, f"{wanted}, in every item of {column}", shown(item, 200), where)
    calls = tuple(call if isinstance(call, str) else json.dumps(call) for call in calls or ()) or None
    return Said(one["role"], one["content"], style, seconds if column == PERSISTENT else None, one["camera"], calls)


def _refuse(root: Path, expected: str, found: str, where: str | Path) -> None:
    next = "correct it there, annotate the episode again, or leave it out (--data.episodes)"
    broken(root, expected, found, where, next)


def question_pairs(items: Sequence[Said], where: str) -> Iterator[tuple[str, str, str]]:
    """Camera, question and answer of the items of style vqa at one frame: by camera, in their order.

    Raises:
        DatasetFormatError: a question without an answer, or the other way round.
    """
    by_camera = defaultdict[str, dict[str, list[str]]](lambda: {"user": [], "assistant": []})
    for one in items:
        if one.style == "vqa":
            by_camera[one.camera or ""].setdefault(one.role, []).append(one.content or "")
    for camera, said in by_camera.items():
        if len(said["user"]) != len(said["assistant"]) or len(said) > 2:
            raise DatasetFormatError(
                expected=f"as many answers (role assistant) as questions (role user) of style vqa for {camera!r}",
                found=", ".join(f"{len(texts)} of role {role}" for role, texts in said.items()),
                where=where,
                next="correct it there, annotate the episode again, or leave it out (--data.episodes)",
            )
        yield from ((camera, *pair) for pair in zip(said["user"], said["assistant"], strict=True))


# Written --------------------------------------------------------------------------------------------------------------


def packed(
    column: str, items: Any, length: int, known: Collection[str], where: str, root: Path
) -> list[tuple[int, dict]]:
    """Pairs of a frame and a `Said` as JSON has them. Raises DatasetFormatError as `checked` does, and for frames
    that an episode of that length does not have."""
    if beyond := [frame for frame, _ in items if not 0 <= frame < length]:
        _refuse(root, f"frames from 0 to {length - 1} in {column}", f"{beyond[0]}", where)
    return [(frame, vars(checked(vars(one), column, known, f"{where}, frame {frame}", root))) for frame, one in items]


def language_array(column: str, items: Sequence[tuple[int, Said]], length: int) -> pa.Array:
    """A column of an episode of so many frames, as lerobot lays it out.

    Args:
        items: each with its frame, which says nothing of persistent ones.
    """
    text, same = pa.string(), column == PERSISTENT
    lists: list[list[dict]] = [[] for _ in range(1 if same else length)]
    for frame, one in items:
        lists[0 if same else frame].append(vars(one))

    def of(call: pa.DataType) -> pa.DataType:
        timed = [pa.field("timestamp", pa.float32(), nullable=False)] if same else []
        fields = [pa.field("role", text, nullable=False), pa.field("content", text), pa.field("style", text)]
        return pa.list_(pa.struct([*fields, *timed, pa.field("camera", text), pa.field("tool_calls", pa.list_(call))]))

    made = pa.array(lists, of(text))
    made = made.cast(of(pa.json_())) if hasattr(pa, "json_") else made  # pyarrow 19 has the type that lerobot asks for
    return made.take(pa.array(np.zeros(length, np.int64))) if same else made
