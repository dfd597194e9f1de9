"""What a policy is told and learns to write: language plans and questions, from files to batches."""

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from PIL import Image
from tests.conftest import EPISODE_LENGTHS, IMAGE_SIZE, toy_episode

from manipi.data.dataset import Feature
from manipi.data.lerobot.language import EVENTS, LANGUAGE, PERSISTENT
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.errors import ConfigError, MissingFeatureError
from manipi.model.config import JointConfig
from manipi.records import json_bytes, to_json
from manipi.robots.tabletop import TABLETOP
from manipi.train.config import DataConfig, DatasetConfig
from manipi.train.data import prepare
from manipi.train.loop import train
from manipi.train.run.folder import Run, read_config
from manipi.transforms.pipeline import observation_of
from manipi.types import Said, Say

SUBTASKS = ("go there", "come back")
PLAN = (Say(weight=2, learn_subtask=True), Say(weight=1, instruct="subtask"), Say(weight=1))
BEGINS = 0.5
"""Seconds at which the second subtask does."""


def write(root, begins=0.0):
    """The toy dataset with two subtasks per episode, and a question at its third frame."""
    features = {
        "observation/image": Feature(kind="image", shape=(IMAGE_SIZE, IMAGE_SIZE, 3), dtype="video"),
        "observation/state": Feature(kind="vector", shape=(4,), dtype="float32"),
        "actions": Feature(kind="vector", shape=(4,), dtype="float32"),
        PERSISTENT: LANGUAGE,
        EVENTS: LANGUAGE,
    }
    times = (begins, BEGINS)
    said = [(0, Said("assistant", text, "subtask", time)) for text, time in zip(SUBTASKS, times, strict=True)]
    asked = [Said("user", "how far?", "vqa", None, "observation/image")]
    asked.append(Said("assistant", "not far", "vqa", None, "observation/image"))
    with LeRobotWriter(root, fps=10, features=features, robot_type=TABLETOP.name, pix_fmt="yuv444p") as writer:
        for number, length in enumerate(EPISODE_LENGTHS):
            language = {PERSISTENT: said, EVENTS: [(2, one) for one in asked]}
            writer.add_episode({**toy_episode(number, length), **language}, task="reach it")
    return str(root)


WRITES = JointConfig(codes_weight=0.0)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    return write(tmp_path_factory.mktemp("spoken") / "set")


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A file of six questions about six pictures."""
    folder = tmp_path_factory.mktemp("asked")
    entries = []
    for i in range(6):
        Image.new("RGB", (40 + i, 30), (40 * i, 0, 0)).save(folder / f"{i}.png")
        entries.append({"image": f"{i}.png", "question": f"how red is picture {i}?", "answer": f"{40 * i}"})
    path = folder / "asked.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)))
    return str(path)


@pytest.fixture
def mixed(tiny, spoken, asked):
    """Half robot under a plan, a quarter each questions of a file and of the robot's dataset."""

    def mixed(**changes):
        sets = (
            DatasetConfig(path=spoken, weight=2, language=PLAN),
            DatasetConfig(path=asked, kind="vqa"),
            DatasetConfig(path=spoken, kind="vqa"),
        )
        config = tiny(batch_size=8, **changes)
        model = replace(config.model, max_token_len=72, joint=WRITES)
        return replace(config, model=model, data=DataConfig(mixture=sets, holdout=0.25, num_workers=0))

    return mixed


def writing(config):
    return replace(config, model=replace(config.model, max_token_len=72, joint=WRITES))


def told(data):
    """Dataset, row, prompt and learned text of the first 64 batches, sample by sample."""
    sampler_rows = data.mixture.stream(data.config.seed).at(np.arange(512))
    texts = []
    for row in sampler_rows.tolist():
        part, own = data.mixture.part_of(row)
        texts.append((part.source.dataset.name, own % part.source.dataset.num_frames, *part.source.told(own)))
    return texts


def test_batches_depend_on_seed_and_step_alone(mixed, tmp_path):
    """For any number of workers and wherever a run goes on."""

    def batches(start, count, workers):
        config = mixed()
        data = prepare(replace(config, data=replace(config.data, num_workers=workers)), tmp_path)
        with data.loader(start) as loader:
            return [{key: value.copy() for key, value in batch.items()} for _, batch, _ in islice(loader, count)]

    whole = batches(0, 6, 0)
    for other in (batches(0, 6, 2), whole[:3] + batches(3, 3, 0)):
        for one, two in zip(whole, other, strict=True):
            assert one.keys() == two.keys()
            for key in one:
                np.testing.assert_array_equal(one[key], two[key])
    assert not any(value.dtype.kind in "US" for value in whole[0].values())


