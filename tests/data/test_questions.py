"""Questions about pictures: of a JSONL file, and of a robot's dataset."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tests.data.lerobot.test_language import CAMERA, LENGTHS, language_of, write

from manipi.data.feed.sampler import split_episodes
from manipi.data.open import open_dataset
from manipi.data.questions import questions_of, read_questions
from manipi.errors import DatasetFormatError, DatasetNotFoundError
from manipi.model.config import Pi05Config
from manipi.robots.tabletop import TABLETOP
from manipi.transforms.pipeline import robot_of_questions

SLOTS = ("base", "left_wrist")
ROBOT = robot_of_questions(TABLETOP, Pi05Config())
LINES = (
    {"image": "a.png", "question": "what is red?", "answer": "the cup"},
    {"image": {"left_wrist": "in/b.jpg", "base": "a.png"}, "question": "closed?", "answer": "no"},
    {"image": "a.png", "question": "what is blue?", "answer": "nothing", "id": 7},
    {"image": "in/b.jpg", "camera": "left_wrist", "question": "wo ist der Würfel?", "answer": "links"},
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set/in").mkdir(parents=True)
    Image.new("RGB", (20, 10), (255, 0, 0)).save(tmp_path / "set/a.png")
    Image.new("L", (8, 8), 90).save(tmp_path / "set/in/b.jpg")
    return tmp_path / "set"


def lines(folder, *entries):
    path = folder / "asked.jsonl"
    path.write_text("\n".join(e if isinstance(e, str) else json.dumps(e) for e in entries) + "\n\n", encoding="utf-8")
    return path


def test_a_file_of_questions(folder):
    questions = read_questions(lines(folder, *LINES), SLOTS)
    # Those about the same pictures follow each other, as one episode.
    assert [questions.prompt(row) for row in range(4)] == [LINES[i]["question"] for i in (0, 2, 1, 3)]
    assert [(e.index, e.length) for e in questions.episodes] == [(0, 2), (1, 1), (2, 1)]
    assert questions.locate(1) == "line 3"
    frames = pickle.loads(pickle.dumps(questions)).frames(np.array([1, 2, 3]), ROBOT, 4)
    assert [frame.answer for frame in frames] == ["nothing", "no", "links"]
    shapes = [{k: v.shape for k, v in frame.observation.items() if v.ndim == 3} for frame in frames]
    base, wrist = {"picture/base": (10, 20, 3)}, {"picture/left_wrist": (8, 8, 3)}
    assert shapes == [base, base | wrist, wrist]
    assert frames[0].observation["picture/base"][0, 0].tolist() == [255, 0, 0]
    for frame in frames:
        assert frame.actions.shape == (4, TABLETOP.model_action_size)
        assert not frame.actions.any()
        assert not frame.action_valid.any()
        assert not any(frame.observation[state.key].any() for state in TABLETOP.state)


def test_other_content_is_another_fingerprint(folder):
    before = read_questions(lines(folder, *LINES), SLOTS).fingerprint
    assert read_questions(lines(folder, *LINES), SLOTS).fingerprint == before
    assert read_questions(lines(folder, *LINES[:3]), SLOTS).fingerprint != before
    Image.new("RGB", (21, 11)).save(folder / "a.png")
    assert read_questions(lines(folder, *LINES), SLOTS).fingerprint != before


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{", "expected JSON"),
        ("[1]", "a JSON object"),
        ({"image": "../outside.png"}, "the path of a picture in .*as 'image'"),
        ({"image": "/etc/hostname"}, "the path of a picture"),
        ({"image": "way/out.png"}, "the path of a picture"),
        ({"image": "absent.png"}, "the path of a picture"),
        ({"image": "in"}, "the path of a picture"),
        ({"image": "x" * 5000}, "the path of a picture"),
        ({"image": "a\0.png"}, "the path of a picture"),
        ({"image": 7}, "the path of a picture"),
        ({"image": None}, "the path of a picture"),
        ({"image": {}}, "a camera among base, left_wrist"),
        ({"image": {"top": "a.png"}}, "a camera among base, left_wrist"),
        ({"camera": ["base"]}, "a camera among"),
        ({"answer": " "}, "as 'answer'"),
        ({"answer": None}, "as 'answer'"),
        ({"answer": 3}, "as 'answer'"),
        ({"question": ""}, "as 'question'"),
        ({"question": "x" * 2049}, "as 'question'"),
    ],
)
def test_bad_lines_are_refused_with_file_and_line(folder, entry, message):
    Image.new("RGB", (4, 4)).save(folder.parent / "outside.png")
    (folder / "way").symlink_to(folder.parent)
    Image.new("RGB", (4, 4)).save(folder.parent / "out.png")
    bad = entry if isinstance(entry, str) else {**LINES[0], **entry}
    with pytest.raises(DatasetFormatError, match=rf"(?s){message}.*asked\.jsonl, line 2\n"):
        read_questions(lines(folder, LINES[0], bad), SLOTS)


def test_a_file_without_questions(folder):
    for path in (folder / "absent.jsonl", lines(folder, "")):
        with pytest.raises(DatasetNotFoundError, match="JSONL"):
            read_questions(path, SLOTS)
    (folder / "asked.jsonl").write_bytes(b"\xff")
    with pytest.raises(DatasetFormatError, match="UTF-8"):
        read_questions(folder / "asked.jsonl", SLOTS)


def test_a_file_that_is_no_picture_is_named_with_its_line(folder):
    (folder / "c.png").write_bytes(b"no picture")
    questions = read_questions(lines(folder, LINES[0], {**LINES[0], "image": "c.png"}), SLOTS)
    with pytest.raises(DatasetFormatError, match=r"(?s)c\.png.*asked\.jsonl, line 2"):
        questions.frames(np.array([1]), ROBOT, 4)


def test_questions_of_a_robots_dataset(tmp_path):
    root = write(tmp_path / "set", language_of)
    dataset = open_dataset(root)
    questions = pickle.loads(pickle.dumps(questions_of(dataset, {CAMERA: "left_wrist"})))
    rows = [2, LENGTHS[0] + LENGTHS[1] + 2]
    assert [questions.prompt(row) for row in range(questions.num_frames)] == ["what is red?"] * 2
    assert [questions.locate(row) for row in (0, 1)] == ["episode 0, frame 2", "episode 2, frame 2"]
    for frame, row in zip(questions.frames(np.arange(2), ROBOT, 3), rows, strict=True):
        assert frame.answer == "the cube"
        shown = frame.observation["picture/left_wrist"]
        np.testing.assert_array_equal(shown, dataset.images(CAMERA, np.array([row]))[0])
    with pytest.raises(DatasetNotFoundError, match="style vqa about other"):
        questions_of(dataset, {"other": "base"})


def test_questions_are_held_out_with_their_episodes(tmp_path):
    dataset = open_dataset(write(tmp_path / "set", language_of))
    questions = questions_of(dataset, {CAMERA: "base"})
    for seed in range(8):
        held_out = split_episodes(dataset, holdout=0.5, seed=seed)[1]
        episodes = {dataset.episodes[i].index for i in dataset.episode_of(held_out).tolist()}
        asked = split_episodes(questions, holdout=0.5, seed=seed)[1]
        assert {questions.episodes[i].index for i in questions.episode_of(asked).tolist()} == episodes & {0, 2}


def test_a_question_without_an_answer_is_refused(tmp_path):
    def half(number):
        language = language_of(number)
        return {
            **language,
            "language_events": [one for one in language["language_events"] if one[1].role != "assistant"],
        }

    dataset = open_dataset(write(tmp_path / "set", half))
    with pytest.raises(DatasetFormatError, match=r"(?s)as many answers.*1 of role user.*episode 0, frame 2"):
        questions_of(dataset, {CAMERA: "base"})


def test_long_texts_of_a_dataset_are_refused(tmp_path):
    def long(number):
        language = language_of(number)
        events = [
            (frame, replace(one, content="x" * 3000) if one.style else one)
            for frame, one in language["language_events"]
        ]
        return {**language, "language_events": events}

    dataset = open_dataset(write(tmp_path / "set", long))
    with pytest.raises(DatasetFormatError, match=r"2,048 characters"):
        questions_of(dataset, {CAMERA: "base"})
