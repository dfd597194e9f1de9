"""A recorder that is killed keeps every episode that had ended, whatever it was doing."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from record_run import LENGTHS, picture, record, record_until
from tests.forks import FORKS

from manipi.cli import main
from manipi.convert.convert import ConvertSettings, convert
from manipi.convert.formats import open_reader
from manipi.data.open import open_dataset
from manipi.data.recorder import Recorder, finish_recording
from manipi.errors import ConfigError, DatasetFormatError, DatasetNotFoundError, StorageError
from manipi.robots.tabletop import TABLETOP


def run(root, episodes, *kill, first=0, asked=False):
    """The episodes that ended, and the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said"
        process = FORKS.Process(target=record_until, args=(root, first, episodes, said, kill, asked))
        process.start()
        process.join(120)
        assert process.exitcode is not None
        return said.read_text().count("ended") if said.exists() else 0, process.exitcode


def require_whole(root, numbers):
    """The dataset has these episodes with their numbers and pictures, and nothing is left beside it."""
    dataset = open_dataset(root)
    assert [episode.length for episode in dataset.episodes] == [LENGTHS[number] for number in numbers]
    seen = [(number, step) for number in numbers for step in range(LENGTHS[number])]
    np.testing.assert_array_equal(dataset.column("observation/state")[:, :2], seen)
    pictures = dataset.images("observation/image", np.arange(len(seen))).astype(int)
    assert np.abs(pictures - [picture(*one) for one in seen]).max() <= 3
    assert json.loads((root / "meta/recording.json").read_text()).keys() == {"robot", "policy", "versions", "written"}
    assert [path.name for path in root.parent.iterdir()] == [root.name]


KILLS = {
    "before an episode": (3, "step", "before 3", 1),
    "in an episode": (3, "step", "3.1", 1),
    "before its numbers are written": (3, "open", "columns.npz", 4),
    "before an episode has its name": (3, "os.rename", "episode-000003", 1),
    "before the dataset is whole": (4, "open", "info.json", 1),
    "before it has its name among the parts": (4, "os.rename", "dataset", 1),
    "before it is known to be whole": (4, "os.rename", "finished.json", 1),
    "before it has its own name": (4, "os.rename", "run", 1),
    "before the parts are deleted": (4, "shutil.rmtree", "episode-000001", 1),
    "before the last of them is": (4, "os.remove", "finished.json", 1),
}
"""How many episodes had ended, and where the process ends."""


@pytest.mark.parametrize(
    ("moment", "sent"), [*((moment, "SIGKILL") for moment in KILLS), *((m, "SIGTERM") for m in list(KILLS)[1:8:3])]
)
def test_a_killed_recording_is_finished(tmp_path, capsys, moment, sent):
    root = tmp_path / "set/run"
    ended, *kill = KILLS[moment]
    assert run(root, 4, *kill, sent) == (ended, -signal.Signals[sent])
    main(["record", "--finish", str(root)])
    assert f"{ended} episodes, {sum(LENGTHS[:ended])} frames" in capsys.readouterr().out
    require_whole(root, range(ended))


@pytest.mark.parametrize(
    "moment", ["in an episode", "before an episode has its name", "before it is known to be whole"]
)
def test_the_same_recording_goes_on(tmp_path, moment):
    root = tmp_path / "set/run"
    ended, *kill = KILLS[moment]
    run(root, 4, *kill, "SIGKILL")
    record(root, ended, 1)
    require_whole(root, range(ended + 1))


def test_questions_go_on_with_the_next_seed(tmp_path):
    root = tmp_path / "set/run"
    run(root, 4, *KILLS["in an episode"][1:], "SIGKILL", asked=True)
    record(root, 3, 2, asked=True)
    dataset = open_dataset(root)
    assert dataset.column("manipi.seed")[:, 0].tolist() == list(range(40, 40 + sum(LENGTHS)))
    assert json.loads((root / "meta/recording.json").read_text())["policy"] == {"checkpoint": "the first"}


@pytest.mark.parametrize("moment", ["before it has its own name", "before the parts are deleted"])
def test_a_recording_that_was_as_good_as_finished_is_not_gone_on_with(tmp_path, moment):
    root = tmp_path / "set/run"
    run(root, 4, *KILLS[moment][1:], "SIGKILL")
    with pytest.raises(StorageError, match="something of that name"):
        Recorder(root, TABLETOP)
    require_whole(root, range(4))