def test_a_plan_gives_its_choices_their_shares(mixed, tmp_path):
    texts = told(prepare(mixed(), tmp_path))
    robot = [(row, prompt, learned) for name, row, prompt, learned in texts if name == "set"]
    assert 0.45 < len(robot) / len(texts) < 0.55
    lengths = np.cumsum([0, *EPISODE_LENGTHS])
    for row, prompt, learned in robot:
        frame = row - lengths[np.searchsorted(lengths, row, side="right") - 1]
        subtask = SUBTASKS[int(frame >= 10 * BEGINS)]
        assert (prompt, learned) in {("reach it", subtask), (subtask, ""), ("reach it", "")}
    kinds = [learned != "" for _, _, learned in robot], [prompt != "reach it" for _, prompt, _ in robot]
    assert 0.4 < np.mean(kinds[0]) < 0.6
    assert 0.15 < np.mean(kinds[1]) < 0.35
    questions = {(prompt, learned) for name, _, prompt, learned in texts if name != "set"}
    assert ("how far?", "not far") in questions
    assert ("how red is picture 5?", "200") in questions or ("how red is picture 4?", "160") in questions


def test_a_plan_changes_no_order_and_none_is_as_before(tiny, spoken, tmp_path):
    """The same frames come in the same order; the plan of one choice that tells the task is no plan, bit for bit."""

    def prepared(name, *plan):
        config = writing(tiny())
        return prepare(replace(config, data=replace(config.data, path=spoken, language=plan)), tmp_path / name)

    without, one, several = prepared("without"), prepared("one", Say(weight=7)), prepared("several", *PLAN)
    places, frames = np.arange(200), without.main.source.dataset.num_frames
    rows = without.mixture.stream(1).at(places)
    np.testing.assert_array_equal(one.mixture.stream(1).at(places), rows)
    np.testing.assert_array_equal(several.mixture.stream(1).at(places) % frames, rows)
    for a, b in zip(without.main.source.samples(rows[:4]), one.main.source.samples(rows[:4]), strict=True):
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[key], b[key]) for key in a)


def test_what_reaches_the_tokens(mixed, tmp_path):
    """The keys beside the prompt, and none of them behind the last step."""
    data = prepare(mixed(), tmp_path)
    spoken, of_file, of_events = data.sets
    frames = spoken.source.dataset.num_frames

    def seen(one, row):
        (frame,) = one.source.frames(np.array([row]))
        sample, stages = one.source.pipeline.encode(observation_of(frame, one.source.pipeline.robot))
        assert not {"prompt", "subtask", "answer"} & sample.keys()
        return stages[-2], sample  # what the step that makes tokens sees

    before, _ = seen(spoken, 0)
    assert (before["prompt"], before["subtask"], "answer" in before) == ("reach it", SUBTASKS[0], False)
    before, _ = seen(spoken, frames)
    assert (before["prompt"], "subtask" in before) == (SUBTASKS[0], False)
    robot_sample = seen(spoken, 2 * frames)[1]
    for one, question in ((of_file, "how red is picture 0?"), (of_events, "how far?")):
        before, sample = seen(one, 0)
        assert before["prompt"] == question
        assert before["answer"] == {"how far?": "not far"}.get(question, "0")
        assert {key: value.shape for key, value in sample.items()} == {
            key: value.shape for key, value in robot_sample.items()
        }
        assert not sample["action_valid"].any()
        assert not sample["actions"].any()
        assert not sample["state"].any()
        assert sample["image_valid"].tolist() == [slot == "base" for slot in data.config.model.cameras]


def test_every_text_is_known_before_the_first_step(mixed, tmp_path):
    """For the longest prompt: what may be told, and what may have to be learned."""
    spoken, of_file, _ = prepare(mixed(), tmp_path).sets
    texts, numbers = spoken.source.instructions()
    assert {texts[n] for n in numbers[0]} == {"reach it", SUBTASKS[0]}
    texts, numbers = spoken.source.learned()
    assert {texts[n] for n in numbers[0]} == {SUBTASKS[0], ""}
    assert set(texts) == {*SUBTASKS, ""}
    assert set(of_file.source.learned()[0]) == {"", *(f"{40 * i}" for i in range(6))}
    config = mixed()
    short = replace(config, model=replace(config.model, max_token_len=24))
    robot, questions, _ = config.data.mixture
    for name, sets, longest in (
        ("learned", (robot, questions), "30 tokens, with the instruction 'reach it'"),
        ("asked", (replace(robot, language=()), questions), "how red is picture"),
    ):
        with pytest.raises(ConfigError, match=longest):
            prepare(replace(short, data=replace(short.data, mixture=sets)), tmp_path / name)


