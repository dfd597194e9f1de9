"""LeRobot's language columns: read, refused where they are broken, written and converted."""

import html
import pickle
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.data.conftest import FEATURES, LENGTHS, make_episode

from manipi.convert.convert import ConvertSettings, convert
from manipi.convert.formats import open_reader
from manipi.data.dataset import EpisodeSubset, Feature
from manipi.data.lerobot.language import EVENTS, LANGUAGE, PERSISTENT
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.data.open import open_dataset
from manipi.data.review.check import check_dataset
from manipi.data.review.view import write_view
from manipi.errors import DatasetFormatError, MissingFeatureError
from manipi.types import Said

CAMERA = "observation.images.top"
PLAN = Said("assistant", "1. reach 2. grasp", "plan", 0.0)
SUBTASKS = (Said("assistant", "reach", "subtask", 0.0), Said("assistant", "grasp", "subtask", 0.3))
ASKED = (
    Said("user", "what is red?", "vqa", None, CAMERA),
    Said("assistant", "the cube", "vqa", None, CAMERA),
    Said("assistant", None, None, None, None, ('{"function": {"name": "say", "arguments": {"text": "so"}}}',)),
)


def language_of(number: int) -> dict[str, list[tuple[int, Said]]]:
    """Subtasks and a plan of the episodes with even numbers, a question at frame 2 of the first and the third."""
    persistent = [(0, one) for one in (PLAN, *SUBTASKS)] if number % 2 == 0 else []
    return {PERSISTENT: persistent, EVENTS: [(2, one) for one in ASKED] if number in (0, 2) else []}


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A dataset with both columns; tests that change it take a copy."""
    return write(tmp_path_factory.mktemp("language") / "spoken", language_of)


def write(root, language, **more):
    features = {**FEATURES, PERSISTENT: LANGUAGE, EVENTS: LANGUAGE} | more
    with LeRobotWriter(root, fps=10, features=features, robot_type="tabletop", data_mb=1) as writer:
        for number, length in enumerate(LENGTHS):
            extra = {key: np.full((length, 1), number % 2) for key in more}
            writer.add_episode({**make_episode(number, length), **language(number), **extra}, task="tidy up")
        if more:
            writer.add_texts("subtask", ["old", "older"])
    return root


def held(dataset, style):
    texts, numbers = dataset.texts(style)
    return [texts[number] if number >= 0 else None for number in numbers.tolist()]


def test_a_text_holds_until_the_next_of_its_style(spoken):
    dataset = open_dataset(spoken)
    expected = []
    for number, length in enumerate(LENGTHS):
        expected += (
            ["reach" if frame < 3 else "grasp" for frame in range(length)] if number % 2 == 0 else [None] * length
        )
    assert held(dataset, "subtask") == expected
    assert held(dataset, "plan") == [PLAN.content if text else None for text in expected]
    assert dataset.subtask(2) == "reach"
    with pytest.raises(MissingFeatureError, match=r"(?s)none that holds there yet.*episode 1, frame 0.*--data\.keep"):
        dataset.subtask(LENGTHS[0])
    with pytest.raises(MissingFeatureError, match="'memory' in language_persistent"):
        dataset.texts("memory")


def test_what_was_written_is_read(spoken):
    dataset = open_dataset(spoken)
    for position in range(len(LENGTHS)):
        language = language_of(position)
        persistent, events = dataset.said(position)
        # lerobot keeps times as float32
        assert [replace(one, timestamp=round(one.timestamp, 6)) for one in persistent] == [
            o for _, o in language[PERSISTENT]
        ]
        assert [(frame, one) for frame, items in events.items() for one in items] == language[EVENTS]


def test_the_columns_are_those_of_lerobot(spoken):
    """Names, types, and what meta/info.json says of them, as lerobot 0.6 declares them."""
    schema = pq.read_schema(next((spoken / "data").rglob("*.parquet")))
    fields = ["role", "content", "style", "timestamp", "camera", "tool_calls"]
    assert [field.name for field in schema.field(PERSISTENT).type.value_type] == fields
    assert [field.name for field in schema.field(EVENTS).type.value_type] == [f for f in fields if f != "timestamp"]
    item = schema.field(PERSISTENT).type.value_type
    assert item.field("timestamp").type == pa.float32()
    assert item.field("tool_calls").type.value_type == pa.json_()
    assert not item.field("role").nullable
    assert open_dataset(spoken).features[EVENTS] == Feature(kind="text", shape=(1,), dtype="language")


def test_subsets_and_worker_processes_know_the_same(spoken):
    dataset = open_dataset(spoken)
    subset = EpisodeSubset(dataset, [2, 0])
    assert held(subset, "subtask") == held(dataset, "subtask")[27:40] + held(dataset, "subtask")[:20]
    assert subset.said(1) == dataset.said(0)
    assert (
        held(open_dataset(spoken, [2, 4]), "subtask") == held(dataset, "subtask")[27:40] + held(dataset, "subtask")[41:]
    )
    assert held(pickle.loads(pickle.dumps(dataset)), "subtask") == held(dataset, "subtask")


def test_the_old_column_says_what_the_new_one_does_not(tmp_path):
    old = Feature(kind="vector", shape=(1,), dtype="int64")
    dataset = open_dataset(write(tmp_path / "set", language_of, subtask_index=old))
    subtasks = held(dataset, "subtask")
    assert subtasks[:4] == ["reach"] * 3 + ["grasp"]
    assert subtasks[LENGTHS[0] : LENGTHS[0] + LENGTHS[1]] == ["older"] * LENGTHS[1]
    texts, numbers = dataset.instructions("subtask")
    assert [texts[number] for number in numbers[:, 0].tolist()] == subtasks


def test_conversion_keeps_them(spoken, tmp_path):
    """Also the words of `subtask_index`; a second conversion gives what the first gave."""
    old = Feature(kind="vector", shape=(1,), dtype="int64")
    source = write(tmp_path / "source", language_of, subtask_index=old)
    convert(open_reader(source), tmp_path / "once", ConvertSettings(), num_workers=0, show=False)
    convert(open_reader(tmp_path / "once"), tmp_path / "twice", ConvertSettings(), num_workers=1, show=False)
    before, *after = (open_dataset(root) for root in (source, tmp_path / "once", tmp_path / "twice"))
    for dataset in after:
        assert [dataset.said(e) for e in range(len(LENGTHS))] == [before.said(e) for e in range(len(LENGTHS))]
        assert held(dataset, "subtask") == held(before, "subtask")
        assert dataset.features[PERSISTENT] == LANGUAGE


def test_texts_begin_at_their_frames_in_another_rate(spoken, tmp_path):
    settings = ConvertSettings(fps=5, exclude=(CAMERA,))
    convert(open_reader(spoken), tmp_path / "slow", settings, num_workers=0, show=False)
    before, after = open_dataset(spoken), open_dataset(tmp_path / "slow")
    assert held(after, "subtask") == held(before, "subtask")
    assert [one.timestamp for one in after.said(0)[0]] == pytest.approx([0, 0, 0.6])
    assert [one.style for one in after.said(0)[1][2]] == [None]  # what is said of a camera went with it


def test_a_page_and_a_check_show_what_is_said(tmp_path):
    """Of both columns, and of `subtask_index` where they say nothing; a broken item is one finding."""
    old = Feature(kind="vector", shape=(1,), dtype="int64")
    root = write(tmp_path / "set", language_of, subtask_index=old)
    expected = {
        0: [("0.00 s", "plan, assistant", PLAN.content), ("0.00 s", "subtask, assistant", "reach")],
        1: [("0.00 s", "subtask", "older")],
    }
    expected[0] += [("0.20 s", "assistant", ASKED[2].tool_calls[0])]
    expected[0] += [("0.20 s", f"vqa, {one.role}, {CAMERA}", one.content) for one in reversed(ASKED[:2])]
    expected[0] += [("0.30 s", "subtask, assistant", "grasp")]
    for episode, lines in expected.items():
        write_view(tmp_path / "page.html", open_dataset(root, [episode]), show=False)
        page = (tmp_path / "page.html").read_text(encoding="utf-8")
        cells = re.findall(r'<tr><th scope="row">([\d.]+ s)</th><td>(.*?)</td><td>(.*?)</td></tr>', page)
        said = [tuple(map(html.unescape, cell)) for cell in cells]
        assert sorted(said) == sorted(lines)
    assert not [f for f in check_dataset(root, quick=True).findings if "style" in f.what]
    edit(root, EVENTS, lambda lists: lists[2][0].update(camera=None))
    (found,) = [f for f in check_dataset(root, quick=True).findings if "style" in f.what]
    assert (found.check, found.severity) == ("language", "error")
    assert "episode 0, frame 2" in found.where


# Broken ---------------------------------------------------------------------------------------------------------------


def edit(root, key, change):
    """Rewrite a column of the first table: `change` alters its list of lists of dicts."""
    path = sorted((root / "data").rglob("*.parquet"))[0]
    table = pq.read_table(path)
    lists = table[key].to_pylist()
    change(lists)
    plain = [
        [{k: v for k, v in item.items() if k != "tool_calls"} if isinstance(item, dict) else item for item in i]
        for i in lists
    ]
    pq.write_table(table.set_column(table.schema.get_field_index(key), key, pa.array(plain)), path)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (PERSISTENT, lambda lists: lists[5].pop(), "the same language_persistent at every frame.*episode 0, frame 5"),
        (
            PERSISTENT,
            lambda lists: [i[1].update(content=" ") for i in lists[:20]],
            "a text as content of style 'subtask'",
        ),
        (PERSISTENT, lambda lists: [i[2].update(timestamp=0.0) for i in lists[:20]], "several at 0 s.*frame 0"),
        (PERSISTENT, lambda lists: [i[2].update(timestamp=None) for i in lists[:20]], "a finite timestamp.*frame 0"),
        (PERSISTENT, lambda lists: [i[1].update(role=None) for i in lists[:20]], "a role"),
        (
            PERSISTENT,
            lambda lists: [i[1].update(style="vqa") for i in lists[:20]],
            "no style 'vqa' in language_persistent",
        ),
        (EVENTS, lambda lists: lists[2][0].update(camera=None), "camera of style 'vqa'.*episode 0, frame 2"),
        (EVENTS, lambda lists: lists[2][1].update(camera="wrist"), "the feature of a camera.*wrist"),
        (EVENTS, lambda lists: lists[2][0].update(style="subtask"), "no style 'subtask' in language_events"),
        (
            EVENTS,
            lambda lists: lists.__setitem__(slice(None), [["x"]] * len(lists)),
            "a role, content, style and camera",
        ),
    ],
)
def test_broken_items_are_refused(key, change, message, tmp_path):
    root = write(tmp_path / "set", language_of)
    edit(root, key, change)
    with pytest.raises(DatasetFormatError, match=f"(?s){message}"):
        open_dataset(root).said(0)


def test_frames_beyond_the_episode_are_not_written(tmp_path):
    with pytest.raises(DatasetFormatError, match=r"frames from 0 to 0 in language_events"):
        write(tmp_path / "set", lambda number: {PERSISTENT: [], EVENTS: [(5, ASKED[2])]})


def test_texts_that_lack_what_their_style_needs_are_not_written(tmp_path):
    bad = Said("assistant", "the cube", "vqa", None, "wrist")
    with pytest.raises(DatasetFormatError, match=r"(?s)the feature of a camera.*episode 0, frame 3"):
        write(tmp_path / "set", lambda number: {PERSISTENT: [], EVENTS: [(3, bad)]})