@pytest.mark.long
def test_a_recording_killed_at_every_change_of_a_file(tmp_path):
    number = status = 0
    while status or not number:
        number += 1
        root = tmp_path / f"{number}/run"
        ended, status = run(root, 3, "any", str(root.parent), number, "SIGKILL")
        if (root.parent / ".run.parts/recording.json").exists() and not root.exists():
            kept = len(list(root.parent.glob(".run.parts/episode-*")))
            assert kept in (ended, ended + 1)  # it has its name before the call returns
            if kept:
                finish_recording(root, show=False)
                require_whole(root, range(kept))
        elif root.exists():
            assert ended == 3
            if status and (root.parent / ".run.parts/finished.json").exists():
                finish_recording(root, show=False)
            assert len(open_dataset(root).episodes) == 3
        else:
            assert ended == 0
    assert number > 60


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_an_episode_is_encoded_loses_nothing(tmp_path):
    root = tmp_path / "set/run"
    ended, *kill = KILLS["before its numbers are written"]
    assert run(root, 4, *kill, "SIGINT")[0] == ended
    require_whole(root, range(4))


def test_what_goes_on_must_be_the_same_recording(tmp_path):
    root = tmp_path / "run"
    run(root, 4, *KILLS["in an episode"][1:], "SIGKILL")
    other = replace(TABLETOP, control_hz=TABLETOP.control_hz * 2)
    with pytest.raises(ConfigError, match=r"(?s)another robot.*manipi record --finish .*run"), Recorder(root, other):
        pass
    with Recorder(root, TABLETOP) as recorder, pytest.raises(ConfigError, match="another policy"):
        recorder.watch(Told())
    assert len(open_dataset(root).episodes) == 3


class Told:
    """A policy that says who it is."""

    metadata: ClassVar = {"checkpoint": "another"}


def test_an_error_before_the_first_new_episode_leaves_what_was_begun(tmp_path):
    root = tmp_path / "set/run"
    run(root, 4, *KILLS["in an episode"][1:], "SIGKILL")
    with pytest.raises(ConfigError, match="another policy"), Recorder(root, TABLETOP) as recorder:
        recorder.watch(Told())
    assert not root.exists()
    record(root, 3, 1)
    require_whole(root, range(4))


def test_a_dataset_that_waits_to_be_finished_is_no_missing_one(tmp_path):
    root = tmp_path / "set/my run"
    run(root, 4, *KILLS["in an episode"][1:], "SIGKILL")
    with pytest.raises(DatasetNotFoundError, match="its episodes wait beside it") as missing:
        open_dataset(root)
    main(shlex.split(missing.value.next)[1:])
    require_whole(root, range(3))


@pytest.mark.parametrize("moment", ["in an episode", "before it is known to be whole", "before it has its own name"])
def test_the_parts_of_a_recording_are_no_conversions(tmp_path, moment):
    root, source = tmp_path / "my set/run", tmp_path / "source"
    ended, *kill = KILLS[moment]
    run(root, 4, *kill, "SIGKILL")
    record(source, 0, 1)
    with pytest.raises(ConfigError, match=r"no episodes there but those of a conversion") as refused:
        convert(open_reader(source), root, ConvertSettings(), num_workers=0, show=False)
    assert f"manipi record --finish '{root}'" in refused.value.next
    finish_recording(root, show=False)
    require_whole(root, range(ended))


def test_the_parts_of_a_conversion_are_no_recording(tmp_path):
    root = tmp_path / "run"
    (tmp_path / ".run.parts/episode-000000").mkdir(parents=True)
    (tmp_path / ".run.parts/conversion.json").write_text("{}")
    with pytest.raises(ConfigError, match="no episodes there but those of a recording"), Recorder(root, TABLETOP):
        pass
    with pytest.raises(DatasetNotFoundError, match="manipi convert command that was begun"):
        finish_recording(root)
    assert (tmp_path / ".run.parts/episode-000000").exists()


def test_something_in_the_way_of_a_recording_is_moved_away(tmp_path):
    root = tmp_path / "set/run"
    run(root, 4, *KILLS["in an episode"][1:], "SIGKILL")
    root.mkdir()
    with pytest.raises(StorageError, match=r"something of that name(?s:.*)move it away, then: manipi record --finish"):
        finish_recording(root)
    root.rmdir()
    finish_recording(root, show=False)
    require_whole(root, range(3))


def test_one_recording_at_a_time(tmp_path):
    root = tmp_path / "run"
    with (
        Recorder(root, TABLETOP),
        pytest.raises(ConfigError, match="another one that is going on"),
        Recorder(root, TABLETOP),
    ):
        pass
    assert list(tmp_path.iterdir()) == []  # nothing was recorded, and nothing is left


def test_nothing_to_finish(tmp_path):
    with pytest.raises(DatasetNotFoundError, match=r"\.run\.parts"):
        finish_recording(tmp_path / "run")
    record(tmp_path / "run", 0, 1)
    with pytest.raises(DatasetNotFoundError, match="a dataset that is whole"):
        finish_recording(tmp_path / "run")