def test_questions_change_no_statistics_and_are_validated_by_nobody(mixed, tiny, spoken, tmp_path):
    alone = tiny(batch_size=8)
    alone = prepare(replace(alone, data=DataConfig(path=spoken, holdout=0.25)), tmp_path / "alone")
    data = prepare(mixed(), tmp_path / "mixed")
    assert json_bytes(data.stats) == json_bytes(alone.stats)
    assert [one.source.dataset.name for one in data.robot_sets] == ["set"]
    assert not data.other_robots
    shares = data.report()
    assert [share.robot for share in shares] == ["tabletop", "questions", "questions"]
    assert [share.held_out for share in shares[1:]] == [2, 2]  # a quarter of six pictures, and of eight episodes
    episodes = [
        {one.source.dataset.episodes[e].index for e in one.source.dataset.episode_of(one.held_out).tolist()}
        for one in (data.sets[0], data.sets[2])
    ]
    assert episodes[0] == episodes[1]


def test_it_trains_and_goes_on(mixed, tmp_path):
    checkpoint = train(mixed(steps=2), tmp_path / "run", show=False)
    assert checkpoint.name == "2"
    assert (tmp_path / "run/first_batch/batch.txt").read_text().count("→") >= 1
    assert train(mixed(steps=3), tmp_path / "run", show=False).name == "3"
    assert read_config(tmp_path / "run").data.mixture[0].language == PLAN


def test_runs_from_before_go_on(tiny, tmp_path):
    """Their settings say nothing of language."""
    config = tiny()
    config = replace(config, data=replace(config.data, path="", mixture=(DatasetConfig(path="somewhere"),)))
    stored = {"format": 1, **to_json(config)}
    assert "language" not in {**stored["data"], **stored["data"]["mixture"][0]}
    assert "kind" not in stored["data"]["mixture"][0]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert read_config(tmp_path) == config
    (tmp_path / "checkpoints/2").mkdir(parents=True)
    Run(tmp_path, config)  # no setting has changed


# What cannot be -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("say", [Say(learn_subtask=True), Say(instruct="subtask")])
def test_subtasks_that_no_dataset_has(tiny, toy_dataset, tmp_path, say):
    config = tiny()
    config = replace(config, data=replace(config.data, language=(Say(), say)))
    with pytest.raises(MissingFeatureError, match=rf"(?s)subtasks.*found none.*{toy_dataset}.*lerobot-annotate"):
        prepare(config, tmp_path)


def test_frames_without_the_subtask_that_is_told(tiny, tmp_path):
    path = write(tmp_path / "late", begins=0.2)
    config = tiny()
    config = replace(config, data=replace(config.data, path=path, language=(Say(instruct="subtask"),)))
    with pytest.raises(MissingFeatureError, match=r"(?s)16 of \d+ frames without, the first: episode 0, frame 0"):
        prepare(config, tmp_path / "run")
    learned = writing(replace(config, data=replace(config.data, language=(Say(learn_subtask=True),))))
    source = prepare(learned, tmp_path / "learned").main.source
    assert [source.told(row)[1] for row in range(4)] == ["", "", *[SUBTASKS[0]] * 2]


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt": "subtask", "language": PLAN},
        {"kind": "vqa", "language": PLAN},
        {"kind": "vqa", "prompt": "subtask"},
        {"kind": "vqa", "keep": "mask.json"},
    ],
)
def test_settings_that_contradict_each_other(settings):
    with pytest.raises(ConfigError, match="the dataset somewhere"):
        DatasetConfig(path="somewhere", **settings)


def test_weights_of_a_plan(tiny, spoken, tmp_path):
    config = tiny()
    config = replace(config, data=replace(config.data, path=spoken, language=(Say(), Say(weight=0))))
    with pytest.raises(ConfigError, match="weights of the language plan"):
        prepare(config, tmp_path).loader(0)


def test_a_run_of_questions_alone_has_no_robot(tiny, asked, tmp_path):
    config = tiny()
    config = replace(config, data=DataConfig(mixture=(DatasetConfig(path=asked, kind="vqa"),)))
    with pytest.raises(ConfigError, match="demonstrations of the recipe's robot"):
        prepare(config, tmp_path)