@pytest.mark.parametrize("mistyped", ["rn", ".run.parts"])
def test_a_mistyped_folder_gets_the_name_of_the_recording_beside_it(tmp_path, mistyped):
    run(tmp_path / "run", 4, *KILLS["in an episode"][1:], "SIGKILL")
    with pytest.raises(DatasetNotFoundError) as caught:
        finish_recording(tmp_path / mistyped)
    assert caught.value.next == f"manipi record --finish {tmp_path / 'run'}"


@pytest.mark.parametrize("name", ["episode.json", "columns.npz", "observation%2Fimage.mp4"])
def test_a_damaged_episode_is_named_and_can_be_left_out(tmp_path, name):
    root = tmp_path / "set/run"
    run(root, 4, *KILLS["in an episode"][1:], "SIGKILL")
    episode = root.parent / ".run.parts/episode-000001"
    os.truncate(episode / name, 7)
    with pytest.raises(DatasetFormatError, match=r"rm -r .*episode-000001"):
        finish_recording(root, show=False)
    shutil.rmtree(episode)
    finish_recording(root, show=False)
    require_whole(root, [0, 2])


class Planner:
    """Says the text that it is given."""

    def __init__(self, **metadata):
        self.metadata, self.texts = metadata, []

    def infer(self, observation):
        return {"actions": np.zeros((4, 4), np.float32), **({"subtask": self.texts[-1]} if self.texts else {})}


def record_texts(root, policy, *episodes):
    """`episodes`: of each the subtask at every step; None: none."""
    with Recorder(root, TABLETOP) as recorder:
        watched = recorder.watch(policy) if policy else None
        for texts in episodes:
            recorder.on_episode_start()
            for step, text in enumerate(texts):
                state = np.array([0, step, 0, 1], np.float32)
                seen = {"observation/image": picture(0, step), "observation/state": state, "prompt": "go"}
                if watched:
                    policy.texts = [text] if text else []
                    watched.infer(seen)
                else:
                    seen |= {"manipi/subtask": text} if text else {}
                recorder.on_step(seen, {"actions": state / 10})
            recorder.on_episode_end()


@pytest.mark.parametrize("asked", [True, False], ids=["written", "told"])
def test_subtasks_are_read_back(tmp_path, asked):
    record_texts(tmp_path / "run", Planner() if asked else None, [None, "reach", "reach", "grasp", "reach"], ["lift"])
    dataset = open_dataset(tmp_path / "run")
    texts, numbers = dataset.texts("subtask")
    assert [texts[n] if n >= 0 else None for n in numbers] == [None, "reach", "reach", "grasp", "reach", "lift"]
    assert dataset.subtask(3) == "grasp"
    items = [(one.role, one.content, one.style, round(one.timestamp, 3)) for one in dataset.said(0)[0]]
    expected = [("reach", 0.1), ("grasp", 0.3), ("reach", 0.4)]
    assert items == [("assistant", text, "subtask", seconds) for text, seconds in expected]


def test_a_policy_that_writes_text_has_the_column_from_the_first_episode_on(tmp_path):
    record_texts(tmp_path / "run", Planner(writes_text=True), [None, None], ["reach", "reach"])
    dataset = open_dataset(tmp_path / "run")
    assert dataset.texts("subtask")[1].tolist() == [-1, -1, 0, 0]


def test_subtasks_that_begin_in_a_later_episode_are_left_out_with_a_word(tmp_path, caplog):
    record_texts(tmp_path / "run", Planner(), [None], ["reach"])
    assert "language_persistent" not in open_dataset(tmp_path / "run").features
    assert "episode 1 is kept without its subtasks" in caplog.text


@pytest.mark.parametrize(
    ("megabytes", "said"), [(2, "the episodes before this one are kept"), (5, r"manipi record --finish .*/run")]
)
def test_a_full_disk_keeps_the_episodes_before_it(mount, tmp_path, monkeypatch, megabytes, said):
    monkeypatch.setenv("LARGE", "1")
    root = mount(megabytes) / "run"
    script = "from pathlib import Path; from record_run import record; "
    script += f"record(Path({str(root)!r}), 0, 5, Path({str(tmp_path / 'said')!r}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True)
    ended = (tmp_path / "said").read_text().count("ended")
    assert ended == 5 if megabytes == 5 else 0 < ended < 5
    assert re.search(rf"(?s)No space left on device.*make room.*{said}", done.stderr)
    subprocess.run(["mount", "-o", "remount,size=30m", str(root.parent)], check=True)
    if not root.exists():
        assert finish_recording(root, show=False)["num_episodes"] == ended
    assert open_dataset(root).num_frames == sum(LENGTHS[:ended])
